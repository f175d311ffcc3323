"""Replay: what a step trains on, when the buffer learns of it, and off when it is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from cases import Case
from tiny import flat
from torch import nn

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy
from clplat.streams.experience import Batch

D, C, K, N = 5, 6, 3, 40
stream = partial(tiny.stream, alternating=True)
learner = partial(tiny.learner, lr=0.1)


def trained(strategy: Strategy | None) -> Learner:
    return tiny.trained(learner(strategy), stream(), epochs=2)


def step(strategy: Strategy, learner: Learner, batch: Batch) -> Batch:
    """The batch that a step trains on, after what is done before it."""
    batch = strategy.batch(learner, batch)
    strategy.before_step(learner, batch)
    return batch


def current(count: int = 8, k: int = 0) -> Batch:
    return stream()[k].train.batch(torch.arange(count))


def past(replay: Replay, made: Learner, k: int = 1) -> Replay:
    """As at the start of experience k, the ones before it inserted whole."""
    for experience in list(stream())[:k]:
        replay.buffer.insert(experience.train.batch(torch.arange(N)))
    replay.before_experience(made, stream()[k])
    return replay


OFF: dict[str, Callable[[], Strategy]] = {
    "reservoir": lambda: Replay(capacity=0),
    "separate": lambda: Replay(capacity=0, forward="separate", weighting="experiences"),
    "class_balanced": lambda: Replay(capacity_per_class=0, policy="class_balanced", rows_per_class=2),
    "ring_after": lambda: Replay(capacity=0, policy="ring", insert="after"),
}


CASES = {"replay": Case({"capacity": 20, "rows": 8}, off={"capacity": 0})}


@pytest.mark.parametrize("off", OFF)
def test_capacity_zero_is_finetuning_bit_for_bit(off: str, trainer: Callable) -> None:
    strategy = OFF[off]()
    assert strategy.passes == 1.0
    assert torch.equal(flat(trained(None)), flat(trained(strategy)))


def test_the_first_batch_is_alone_and_then_learned_of() -> None:
    made, replay = learner(), Replay(capacity=20)
    batch = current()
    assert step(replay, made, batch) is batch
    assert len(replay.buffer) == 8
    joined = step(replay, made, batch)
    assert len(joined) == 16
    assert joined.source is not None
    assert joined.source.tolist() == [0] * 8 + [1] * 8
    assert joined.weight is None
    assert torch.equal(joined.x[:8], batch.x)


def test_rows_are_drawn_before_the_batch_is_inserted() -> None:
    made, replay = learner(), Replay(capacity=8)
    step(replay, made, current(8, k=0))
    joined = step(replay, made, current(8, k=2))
    assert joined.y[8:].max() < 2


@pytest.mark.parametrize(("rows", "expected"), [(None, 8), (3, 3), (500, 80)])
def test_the_number_of_replayed_rows(rows: int | None, expected: int) -> None:
    made = learner()
    replay = past(Replay(capacity=100, rows=rows), made, k=2)
    assert len(step(replay, made, current(8, k=2))) == 8 + expected


@pytest.mark.parametrize("policy", ["class_balanced", "ring"])
def test_rows_of_every_class(policy: str) -> None:
    made = learner()
    replay = past(Replay(capacity_per_class=10, policy=policy, rows_per_class=4, insert="after"), made, k=2)
    joined = step(replay, made, current(8, k=2))
    assert joined.y[8:].bincount().tolist() == [4, 4, 4, 4]
    assert replay.stored_bytes() == 40 * (D * 4 + 8 + 8)


def test_replayed_rows_of_another_strategy_are_not_inserted() -> None:
    made = learner()
    one, two = past(Replay(capacity=100, seed=1), made), Replay(capacity=100, seed=2)
    batch = step(Composite({"one": one, "two": two}), made, current(8, k=1))
    assert len(batch) == 16
    assert len(two.buffer) == 8
    assert two.buffer.sample(8).y.min() == 2


def test_inserted_after_the_experience_means_not_during() -> None:
    made, replay = learner(), Replay(capacity=30, insert="after")
    assert len(step(replay, made, current())) == 8
    assert len(step(replay, made, current())) == 8
    assert len(replay.buffer) == 0
    replay.after_experience(made, stream()[0])
    assert len(replay.buffer) == 30
    assert replay.buffer.seen == N


@pytest.mark.parametrize("forward", ["joint", "separate"])
@pytest.mark.parametrize("weighting", ["rows", "experiences"])
def test_the_weighting_is_the_one_written_down(forward: str, weighting: str) -> None:
    made = learner()
    replay = past(Replay(capacity=100, rows=24, forward=forward, weighting=weighting), made, k=2)
    own = current(8, k=2)
    batch = step(replay, made, own)
    logits = made(batch)
    total = (
        replay.objective(made, batch, logits) if "objective" in replay.claims else made.objective(logits.logits, batch)
    )
    assert ("objective" in replay.claims) is (forward == "separate")

    # The same generator draws the same rows once more.
    again = step(past(Replay(capacity=100, rows=24), made, k=2), made, own)
    losses = nn.functional.cross_entropy(made(again).logits, again.y, reduction="none")
    a, b = losses[:8].mean(), losses[8:].mean()
    right = losses.mean() if weighting == "rows" else a / 3 + 2 * b / 3
    torch.testing.assert_close(total, right)


def test_weights_by_experience_replay_nothing_in_the_first() -> None:
    made, replay = learner(), Replay(capacity=100, weighting="experiences")
    replay.before_experience(made, stream()[0])
    for _ in range(3):
        assert len(step(replay, made, current())) == 8
    assert len(replay.buffer) == 24


def test_weights_of_the_batch_are_kept() -> None:
    made = learner()
    replay = past(Replay(capacity=100, rows=8, weighting="experiences"), made, k=1)
    weighted = replace(current(8, k=1), weight=torch.arange(8.0))
    joined = step(replay, made, weighted)
    assert joined.weight is not None
    torch.testing.assert_close(joined.weight, torch.cat([torch.arange(8.0), torch.ones(8)]))  # 1/2 and 1/2, B equal


def test_both_forward_passes_give_the_same_gradient_without_batch_norm(trainer: Callable) -> None:
    joint, separate = (trained(Replay(capacity=30, forward=f)) for f in ("joint", "separate"))
    torch.testing.assert_close(flat(joint), flat(separate), rtol=1e-4, atol=1e-5)
    assert not torch.equal(flat(joint), flat(trained(None)))


def test_a_saved_strategy_goes_on_exactly() -> None:
    made = learner()
    options: dict[str, Any] = {"capacity": 20, "weighting": "experiences"}
    one, two = past(Replay(**options, seed=1), made, k=2), Replay(**options, seed=9)
    two.load_state_dict(one.state_dict())
    for _ in range(5):
        a, b = step(one, made, current(8, k=2)), step(two, made, current(8, k=2))
        assert torch.equal(a.x, b.x)
        assert a.weight is not None
        assert b.weight is not None
        assert torch.equal(a.weight, b.weight)


def test_replay_forgets_less(trainer: Callable) -> None:
    def first(made: Learner) -> float:
        made.eval()
        batch = stream()[0].test.batch(torch.arange(N))
        return float(made.objective(made(batch).logits, batch).detach())

    assert first(trained(Replay(capacity=60))) < first(trained(None)) - 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fifo"}, "got 'fifo', allowed are 'reservoir', 'class_balanced', 'ring', 'herding'"),
        ({"capacity": None}, "needs capacity"),
        ({"capacity": None, "policy": "ring"}, "either capacity or"),
        ({"capacity_per_class": 3}, "knows no classes"),
        ({"insert": "before"}, "allowed are 'during', 'after'"),
        ({"forward": "both"}, "allowed are 'joint', 'separate'"),
        ({"weighting": "steps"}, "allowed are 'rows', 'experiences'"),
        ({"rows": 0}, "at least 1"),
        ({"rows": 3, "rows_per_class": 3}, "only one can be"),
        ({"rows_per_class": 3}, "knows no classes"),
        ({"capacity": -3}, "at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Replay(**dict[str, Any](capacity=5) | options)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, set()),
        ({"policy": "ring"}, {"classes"}),
        ({"insert": "after"}, {"boundaries"}),
        ({"weighting": "experiences", "policy": "class_balanced"}, {"boundaries", "classes"}),
    ],
)
def test_what_it_needs_of_a_stream(options: dict[str, Any], needs: set[str]) -> None:
    assert Replay(capacity=5, **options).needs == needs
