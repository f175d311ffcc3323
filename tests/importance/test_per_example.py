"""Squared per-example gradients from batched passes against one pass an example, and the Fisher against closed forms.

Letters: B batch, T time, D input features, H hidden, C classes, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.importance.fisher import fisher
from clplat.importance.per_example import AbsoluteGradients, SquaredGradients, Way
from clplat.learners.learner import Learner
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import GrowingHead, Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Net, Output
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objective import Objective
from clplat.learners.objectives import objective_for
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.experience import UNSCORED, Batch, Data, Experience
from clplat.streams.inputs import Inputs

B, T, D, H, C, V = 9, 6, 4, 8, 5, 11


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OfBatches(nn.Module):
    """Gives a module [B, ...] -> [B, C] the signature of a learner."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Output:
        return Output(self.module(batch.x), features=batch.x, state=())


def squares(
    module: nn.Module, x: Tensor, way: Way, kind: type[SquaredGradients] = SquaredGradients
) -> tuple[dict[str, Tensor], str]:
    """Of a module [B, ...] -> [B, C], with three cotangents; and the way that it went in the end."""
    weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = kind(OfBatches(module), weights, way)

    def cotangents(logits: Tensor, batch: Batch) -> list[Tensor]:
        g = generator(3)
        return [torch.randn(logits.shape, generator=g, dtype=logits.dtype) for _ in range(3)]

    found.add(Batch(x=x, y=x), cotangents)
    return found.total, found.way


def compare(module: nn.Module, x: Tensor, way: Way = "taps") -> None:
    """Begun by taps it goes `way`, begun by vmap that way or example by example: the sums are always the same."""
    module = module.double().eval()
    torchs = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in module.modules())
    ends: dict[Way, Way] = {"taps": way, "mapped": "single" if way == "single" or torchs else "mapped"}
    for kind in (SquaredGradients, AbsoluteGradients):
        plain, _ = squares(module, x, "single", kind)
        assert plain
        for begin, expected in ends.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found, end = squares(module, x, begin, kind)
            assert end == expected
            assert bool(caught) is (end == "single"), [str(w.message) for w in caught]
            for name in plain:
                assert float(plain[name].max()) > 0 or plain[name].numel() == 0, name
                torch.testing.assert_close(found[name], plain[name], rtol=1e-9, atol=1e-14, msg=name)


class Last(nn.Module):
    """A recurrence of torch, its last output."""

    def __init__(self, rnn: nn.Module, time_major: bool = False) -> None:
        super().__init__()
        self.rnn, self.time_major = rnn, time_major

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x.transpose(0, 1))[0].transpose(0, 1) if self.time_major else self.rnn(x)[0]
        return y.sum(1)


class Steps(nn.Module):
    """A cell of torch in a loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]


class Attention(nn.Module):
    """Embedding, pre-norm attention, and an output tied to the embedding."""

    def __init__(self, norm: type[nn.Module], tied: bool, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H, padding_idx=padding_idx)
        self.norm, self.qkv = norm(H), nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, V, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, H // 2)).permute(2, 0, 3, 1, 4)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(h)


FLOATS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Last(nn.LSTM(D, H, batch_first=True)),
    "lstm_two_layers_both_ways": lambda: Last(nn.LSTM(D, H, 2, batch_first=True, bidirectional=True)),
    "lstm_time_major": lambda: Last(nn.LSTM(D, H), time_major=True),
    "lstm_without_bias": lambda: Last(nn.LSTM(D, H, bias=False, batch_first=True)),
    "gru": lambda: Last(nn.GRU(D, H, 2, batch_first=True)),
    "gru_both_ways": lambda: Last(nn.GRU(D, H, batch_first=True, bidirectional=True, bias=False)),
    "tanh": lambda: Last(nn.RNN(D, H, batch_first=True)),
    "relu": lambda: Last(nn.RNN(D, H, 2, nonlinearity="relu", batch_first=True)),
    "lstm_cell": lambda: Steps(nn.LSTMCell(D, H)),
    "gru_cell": lambda: Steps(nn.GRUCell(D, H)),
    "rnn_cell": lambda: Steps(nn.RNNCell(D, H)),
    "norms": lambda: nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Tanh(), nn.RMSNorm(H), nn.Linear(H, C)),
    "norm_of_two_dimensions": lambda: nn.Sequential(nn.LayerNorm([T, D]), nn.Linear(D, C, bias=False)),
    "in_place": lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(inplace=True), nn.Linear(H, C)),
}


@pytest.mark.parametrize("name", FLOATS)
def test_taps_equal_the_loop_over_examples(name: str) -> None:
    compare(FLOATS[name](), torch.randn(B, T, D, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_with_and_without_tied_weights(norm: type[nn.Module], tied: bool) -> None:
    module = Attention(norm, tied)
    compare(module, torch.randint(V, (B, T)))
    assert ("out.weight" in dict(module.named_parameters())) is not tied


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_row_of_an_embedding_gets_no_gradient_from_it(tied: bool) -> None:
    x = torch.randint(V, (B, T))
    x[:, 2] = 3
    compare(Attention(nn.LayerNorm, tied, padding_idx=3), x)


def test_without_a_time_axis_no_gradient_of_an_example_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Tanh(), nn.Linear(H, C))
    module(torch.randn(50, D))  # statistics that are not 0 and 1
    monkeypatch.setattr(torch, "bmm", lambda *_: pytest.fail("formed a matrix an example"))
    compare(module, torch.randn(B, D, dtype=torch.float64))


def test_a_frozen_weight_with_a_trained_bias() -> None:
    module = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C))
    module[0].weight.requires_grad_(False)
    compare(module, torch.randn(B, T, D, dtype=torch.float64))


class Decay(nn.Module):
    """Uses a parameter in a way that is not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.decay = nn.Linear(D, H), nn.Parameter(torch.rand(H))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), H, dtype=x.dtype)
        for x_t in self.into(x).unbind(1):
            h = self.decay.sigmoid() * h + x_t
        return h


class Hidden(torch.autograd.Function):
    """A custom function, which no function mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        return grad @ weight.mT, x.flatten(0, -2).mT @ grad.flatten(0, -2)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(D, H))

    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(x, self.kernel).tanh()  # type: ignore[union-attr]


class TimeMajor(nn.Module):
    """A linear layer whose first dimension is time: with T = B nothing but its values tells."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).tanh().sum(0)


class Shared(nn.Module):
    """A module registered in two places, which uses its parameter in a way that is not recorded."""

    def __init__(self) -> None:
        super().__init__()
        one = Decay()
        self.one, self.two, self.into = nn.ModuleList([one]), nn.ModuleList([one]), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.two[0](self.into(self.one[0](x))[:, None])


@pytest.mark.parametrize("module", [Decay, Shared])
def test_any_other_use_of_a_parameter_goes_side_by_side(module: Callable[[], nn.Module]) -> None:
    compare(module(), torch.randn(B, T, D, dtype=torch.float64), "mapped")


@pytest.mark.parametrize("steps", [2, T, B])
def test_time_major_layers_go_side_by_side(steps: int) -> None:
    compare(TimeMajor(), torch.randn(B, steps, D, dtype=torch.float64), "mapped")


def test_what_cannot_be_mapped_goes_example_by_example() -> None:
    compare(Custom(), torch.randn(B, T, D, dtype=torch.float64), "single")
    with pytest.warns(UserWarning, match=r"example by example, which is slow: torch.func.vmap cannot run this net \("):
        squares(Custom().double(), torch.randn(B, T, D, dtype=torch.float64), "taps")


@pytest.mark.parametrize(("numbers", "steps"), [(1, 2**15), (2**24, 1), (3 * (D * H + 2 * H), 2**15), (2**24, 4 * T)])
def test_parts_of_a_batch_add_up(numbers: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, or three of nine, or four."""
    monkeypatch.setattr("clplat.importance.per_example.AT_ONCE", numbers)
    monkeypatch.setattr("clplat.importance.per_example.STEPS_AT_ONCE", steps)
    compare(Decay(), torch.randn(B, T, D, dtype=torch.float64), "mapped")


def learner(
    net: Callable[..., Net], inputs: Inputs, target: str = "class", outputs: int = C, **options: Any
) -> Learner:
    head = options.pop("head", partial(Head, outputs=outputs))
    return Learner(net(inputs, head), objective_for(target), **options).double()  # type: ignore[arg-type]


NETS: dict[str, Callable[..., Net]] = {
    "lstm": partial(recurrent, mixer=LSTM, hidden=H, layers=2, dropout=0.5),
    "gru": partial(recurrent, mixer=GRU, hidden=H),
    "elman": partial(recurrent, mixer=Elman, hidden=H),
    "transformer": partial(transformer, hidden=H, heads=2, layers=1),
    "transformer_layer_norm": partial(
        transformer, hidden=H, heads=2, layers=1, norm="layer", causal=False, pooling="mean"
    ),
    "mlp": partial(mlp, hidden=[H, H]),
}


def ragged(per_step: bool) -> tuple[RaggedData, list[int]]:
    lengths = [3, 6, 1, 5, 2, 6, 4]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(sum(lengths), D, dtype=torch.float64)
    y = torch.randint(C, (sum(lengths),) if per_step else (len(lengths),))
    if per_step:
        y[::4] = UNSCORED
    return RaggedData(x, offsets, y, per_step=per_step), lengths


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_fisher_of_every_net_goes_fast_and_equals_the_loop(net: str, kind: str) -> None:
    made = learner(NETS[net], Inputs(features=D, length=T))
    data = TensorData(torch.randn(B, T, D, dtype=torch.float64), torch.randint(C, (B,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = fisher(made, data, kind, None, generator(), batch_size=4)
    slow = fisher(made, data, kind, None, generator(), batch_size=4, way="single")
    assert fast.keys() == made.weights().keys()
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-8, atol=1e-13, msg=name)


def naive_exact(made: Learner, data: Data) -> dict[str, Tensor]:
    """sum over classes of p_k (d log p_k)^2, one example and one class at a time."""
    made.eval()
    weights, count = made.weights(), len(data)
    total = {n: torch.zeros_like(p, requires_grad=False) for n, p in weights.items()}
    for i in range(count):
        log_p = made(data.batch(torch.tensor([i]))).logits.log_softmax(-1)[0]
        for k in range(len(log_p)):
            if float(log_p[k].detach().exp()) == 0:
                continue
            grads = torch.autograd.grad(log_p[k], list(weights.values()), retain_graph=True, allow_unused=True)
            for name, g in zip(weights, grads, strict=True):
                if g is not None:
                    total[name] += log_p[k].exp().detach() * g**2 / count
    return total


@pytest.mark.parametrize("net", ["lstm", "transformer"])
def test_the_exact_fisher_is_the_expectation_over_all_classes(net: str) -> None:
    made = learner(NETS[net], Inputs(features=D, length=T))
    data = TensorData(2 * torch.randn(B, T, D, dtype=torch.float64), torch.randint(C, (B,)))
    got, right = fisher(made, data, "exact", None, generator()), naive_exact(made, data)
    for name in right:
        torch.testing.assert_close(got[name], right[name], rtol=1e-8, atol=1e-13, msg=name)


def softmax_regression() -> tuple[Learner, TensorData]:
    made = learner(partial(mlp, hidden=[]), Inputs(features=D, length=0))
    return made, TensorData(torch.randn(40, D, dtype=torch.float64), torch.randint(C, (40,)))


def test_softmax_regression_has_its_closed_form() -> None:
    made, data = softmax_regression()
    p = made(data.batch(torch.arange(40))).logits.softmax(-1).detach()
    got = fisher(made, data, "exact", None, generator())
    variance = p * (1 - p)
    torch.testing.assert_close(got["head.linear.weight"], variance.T @ data.x.square() / 40)
    torch.testing.assert_close(got["head.linear.bias"], variance.mean(0))


def test_the_mean_of_many_sampled_fishers_is_the_exact_one() -> None:
    made, data = softmax_regression()
    exact = fisher(made, data, "exact", None, generator())
    g = generator(1)
    draws = [fisher(made, data, "sampled", None, g) for _ in range(600)]
    for name, right in exact.items():
        stacked = torch.stack([d[name] for d in draws])
        error = (stacked.mean(0) - right).abs() / (stacked.std(0) / 600**0.5)
        assert float(error.max()) < 4.5, name
    assert any(float((draws[0][n] - exact[n]).abs().max()) > 1e-3 for n in exact)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_batch_size_changes_nothing(kind: str) -> None:
    made = learner(NETS["gru"], Inputs(features=D, length=T))
    data = TensorData(torch.randn(B, T, D, dtype=torch.float64), torch.randint(C, (B,)))
    one, four, all_ = (fisher(made, data, kind, None, generator(), batch_size=n) for n in (1, 4, 100))
    for name in all_:
        torch.testing.assert_close(one[name], all_[name])
        torch.testing.assert_close(four[name], all_[name])


def test_the_empirical_fisher_is_not_the_square_of_the_mean_gradient() -> None:
    made, data = softmax_regression()
    got = fisher(made, data, "empirical", None, generator())["head.linear.weight"]
    loss = made.objective(made(batch := data.batch(torch.arange(40))).logits, batch)
    batched = torch.autograd.grad(loss, made.weights()["head.linear.weight"])[0].square()
    assert float(got.min()) > float(batched.max())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("net", ["lstm", "elman", "transformer"])
def test_padding_changes_nothing(net: str, kind: str) -> None:
    data, lengths = ragged(per_step=False)
    made = learner(NETS[net], Inputs(features=D, length=None))
    padded = fisher(made, data, kind, None, generator(), batch_size=len(lengths))
    alone = fisher(made, data, kind, None, generator(), batch_size=1)
    for name in padded:
        torch.testing.assert_close(padded[name], alone[name], rtol=1e-8, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_unscored_steps_and_padding_count_nothing(kind: str) -> None:
    data, lengths = ragged(per_step=True)
    made = learner(NETS["lstm"], Inputs(features=D, length=None, per_step=True), "tag")
    got = fisher(made, data, kind, None, generator(), batch_size=3)
    if kind == "sampled":
        assert all(bool(f.isfinite().all()) and float(f.max()) > 0 for f in got.values())
        data.y.fill_(UNSCORED)
        nothing = fisher(made, data, kind, None, generator(), batch_size=3)
        assert all(float(f.max()) == 0 for f in nothing.values())
        return
    weights, right = made.weights(), {n: torch.zeros_like(f) for n, f in got.items()}
    made.eval()
    for i, length in enumerate(lengths):
        batch = data.batch(torch.tensor([i]))
        log_p, y = made(batch).logits[0, :length].log_softmax(-1), batch.y[0, :length]
        scored = log_p[y != UNSCORED].gather(1, y[y != UNSCORED][:, None]).sum()  # summed over time, then squared
        if (y != UNSCORED).any():
            for name, g in zip(weights, torch.autograd.grad(scored, list(weights.values())), strict=True):
                right[name] += g**2 / len(lengths)
    for name in right:
        torch.testing.assert_close(got[name], right[name], rtol=1e-8, atol=1e-13, msg=name)


@pytest.mark.parametrize(("net", "target"), [("mlp", "value"), ("lstm", "value"), ("lstm", "bits")])
def test_values_and_bits(net: str, target: str) -> None:
    per_step = net == "lstm"
    made = learner(NETS[net], Inputs(features=D, length=3, per_step=per_step), target, outputs=2)
    x, mask = torch.randn(B, 3, D, dtype=torch.float64), torch.rand(B, 3) < 0.6
    y = torch.rand(B, 3, 2, dtype=torch.float64).round() if per_step else torch.randn(B, 2, dtype=torch.float64)
    data = TensorData(x, y, mask=mask if per_step else None)
    exact = fisher(made, data, "exact", None, generator())
    weights, right = made.weights(), {n: torch.zeros_like(f) for n, f in exact.items()}
    made.eval()
    for i in range(B):
        out = made(data.batch(torch.tensor([i]))).logits[0]
        scored = out[mask[i]].flatten() if per_step else out.flatten()
        for value in scored:
            p = float(value.detach().sigmoid())
            scale = p * (1 - p) if target == "bits" else 1.0
            grads = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
            for name, g in zip(weights, grads, strict=True):
                right[name] += scale * g**2 / B
    for name in right:
        torch.testing.assert_close(exact[name], right[name], rtol=1e-8, atol=1e-13, msg=name)
    g = generator(1)
    sampled = [fisher(made, data, "sampled", None, g)["head.linear.bias"] for _ in range(300)]
    mean, error = torch.stack(sampled).mean(0), torch.stack(sampled).std(0) / 300**0.5
    assert float(((mean - right["head.linear.bias"]).abs() / error).max()) < 4.5


def test_only_classes_that_compete_count() -> None:
    experience = Experience(
        0, "two", (1, 3), train=(data := TensorData(torch.randn(B, D).double(), torch.ones(B).long())), test=data
    )
    seen = learner(partial(mlp, hidden=[H]), Inputs(features=D, length=0), logit_mask="seen")
    seen.shape_for(experience)
    got, right = fisher(seen, data, "exact", None, generator()), naive_exact(seen, data)
    for name in right:
        torch.testing.assert_close(got[name], right[name])
    rows = got["head.linear.bias"]
    assert (rows > 0).tolist() == [False, True, False, True, False]

    growing = learner(partial(mlp, hidden=[H]), Inputs(features=D, length=0), head=partial(GrowingHead, outputs=C))
    growing.shape_for(experience)
    assert (fisher(growing, data, "exact", None, generator())["head.linear.bias"] > 0).tolist() == rows.bool().tolist()

    head = partial(TaskHead, outputs=C, tasks=[(0, 2), (1, 3)])
    tasks = learner(partial(mlp, hidden=[H]), Inputs(features=D, length=0), head=head)
    labelled = TensorData(data.x, data.y, task=1)
    assert (fisher(tasks, labelled, "exact", None, generator())["head.linear.bias"] > 0).tolist() == [False] * 2 + [
        True
    ] * 2


def test_nothing_of_the_learner_or_of_the_global_random_state_changes() -> None:
    made = learner(NETS["lstm"], Inputs(features=D, length=T))
    made.net.add_module("norm", nn.BatchNorm1d(3))
    data = TensorData(torch.randn(B, T, D, dtype=torch.float64), torch.randint(C, (B,)))
    made.train()
    made.net.blocks[0].eval()
    made.objective(made(batch := data.batch(torch.arange(B))).logits, batch).backward()
    before = {n: t.clone() for n, t in made.state_dict().items() if torch.is_tensor(t)}
    grads = {n: p.grad.clone() for n, p in made.weights().items() if p.grad is not None}
    modes, state = [m.training for m in made.modules()], torch.random.get_rng_state()
    with torch.no_grad():
        for kind in ("exact", "sampled", "empirical"):
            fisher(made, data, kind, 5, generator())
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [m.training for m in made.modules()]
    assert all(torch.equal(p.grad, grads[n]) for n, p in made.weights().items() if p.grad is not None)
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items() if torch.is_tensor(t))


def test_a_subset_is_averaged_over_its_own_size() -> None:
    made, data = softmax_regression()
    chosen = torch.randperm(40, generator=generator())[:5]
    alone = fisher(made, TensorData(data.x, data.y, rows=chosen), "empirical", None, generator())
    for name, part in fisher(made, data, "empirical", 5, generator()).items():
        torch.testing.assert_close(part, alone[name])


def test_the_subset_is_a_function_of_the_generator() -> None:
    made, data = softmax_regression()
    one, same, other = (fisher(made, data, "exact", 5, generator(s))["head.linear.weight"] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("target", ["tag", "token"])
def test_exact_is_refused_for_sequences_of_answers(target: str) -> None:
    made = learner(NETS["lstm"], Inputs(features=D, length=T, per_step=True), target)
    data = TensorData(torch.randn(B, T, D, dtype=torch.float64), torch.randint(C, (B, T)))
    with pytest.raises(ValueError, match=r"fisher: got 'exact'.* set fisher=sampled or fisher=empirical"):
        fisher(made, data, "exact", None, generator())


def test_wrong_options_are_refused() -> None:
    made, data = softmax_regression()
    with pytest.raises(ValueError, match=r"got 'true', allowed are 'exact', 'sampled', 'empirical'"):
        fisher(made, data, "true", None, generator())
    with pytest.raises(ValueError, match="examples=0"):
        fisher(made, data, "exact", 0, generator())


def test_one_example_and_float32() -> None:
    made = Learner(NETS["lstm"](Inputs(features=D, length=T), partial(Head, outputs=C)), objective_for("class"))
    assert isinstance(made.objective, Objective)
    data = TensorData(torch.randn(1, T, D), torch.randint(C, (1,)))
    fast, slow = (fisher(made, data, "exact", None, generator(), way=way) for way in ("taps", "single"))
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=1e-9)
