"""Dropout with lasting masks, penalties that nets give, and the optimiser that averages.

Letters: B batch, T time, D input features, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from learners.rows import Learns
from torch import Tensor, nn

from clplat import checkpoint
from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.mixers.dropout import DroppedEmbedding, LockedDropout
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.awd import AWDNet, awd
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.net import Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.residual import residual
from clplat.learners.objectives import objective_for
from clplat.learners.optimizers import NTASGD
from clplat.lightning import pl
from clplat.loop import Run
from clplat.settings import Evaluation, Training
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.inputs import Inputs

B, T, D, H, C, V = 5, 7, 4, 8, 6, 11
FLOATS, TOKENS = Inputs(features=D, length=T), Inputs(vocabulary=V, length=T)
LEARNS = {
    "awd_lstm": Learns(
        0.70,
        1500,
        # Either penalty keeps a net of one layer near chance, for it must carry the memory in the outputs that they
        # make small and slow; dropout stays.
        ("learner.net.layers=1", "learner.net.activation=0", "learner.net.temporal_activation=0", "optimizer.lr=0.006"),
        digits=0.60,
    )
}
OFF: dict[str, float] = dict.fromkeys(("embedding_dropout", "input_dropout", "dropout", "output_dropout"), 0.0)


def shared(features: int) -> Head:
    return Head(features, C)


def awd_net(inputs: Inputs = FLOATS, mixer: Any = LSTM, **options: Any) -> AWDNet:
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"hidden": H, "embedding": H}
    net = awd(inputs, shared, mixer=mixer, **(sizes | options))
    assert isinstance(net, AWDNet)
    return net.double()


def batch_of(inputs: Inputs = FLOATS, lengths: Tensor | None = None) -> Batch:
    torch.manual_seed(1)
    x = torch.randn(B, T, D, dtype=torch.float64) if inputs.vocabulary is None else torch.randint(V, (B, T))
    return Batch(x=x, y=torch.zeros(B, dtype=torch.int64), lengths=lengths)


# Dropout


def test_locked_dropout_has_one_mask_a_sequence() -> None:
    drop, x = LockedDropout(0.4), torch.randn(200, 5, 30)
    y = drop(x)
    factor = y / x
    assert torch.equal(factor == 0, (factor == 0)[:, :1].expand_as(factor))
    torch.testing.assert_close(factor[factor != 0], torch.full_like(factor[factor != 0], 1 / 0.6))
    assert abs(float((factor == 0).float().mean()) - 0.4) < 0.03
    assert (factor[0, 0] != factor[1, 0]).any()  # every row has its own
    assert drop.eval()(x) is x
    assert LockedDropout(0.0)(x) is x


def test_embedding_dropout_drops_whole_tokens_for_all_rows_and_steps() -> None:
    torch.manual_seed(0)
    embed, tokens = DroppedEmbedding(400, 3, 0.25), torch.randint(400, (50, 60))
    nn.init.ones_(embed.weight)
    y = factor = embed(tokens)
    assert torch.equal(factor, factor[..., :1].expand_as(factor))
    by_token = torch.zeros(400)
    by_token[tokens] = factor[..., 0].detach()
    assert torch.equal(by_token[tokens], factor[..., 0])  # one factor a token, wherever it stands
    assert abs(float((by_token == 0).float().mean()) - 0.25) < 0.06
    kept = by_token[by_token != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))
    (gradient,) = torch.autograd.grad(y.sum(), embed.weight)
    assert torch.equal(gradient[:, 0] == 0, by_token == 0)
    embed.eval()
    assert torch.equal(embed(tokens), embed.weight[tokens])


def test_masks_come_from_the_global_generator() -> None:
    for inputs in (FLOATS, TOKENS):
        net, batch = awd_net(inputs, partial(LSTM, weight_drop=0.5)), batch_of(inputs)
        torch.manual_seed(3)
        first = net(batch).logits
        assert not torch.equal(net(batch).logits, first)
        torch.manual_seed(3)
        assert torch.equal(net(batch).logits, first)
        net.eval()
        assert torch.equal(net(batch).logits, net(batch).logits)


# The net of the AWD-LSTM


@pytest.mark.parametrize("inputs", [FLOATS, TOKENS], ids=["floats", "tokens"])
def test_an_awd_net_without_dropout_is_a_recurrent_net(inputs: Inputs) -> None:
    net, batch = awd_net(inputs, layers=2, **OFF), batch_of(inputs)
    plain = recurrent(inputs, shared, mixer=LSTM, hidden=H, layers=2, embedding=H).double()
    names = {"embedding.0.weight": "embedding.weight"}
    plain.load_state_dict({names.get(k, k): v for k, v in net.state_dict().items()})
    output, expected = net(batch), plain(batch)
    assert torch.equal(output.logits, expected.logits)
    assert expected.penalties == {}
    # Cut anywhere, it goes on the same.
    for cut in range(len(net.blocks) + 1):
        hidden, _ = net.lower(batch, cut)
        above = net.upper(hidden, cut, batch)
        torch.testing.assert_close(above.logits, output.logits)
        assert set(above.penalties) == (set() if cut == len(net.blocks) else set(output.penalties))
    assert len(output.state) == len(net.blocks)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_penalties_of_activations_equal_their_formulas(padded: bool, resets: bool) -> None:
    lengths = torch.tensor([T, 1, 3, 2, T - 1]) if padded else None
    net, batch = awd_net(activation=2.0, temporal_activation=0.5, output_dropout=0.4, layers=1), batch_of()
    net.embedding.eval()
    batch = replace(batch, lengths=lengths)
    reset = None
    if resets:
        reset = torch.zeros(B, T, dtype=torch.bool)
        reset[0, 0] = reset[0, 3] = reset[2, 1] = True
    torch.manual_seed(5)
    penalties = net(batch, None, reset).penalties
    raw, _ = net.lower(batch, 1, None, reset)
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones(B, 1, H, dtype=torch.float64), 0.4)
    sizes, changes = [], []
    for b in range(B):
        steps = T if lengths is None else int(lengths[b])
        for t in range(steps):
            sizes.append((mask[b, 0] * raw[b, t]).square())
            if t and not (reset is not None and reset[b, t]):
                changes.append((raw[b, t] - raw[b, t - 1]).square())
    torch.testing.assert_close(penalties["activation"], 2.0 * torch.cat(sizes).mean())
    torch.testing.assert_close(penalties["temporal_activation"], 0.5 * torch.cat(changes).mean())
    torch.manual_seed(5)
    assert net(replace(batch, reset=reset)).penalties == penalties  # resets that the stream gives
    assert net.eval()(batch).penalties == {}
    assert awd_net(activation=0.0, temporal_activation=0.0)(batch).penalties == {}


def test_one_step_has_no_change_to_penalise() -> None:
    net, batch = awd_net(), batch_of()
    assert float(net(replace(batch, x=batch.x[:, :1])).penalties["temporal_activation"].detach()) == 0


def test_tied_weights_are_one_parameter() -> None:
    torch.manual_seed(0)
    inputs = replace(TOKENS, per_step=True)
    net = awd(inputs, lambda h: Head(h, V), mixer=LSTM, hidden=12, embedding=5, layers=2, tied=True).double()
    embedding = net.get_parameter("embedding.0.weight")
    assert net.head.linear.weight is embedding
    assert embedding.abs().max() <= 0.1
    output = net(batch_of(TOKENS))
    assert output.features.shape == (B, T, 5)
    output.logits.sum().backward()
    assert len([n for n, _ in net.named_parameters() if "linear.weight" in n or "embedding" in n]) == 1
    copied = deepcopy(net)
    assert copied.head.linear.weight is copied.get_parameter("embedding.0.weight")


def test_the_mark_of_a_start_keeps_an_embedding_of_its_own_where_weights_are_tied() -> None:
    """Text streams read one token more than there is to predict."""
    torch.manual_seed(0)
    inputs = replace(TOKENS, per_step=True)
    net = awd(inputs, lambda h: Head(h, V - 1), mixer=LSTM, hidden=12, embedding=5, layers=1, tied=True).eval()
    table = torch.cat([net.head.linear.weight, net.get_parameter("embedding.0.marks.weight")])
    assert table.shape == (V, 5)
    assert float(table.detach().abs().max()) <= 0.1
    ids = torch.arange(V)[None]
    torch.testing.assert_close(net.embedding(ids), table[None])
    dropped = DroppedEmbedding(V - 1, 5, 0.9, marks=1)
    assert torch.equal(dropped(ids)[0, -1], dropped.get_parameter("marks.weight")[0])  # what says "begin" always does
    assert int((dropped(ids) == 0).all(-1).sum()) > 1


def test_what_an_awd_net_does_not_take() -> None:
    with pytest.raises(ValueError, match="layers: got 0"):
        awd_net(layers=0)
    with pytest.raises(ValueError, match="tied: got true on float inputs"):
        awd_net(tied=True)
    with pytest.raises(ValueError, match=r"tied: got true with a head \[6, 8\] and an embedding \[11, 8\]"):
        awd_net(TOKENS, tied=True)
    with pytest.raises(ValueError, match=r"^activation: got -1"):
        awd_net(activation=-1.0)
    with pytest.raises(ValueError, match=r"dropout: got 1\.5"):
        awd_net(output_dropout=1.5)
    with pytest.raises(ValueError, match=r"embedding_dropout: got 1\.0"):
        awd_net(TOKENS, embedding_dropout=1.0)
    with pytest.raises(ValueError, match="An AWD net learns sequences"):
        awd_net(Inputs(features=D, length=0))


# Penalties


@pytest.mark.parametrize("make", [recurrent, partial(residual, expansion=0)], ids=["recurrent", "residual"])
def test_the_penalty_on_recurrent_matrices_is_the_sum_over_layers(make: Callable[..., Net]) -> None:
    torch.manual_seed(0)
    net = make(FLOATS, shared, mixer=partial(Elman, orthogonality=0.3), hidden=H, layers=2).double()
    matrices = [p for n, p in net.named_parameters() if "weight_hh" in n]
    expected = sum(0.3 * torch.linalg.matrix_norm(u.T @ u - torch.eye(H, dtype=torch.float64)) ** 2 for u in matrices)
    penalties = net(batch_of()).penalties
    assert list(penalties) == ["orthogonality"]
    torch.testing.assert_close(penalties["orthogonality"], expected)
    assert net.eval()(batch_of()).penalties == {}
    with pytest.raises(ValueError, match=r"orthogonality: got -1"):
        Elman(D, H, orthogonality=-1.0)


def test_a_net_run_with_other_weights_penalises_these() -> None:
    net = recurrent(FLOATS, shared, mixer=partial(Elman, orthogonality=1.0, init="orthogonal"), hidden=H).double()
    assert float(net(batch_of()).penalties["orthogonality"].detach()) < 1e-9
    zeros = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    output = torch.func.functional_call(net, zeros, (batch_of(),))
    assert float(output.penalties["orthogonality"]) == H


def stream_of(experiences: int = 2, held_out: bool = False) -> Stream:
    """Two classes an experience, sequences [5, D] whose mean tells the class."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for k in range(experiences):
        data = []
        for n in (64, 20, 300):
            y = torch.randint(2 * k, 2 * k + 2, (n,), generator=generator)
            data.append(TensorData(torch.randn(n, 5, D, generator=generator) + y[:, None, None], y))
        valid = data[2] if held_out else None
        parts.append(Experience(k, str(k), (2 * k, 2 * k + 1), train=data[0], test=data[1], valid=valid))
    return Stream("s", tuple(parts), "class_incremental", "class", 2 * experiences, features=D, length=5)


def learner_of(stream: Stream, strategy: Strategy | None = None, optimizer: Any = None, **options: Any) -> Learner:
    torch.manual_seed(1)
    net = awd(
        Inputs(features=D, length=5),
        partial(Head, outputs=stream.outputs),
        mixer=partial(LSTM, weight_drop=0.3),
        hidden=H,
        layers=2,
    )
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
    return Learner(net, objective_for("class"), strategy, optimizer, **options)


class Terms(Strategy):
    """Keeps the terms of every step, and what the loss was made of."""

    latest: Callable[[], dict[str, Tensor]]

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def loss(self, learner: Learner, batch: Batch, output: Any) -> dict[str, Tensor]:
        return {"more": output.logits.sum() * 0 + 1.0}

    def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
        self.seen.append({k: float(v) for k, v in self.latest().items()})


def test_penalties_are_minimised_and_logged(trainer: Callable[..., pl.Trainer]) -> None:
    stream, strategy = stream_of(1), Terms()
    learner = learner_of(stream, strategy)
    run = Run(stream, learner, trainer(), Training(batch_size=16, epochs=1))
    strategy.latest = lambda: run.stepper._terms[-1]
    run.go()
    assert len(strategy.seen) == 4
    for terms in strategy.seen:
        assert set(terms) == {"objective", "activation", "temporal_activation", "more", "loss"}
        assert terms["activation"] > 0
        parts = sum(v for name, v in terms.items() if name != "loss")
        assert terms["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_strong_penalty_of_orthogonality_is_obeyed(trainer: Callable[..., pl.Trainer]) -> None:
    apart = {}
    for strength in (0.0, 1.0):
        torch.manual_seed(1)
        stream = stream_of(1)
        mixer = partial(Elman, orthogonality=strength)
        net = recurrent(Inputs(features=D, length=5), partial(Head, outputs=2), mixer=mixer, hidden=H)
        learner = Learner(net, objective_for("class"), None, partial(torch.optim.SGD, lr=0.03))
        Run(stream, learner, trainer(), Training(batch_size=16, steps=150)).go()
        u = net.get_parameter("blocks.0.mixer.rnn.weight_hh_l0").detach()
        apart[strength] = float((u.T @ u - torch.eye(H)).norm())
    assert apart[1.0] < 0.1 < 1.0 < apart[0.0]


# NT-ASGD


def parameters(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in values]


def test_before_the_trigger_it_is_sgd() -> None:
    mine, plain = parameters(1.0, -2.0), parameters(1.0, -2.0)
    a, b = NTASGD(mine, lr=0.1, weight_decay=0.3), torch.optim.SGD(plain, lr=0.1, weight_decay=0.3)
    for _ in range(5):
        for weights, optimizer in ((mine, a), (plain, b)):
            optimizer.zero_grad()
            (weights[0] ** 2 * weights[1]).sum().backward()
            optimizer.step()
    for p, q in zip(mine, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_trigger_is_that_of_the_paper(n: int, seed: int) -> None:
    """Algorithm 1: with t checks before, averaging begins where t > n and v > min over l < t - n of logs[l]."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.linspace(1, 0.7, 40) + 0.2 * torch.rand(40, generator=generator)).tolist()
    expected, logs = None, []
    for t, v in enumerate(values):
        if t > n and v > min(logs[: t - n]):
            expected = t
            break
        logs.append(v)
    assert expected is not None
    (p,) = parameters(0.0)
    optimizer = NTASGD([p], lr=1.0, n=n, every=3)
    began = None
    for t, v in enumerate(values):
        for k in range(3):
            assert not optimizer.averaging
            p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.observe(torch.tensor(v + (k - 1) * 10))  # the mean of the three is v
        if optimizer.averaging:
            began = t
            break
    assert began == expected


def test_the_answer_is_the_mean_of_the_iterates_and_training_goes_on_from_the_last() -> None:
    p, frozen = parameters(0.0, 5.0)
    optimizer = NTASGD([{"params": [p]}, {"params": [frozen]}], lr=1.0)
    for g in (1.0, 2.0):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    with optimizer.averaged():
        assert p.item() == -3  # no trigger, no mean
    optimizer.begin()
    iterates = [p.item()]
    for g in (1.0, 4.0, -2.0):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        iterates.append(p.item())
    assert iterates == [-3, -4, -8, -6]
    with optimizer.averaged():
        assert p.item() == pytest.approx(sum(iterates) / 4)
        assert frozen.item() == 5
    assert p.item() == -6
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        _ = 1 / 0
    assert p.item() == -6  # whatever happens inside
    optimizer.finish()
    assert p.item() == pytest.approx(sum(iterates) / 4)
    assert not optimizer.averaging
    assert optimizer.param_groups[0]["checks"] == []


def test_what_is_held_out_is_checked_in_place_of_the_training_loss() -> None:
    (p,) = parameters(0.0)
    optimizer = NTASGD([p], n=1, every=1)
    held_out = iter([3.0, 2.0, 2.5])
    for _ in range(3):
        assert not optimizer.averaging
        optimizer.observe(torch.tensor(0.0), lambda: torch.tensor(next(held_out)))
    assert not optimizer.averaging  # 2.5 is not above the 3 of two checks ago
    optimizer.observe(torch.tensor(0.0), lambda: torch.tensor(2.2))
    assert optimizer.averaging  # 2.2 > min(3, 2)


def test_its_state_is_exact_and_complete() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(60, 3)
    losses = torch.cat([torch.linspace(2, 1, 30), torch.rand(30) + 1])

    def advance(optimizer: NTASGD, p: nn.Parameter, steps: range) -> None:
        for k in steps:
            p.grad = gradients[k].clone()
            optimizer.step()
            optimizer.observe(losses[k])

    whole = nn.Parameter(torch.ones(3))
    one = NTASGD([whole], lr=0.1, n=2, every=4)
    advance(one, whole, range(60))
    assert one.averaging
    for cut in (3, 30, 58):
        first = nn.Parameter(torch.ones(3))
        early = NTASGD([first], lr=0.1, n=2, every=4)
        advance(early, first, range(cut))
        second = nn.Parameter(first.detach().clone())
        late = NTASGD([second], lr=0.1, n=2, every=4)
        late.load_state_dict(deepcopy(early.state_dict()))
        advance(late, second, range(cut, 60))
        assert torch.equal(second, whole)
        with one.averaged(), late.averaged():
            assert torch.equal(second, whole)


def test_what_nt_asgd_does_not_take() -> None:
    options: dict[str, Any]
    for options in ({"lr": -1.0}, {"weight_decay": -1.0}, {"n": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="NTASGD: got"):
            NTASGD(parameters(1.0), **options)


def test_a_learner_is_scored_with_the_mean_and_leaves_it_behind(trainer: Callable[..., pl.Trainer]) -> None:
    stream, scored = stream_of(2), []

    class Watch(Strategy):
        def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
            optimizer = learner.optimizer
            if isinstance(optimizer, NTASGD) and optimizer.averaging:
                p = next(iter(learner.weights().values()))
                scored.append(torch.equal(p, optimizer.state[p]["average"]))
            return logits

        def after_experience(self, learner: Learner, experience: Experience) -> None:
            assert isinstance(learner.optimizer, NTASGD)
            finished.append(learner.optimizer.averaging)

        def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
            optimizer = learner.optimizer
            assert isinstance(optimizer, NTASGD)
            if learner.steps % 20 == 6:
                optimizer.begin()
            if optimizer.averaging:
                averages.append({n: optimizer.state[p]["average"].clone() for n, p in learner.weights().items()})

    averages: list[dict[str, Tensor]] = []
    finished: list[bool] = []
    learner = learner_of(stream, Watch(), partial(NTASGD, lr=0.5, n=50, every=2))
    run = Run(stream, learner, trainer(), Training(batch_size=16, epochs=5), Evaluation(every_n_steps=9))
    run.go()
    assert scored
    assert all(scored)
    assert finished == [False, False]
    assert all(torch.equal(p, averages[-1][n]) for n, p in learner.weights().items())
    assert evaluate(learner, stream.experiences)[0] == run.results.all.rows[-1].tolist()


def test_the_held_out_set_decides_in_a_run(trainer: Callable[..., pl.Trainer]) -> None:
    stream = stream_of(1, held_out=True)
    checks = []

    class Watch(Strategy):
        def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
            assert isinstance(learner.optimizer, NTASGD)
            if learner.steps % 4 == 0:
                with learner.evaluating():
                    data = stream[0].valid
                    assert data is not None
                    whole = data.batch(torch.arange(len(data)))
                    loss = learner.objective(learner(whole).logits, whole)
                checks.append((learner.optimizer.param_groups[0]["checks"][-1], float(loss)))

    learner = learner_of(stream, Watch(), partial(NTASGD, lr=0.5, n=50, every=4))
    Run(stream, learner, trainer(), Training(batch_size=16, epochs=2)).go()
    assert len(checks) == 2
    for mine, expected in checks:
        assert mine == pytest.approx(expected, rel=1e-5)


class Crash(Exception):
    pass


@pytest.mark.parametrize("state", ["fresh", "kept"])
@pytest.mark.parametrize("crash", [9, "end", 14])
def test_a_run_that_averages_resumes_exactly(
    tmp_path: Path, trainer: Callable[..., pl.Trainer], crash: int | str, state: str
) -> None:
    """Masks, checks and means go on as if nothing had happened: inside an experience (12 steps, averaged from the 6th
    on), after its last step but before the mean is adopted, and in the next one."""
    stream = stream_of(2)

    def run(folder: Path, crash: int | str | None) -> Run:
        class Watch(Strategy):
            def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
                assert isinstance(learner.optimizer, NTASGD)
                if learner.steps % 12 == 6:
                    learner.optimizer.begin()
                if learner.steps == crash:
                    raise Crash

            def after_experience(self, learner: Learner, experience: Experience) -> None:
                if crash == "end":
                    raise Crash

        learner = learner_of(stream, Watch(), partial(NTASGD, lr=0.5, n=50, every=5), optimizer_state=state)
        folder.mkdir(exist_ok=True)
        training = Training(batch_size=16, epochs=3, checkpoint_every_n_steps=4)
        return Run(stream, learner, trainer(), training, folder=folder)

    whole = run(tmp_path / "whole", None)
    whole.go()
    with pytest.raises(Crash):
        run(tmp_path / "cut", crash).go()
    loaded = checkpoint.load(tmp_path / "cut" / "last.ckpt")
    assert loaded["steps"] == {9: 8, "end": 12, 14: 12}[crash]
    resumed = run(tmp_path / "cut", None)
    resumed.resume(loaded)
    resumed.go()
    for (name, a), (_, b) in zip(whole.learner.state_dict().items(), resumed.learner.state_dict().items(), strict=True):
        if torch.is_tensor(a):
            assert torch.equal(a, b), name
    assert torch.equal(whole.results.R, resumed.results.R)


def test_a_head_of_each_task_cannot_be_tied() -> None:
    head = partial(TaskHead, outputs=V, tasks=[(0, 1), (2, 3)])
    with pytest.raises(ValueError, match=r"tied: got true with a head \[4, 8\]"):
        awd(TOKENS, head, mixer=LSTM, hidden=H, embedding=H, tied=True)
