"""Truncated back-propagation through time: what is carried, what is cut, and what must not see the carried state."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clplat import checkpoint
from clplat.composition import Composite
from clplat.evaluate import evaluate
from clplat.importance.fisher import fisher
from clplat.learners.carry import Carry
from clplat.learners.learner import Learner
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.hyper_lstm import HyperLSTM
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.net import Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.scores import Results
from clplat.settings import Evaluation, Training
from clplat.strategies.agem import AGEM
from clplat.strategies.center_loss import CenterLoss
from clplat.strategies.cumulative import Cumulative
from clplat.strategies.der import DER
from clplat.strategies.ewc import EWC
from clplat.strategies.joint import Joint
from clplat.strategies.lwf import LwF
from clplat.strategies.mas import MAS
from clplat.strategies.mir import MIR
from clplat.strategies.replay import Replay
from clplat.strategies.si import SI
from clplat.strategy import Strategy
from clplat.streams.batch import concatenate
from clplat.streams.data import TensorData
from clplat.streams.experience import UNSCORED, Batch, Experience, Stream, StreamError
from clplat.streams.segments import SegmentData, random_ends

ROWS, STEPS, TOKENS = 3, 4, 5
SMALL_HYPER = partial(HyperLSTM, size=3, embedding=2)


def text_data(count: int, seed: int, steps: int = STEPS, starts: bool = False, task: int | None = None) -> SegmentData:
    """Random tokens; with `starts` some documents begin inside of segments."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (count + 1,), generator=generator)
    start = torch.rand(count, generator=generator) < (0.15 if starts else 0.0)
    return SegmentData(tokens[:-1], tokens[1:], start, ROWS, steps, task)


def text_stream(steps: int = STEPS, starts: bool = False, tasks: bool = False, count: int = 33) -> Stream:
    parts = []
    for k in range(2):
        label = k if tasks else None
        train, test = (text_data(count, 10 * k + n, steps, starts, label) for n in (0, 1))
        parts.append(Experience(k, f"text {k}", (), train, test, task_label=label))
    scenario = "task_incremental" if tasks else "domain_incremental"
    return Stream("text", tuple(parts), scenario, "token", TOKENS, vocabulary=TOKENS, per_step=True)


def make_net(stream: Stream, mixer: Any = LSTM, layers: int = 1) -> Net:
    torch.manual_seed(1)
    head = partial(Head, outputs=TOKENS)
    if stream.scenario == "task_incremental":
        head = partial(TaskHead, outputs=TOKENS, tasks=[tuple(range(TOKENS))] * 2)
    inputs = stream.inputs
    return recurrent(inputs, head, mixer=mixer, hidden=4, layers=layers).double()


def make_learner(stream: Stream, strategy: Strategy | None = None, lr: float = 0.5, mixer: Any = LSTM) -> Learner:
    return Learner(make_net(stream, mixer), objective_for("token"), strategy, partial(torch.optim.SGD, lr=lr))


class Watch(Strategy):
    """Notes what each step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self.carry: Carry | None = None
        self.before: list[Any] = []
        self.gradients_seen: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.lengths: list[int] = []

    def loss(self, learner: Learner, batch: Batch, output: Any) -> dict[str, Tensor]:
        self.logits.append(output.logits.detach().clone())
        self.before.append(None if self.carry is None else self.carry.state)
        return {}

    def gradients(self, learner: Learner, batch: Batch) -> None:
        self.gradients_seen.append({n: p.grad.clone() for n, p in learner.net.named_parameters() if p.grad is not None})

    def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
        assert learner.optimizer is not None
        self.rates.append(learner.optimizer.param_groups[0]["lr"])
        self.lengths.append(batch.x.shape[1])


def watched(run: Run, watch: Watch) -> Results:
    """Run to the end, where `watch` sees what is carried."""
    watch.carry = run.carry
    return run.go()


def weights(learner: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.state_dict().items() if torch.is_tensor(v)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def whole(data: SegmentData) -> Batch:
    """All rows of a set as sequences of L steps."""
    (batch,) = data.in_order([data.length])
    return batch


# The data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 11, 12])
def test_segments_in_order_are_the_rows_and_independent_ones_hold_the_same_steps(steps):
    data = text_data(35, 0, steps, starts=True)  # L = 11, two steps left out
    assert (data.length, data.segments, len(data)) == (11, -(-11 // steps), 3 * -(-11 // steps))
    parts = list(data.in_order())
    assert [p.x.shape[1] for p in parts] == [steps] * (11 // steps) + ([11 % steps] if 11 % steps else [])
    flat = torch.cat([p.x for p in parts], 1)
    assert torch.equal(flat, data.x)
    assert torch.equal(torch.cat([p.y for p in parts], 1), data.y)
    resets = torch.cat([torch.zeros_like(p.x).bool() if p.reset is None else p.reset for p in parts], 1)
    assert resets[:, 0].all()
    assert torch.equal(resets[:, 1:], data.start[:, 1:])
    assert data.start.any()
    for segment, part in enumerate(parts):
        alone = data.batch(segment * ROWS + torch.arange(ROWS))
        width = part.x.shape[1]
        assert alone.x.shape == (ROWS, steps)
        assert torch.equal(alone.x[:, :width], part.x)
        assert torch.equal(alone.y[:, :width], part.y)
        assert (alone.y[:, width:] == UNSCORED).all()
        assert part.index is not None
        assert part.index.tolist() == (segment * ROWS + torch.arange(ROWS)).tolist()
        marks = torch.zeros_like(alone.x).bool() if alone.reset is None else alone.reset
        assert torch.equal(marks[:, 1:width], data.start[:, segment * steps : segment * steps + width][:, 1:])
        assert not marks[:, 0].any()


def test_segments_refuse_what_does_not_fit():
    x = torch.zeros(4, dtype=torch.int64)
    start = torch.zeros(4, dtype=torch.bool)
    for arguments, message in (
        ((x, x[:3], start, 2, 2), "a target and a bool mark for each of 4 steps"),
        ((x, x, start.long(), 2, 2), "a bool mark"),
        ((x, x, start, 0, 2), "rows: got 0"),
        ((x, x, start, 5, 2), "4 steps cannot be laid out in 5 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentData(*arguments)


def test_resets_go_through_joined_and_moved_batches():
    marked = Batch(torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), reset=torch.eye(2, 3).bool())
    plain = Batch(torch.zeros(1, 5).long(), torch.zeros(1, 5).long())
    joined = concatenate([marked, plain])
    assert joined.reset is not None
    assert joined.reset.int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert concatenate([plain, plain]).reset is None


def test_random_lengths_follow_the_paper_and_cover_the_row():
    generator = torch.Generator().manual_seed(0)
    ends = random_ends(400_000, 70, generator)
    lengths = torch.tensor([0, *ends]).diff()[:-1].double()
    assert ends[-1] == 400_000
    assert int(lengths.min()) >= 5
    short = (lengths < 52.5).double().mean()
    assert abs(float(short) - 0.05) < 4 * (0.05 * 0.95 / len(lengths)) ** 0.5
    full = lengths[lengths > 52.5]
    assert abs(float(full.mean()) - 69.5) < 4 * 5 / len(full) ** 0.5  # rounded down: half a step less
    assert float(full.std()) == pytest.approx(5, abs=0.2)
    assert random_ends(3, 2, generator)[-1] == 3


# What is carried, and what is cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", [LSTM, GRU, Elman, SMALL_HYPER])
@pytest.mark.parametrize("starts", [False, True])
def test_carried_segments_have_the_values_of_one_long_pass(trainer, mixer, starts):
    stream, watch = text_stream(starts=starts), Watch()
    learner = make_learner(stream, watch, lr=0.0, mixer=mixer)
    watched(Run(stream, learner, trainer(), Training(batch_size=ROWS, epochs=2)), watch)
    net = make_net(stream, mixer)
    expected = [net(whole(e.train)).logits for e in stream for _ in range(2)]  # pyright: ignore[reportArgumentType]
    assert len(watch.logits) == 2 * 2 * 3
    assert torch.allclose(torch.cat(watch.logits, 1), torch.cat(expected, 1), rtol=0, atol=1e-12)


def test_gradients_are_cut_exactly_at_the_border(trainer):
    stream, watch = text_stream(), Watch()
    Run(stream, make_learner(stream, watch, lr=0.0), trainer(), Training(batch_size=ROWS, epochs=1)).go()
    net, objective, data = make_net(stream), objective_for("token"), stream[0].train
    assert isinstance(data, SegmentData)
    first, second, _ = data.in_order()

    def gradient(cut: bool) -> dict[str, Tensor]:
        state = net(first).state
        if cut:
            state = tuple(tuple(t.detach() for t in s) for s in state if s is not None)
        net.zero_grad()
        objective(net(second, state).logits, second).backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    through, found = gradient(cut=False), watch.gradients_seen[1]
    expected = gradient(cut=True)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert torch.allclose(found[name], right, rtol=0, atol=1e-12)
    assert any(not torch.allclose(found[n], through[n], rtol=0, atol=1e-6) for n in found)


@pytest.mark.parametrize("steps", [11, 30])
def test_segments_as_long_as_the_text_are_full_backpropagation(trainer, steps):
    stream = text_stream(steps)
    learner = make_learner(stream)
    Run(stream, learner, trainer(), Training(batch_size=ROWS, epochs=4)).go()
    net, objective = make_net(stream), objective_for("token")
    for experience in stream:
        data = experience.train
        assert isinstance(data, SegmentData)
        batch = Batch(data.x, data.y)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            objective(net(batch).logits, batch).backward()
            optimizer.step()
    for name, weight in net.state_dict().items():
        assert torch.allclose(weight, learner.net.state_dict()[name], rtol=0, atol=1e-12)
    short = text_stream(4)
    other = make_learner(short)
    Run(short, other, trainer(), Training(batch_size=ROWS, epochs=4)).go()
    assert not torch.allclose(other.net.head.linear.weight, net.head.linear.weight, atol=1e-4)


def test_resets_are_separate_documents():
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(TOKENS, (n,), generator=generator) for n in (4, 1, 6)]
    x = torch.cat(documents)
    start = torch.tensor([True, False, False, False, True, True, *[False] * 5])
    data = SegmentData(x, x, start, 1, 3)
    net, state, logits = make_net(text_stream()), None, []
    for batch in data.in_order():
        output = net(batch, state)
        state = output.state
        logits.append(output.logits)
    apart = [net(Batch(d[None], d[None])).logits for d in documents]
    assert torch.allclose(torch.cat(logits, 1), torch.cat(apart, 1), rtol=0, atol=1e-12)
    deep, batch = make_net(text_stream(), layers=2), Batch(x[None], x[None], reset=start[None])
    for cut in (0, 1, 2):  # a net that is cut knows the documents below and above the cut
        hidden, _ = deep.lower(batch, cut)
        assert torch.allclose(deep.upper(hidden, cut, batch).logits, deep(batch).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(deep(batch).logits, deep(Batch(x[None], x[None])).logits)


def test_every_experience_begins_fresh_and_no_segment_after_it_does(trainer):
    watch = Watch()
    stream = text_stream()
    watched(Run(stream, make_learner(stream, watch), trainer(), Training(batch_size=ROWS, epochs=1)), watch)
    assert [b is None for b in watch.before] == [True, False, False] * 2
    carried = [t for b in watch.before if b is not None for s in b for t in s]
    assert not any(t.requires_grad for t in carried)


def test_without_carrying_segments_are_examples_like_any_others(trainer):
    stream, watch = text_stream(), Watch()
    run = Run(stream, make_learner(stream, watch), trainer(), Training(batch_size=2, epochs=1, carry_state=False))
    run.go()
    assert run.carry is None
    assert [len(logits) for logits in watch.logits] == [2, 2, 2, 2, 1] * 2


def test_segments_of_random_length_scale_the_learning_rate(trainer):
    watch = Watch()
    stream = text_stream(steps=20, count=1200)
    training = Training(batch_size=ROWS, steps=30, vary_segments=True)
    Run(stream, make_learner(stream, watch, lr=1e-3), trainer(), training).go()
    assert len(set(watch.lengths)) > 5
    assert watch.rates == pytest.approx([1e-3 * n / 20 for n in watch.lengths])


# What must not see it -------------------------------------------------------------------------------------------------


def test_evaluation_has_a_state_of_its_own_and_leaves_that_of_the_training(trainer):
    stream, finals, tables = text_stream(starts=True), [], []
    for every in (None, 1):
        learner = make_learner(stream, Replay(capacity=6, rows=2))
        run = Run(stream, learner, trainer(), Training(batch_size=ROWS, epochs=2), Evaluation(every_n_steps=every))
        tables.append(run.go())
        finals.append(weights(learner))
    assert same(*finals)
    assert torch.equal(tables[0].R, tables[1].R)
    scores, _ = evaluate(learner, stream.experiences, carries=True)
    objective = objective_for("token")
    for score, experience in zip(scores, stream, strict=True):
        batch = whole(experience.test)  # pyright: ignore[reportArgumentType]
        total, count = objective.score(learner.net(batch).logits.detach(), batch)
        assert score == pytest.approx(float(total / count), abs=1e-12)
    parts, _ = evaluate(learner, stream.experiences, examples=ROWS, carries=True)
    assert parts != scores


def test_replayed_rows_start_fresh_and_leave_nothing_behind(trainer):
    stream = text_stream(starts=True)  # rows of 11 steps: the last segment has 3, and is padded to replayed ones of 4
    states = []
    for strategy in (None, Replay(capacity=50, rows=3)):
        watch = Watch()
        parts = {"watch": watch} if strategy is None else {"replay": strategy, "watch": watch}
        learner = make_learner(stream, Composite(parts), lr=0.0)
        watched(Run(stream, learner, trainer(), Training(batch_size=ROWS, epochs=2)), watch)
        states.append(watch)
    plain, replayed = states
    assert any(len(r) == 2 * ROWS for r in replayed.logits)
    assert any(r.shape[1] > p.shape[1] for p, r in zip(plain.logits, replayed.logits, strict=True))
    for p, r in zip(plain.logits, replayed.logits, strict=True):
        assert torch.allclose(p, r[:ROWS, : p.shape[1]], rtol=0, atol=1e-12)
    for p, r in zip(plain.before, replayed.before, strict=True):
        assert (p is None) == (r is None)
        for a, b in zip(p or (), r or (), strict=True):
            assert all(torch.allclose(s, t, rtol=0, atol=1e-12) for s, t in zip(a, b, strict=True))

    class Rows(Strategy):
        def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
            assert batch.source is None or (batch.source[:ROWS] == 0).all()
            for row in range(ROWS, len(batch)):
                alone = batch.rows(torch.tensor([row]))
                expected = learner.net(alone).logits[0]
                width = int(alone.lengths[0]) if alone.lengths is not None else len(expected)
                assert torch.allclose(output.logits[row, :width], expected[:width], rtol=0, atol=1e-12)

    learner = make_learner(stream, Composite({"replay": Replay(capacity=50, rows=3), "rows": Rows()}), lr=0.0)
    Run(stream, learner, trainer(), Training(batch_size=ROWS, epochs=2)).go()


def test_the_fisher_takes_each_segment_from_a_fresh_state():
    stream = text_stream()
    learner = make_learner(stream)
    found = fisher(learner, stream[0].train, "empirical", None, torch.Generator(), batch_size=ROWS)
    total = {n: torch.zeros_like(p) for n, p in learner.weights().items()}
    for i in range(len(stream[0].train)):
        batch = stream[0].train.batch(torch.tensor([i]))
        loss = learner.objective.losses(learner.net(batch).logits, batch).sum()
        for name, g in zip(total, torch.autograd.grad(loss, list(learner.weights().values())), strict=True):
            total[name] += g**2 / len(stream[0].train)
    assert all(torch.allclose(total[n], found[n], rtol=1e-9, atol=1e-12) for n in total)


# Kill and resume --------------------------------------------------------------------------------------------------------


KILLS = [(kill, vary) for kill in (2, 3, 5, 7, 8, 11) for vary in (False, True)]
"""After which save a run is killed: the 1st is before any step, the 7th between the experiences, the 13th the last."""
SHORT = [(2, False), (7, False), (5, True), (11, True)]


@pytest.mark.parametrize(
    ("kill", "vary"), [pytest.param(*cell, marks=() if cell in SHORT else pytest.mark.slow) for cell in KILLS]
)
def test_killed_at_any_step_and_resumed_equals_uninterrupted(trainer, tmp_path, monkeypatch, kill, vary):
    def start(folder: Path) -> Run:
        folder.mkdir(exist_ok=True)
        stream = text_stream(starts=True)
        parts = {"replay": Replay(capacity=6, rows=2), "ewc": EWC(strength=1.0, fisher="empirical", examples=3)}
        training = Training(batch_size=ROWS, steps=5, chunk=3, checkpoint_every_n_steps=1, vary_segments=vary)
        return Run(stream, make_learner(stream, Composite(parts)), trainer(), training, folder=folder)

    uninterrupted = start(tmp_path / "whole")
    table = uninterrupted.go()
    broken, saves, save = start(tmp_path / "broken"), 0, Run.save

    class Killed(BaseException):
        pass

    def dying(self: Run) -> None:
        nonlocal saves
        save(self)
        saves += 1
        if saves == kill:
            raise Killed

    monkeypatch.setattr(Run, "save", dying)
    with pytest.raises(Killed):
        broken.go()
    monkeypatch.setattr(Run, "save", save)
    state = checkpoint.load(tmp_path / "broken" / "last.ckpt")
    assert (state["carried"] is None) == (state["step"] == 0)
    resumed = start(tmp_path / "broken")
    torch.manual_seed(99)
    resumed.resume(state)
    again = resumed.go()
    assert same(weights(resumed.learner), weights(uninterrupted.learner))
    assert torch.equal(again.R, table.R)


# Refusals, and what works -------------------------------------------------------------------------------------------------


def test_a_growing_state_is_refused_and_goes_without_carrying(trainer):
    stream = text_stream()
    inputs = stream.inputs

    def learner() -> Learner:
        net = transformer(inputs, partial(Head, outputs=TOKENS), hidden=4, layers=1, heads=1)
        return Learner(net, objective_for("token"))

    with pytest.raises(StreamError, match=r"grows with every step \(\[1, 1, 1, 4\], then \[1, 1, 2, 4\]\)"):
        Run(stream, learner(), trainer(), Training(batch_size=ROWS, epochs=1))
    table = Run(stream, learner(), trainer(), Training(batch_size=ROWS, epochs=1, carry_state=False)).go()
    assert torch.isfinite(table.R).all()


def test_a_net_without_a_state_is_refused(trainer):
    stream = text_stream()
    net = make_net(stream)
    net = Net(net.embedding, [], net.head, per_step=True)
    with pytest.raises(StreamError, match="state of this net is empty"):
        Run(stream, Learner(net, objective_for("token")), trainer(), Training(batch_size=ROWS, epochs=1))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (LwF(strength=1.0), "does not go with .* its teacher"),
        (Joint(), "'joint' does not go with .* another set"),
        (Cumulative(), "another set"),
        (DER(capacity=5, alpha=0.5, beta=0.5), "answers from a carried state"),
        (CenterLoss(strength=1.0, mode="features"), "its old net"),
        (Composite({"first": Replay(capacity=5), "second": Joint()}), "'second' does not go with"),
    ],
)
def test_strategies_that_cannot_are_refused_before_training(trainer, strategy, message):
    stream = text_stream()
    with pytest.raises(StreamError, match=message):
        Run(stream, make_learner(stream, strategy), trainer(), Training(batch_size=ROWS, epochs=1))
    Run(stream, make_learner(stream), trainer(), Training(batch_size=ROWS, epochs=1, carry_state=False))


def test_a_strategy_that_does_not_say_so_is_stopped_at_its_other_training_set(trainer):
    class Other(Strategy):
        def session(self, stream: Stream, index: int, session: Any) -> Any:
            return type(session)(TensorData(stream[0].train.batch(torch.arange(3)).x, torch.zeros(3, 4).long()))

    class Dropping(Strategy):
        def batch(self, learner: Learner, batch: Batch) -> Batch:
            return batch.rows(torch.arange(2))

    stream = text_stream()
    with pytest.raises(StreamError, match="TensorData, whose examples do not follow one another"):
        Run(stream, make_learner(stream, Other()), trainer(), Training(batch_size=ROWS, epochs=1)).go()
    with pytest.raises(ValueError, match="carried for 3 rows, and the strategy gave 2"):
        Run(stream, make_learner(stream, Dropping()), trainer(), Training(batch_size=ROWS, epochs=1)).go()


def test_sizes_that_do_not_fit_are_refused(trainer):
    stream = text_stream()
    with pytest.raises(StreamError, match=r"training.batch_size: got 4, .* 3 rows"):
        Run(stream, make_learner(stream), trainer(), Training(batch_size=4, epochs=1))
    with pytest.raises(ValueError, match=r"training\.vary_segments: got true with carry_state=false"):
        Training(epochs=1, carry_state=False, vary_segments=True)
    mixed = Experience(1, "m", (), stream[0].train, TensorData(torch.zeros(2, 3).long(), torch.zeros(2, 3).long()))
    both = Stream("both", (stream[0], mixed), "domain_incremental", "token", TOKENS, vocabulary=TOKENS, per_step=True)
    with pytest.raises(StreamError, match="sets in segments and sets of whole sequences"):
        Run(both, make_learner(stream), trainer(), Training(batch_size=ROWS, epochs=1))
    plain = Stream("plain", (Experience(0, "p", (), mixed.test, mixed.test),), "domain_incremental", "token", TOKENS)
    plain = Stream(**{**vars(plain), "vocabulary": TOKENS, "per_step": True})
    with pytest.raises(StreamError, match="'plain' has no segments"):
        Run(plain, make_learner(stream), trainer(), Training(epochs=1, vary_segments=True))


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: EWC(strength=1.0, fisher="sampled", examples=4),
        lambda: MAS(strength=1.0, examples=4),
        lambda: SI(strength=1.0),
        lambda: AGEM(capacity_per_experience=4, rows=2),
        lambda: MIR(capacity=6, rows=2, candidates=4),
        lambda: Replay(capacity=6, rows=2, insert="after", forward="separate", weighting="experiences"),
    ],
    ids=["ewc", "mas", "si", "agem", "mir", "replay separate"],
)
@pytest.mark.parametrize("vary", [False, True])
def test_these_strategies_work(trainer, strategy, vary):
    stream = text_stream(starts=True, tasks=True)
    learner = make_learner(stream, strategy(), lr=0.05)
    table = Run(stream, learner, trainer(), Training(batch_size=ROWS, steps=4, vary_segments=vary)).go().all
    assert torch.isfinite(table.R).all()
    assert table.score != "accuracy"
    assert learner.steps == 8


def test_a_state_is_carried_in_bfloat16_too(trainer):
    stream, watch = text_stream(starts=True), Watch()
    learner = make_learner(stream, watch).float()
    run = Run(stream, learner, trainer(precision="bf16-mixed"), Training(batch_size=ROWS, epochs=2))
    table = watched(run, watch)
    assert torch.isfinite(table.R).all()
    assert sum(b is not None for b in watch.before) == 10
