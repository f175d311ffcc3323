"""Arithmetic on weights against closed forms, and what a run with it trains from and answers with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from cases import Case
from tiny import only
from torch import Tensor, nn

from clplat.learners.nets.heads import GrowingHead
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.time_vectors import TimeVectors
from clplat.strategy import Session, Strategy
from clplat.streams.experience import Experience
from clplat.weights.arithmetic import (
    add,
    cosine,
    difference,
    interpolate,
)
from clplat.weights.flat import flatten, load_flat, unflatten

K, N, D = 3, 40, 5
stream = partial(tiny.stream, shift=0.7, alternating=True)
learner = partial(tiny.learner, lr=0.1)


class Watched(Run):
    """Notes the weights from which each experience starts, those at its end, and those that are scored after it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.starts: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.scored: list[Tensor] = []
        end = self.learner.end

        def ending(experience: Experience) -> None:
            self.ends.append(flatten(self.learner.net))
            end(experience)

        self.learner.end = ending  # type: ignore[method-assign]  # the last moment before it is consolidated

    def _fit(self, session: Session, length: int) -> None:
        self.starts.append(flatten(self.learner.net))
        super()._fit(session, length)

    def score(self, trained: int, final: bool) -> None:
        super().score(trained, final)
        if trained >= 0:
            self.scored.append(flatten(self.learner.net))


def watched(trainer: Callable, strategy: Strategy, head: Callable | None = None) -> Watched:
    run = Watched(
        stream(), learner(strategy, head=head and partial(head, outputs=6)), trainer(), Training(batch_size=8, epochs=2)
    )
    run.go()
    return run


def states(count: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "weight": torch.randn(4, 3, generator=generator) * 10.0**k,
            "statistics": torch.rand(4, generator=generator),
            "count": torch.tensor(k),
            "met": torch.tensor([k > 0, True]),
        }
        for k in range(count)
    ]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


CASES = {"time_vectors": Case(off={"merge": "none"})}


def test_base_plus_difference_is_the_state_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1.0, 1e6):
        base = {"w": torch.randn(1000, generator=generator)}
        after = {"w": torch.randn(1000, generator=generator) * scale}
        assert same(add(base, [(1.0, difference(after, base))]), after)
    half = {"w": torch.randn(1000, generator=generator).bfloat16()}
    assert same(
        add(half, [(1.0, difference(half, {"w": torch.zeros(1000).bfloat16()})), (-1.0, {"w": half["w"]})]), half
    )


def test_interpolation_ends_at_both_states_and_is_linear_between() -> None:
    base, one, other = states()
    at_one, at_other = interpolate(base, one, other, 1.0), interpolate(base, one, other, 0.0)
    for name in ("weight", "statistics"):
        assert torch.equal(at_one[name], one[name])
        assert torch.equal(at_other[name], other[name])
        middle = interpolate(base, one, other, 0.3)[name]
        torch.testing.assert_close(middle, 0.3 * one[name] + 0.7 * other[name])
        beyond = interpolate(base, one, other, 1.5)[name]
        torch.testing.assert_close(beyond, 1.5 * one[name] - 0.5 * other[name])


def test_what_is_not_comparable_stays_that_of_the_base() -> None:
    base, one, other = states()
    one["weight"] = torch.randn(5, 3)  # another vocabulary
    one["new"] = torch.randn(2)
    mixed = interpolate(base, one, other, 0.5)
    assert mixed.keys() == base.keys()
    for name in ("weight", "count", "met"):
        assert torch.equal(mixed[name], base[name])
    assert not torch.equal(mixed["statistics"], base["statistics"])
    assert set(difference(one, base)) == {"statistics"}
    assert difference(one, base)["statistics"].dtype == torch.float64
    assert mixed["statistics"].dtype == torch.float32


def test_cosine() -> None:
    base, one, other = states()
    a, b = difference(one, base), difference(other, base)
    assert cosine(a, a) == pytest.approx(1.0)
    assert cosine(a, {n: -t for n, t in a.items()}) == pytest.approx(-1.0)
    flat = [torch.cat([v["weight"].flatten(), v["statistics"]]) for v in (a, b)]
    assert cosine(a, b) == pytest.approx(float(torch.cosine_similarity(flat[0], flat[1], dim=0)))
    assert math.isnan(cosine(a, {"else": torch.ones(1)}))


def test_a_net_as_one_vector_and_back() -> None:
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Linear(3, 4), norm)
    vector, before = flatten(net), copy.deepcopy(net.state_dict())
    assert vector.shape == (3 * 4 + 4 + 4 * 4,)  # running statistics are in it, their counter is not
    norm.load_state_dict(norm.state_dict() | {"num_batches_tracked": torch.tensor(7)})
    load_flat(net, vector + 1)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, torch.tensor(7) if name == "1.num_batches_tracked" else before[name] + 1)
    assert set(unflatten(net, vector)) == set(before) - {"1.num_batches_tracked"}
    with pytest.raises(ValueError, match=r"\[31\] values does not fit a net of 32"):
        load_flat(net, vector[:-1])


@pytest.mark.parametrize("start", ["last", "merged", "base"])
def test_where_training_goes_on_and_what_is_scored(start: str, trainer: Callable) -> None:
    run = watched(trainer, TimeVectors("mean", start))
    initial = flatten(learner(None).net)
    assert torch.equal(run.starts[0], initial)
    ends = [initial, *run.ends]
    for k in range(K):
        if k:
            expected = {"last": ends[k], "merged": run.scored[k - 1], "base": initial}[start]
            assert torch.equal(run.starts[k], expected)
        torch.testing.assert_close(run.scored[k], torch.stack(run.ends[: k + 1]).mean(0))
    assert not torch.equal(run.scored[1], run.ends[1])
    assert torch.equal(run.scored[0], run.ends[0])  # the mean of one, to the bit


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_interpolation_of_the_last_two(share: float, trainer: Callable) -> None:
    run = watched(trainer, TimeVectors("interpolate", "base", share))
    ends, scored = run.ends, run.scored
    assert torch.equal(scored[0], ends[0])
    for k in (1, 2):
        torch.testing.assert_close(scored[k], share * ends[k] + (1 - share) * ends[k - 1])
        if share in (0.0, 1.0):
            assert torch.equal(scored[k], ends[k] if share else ends[k - 1])


@pytest.mark.parametrize("merge", ["mean", "interpolate"])
def test_scale_stretches_the_vector_from_the_base(merge: str, trainer: Callable) -> None:
    one, two = (watched(trainer, TimeVectors(merge, "base", scale=s)) for s in (1.0, 2.5))
    initial = flatten(learner(None).net)
    for a, b, e, f in zip(one.scored, two.scored, one.ends, two.ends, strict=True):
        assert torch.equal(e, f)
        torch.testing.assert_close(b - initial, 2.5 * (a - initial), rtol=1e-4, atol=1e-6)


def test_scores_are_those_of_the_combination(trainer: Callable) -> None:
    run = watched(trainer, TimeVectors("mean"))
    made = learner(None)
    load_flat(made.net, only(run.learner).merged())
    for j, experience in enumerate(stream()):
        batch = experience.test.batch(torch.arange(N))
        right = float((made(batch).logits.argmax(-1) == batch.y).double().mean())
        assert float(run.results.R[-1, j]) == pytest.approx(right)


def test_memory_is_one_state_a_period_and_the_base(trainer: Callable) -> None:
    run = watched(trainer, TimeVectors("none"))
    values = flatten(run.learner.net).numel()
    assert only(run.learner).stored_bytes() == (K + 1) * values * 4
    assert only(run.learner).past is not None
    assert torch.equal(only(run.learner).past, torch.stack(run.ends))


def test_no_merge_from_the_base_is_independent_training(trainer: Callable) -> None:
    run = watched(trainer, TimeVectors("none", "base"))
    initial = flatten(learner(None).net)
    assert all(torch.equal(start, initial) for start in run.starts)
    assert all(torch.equal(a, b) for a, b in zip(run.scored, run.ends, strict=True))


def test_a_growing_head_keeps_what_it_offers(trainer: Callable) -> None:
    run = watched(trainer, TimeVectors("mean", "base"), GrowingHead)
    head = run.learner.net.head
    assert isinstance(head, GrowingHead)
    assert bool(head.met.all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "median"}, "merge: got 'median', allowed are 'mean', 'interpolate', 'none'"),
        ({"start": "first"}, "start: got 'first', allowed are 'last', 'merged', 'base'"),
        ({"merge": "none", "scale": 2.0}, "set it to 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeVectors(**options)


def test_nothing_to_merge_is_said() -> None:
    with pytest.raises(ValueError, match="no experience has been learned yet"):
        TimeVectors().merged()
