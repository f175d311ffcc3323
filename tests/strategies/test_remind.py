"""REMIND: the front stays, the upper part learns as a plain loop says, codes are what is stored, and who must leave."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from tiny import killed_and_resumed, only
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Block, Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.per_task.masked import MaskedNet, TaskMasks
from clplat.rehearsal.class_rate import class_rate
from clplat.rehearsal.largest_first import LargestFirst
from clplat.rehearsal.quantised import DECODED, OTHER_Y, Quantised
from clplat.settings import Training
from clplat.strategies.cumulative import Cumulative
from clplat.strategies.ewc import EWC
from clplat.strategies.packnet import PackNet
from clplat.strategies.remind import Remind
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.inputs import Inputs
from clplat.streams.loader import stable_seed
from clplat.streams.order import Order

D, C, K, N, T, H = 4, 6, 3, 40, 5, 8
TRAINING = Training(batch_size=8, epochs=1, chunk=3)


def stream(tasks: bool = False, mixed: bool = False) -> Stream:
    """Two classes an experience, or all classes in every one (`mixed`)."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for k in range(K):
        y = torch.randint(0, C, (N,), generator=generator) if mixed else 2 * k + torch.arange(N) % 2
        x = torch.randn(N, T, D, generator=generator) + 0.7 * y[:, None, None]
        label = k if tasks else None
        data = TensorData(x, y, task=label)
        classes = tuple(range(C)) if mixed else (2 * k, 2 * k + 1)
        parts.append(Experience(k, str(k), classes, train=data, test=data, task_label=label))
    scenario = "task_incremental" if tasks else "domain_incremental" if mixed else "class_incremental"
    return Stream("tiny", tuple(parts), scenario, "class", C, features=D, length=T)


def tagging(ragged: bool = True) -> Stream:
    """A tag at every step of sequences of 3 to 6 steps."""
    generator, parts = torch.Generator().manual_seed(6), []
    for k in range(K):
        lengths = torch.randint(3, 7, (N,), generator=generator) if ragged else torch.full((N,), 6)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        y = torch.randint(0, C, (int(offsets[-1]),), generator=generator)
        data = RaggedData(torch.randn(len(y), D, generator=generator) + 0.5 * y[:, None], offsets, y, per_step=True)
        parts.append(Experience(k, str(k), (), train=data, test=data))
    return Stream("tags", tuple(parts), "domain_incremental", "tag", C, features=D, per_step=True)


def learner(
    strategy: Strategy | None = None, of: Stream | None = None, kind: str = "lstm", sgd: float = 0.1, **options: Any
) -> Learner:
    torch.manual_seed(1)
    of = stream() if of is None else of
    head: Callable[[int], Head] = partial(Head, outputs=C)
    if of.scenario == "task_incremental":
        head = partial(TaskHead, outputs=C, tasks=[e.classes for e in of])
    inputs = Inputs(D, None, of.length, of.per_step)
    if kind == "lstm":
        net = recurrent(inputs, head, mixer=LSTM, hidden=H, layers=2)
    elif kind == "transformer":
        net = transformer(inputs, head, hidden=H, layers=2, heads=2)
    else:
        net = mlp(inputs, head, hidden=[H, H])
    optimizer = options.pop("optimizer", partial(torch.optim.SGD, lr=sgd))
    return Learner(net, objective_for(of.target), strategy, optimizer, **options)


def remind(**options: Any) -> Remind:
    return Remind(**dict[str, Any](capacity=60, parts=4, rows=6, fit_vectors=1000) | options)


def masked() -> Learner:
    made = learner()
    made.net = MaskedNet(made.net, TaskMasks())
    return made


def begun(strategy: Remind, of: Stream | None = None, **options: Any) -> Learner:
    """A learner whose base is done, without training, at the start of experience 1."""
    of = stream() if of is None else of
    made = learner(strategy, of, **options)
    strategy.setup(made, of)
    made.begin(of[0])
    made.end(of[0])
    made.begin(of[1])
    return made


def trained(trainer: Callable, strategy: Strategy | None, of: Stream | None = None, **options: Any) -> Learner:
    of = stream() if of is None else of
    made = learner(strategy, of, **options)
    Run(of, made, trainer(), TRAINING).go()
    return made


def quantised(made: Learner) -> Quantised:
    assert isinstance(made.net, Quantised)
    return made.net


def some(of: Stream | None = None, k: int = 1, count: int = 7) -> Batch:
    return (stream() if of is None else of)[k].train.batch(torch.arange(count))


class Watched(Remind):
    """Keeps what the net is after the base, and the learning rate of every later step."""

    base: dict[str, Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rates: list[float] = []
        self.shown: list[Tensor] = []

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        super().after_experience(learner, experience)
        if experience.index == 0:
            self.base = {k: v.clone() for k, v in learner.net.state_dict().items()}

    def after_step(self, learner: Learner, batch: Batch, output: Any) -> None:
        if self._fresh is not None:
            assert learner.optimizer is not None
            self.rates.append(learner.optimizer.param_groups[0]["lr"])
            self.shown.append(self._fresh.y)
        super().after_step(learner, batch, output)


# The base and the front


CASES = {"remind": Case({"capacity": 40, "rows": 8, "parts": 4, "every": 5}, refused={"replay": "keeps raw rows"})}


@pytest.mark.parametrize("kind", ["lstm", "transformer", "mlp"])
def test_the_base_is_trained_as_usual_and_then_only_what_lies_above(trainer: Callable, kind: str) -> None:
    watched = Watched(capacity=60, parts=4, rows=6)
    made = trained(trainer, watched, kind=kind)
    plain = learner(kind=kind)
    of = stream()
    Run(replace(of, experiences=of.experiences[:1]), plain, trainer(), TRAINING).go()
    for name, value in plain.net.state_dict().items():
        assert torch.equal(watched.base[name], value), name
    after = made.net.state_dict()
    below = {name for name in after if name.startswith(("embedding", "blocks.0.", "quantizer"))}
    assert below
    assert all(torch.equal(after[name], watched.base[name]) for name in below)
    assert all(not torch.equal(after[name], watched.base[name]) for name in after.keys() - below)
    assert not any(name in below for name in made.weights())


class Normed(Block):
    """A block with buffers that training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(D, H), nn.BatchNorm1d(H), nn.Dropout(0.5)

    def forward(self, hidden: Tensor, state: Any = None, reset: Any = None, lengths: Any = None) -> Any:
        return self.dropout(self.norm(self.linear(hidden).transpose(1, 2)).transpose(1, 2)), None


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_nothing_of_the_front_moves_not_by_decay_momentum_or_running_means(trainer: Callable, state: str) -> None:
    watched = Watched(capacity=60, parts=4, rows=6)
    torch.manual_seed(1)
    rest = recurrent(Inputs(H), partial(Head, outputs=C), mixer=LSTM, hidden=H)
    blocks = [Normed(), *(block for block in rest.blocks if isinstance(block, Block))]
    net = Net(nn.Identity(), blocks, rest.head)
    adam = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
    made = Learner(net, objective_for("class"), watched, adam, optimizer_state=state)
    Run(stream(), made, trainer(), TRAINING).go()
    front = {k: v for k, v in made.net.state_dict().items() if k.startswith("blocks.0.")}
    assert {"blocks.0.norm.running_mean", "blocks.0.norm.num_batches_tracked"} < set(front)
    assert all(torch.equal(v, watched.base[k]) for k, v in front.items())
    assert int(front["blocks.0.norm.num_batches_tracked"]) == 5  # those of the base
    made.train()
    assert not any(m.training for part in quantised(made).front() for m in part.modules())
    assert quantised(made).blocks[1].training


def test_several_base_experiences_are_trained_together(trainer: Callable) -> None:
    strategy = remind(base_experiences=2, base_passes=3, capacity=200, rows=0)
    of = stream()
    made = learner(strategy, of)
    run = Run(of, made, trainer(), TRAINING)
    run.go()
    steps = -(-3 * 2 * N // 8)
    assert made.steps == steps + N // 8
    assert run.results.R[0].equal(run.results.R[1])  # nothing is trained in experience 1
    assert not run.results.R[1].equal(run.results.R[2])
    assert len(strategy.store) == 3 * N
    assert strategy.store.y is not None
    assert strategy.store.y[: 3 * N].bincount().tolist() == [20] * 6
    assert dict(strategy.met) == {4: 20, 5: 20}


def test_a_base_of_all_experiences_is_refused_in_one_line(trainer: Callable) -> None:
    of = stream()
    with pytest.raises(ValueError, match="base_experiences: got 3, the stream has 3 and none would be left"):
        Run(of, learner(remind(base_experiences=len(of)), of), trainer(), TRAINING)


# What is stored


def test_the_store_holds_the_codes_of_the_base_and_then_of_what_was_learned() -> None:
    strategy = remind(capacity=100)
    made = begun(strategy)
    net, store = quantised(made), strategy.store
    whole = stream()[0].train.batch(torch.arange(N))
    codes = net.quantizer.encode(net.lower(whole, 1)[0])
    assert store.x is not None
    assert codes.dtype == store.x.dtype == torch.uint8
    assert store.x[: len(store)].shape == (N, T, 4)
    rows = sorted(map(repr, zip(store.x[:N].tolist(), store.y[:N].tolist(), strict=True)))  # pyright: ignore[reportOptionalSubscript]  # targets come with inputs
    assert rows == sorted(map(repr, zip(codes.tolist(), whole.y.tolist(), strict=True)))
    batch = some()
    only(made).batch(made, batch)
    assert len(store) == N  # the rows of a step enter after it
    only(made).after_step(made, batch, made(batch))
    assert len(store) == N + 7
    fresh = net.quantizer.encode(net.lower(batch, 1)[0])
    assert torch.equal(store.x[N : N + 7], fresh)


def test_the_quantiser_is_fitted_to_valid_steps_only() -> None:
    of = tagging()
    strategy = remind(policy="reservoir", final=1, fit_vectors=10**6, codes=256, iterations=1)
    made = begun(strategy, of)
    net = quantised(made)
    total = 0
    for n in range(N):
        batch = of[0].train.batch(torch.tensor([n]))
        total += batch.x.shape[1]
        assert batch.lengths is not None
        assert batch.lengths.item() == batch.x.shape[1]
    assert total < 256  # so that every vector is a centroid, and only those of valid steps are
    assert strategy.quantizer.codebooks is not None
    assert strategy.quantizer.codebooks.shape == (4, total, H // 4)
    batch = of[0].train.batch(torch.arange(N))
    hidden = net.lower(batch, 1)[0]
    valid = batch.valid()
    torch.testing.assert_close(strategy.quantizer.decode(strategy.quantizer.encode(hidden))[valid], hidden[valid])


@pytest.mark.parametrize(("kind", "item"), [("lstm", T * 4 + 8), ("mlp", 4 + 8)])
def test_bytes_are_codes_targets_and_centroids(trainer: Callable, kind: str, item: int) -> None:
    strategy = remind(capacity=30, codes=16)
    trained(trainer, strategy, kind=kind)
    assert strategy.stored_bytes() == 30 * item + 16 * H * 4


def test_the_store_is_never_overfull_and_the_largest_class_shrinks_first() -> None:
    store = LargestFirst(20, seed=0)
    sizes: Counter[int] = Counter()
    labels = [*[0] * 15, *[1] * 3, *[2] * 9, *[3] * 20, *[1] * 30]
    for label in labels:
        store.insert(Batch(torch.zeros(1, 2), torch.tensor([label])))
        sizes[label] += 1
        if sum(sizes.values()) > 20:
            largest = max(sizes.values())
            sizes[next(c for c in sizes if sizes[c] == largest)] -= 1
        assert store.y is not None
        assert Counter(store.y[: len(store)].tolist()) == +sizes
        assert len(store) == sum(sizes.values()) <= 20
    assert sorted(sizes.values()) == [5, 5, 5, 5]


def test_small_classes_stay_whole_and_no_room_is_left_empty() -> None:
    store = LargestFirst(20, seed=0)
    store.insert(Batch(torch.zeros(2, 1), torch.ones(2).long()))
    store.insert(Batch(torch.zeros(500, 1), torch.zeros(500).long()))
    assert store.y is not None
    assert store.y.bincount().tolist() == [18, 2]


def test_batches_enter_as_their_rows_would_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.arange(300.0)[:, None], torch.randint(0, 5, (300,), generator=generator)
    one, many = LargestFirst(37, seed=4), LargestFirst(37, seed=4)
    for n in range(300):
        one.insert(Batch(x[n : n + 1], y[n : n + 1]))
    for rows in torch.arange(300).split(64):
        many.insert(Batch(x[rows], y[rows]), y[rows])
    assert one.x is not None and many.x is not None
    assert torch.equal(one.x, many.x)


def test_every_row_of_the_largest_class_is_as_likely_to_go() -> None:
    gone, rounds = np.zeros(6), 3000
    for seed in range(rounds):
        store = LargestFirst(7, seed)
        store.insert(Batch(torch.arange(8.0)[:, None], torch.tensor([1, 1, 0, 0, 0, 0, 0, 0])))
        assert store.x is not None
        left = set(store.x.flatten().int().tolist())
        assert {0, 1} < left  # the smaller class is safe
        gone[[n - 2 for n in range(2, 8) if n not in left]] += 1
    assert gone.sum() == rounds
    expected = rounds / 6
    assert float(((gone - expected) ** 2 / expected).sum()) < 20.5  # chi-square, 5 degrees of freedom: p = 0.001


# What a step does


def test_without_replay_it_is_descent_on_quantised_features(trainer: Callable) -> None:
    watched = Watched(capacity=60, parts=4, rows=0, mixup=0.0, final=1.0)
    made = trained(trainer, watched)
    plain = learner()
    front = {k: v for k, v in watched.base.items() if not k.startswith("quantizer")}
    plain.net.load_state_dict(front)
    quantizer = watched.quantizer
    upper = [*plain.net.blocks[1].parameters(), *plain.net.head.parameters()]
    for k in (1, 2):
        optimizer = torch.optim.SGD(upper, lr=0.1)
        loader = stream()[k].train.training(Order(8, steps=N // 8, seed=0, experience=k))
        for batch in (batch for chunk in loader for batch in chunk):
            with torch.no_grad():
                hidden = quantizer.decode(quantizer.encode(plain.net.lower(batch, 1)[0]))
            optimizer.zero_grad()
            F.cross_entropy(plain.net.upper(hidden, 1, batch).logits, batch.y).backward()
            optimizer.step()
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, made.net.state_dict()[name]), name


def test_answers_come_from_quantised_features() -> None:
    made = begun(remind(codes=8))
    net, batch = quantised(made), some()
    hidden = net.lower(batch, 1)[0]
    decoded = net.quantizer.decode(net.quantizer.encode(hidden))
    assert not torch.equal(hidden, decoded)
    assert torch.equal(made(batch).logits, net.upper(decoded, 1, batch).logits)
    assert not torch.equal(made(batch).logits, net.upper(hidden, 1, batch).logits)
    assert len(net(batch).state) == 2


def test_a_step_without_mixing_takes_the_mean_over_current_and_replayed_rows() -> None:
    strategy = remind(mixup=0.0)
    made, batch = begun(strategy), some()
    assert "objective" not in strategy.claims
    state = strategy.store.get_extra_state()
    given = strategy.batch(made, batch)
    strategy.store.set_extra_state(state)
    drawn = strategy.store.sample(6)
    net = quantised(made)
    assert len(given) == 7 + 6
    assert bool(given.extra[DECODED].all())
    assert torch.equal(given.y, torch.cat([batch.y, drawn.y]))
    current = net.quantizer.encode(net.lower(batch, 1)[0])
    assert torch.equal(given.x, net.quantizer.decode(torch.cat([current, drawn.x])))
    assert given.source is not None
    assert given.source.tolist() == [0] * 7 + [1] * 6
    torch.testing.assert_close(made(given).logits[:7], made(batch).logits)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_a_mixed_step_against_a_naive_sum(alpha: float) -> None:
    strategy = remind(mixup=alpha)
    made, batch = begun(strategy), some()
    assert "objective" in strategy.claims
    state = strategy.store.get_extra_state()
    given = strategy.batch(made, batch)
    strategy.store.set_extra_state(state)
    drawn = strategy.store.sample(12)
    net = quantised(made)
    lam = float(np.random.default_rng(stable_seed(0, "mixup", made.steps)).beta(alpha, alpha))
    decoded = net.quantizer.decode(drawn.x)
    mixed = lam * decoded[:6] + (1 - lam) * decoded[6:]
    current = net.quantizer.decode(net.quantizer.encode(net.lower(batch, 1)[0]))
    logits = net.upper(torch.cat([current, mixed]), 1, replace(batch, lengths=None)).logits
    losses = [F.cross_entropy(logits[n], batch.y[n]) for n in range(7)]
    for n in range(6):
        a, b = (F.cross_entropy(logits[7 + n], drawn.y[n + shift]) for shift in (0, 6))
        losses.append(lam * a + (1 - lam) * b)
    right = torch.stack(losses).mean()
    value = strategy.objective(made, given, made(given))
    torch.testing.assert_close(value, right)
    weights = list(made.weights().values())
    for got, expected in zip(
        torch.autograd.grad(value, weights), torch.autograd.grad(right, weights, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_the_shares_follow_the_beta_distribution_one_a_step() -> None:
    strategy = remind(mixup=0.5)
    made, shares = begun(strategy), []
    for _ in range(400):
        strategy.batch(made, some(count=1))
        shares.append(strategy._share)
        made.steps += 1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(0.125, abs=0.02)  # of Beta(1/2, 1/2)
    assert len(set(shares)) == 400


def test_a_pair_of_different_lengths_is_cropped_to_the_shorter() -> None:
    of = tagging()
    strategy = remind(policy="reservoir", final=1, rows=10, mixup=1.0, capacity=40)
    made, batch = begun(strategy, of), some(of)
    state = strategy.store.get_extra_state()
    given = strategy.batch(made, batch)
    strategy.store.set_extra_state(state)
    drawn = strategy.store.sample(20)
    assert drawn.lengths is not None and given.lengths is not None and batch.lengths is not None
    assert bool((drawn.lengths[:10] != drawn.lengths[10:]).any())
    assert given.lengths.tolist() == batch.lengths.tolist() + [
        min(int(a), int(b)) for a, b in zip(drawn.lengths[:10], drawn.lengths[10:], strict=True)
    ]
    output = made(given)
    value = strategy.objective(made, given, output)
    totals, count = [0.0, 0.0], 0
    for n in range(17):
        for t in range(int(given.lengths[n])):
            count += 1
            for side, y in enumerate((given.y, given.extra[OTHER_Y])):
                totals[side] += float(F.cross_entropy(output.logits[n, t], y[n, t]))
    lam = strategy._share
    assert float(value) == pytest.approx((lam * totals[0] + (1 - lam) * totals[1]) / count, rel=1e-5)


@pytest.mark.parametrize("how", ["task", "mask"])
def test_only_rows_that_compete_with_one_another_are_mixed(how: str) -> None:
    of = stream(tasks=how == "task")
    strategy = remind(mixup=1.0, rows=20, capacity=80)
    made = begun(strategy, of, **({"logit_mask": "experience"} if how == "mask" else {}))
    for k in (0, 1):
        batch = some(of, k, 20)
        strategy.batch(made, batch)
        strategy.after_step(made, batch, made(batch))
    given = strategy.batch(made, some(of))
    group, other = given.y[7:] // 2, given.extra[OTHER_Y][7:] // 2
    assert torch.equal(group, other)
    assert len(group.unique()) == 2
    mixed = given.y[7:] != given.extra[OTHER_Y][7:]
    assert bool(mixed.any())
    loss = strategy.objective(made, given, made(given))
    assert float(loss) < 10  # no row is asked for a class that it is not offered


def test_the_first_steps_replay_what_there_is() -> None:
    strategy = remind(capacity=5, rows=50, mixup=0.1)
    made = begun(strategy)
    assert len(strategy.batch(made, some(count=1))) == 1 + 2  # two pairs of the five
    alone = remind(capacity=1, rows=50, mixup=0.1)
    assert len(alone.batch(begun(alone), some(count=1))) == 1


@pytest.mark.parametrize("policy", ["class_balanced", "reservoir"])
def test_rows_null_replays_as_many_as_the_batch_has(policy: str) -> None:
    strategy = remind(rows=None, policy=policy)
    assert len(strategy.batch(begun(strategy), some(count=9))) == 18


# The rate


def test_the_rate_of_a_class_in_closed_form() -> None:
    gamma = 0.01 ** (100 / 1300)
    assert gamma == pytest.approx(0.7017, abs=1e-4)
    for seen in range(0, 1301, 50):
        assert 0.1 * class_rate(seen, 0.01, 1300, 100) == pytest.approx(0.1 * gamma ** (seen // 100))
    assert 0.1 * class_rate(1300, 0.01, 1300, 100) == pytest.approx(0.001)
    assert class_rate(10**6, 0.01, 1300, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_rates_of_interleaved_classes_are_set_before_each_step(
    trainer: Callable, size: int, scheduled: bool
) -> None:
    of = stream(mixed=True)
    watched = Watched(capacity=60, parts=4, rows=2, final=0.1, final_after=12, every=3)
    slope = (lambda steps: lambda step: 1 / (1 + step)) if scheduled else None
    made = learner(watched, of, sgd=0.2, schedule=slope)
    Run(of, made, trainer(), Training(batch_size=size, epochs=1, chunk=3)).go()
    assert len(watched.rates) == 2 * -(-N // size)
    seen: Counter[int] = Counter()
    for number, (rate, classes) in enumerate(zip(watched.rates, watched.shown, strict=True)):
        single = []
        for label in classes.tolist():
            single.append(max(0.1, (0.1 ** (3 / 12)) ** (seen[label] // 3)))
            seen[label] += 1
        factor = 1 / (1 + number % -(-N // size)) if scheduled else 1.0
        assert rate == pytest.approx(0.2 * factor * sum(single) / len(single)), number
    assert len(set(watched.rates)) > 4
    assert watched.met == seen


def test_the_base_has_the_ordinary_rate(trainer: Callable) -> None:
    assert remind().rate(3, 10, some(), 0.5) == 0.5


# Runs


def assert_resumed_exactly(
    trainer: Callable, tmp_path: Path, make: Callable[[], tuple[Stream, Learner]], at: int
) -> None:
    often = Training(batch_size=8, epochs=1, chunk=3, checkpoint_every_n_steps=1)

    def start(folder: Path | None) -> Run:
        torch.manual_seed(0)
        return Run(*make(), trainer(), often, folder=folder)

    whole = start(None)
    expected = whole.go()
    resumed = killed_and_resumed(start, tmp_path, at)
    assert torch.equal(resumed.results.R, expected.R)
    state = resumed.learner.state_dict()
    for name, value in whole.learner.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("at", [4, 8, 11])
def test_killed_and_resumed_with_a_kept_optimiser_on_ragged_tags(trainer: Callable, tmp_path: Path, at: int) -> None:
    def make() -> tuple[Stream, Learner]:
        strategy = remind(policy="reservoir", final=1, mixup=0.3)
        adam = partial(torch.optim.Adam, lr=1e-2)
        return tagging(), learner(strategy, tagging(), "transformer", optimizer=adam, optimizer_state="kept")

    assert_resumed_exactly(trainer, tmp_path, make, at)


@pytest.mark.parametrize("at", [9, 12])
def test_killed_and_resumed_with_rates_by_class(trainer: Callable, tmp_path: Path, at: int) -> None:
    def make() -> tuple[Stream, Learner]:
        return stream(mixed=True), learner(remind(capacity=30, final_after=6, every=2), stream(mixed=True))

    assert_resumed_exactly(trainer, tmp_path, make, at)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_any_cut_of_any_learner(trainer: Callable, kind: str, cut: int) -> None:
    strategy = remind(cut=cut)
    if kind == "lstm" and cut == 0:
        with pytest.raises(ValueError, match="cut: got 0, nothing with weights lies below"):
            strategy.setup(learner(strategy), stream())
        return
    made = trained(trainer, strategy, kind=kind)
    below = ("embedding", *(f"blocks.{i}." for i in range(cut)))
    assert {n for n, p in made.net.named_parameters() if not p.requires_grad} == {
        n for n, _ in made.net.named_parameters() if n.startswith(below)
    }
    assert all(bool(torch.isfinite(p).all()) for p in made.net.parameters())


def test_one_at_a_time_it_keeps_what_finetuning_forgets(trainer: Callable) -> None:
    of = stream()
    one = Training(batch_size=1, epochs=1)
    ends = []
    for strategy in (None, remind(rows=10, base_passes=10, capacity=120, final=0.5, final_after=20, every=5)):
        made = learner(strategy, of)
        ends.append(Run(of, made, trainer(), one).go().R[-1])
    assert float(ends[0][:2].mean()) < 0.3
    assert float(ends[1].mean()) > float(ends[0].mean()) + 0.1


def test_a_copy_of_the_net_is_quantised_too() -> None:
    made = begun(remind())
    twin = copy.deepcopy(made.net)
    assert torch.equal(twin(some()).logits, made.net(some()).logits)


# Who must leave


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, r"capacity: got 0, it must be at least 1"),
        ({"cut": -1}, r"cut: got -1"),
        ({"rows": -1}, r"rows: got -1, it must be at least 0"),
        ({"mixup": -0.1}, r"mixup: got -0.1"),
        ({"mixup": float("nan")}, r"mixup: got nan"),
        ({"final": 0.0}, r"final: got 0.0, it must be above 0"),
        ({"final": 1.5}, r"final: got 1.5"),
        ({"every": 0}, r"every: got 0"),
        ({"base_experiences": 0}, "base_experiences: got 0"),
        ({"policy": "ring"}, "got 'ring', allowed are 'class_balanced', 'reservoir'"),
        ({"codes": 300}, r"codes: got 300, it must lie in 2\.\.256"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remind(**options)


def test_what_does_not_fit_the_learner_is_refused() -> None:
    with pytest.raises(ValueError, match="cut: got 3, the net has 2 blocks"):
        remind(cut=3).setup(learner(), stream())
    with pytest.raises(ValueError, match=r"policy=reservoir and strategy\.remind\.final=1"):
        remind().setup(learner(of=tagging()), tagging())
    with pytest.raises(ValueError, match="parts: got 3, vectors of width 8 can be cut into 1, 2, 4, 8 parts"):
        remind(parts=3).setup(learner(), stream())


def test_partners_that_cannot_be_are_refused() -> None:
    for partner, message in (
        (Replay(capacity=5), "remind trains on stored codes in place of inputs, other keeps raw rows of inputs"),
        (Cumulative(), "each chooses what an experience is trained on"),
        (PackNet(), "other gives each task weights of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            Composite({"remind": remind(), "other": partner})
        with pytest.raises(ValueError, match="other and remind cannot be used"):
            Composite({"other": partner, "remind": remind()})
    Composite({"remind": remind(), "ewc": EWC(1.0)})
    with pytest.raises(ValueError, match="net of class MaskedNet, whose forward is its own"):
        remind().setup(masked(), stream())
