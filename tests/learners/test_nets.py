"""Nets: cuts, pooling, heads, every input kind, and what is refused.

Letters: B batch, T time, D input features, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.attention import Attention
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.griffin import RGLRU
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.awd import awd
from clplat.learners.nets.gated import gated, hgrn
from clplat.learners.nets.heads import GrowingHead, Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.residual import residual
from clplat.learners.nets.transformer import transformer
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Experience
from clplat.streams.inputs import Inputs

CONF = Path(__file__).parents[2] / "conf" / "learner"
B, T, D, H, C, VOCABULARY = 5, 7, 11, 40, 6, 13

SEQUENCE: dict[str, Callable[..., Net]] = {
    "elman": partial(recurrent, mixer=Elman, hidden=H, layers=2),
    "lstm": partial(recurrent, mixer=LSTM, hidden=H, layers=3),
    "gru": partial(recurrent, mixer=GRU, hidden=H),
    "attention_layers": partial(recurrent, mixer=Attention, hidden=H, layers=2),
    "transformer": partial(transformer, hidden=H),
    "transformer_rms": partial(transformer, hidden=H, layers=1, norm="rms"),
    "transformer_bidirectional": partial(transformer, hidden=H, causal=False),
}
NETS = {**SEQUENCE, "mlp": partial(mlp, hidden=[H, 20]), "linear": partial(mlp, hidden=[])}
FLOATS, TOKENS = Inputs(features=D, length=T), Inputs(vocabulary=VOCABULARY, length=T)

each_net = pytest.mark.parametrize("name", NETS)
each_sequence_net = pytest.mark.parametrize("name", SEQUENCE)
each_kind = pytest.mark.parametrize("kind", [FLOATS, TOKENS], ids=["floats", "tokens"])


def shared(features: int) -> Head:
    return Head(features, C)


def build(name: str, inputs: Inputs = FLOATS, **options: Any) -> Net:
    torch.manual_seed(7)
    return NETS[name](inputs, shared, **options).double().eval()


def batch_of(inputs: Inputs, rows: int = B) -> Batch:
    torch.manual_seed(1)
    x = torch.randn(rows, T, D, dtype=torch.float64)
    if inputs.vocabulary is not None:
        x = torch.randint(inputs.vocabulary, (rows, T))
    elif inputs.length == 0:
        x = x[:, 0]
    return Batch(x=x, y=torch.zeros(rows, dtype=torch.int64))


def batch_of_float32() -> Batch:
    batch = batch_of(FLOATS)
    return replace(batch, x=batch.x.float())


def experience(index: int, classes: tuple[int, ...]) -> Experience:
    data = TensorData(torch.zeros(1, T, D), torch.zeros(1, dtype=torch.int64))
    return Experience(index=index, name=str(index), classes=classes, train=data, test=data)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# Inputs and outputs


@each_kind
@each_net
def test_every_net_reads_floats_and_tokens_and_every_weight_learns(name: str, kind: Inputs) -> None:
    net, batch = build(name, kind), batch_of(kind)
    output = net(batch)
    assert output.logits.shape == (B, C)
    assert len(output.state) == len(net.blocks)
    close(output.logits, net.head(output.features))
    output.logits.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_kind
@each_sequence_net
def test_a_target_at_every_step_gives_logits_at_every_step(name: str, kind: Inputs) -> None:
    net, batch = build(name, replace(kind, per_step=True)), batch_of(kind)
    assert net(batch).logits.shape == (B, T, C)
    close(net(batch).logits[:, -1], build(name, kind)(batch).logits)  # the plain pooling is the last step


def test_an_mlp_reads_vectors() -> None:
    kind = Inputs(features=D, length=0)
    net, batch = build("mlp", kind), batch_of(kind)
    first, first_bias, second, second_bias = net.blocks.parameters()
    hidden = (batch.x @ first.T + first_bias).relu()
    close(net(batch).features, (hidden @ second.T + second_bias).relu())


def test_an_mlp_flattens_sequences() -> None:
    batch = batch_of(FLOATS)
    flat = replace(batch, x=batch.x.reshape(B, T * D))
    close(build("mlp")(batch).logits, build("mlp", Inputs(features=T * D, length=0))(flat).logits)


@pytest.mark.parametrize("make", [partial(mlp), partial(transformer), partial(recurrent, mixer=LSTM, layers=2)])
def test_without_dropout_there_are_no_dropout_modules(make: Callable[..., Net]) -> None:
    assert not any(isinstance(m, nn.Dropout) for m in make(FLOATS, shared).modules())
    net = make(FLOATS, shared, dropout=0.5).double()
    assert any(isinstance(m, nn.Dropout) for m in net.modules())
    batch = batch_of(FLOATS)
    assert not torch.equal(net(batch).logits, net(batch).logits)
    net.eval()
    assert torch.equal(net(batch).logits, net(batch).logits)


def test_recurrent_dropout_lies_between_layers_only() -> None:
    net = recurrent(FLOATS, shared, mixer=GRU, hidden=H, layers=3, dropout=0.5).double()
    torch.manual_seed(7)
    batch = batch_of(FLOATS)
    torch.manual_seed(3)
    features = net(batch).features
    torch.manual_seed(3)
    hidden = batch.x
    for layer in range(3):
        hidden = net.get_submodule(f"blocks.{layer}.mixer")(hidden)[0]
        hidden = F.dropout(hidden, 0.5) if layer < 2 else hidden
    close(features, hidden[:, -1])


def test_a_transformer_block_is_pre_norm() -> None:
    net, batch = build("transformer", layers=1), batch_of(FLOATS)
    mixer, expand, contract = (
        net.get_submodule(f"blocks.0.{part}") for part in ("mixer", "dense.expand", "dense.contract")
    )
    x = net.embedding(batch.x)
    x = x + mixer(F.layer_norm(x, [H]))[0]
    inner = expand(F.layer_norm(x, [H]))
    assert inner.shape == (B, T, 4 * H)
    x = x + contract(F.gelu(inner))
    close(net(batch).features, F.layer_norm(x, [H])[:, -1])


# Time: cuts, states, lengths


@each_net
def test_upper_of_lower_is_forward_at_every_cut(name: str) -> None:
    net, batch = build(name), batch_of(FLOATS)
    whole = net(batch)
    for cut in range(len(net.blocks) + 1):
        hidden, below = net.lower(batch, cut)
        above = net.upper(hidden, cut, batch)
        assert torch.equal(above.logits, whole.logits)
        assert torch.equal(above.features, whole.features)
        assert len(below) == cut
        assert len(above.state) == len(net.blocks) - cut


@pytest.mark.parametrize("name", [n for n in SEQUENCE if "bidirectional" not in n])
def test_cuts_hand_over_states_and_resets(name: str) -> None:
    net, batch = build(name, replace(FLOATS, per_step=True)), batch_of(FLOATS)
    state = net(batch).state
    reset = torch.rand(B, T) < 0.3
    whole = net(batch, state, reset)
    for cut in range(len(net.blocks) + 1):
        hidden, below = net.lower(batch, cut, state[:cut], reset)
        above = net.upper(hidden, cut, batch, state[cut:], reset)
        close(above.logits, whole.logits)
        close([*below, *above.state], [*whole.state])
    early, late = replace(batch, x=batch.x[:, :3]), replace(batch, x=batch.x[:, 3:])
    first = net(early)
    close(torch.cat([first.logits, net(late, first.state).logits], 1), net(batch).logits)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@each_sequence_net
def test_padded_rows_give_what_they_give_alone(name: str, pooling: str) -> None:
    net = build(name, replace(FLOATS, length=None), pooling=pooling)
    batch = batch_of(FLOATS)
    lengths = torch.tensor([7, 1, 3, 7, 6])
    batch.x[torch.arange(T) >= lengths[:, None]] = 1e3
    together = net(replace(batch, lengths=lengths)).logits
    for b, length in enumerate(lengths.tolist()):
        alone = net(Batch(x=batch.x[b : b + 1, :length], y=batch.y[b : b + 1])).logits
        close(together[b : b + 1], alone)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooling_without_lengths(pooling: str) -> None:
    net, batch = build("gru", pooling=pooling), batch_of(FLOATS)
    hidden, _ = net.lower(batch, 1)
    close(net(batch).features, hidden[:, -1] if pooling == "last" else hidden.sum(1) / T)
    full = replace(batch, lengths=torch.full((B,), T))
    close(net(full).features, net(batch).features)


# Heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
@pytest.mark.parametrize("features", [7, 40, 128])
def test_growing_leaves_old_logits_bit_for_bit(features: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = GrowingHead(features, 100).to(dtype)
    x = torch.randn(rows, features, dtype=dtype)
    known: list[int] = []
    old = head(x)
    for index, classes in enumerate([(5, 2), (7,), (2, 0, 1), tuple(range(10, 100))]):
        head.adapt(experience(index, classes))
        new = head(x)
        assert torch.equal(new[:, known], old[:, known])
        known = sorted({*known, *classes})
        unmet = [c for c in range(100) if c not in known]
        assert (new[:, unmet] == torch.finfo(dtype).min).all()
        close(new[:, known], F.linear(x, head.linear.weight, head.linear.bias)[:, known])
        old = new


@pytest.mark.parametrize("steps", [(), (T,)])
def test_classes_not_offered_have_probability_and_gradient_zero(steps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    growing, tasks = GrowingHead(H, C), TaskHead(H, C, [(0, 3), (1, 2, 4, 5)])
    growing.adapt(experience(0, (0, 3)))
    x = torch.randn(B, *steps, H)
    for head, task in ((growing, None), (tasks, torch.zeros(B, dtype=torch.int64))):
        head.zero_grad()
        logits = head(x, task)
        assert logits.shape == (B, *steps, C)
        assert torch.isfinite(logits).all()
        logits.retain_grad()
        probability = logits.softmax(-1)
        assert (probability[..., [1, 2, 4, 5]] == 0).all()
        F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits[..., 0].numel(), dtype=torch.int64)).backward()
        assert logits.grad is not None
        assert (logits.grad[..., [1, 2, 4, 5]] == 0).all()
        assert (logits.grad[..., [0, 3]] != 0).all()
        weight, bias = head.linear.weight.grad, head.linear.bias.grad
        assert weight is not None
        assert bias is not None
        offered = [0, 3] if head is growing else [0, 1]
        assert sorted(weight.any(1).nonzero().flatten().tolist()) == offered
        assert sorted(bias.nonzero().flatten().tolist()) == offered


@pytest.mark.parametrize("steps", [(), (T,)])
def test_a_task_head_equals_separate_linear_layers(steps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tasks = [(4, 1), (0, 3, 5), (2,)]
    head = TaskHead(H, C, tasks).double()
    layers = [nn.Linear(H, len(classes)).double() for classes in tasks]
    with torch.no_grad():
        head.linear.weight.copy_(torch.cat([layer.weight for layer in layers]))
        head.linear.bias.copy_(torch.cat([layer.bias for layer in layers]))
    x = torch.randn(B, *steps, H, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    logits = head(x, labels)
    for b, task in enumerate(labels.tolist()):
        close(logits[b][..., list(tasks[task])], layers[task](x[b]))
        others = [c for c in range(C) if c not in tasks[task]]
        assert (logits[b][..., others] == torch.finfo(torch.float64).min).all()
    with pytest.raises(ValueError, match=r"task labels.*learner\.head=shared"):
        head(x)


@pytest.mark.parametrize("make", [lambda: GrowingHead(H, C), lambda: TaskHead(H, C, [(0, 1), (2, 3, 4, 5)])])
def test_masks_stay_finite_under_autocast(make: Callable[[], Head]) -> None:
    head = make()
    head.adapt(experience(0, (0, 1)))
    with torch.autocast("cpu", torch.float16):
        logits = head(torch.randn(B, H), torch.zeros(B, dtype=torch.int64))
    assert logits.dtype == torch.float16
    assert torch.isfinite(logits).all()


def test_a_growing_head_fits_its_checkpoint_at_any_time() -> None:
    old = GrowingHead(H, C)
    old.adapt(experience(0, (1, 4)))
    new = GrowingHead(H, C)
    new.load_state_dict(old.state_dict())
    x = torch.randn(B, H)
    assert torch.equal(new(x), old(x))


# What is refused


@pytest.mark.parametrize("make", [partial(recurrent, mixer=LSTM), transformer])
def test_sequence_nets_refuse_inputs_without_time(make: Callable[..., Net]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 11\] without.*set stream\.layout=rows.*learner=mlp"):
        make(Inputs(features=D, length=0), shared)
    net = make(FLOATS, shared, hidden=H)
    hidden = torch.zeros(B, net.lower(batch_of_float32(), 0)[0].shape[-1])
    with pytest.raises(ValueError, match=r"maps \[B, T, D\], got \[5, (11|40)\]"):
        net.upper(hidden, 0, batch_of_float32())


def test_an_mlp_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"target at every step.*learner=lstm"):
        mlp(replace(FLOATS, per_step=True), shared)
    with pytest.raises(ValueError, match=r"lengths differ.*learner=lstm"):
        mlp(replace(FLOATS, length=None), shared)
    net, batch = build("mlp"), batch_of(FLOATS)
    with pytest.raises(ValueError, match="got lengths"):
        net(replace(batch, lengths=torch.full((B,), T)))
    with pytest.raises(ValueError, match="got reset"):
        net(batch, reset=torch.zeros(B, T, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"built for 77 values a row, got 66 \(inputs \[5, 6, 11\]\)"):
        net(replace(batch, x=batch.x[:, 1:]))


@pytest.mark.parametrize("make", [partial(recurrent, mixer=LSTM), transformer])
def test_sequence_nets_refuse_wrong_options(make: Callable[..., Net]) -> None:
    with pytest.raises(ValueError, match=r"pooling: got 'first', allowed are 'last', 'mean'"):
        make(FLOATS, shared, pooling="first")


SIZES: dict[str, tuple[Callable[..., Net], dict[str, int]]] = {
    "recurrent": (partial(recurrent, mixer=LSTM), {"hidden": 1, "layers": 1, "embedding": 1}),
    "transformer": (transformer, {"hidden": 1, "layers": 1, "expansion": 0}),
    "residual": (partial(residual, mixer=Attention), {"hidden": 1, "layers": 1, "expansion": 0}),
    "gated": (partial(gated, mixers=[RGLRU]), {"hidden": 1, "layers": 1, "expansion": 1}),
    "hgrn": (hgrn, {"hidden": 1, "layers": 1, "expansion": 1}),
    "awd": (partial(awd, mixer=LSTM), {"hidden": 1, "layers": 1, "embedding": 1}),
    "mlp": (mlp, {"embedding": 1}),
}
"""Each net's sizes, with the least that is allowed."""


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, (_, least) in SIZES.items() for size in least])
@pytest.mark.parametrize("below", [1, 129])
def test_too_small_sizes_are_refused_by_their_key(name: str, size: str, below: int) -> None:
    make, least = SIZES[name]
    given = least[size] - below
    with pytest.raises(ValueError, match=rf"^{size}: got {given}, it must (be at least|lie in) {least[size]}\."):
        make(TOKENS, shared, **{size: given})


def test_too_small_layers_of_an_mlp_are_refused_by_their_place() -> None:
    with pytest.raises(ValueError, match=r"^hidden\[1\]: got -3, it must be at least 1\."):
        mlp(FLOATS, shared, hidden=[4, -3])


@pytest.mark.parametrize("make", [partial(recurrent, mixer=LSTM, layers=2), transformer, mlp])
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_outside_its_range_is_refused(make: Callable[..., Net], dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout: got"):
        make(FLOATS, shared, dropout=dropout)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"norm: got 'batch', allowed are 'rms', 'layer'"):
        transformer(FLOATS, shared, norm="batch")
    with pytest.raises(ValueError, match=r"features=None and vocabulary=None"):
        Inputs()
    with pytest.raises(ValueError, match=r"features=3 and vocabulary=4"):
        Inputs(features=3, vocabulary=4)
    with pytest.warns(UserWarning, match=r"dropout=0\.3 .* layers=1"):
        recurrent(FLOATS, shared, mixer=LSTM, dropout=0.3)


# Configuration


@pytest.mark.parametrize("name", ["mlp", "lstm", "gru", "elman", "transformer"])
def test_learner_files_build_their_net(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name)
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")
    assert {k: v for k, v in cfg.items() if k != "net"} == {
        "head": "auto",
        "logit_mask": "all",
        "clip_norm": None,
        "optimizer_state": "fresh",
    }
    for kind in (FLOATS, TOKENS):
        net = instantiate(cfg.net)(kind, shared).double()
        assert net(batch_of(kind)).logits.shape == (B, C)


def test_an_embedding_may_be_narrower_than_the_layers() -> None:
    net = build("lstm", TOKENS, embedding=3)
    hidden, _ = net.lower(batch_of(TOKENS), 0)
    assert hidden.shape == (B, T, 3)


def sum_of(state: tuple[tuple[Tensor, ...] | None, ...]) -> list[Tensor]:
    return [s for block in state if block is not None for s in block]


@each_sequence_net
def test_states_have_a_row_each(name: str) -> None:
    net, batch = build(name), batch_of(FLOATS)
    tensors = sum_of(net(batch).state)
    assert all(s.shape[0] == B for s in tensors)
    assert bool(tensors) == ("bidirectional" not in name)
