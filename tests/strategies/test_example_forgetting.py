"""Example forgetting: known sequences, a naive count over a whole run, and the buffer that it chooses for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import Case
from hydra import compose, initialize_config_module
from tiny import Killed
from torch import Tensor

from clplat import checkpoint
from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Output
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.rehearsal.example_forgetting import NEVER, MostForgotten, Presentations, answered_right, forgetting_scores
from clplat.report.summary import Names
from clplat.settings import Training
from clplat.strategies.cumulative import Cumulative
from clplat.strategies.example_forgetting import ExampleForgetting
from clplat.strategies.forgetting_replay import ForgettingReplay
from clplat.strategies.joint import Joint
from clplat.strategies.rehearsal_budget import RehearsalBudget
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy
from clplat.streams.experience import UNSCORED, Batch
from clplat.streams.inputs import Inputs
from clplat.train import train

K, N, D, C = 3, 40, 3, 6
stream = partial(tiny.stream, features=3, shift=0.3, alternating=True)  # hard enough that examples are forgotten


def learner(strategy: Strategy | None, dropout: float = 0.2) -> Learner:
    return tiny.learner(strategy, stream(), lr=0.5, dropout=dropout)


class Naive(Strategy):
    """The history of every example of every experience, as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[tuple[int, int], list[bool]] = {}

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        assert learner.experience is not None
        assert batch.index is not None
        right = output.logits.argmax(-1) == batch.y
        for row in range(len(batch)):
            if batch.source is None or int(batch.source[row]) == 0:
                key = (learner.experience.index, int(batch.index[row]))
                self.history.setdefault(key, []).append(bool(right[row]))


def counted(history: list[bool]) -> tuple[int, int, int, int]:
    """Events, first learned, presentations, right at last."""
    events = sum(a and not b for a, b in pairwise(history))
    return events, history.index(True) if True in history else -1, len(history), int(history[-1])


def presented(sequences: list[str], order: Callable[[int], Tensor] | None = None) -> Presentations:
    """Example n is answered as `sequences[n]` says, all once a pass."""
    found = Presentations()
    found.begin(len(sequences))
    for k in range(len(sequences[0])):
        at = torch.arange(len(sequences)) if order is None else order(k)
        right = torch.tensor([sequences[n][k] == "1" for n in at.tolist()])
        for part in at.split(2):
            rows = torch.isin(at, part)
            found.observe(Batch(torch.zeros(len(part), 1), torch.zeros(len(part)), index=at[rows]), right[rows])
    return found


SEQUENCES = ["011010", "000000", "111111", "101010", "000001"]


CASES = {
    "example_forgetting": Case(off={}),
    "forgetting_replay": Case({"capacity": 12, "rows": 8}, off={"capacity": 0}),
}


def test_known_sequences() -> None:
    found = presented(SEQUENCES).compact()
    assert found["events"].tolist() == [2, 0, 0, 3, 0]
    assert found["first"].tolist() == [1, NEVER, 0, 0, 5]
    assert found["shown"].tolist() == [6] * 5
    assert found["last"].tolist() == [False, False, True, False, True]
    assert presented(SEQUENCES).scores().tolist() == [2, 6, 0, 3, 0]  # never learned: as often as shown
    assert {name: t.dtype for name, t in found.items()} == {
        "events": torch.uint16,
        "first": torch.uint16,
        "shown": torch.uint16,
        "last": torch.bool,
    }
    assert sum(t.element_size() for t in found.values()) == 7


def test_the_order_of_batches_does_not_change_counts() -> None:
    def order(k: int) -> Tensor:
        return torch.randperm(len(SEQUENCES), generator=torch.Generator().manual_seed(k))

    assert all(torch.equal(a, b) for a, b in zip(
        presented(SEQUENCES).compact().values(), presented(SEQUENCES, order).compact().values(), strict=True
    ))  # fmt: skip


def test_rows_that_are_not_of_the_current_set_do_not_count() -> None:
    found = Presentations()
    found.begin(3)
    batch = Batch(
        torch.zeros(5, 1),
        torch.zeros(5),
        index=torch.tensor([0, 1, 1, -1, 7]),
        source=torch.tensor([0, 1, 0, 0, 0], dtype=torch.uint8),
    )
    found.observe(batch, torch.tensor([True, True, False, True, True]))
    assert found.compact()["shown"].tolist() == [1, 1, 0]
    assert found.compact()["last"].tolist() == [True, False, False]
    found.observe(Batch(torch.zeros(2, 1), torch.zeros(2)), torch.tensor([True, True]))  # no numbers
    assert found.compact()["shown"].tolist() == [1, 1, 0]
    found.begin(3)  # twice is once
    assert found.compact()["shown"].tolist() == [1, 1, 0]
    found.clear()
    with pytest.raises(ValueError, match="No set is followed"):
        found.scores()


def test_large_counts_saturate() -> None:
    found = Presentations()
    found.begin(1)
    assert found.events is not None
    assert found.shown is not None
    found.events[0], found.shown[0] = 70000, 140000
    assert found.compact()["events"].tolist() == [NEVER]
    found.observe(Batch(torch.zeros(1, 1), torch.zeros(1), index=torch.tensor([0])), torch.tensor([True]))
    assert found.compact()["first"].tolist() == [NEVER - 1]  # learned, though late
    assert forgetting_scores(*found.compact().values()).tolist() == [NEVER]


@pytest.mark.parametrize("partner", ["none", "replay", "budget"])
def test_a_run_against_a_naive_count(partner: str, trainer: Callable) -> None:
    partners: dict[str, dict[str, Strategy]] = {
        "none": {},
        "replay": {"replay": Replay(capacity=20)},
        "budget": {"budget": RehearsalBudget(10)},
    }
    naive, observer = Naive(), ExampleForgetting()
    made = learner(Composite({**partners[partner], "observer": observer, "naive": naive}))
    Run(stream(), made, trainer(), Training(batch_size=8, epochs=6)).go()
    found = observer.report()
    assert len(found["events"]) == K * N
    shown = found["presentations"] > 0
    keys = list(zip(found["experience"][shown].tolist(), found["example"][shown].tolist(), strict=True))
    assert set(keys) == set(naive.history) == {(k, n) for k in range(K) for n in range(N)}
    names = ("events", "first_learned", "presentations", "right_at_last")
    rows = list(zip(*(found[n][shown].tolist() for n in names), strict=True))
    assert rows == [counted(naive.history[key]) for key in keys]
    assert sum(events for events, *_ in rows) > 20  # something was forgotten
    for k in range(K):
        histories = [counted(h) for (e, _), h in naive.history.items() if e == k]
        good = sum(events == 0 and first >= 0 for events, first, *_ in histories)
        assert float(found["unforgettable"][k]) == pytest.approx(good / len(histories))


@pytest.mark.parametrize("kill", [7, 22])
def test_killed_in_an_experience_the_last_answers_are_kept(kill: int, trainer: Callable, tmp_path: Path) -> None:
    class Dying(Run):
        def save(self) -> None:
            super().save()
            if self.learner.steps == kill:
                raise Killed

    def start(kind: type[Run]) -> tuple[Run, ExampleForgetting]:
        observer = ExampleForgetting()
        often = Training(batch_size=8, epochs=3, chunk=4, checkpoint_every_n_steps=1)
        return kind(stream(), learner(observer), trainer(), often, folder=tmp_path), observer

    run, expected = start(Run)
    run.go()
    with pytest.raises(Killed):
        start(Dying)[0].go()
    resumed, got = start(Run)
    resumed.resume(checkpoint.load(tmp_path / "last.ckpt"))
    resumed.go()
    assert all(torch.equal(a, b) for a, b in zip(expected.report().values(), got.report().values(), strict=True))


def test_it_changes_nothing_and_keeps_seven_bytes_an_example(trainer: Callable) -> None:
    plain, observed = (learner(strategy) for strategy in (None, ExampleForgetting()))
    for made in (plain, observed):
        torch.manual_seed(2)
        Run(stream(), made, trainer(), Training(batch_size=8, epochs=2)).go()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), observed.parameters(), strict=True))
    assert observed.strategy.stored_bytes() == K * (7 * N + 8)  # and where each experience ends


def test_behind_cumulative_and_joint_it_follows_the_whole_set(trainer: Callable) -> None:
    for maker, sizes in ((Cumulative, [N, 2 * N, 3 * N]), (Joint, [3 * N, 0, 0])):
        observer = ExampleForgetting()
        made = learner(Composite({"all": maker(), "observer": observer}))
        Run(stream(), made, trainer(), Training(batch_size=8, epochs=2)).go()
        found = observer.report()
        assert torch.bincount(found["experience"], minlength=K).tolist() == sizes
        assert set(found["presentations"].tolist()) == {2}
    assert ExampleForgetting().report() == {}


def test_right_answers_by_kind() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]], [[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]]])  # answers 0 1 0
    y = torch.tensor([[0, 1, 1], [0, 0, UNSCORED]])
    batch = Batch(torch.zeros(2, 3, 4), y)
    for kind in ("tag", "token"):
        objective = objective_for(kind)
        assert answered_right(objective, logits, batch).tolist() == [False, False]
        assert answered_right(objective, logits, batch, 0.6).tolist() == [True, False]
        assert answered_right(objective, logits, batch, 0.5).tolist() == [True, True]
    short = Batch(torch.zeros(2, 3, 4), y, lengths=torch.tensor([2, 1]))
    assert answered_right(objective_for("tag"), logits, short).tolist() == [True, True]
    bits = Batch(torch.zeros(1, 2, 4), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    answers = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])
    assert answered_right(objective_for("bits"), answers, bits).tolist() == [False]
    assert answered_right(objective_for("bits"), answers, bits, 0.75).tolist() == [True]
    masked = Batch(bits.x, bits.y, mask=torch.tensor([[True, False]]))
    assert answered_right(objective_for("bits"), answers, masked).tolist() == [True]
    plain = Batch(torch.zeros(2, 3), torch.tensor([1, 0]))
    assert answered_right(objective_for("class"), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), plain).tolist() == [
        True,
        False,
    ]


def test_real_values_are_refused() -> None:
    net = mlp(Inputs(features=D, length=0), partial(Head, outputs=1), hidden=[])
    made = Learner(net, objective_for("value"), ExampleForgetting())
    with pytest.raises(ValueError, match="Regression does not define right and wrong answers"):
        made.strategy.setup(made, stream())


@pytest.mark.parametrize("most", [True, False])
def test_the_buffer_keeps_the_extremes_of_each_class(most: bool) -> None:
    buffer = MostForgotten(12, most=most)
    generator = torch.Generator().manual_seed(0)
    offered: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for labels in ([0, 1], [2]):
        y = torch.tensor(labels).repeat(15)
        scores = torch.randint(0, 50, (len(y),), generator=generator)
        for label, score in zip(y.tolist(), scores.tolist(), strict=True):
            offered[label].append(score)
        buffer.insert_scored(Batch(scores[:, None].float(), y, index=torch.arange(len(y))), scores)
    held = buffer.sample(12)
    for label, scores in offered.items():
        kept = held.x[held.y == label][:, 0].int().tolist()
        assert sorted(kept, reverse=most) == sorted(scores, reverse=most)[:4]


def test_ties_are_broken_at_random_and_large_scores_kept() -> None:
    x, y = torch.arange(100.0)[:, None], torch.zeros(100, dtype=torch.int64)
    held = []
    for seed in (0, 1):
        buffer = MostForgotten(5, seed=seed)
        buffer.insert_scored(Batch(x, y), torch.zeros(100))
        held.append(set(buffer.sample(5).x[:, 0].int().tolist()))
    assert held[0] != held[1]
    buffer = MostForgotten(2)
    buffer.insert_scored(Batch(x, y), torch.arange(100) * 10**6)  # beyond 16 bits all are equal
    assert 0 not in buffer.sample(2).x[:, 0].int().tolist()


@pytest.mark.parametrize("keep", ["most", "least"])
def test_replay_holds_what_a_naive_count_would_choose(keep: str, trainer: Callable) -> None:
    naive, replay = Naive(), ForgettingReplay(capacity_per_class=5, capacity=None, rows=4, keep=keep)
    made = learner(Composite({"replay": replay, "naive": naive}))
    data = stream()
    Run(data, made, trainer(), Training(batch_size=8, epochs=8)).go()
    scores = {}
    for key, history in naive.history.items():
        events, first, shown, _ = counted(history)
        scores[key] = events if first >= 0 else shown
    held = replay.buffer.sample(30)
    assert held.index is not None
    for label in range(C):
        k = label // 2
        expected = sorted((scores[k, n] for n in range(N) if n % 2 == label % 2), reverse=keep == "most")[:5]
        got = sorted((scores[k, n] for n in held.index[held.y == label].tolist()), reverse=keep == "most")
        assert got == expected
    assert replay.stored_bytes() == 30 * (D * 4 + 8 + 8)


def test_replayed_rows_join_the_batch_from_the_second_experience_on(trainer: Callable) -> None:
    sizes: list[list[int]] = []

    class Sizes(Strategy):
        def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
            assert learner.experience is not None
            replayed = 0 if batch.source is None else int((batch.source == 1).sum())
            sizes.append([learner.experience.index, len(batch), replayed])

    made = learner(Composite({"replay": ForgettingReplay(12, rows=3), "sizes": Sizes()}))
    Run(stream(), made, trainer(), Training(batch_size=8, epochs=1)).go()
    assert sizes == [[0, 8, 0]] * 5 + [[1, 11, 3]] * 5 + [[2, 11, 3]] * 5


def test_capacity_zero_does_nothing(trainer: Callable) -> None:
    off = ForgettingReplay(0)
    assert off.passes == 1.0
    made = learner(off)
    Run(stream(), made, trainer(), Training(batch_size=8, epochs=1)).go()
    assert len(off.now) == 0
    assert off.stored_bytes() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExampleForgetting(0.0), "fraction: got 0.0, it must be above 0"),
        (lambda: ForgettingReplay(keep="some"), "keep: got 'some', allowed are 'most', 'least'"),
        (lambda: ForgettingReplay(rows=0), "rows: got 0, it must be at least 1"),
        (lambda: ForgettingReplay(-1), "capacity: got -1, it must be at least 0"),
        (lambda: ForgettingReplay(3, 3), "give exactly one of them"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_was_found_is_in_the_runs_folder(tmp_path: Path) -> None:
    overrides = ["strategy=[example_forgetting]", "tracking=none", "progress=false", "training.epochs=1"]
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", overrides)
    train(cfg, tmp_path, Names("stream", "learner", "example_forgetting"))
    found = {
        name.removeprefix("example_forgetting."): value for name, value in np.load(tmp_path / "strategy.npz").items()
    }
    assert {"events", "first_learned", "presentations", "scores"} <= found.keys()
    assert len(found["events"]) > 1000
    assert bool((found["presentations"] == 1).all())  # one epoch
