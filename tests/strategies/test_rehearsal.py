"""Rehearsal of raw old data: counts against published lists, mixtures example by example, and equal budgets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from tiny import only
from torch import Tensor

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.rehearsal_budget import RehearsalBudget
from clplat.strategies.rehearsal_environment import RehearsalEnvironment, environment
from clplat.strategy import Session, Strategy
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.inputs import Inputs
from clplat.streams.mixed import MixedData, data_bytes

K, N = 4, 60
ALL = ("uniform", "powerlaw", "exponential", "kernel")


def stream(sizes: tuple[int, ...] = (N,) * K) -> Stream:
    """x[:, 0] is the experience, x[:, 1] the example's number: each row says where it came from."""
    parts = []
    for k, n in enumerate(sizes):
        x = torch.stack([torch.full((n,), float(k)), torch.arange(n).float()], 1)
        data = TensorData(x, torch.full((n,), k))
        parts.append(Experience(k, str(k), (k,), train=data, test=data))
    return Stream("told", tuple(parts), "class_incremental", "class", len(sizes), features=2, length=0)


def learner(strategy: Strategy | None = None, scale: float = 1.0) -> Learner:
    torch.manual_seed(1)
    net = mlp(Inputs(features=2, length=0), partial(Head, outputs=K), hidden=[7])
    return Learner(net, objective_for("class"), strategy, partial(torch.optim.SGD, lr=1e-4 * scale))


def whole(session: Session) -> Batch:
    assert session.data is not None
    return session.data.batch(torch.arange(len(session.data)))


def session(strategy: Strategy, k: int, data: Stream | None = None) -> Session:
    data = stream() if data is None else data
    return strategy.session(data, k, Session(data[k].train))


def per_source(batch: Batch) -> list[int]:
    return torch.bincount(batch.x[:, 0].long(), minlength=K).tolist()


CASES = {
    "rehearsal_environment": Case({"fraction": 0.5, "min_examples": 0}, off={"fraction": 0.0}, borrows=True),
    "rehearsal_budget": Case({"examples": 10}, off={"examples": 0}, borrows=True),
}


def test_the_published_powerlaw_counts() -> None:
    counts = environment([57927] * 10, "powerlaw", 0.5, exponent=5.0)
    assert counts[:9, 9].tolist() == [694, 1016, 1440, 1983, 2668, 3516, 4551, 5800, 7290]


def test_the_kernel_fits_the_published_lists() -> None:
    counts = environment([57927] * 11, "kernel", None, exponent=5.6, offset=20.0)
    listed = [57927, 44078, 33969, 26483, 20867, 16603, 13329, 10790, 8802, 7232, 5981]
    assert all(abs(a - b) <= 1 for a, b in zip(counts[:, 10].flip(0).tolist(), listed, strict=True))
    every_second = environment([57927] * 10, "kernel", None, exponent=5.6, offset=10.0)
    listed = [57927, 33969, 20867, 13329, 8802, 5981, 4167, 2968, 2155, 1592]
    assert all(abs(a - b) <= 1 for a, b in zip(every_second[:, 9].flip(0).tolist(), listed, strict=True))


@pytest.mark.parametrize("schedule", ALL)
def test_a_column_is_within_its_budget_and_recent_tasks_get_more(schedule: str) -> None:
    new = [1000, 700, 2000, 900, 1500, 1200]
    counts = environment(new, schedule, 0.4)
    assert torch.equal(counts.diagonal(), torch.tensor(new))
    assert torch.equal(counts, counts.triu())
    for i in range(1, len(new)):
        budget, column = int(new[i] * 0.4), counts[:i, i]
        assert 0 < int(column.sum()) <= budget
        assert int(column.sum()) > budget - 2 * i - 1  # nothing but the floors is lost
        assert bool((column.diff() >= 0).all())
        if schedule == "uniform":
            assert column.unique().numel() == 1
        else:
            assert int(column[-1]) > int(column[0]) or i == 1


def test_exponential_and_kernel_by_hand() -> None:
    counts = environment([1000] * 4, "exponential", 0.5, scale=1.0)
    weights = torch.tensor([-3.0, -2.0, -1.0], dtype=torch.float64).exp()
    assert counts[:3, 3].tolist() == (500 // weights.sum() * weights).int().tolist()
    counts = environment([1000] * 4, "kernel", 0.5, exponent=2.0, offset=1.0)
    assert counts[:3, 3].tolist() == [int(500 * w / (1 / 16 + 1 / 9 + 1 / 4)) for w in (1 / 16, 1 / 9, 1 / 4)]


@pytest.mark.parametrize("schedule", ALL)
def test_the_session_has_exactly_these_examples(schedule: str) -> None:
    strategy = RehearsalEnvironment(schedule, 0.5, exponent=3.0)
    for k in range(K):
        made = session(strategy, k)
        batch, expected = whole(made), environment([N] * K, schedule, 0.5, exponent=3.0)[:, k]
        assert per_source(batch) == expected.tolist()
        rows = batch.x.tolist()
        assert len({tuple(r) for r in rows}) == len(rows)  # without replacement
        assert made.budget == pytest.approx(len(batch) / N)
        if k:
            assert batch.source is not None
            assert torch.equal(batch.source, (batch.x[:, 0] != k).to(torch.uint8))
            assert batch.index is not None
            assert torch.equal(batch.index, batch.x[:, 1].long())
            assert torch.equal(batch.y, batch.x[:, 0].long())


def test_the_choice_is_a_function_of_seed_and_experience() -> None:
    a, b, other = (whole(session(RehearsalEnvironment(seed=s), 2)).x for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    later = whole(session(RehearsalEnvironment(seed=3), 3))
    firsts = [x[x[:, 0] == 0][:, 1].tolist() for x in (a, later.x)]
    assert not set(firsts[1]) <= set(firsts[0])  # drawn anew in each experience


def test_keep_steps_replaces_current_examples() -> None:
    for k in range(1, K):
        free, held = (session(RehearsalEnvironment("uniform", 0.5, keep_steps=keep), k) for keep in (False, True))
        assert held.data is not None
        assert len(held.data) == N
        assert held.budget == 1.0
        assert per_source(whole(held))[:k] == per_source(whole(free))[:k]
        assert per_source(whole(held))[k] == N - sum(per_source(whole(free))[:k])


@pytest.mark.parametrize(("keep", "extra"), [(False, 1.5), (True, 1.0)])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 12}])
def test_optimiser_steps(keep: bool, extra: float, length: dict[str, Any], trainer: Callable) -> None:
    made = learner(RehearsalEnvironment("uniform", 0.5, keep_steps=keep))
    Run(stream((60, 60)), made, trainer(), Training(batch_size=10, **length)).go()
    assert made.steps == 12 + 12 * extra


def test_a_small_old_set_comes_back_whole_and_few_examples_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    data = stream((3, 60))
    assert per_source(whole(session(RehearsalEnvironment("uniform", 0.5), 1, data)))[:2] == [3, 60]
    with caplog.at_level(logging.WARNING):
        session(RehearsalEnvironment("uniform", 0.5, min_examples=30), 1)
        assert not caplog.records
        session(RehearsalEnvironment("uniform", 0.5, min_examples=31), 1)
    assert "experience 1 gets [30] examples" in caplog.text


def test_the_environment_counts_all_sets_as_stored(trainer: Callable) -> None:
    made = learner(RehearsalEnvironment())
    Run(stream(), made, trainer(), Training(batch_size=20, epochs=1)).go()
    assert only(made).stored_bytes() == K * N * (2 * 4 + 8)
    off = learner(RehearsalEnvironment(fraction=0.0))
    Run(stream(), off, trainer(), Training(batch_size=20, epochs=1)).go()
    assert only(off).stored_bytes() == 0


@pytest.mark.parametrize("replacement", [False, True])
def test_the_budget_is_exact_for_every_source(replacement: bool, trainer: Callable) -> None:
    strategy = RehearsalBudget(25, replacement)
    for k in range(K):
        made = session(strategy, k)
        assert per_source(whole(made))[: k + 1] == [25] * k + [N]
        assert made.budget == pytest.approx((N + 25 * k) / N)
    old = [whole(session(strategy, k)).x for k in (2, 3)]
    assert torch.equal(old[0][old[0][:, 0] == 1], old[1][old[1][:, 0] == 1])  # the same ones in later experiences
    distinct = len({tuple(r) for r in old[1][old[1][:, 0] < 3].tolist()})
    assert (distinct < 75) == replacement
    Run(stream(), made := learner(strategy), trainer(), Training(batch_size=20, epochs=1)).go()
    assert only(made).stored_bytes() == K * 25 * (2 * 4 + 8)


def test_no_budget_is_only_the_new_task_and_a_large_one_the_whole_set() -> None:
    plain = Session(stream()[2].train)
    assert RehearsalBudget(0).session(stream(), 2, plain) is plain
    assert RehearsalEnvironment(fraction=0.0).session(stream(), 2, plain) is plain
    assert per_source(whole(session(RehearsalBudget(1000, replacement=False), 2)))[:3] == [N] * 3
    assert per_source(whole(session(RehearsalBudget(1000, replacement=True), 1)))[0] == 1000


def test_trained_on_nothing_stays_so() -> None:
    nothing = Session(None, 0.0)
    for strategy in (RehearsalEnvironment(), RehearsalBudget(5)):
        assert strategy.session(stream(), 1, nothing) is nothing


def test_two_mixtures_keep_their_marks() -> None:
    both = Composite({"a": RehearsalBudget(5), "b": RehearsalEnvironment("uniform", 0.5)})
    batch = whole(both.session(stream(), 1, Session(stream()[1].train)))
    assert batch.source is not None
    assert torch.equal(batch.source, (batch.x[:, 0] != 1).to(torch.uint8))
    assert per_source(batch)[:2] == [5 + (N + 5) // 2, N]


def test_mixed_data_are_the_rows_asked_for() -> None:
    data = stream()
    parts = [data[2].train, data[0].train, data[1].train]
    mixed = MixedData(parts, [None, torch.tensor([7, 7, 3]), torch.tensor([1])])
    assert len(mixed) == N + 4
    batch = mixed.batch(torch.tensor([N + 3, 5, N + 1, N + 2, 0]))
    assert batch.x.tolist() == [[1, 1], [2, 5], [0, 7], [0, 3], [2, 0]]
    assert batch.source is not None
    assert batch.source.tolist() == [1, 0, 1, 1, 0]
    targets = mixed.targets()
    assert targets is not None
    assert torch.equal(targets, mixed.batch(torch.arange(N + 4)).y)
    assert len(list(mixed.batches([torch.tensor([0]), torch.tensor([1, 2])]))) == 2
    with pytest.raises(ValueError, match="one entry of rows a part"):
        MixedData(parts, [None])


def test_bytes_of_data() -> None:
    plain = TensorData(torch.zeros(300, 5, 4), torch.zeros(300, dtype=torch.int64), task=1)
    assert data_bytes(plain) == 300 * (5 * 4 * 4 + 8 + 8)
    assert data_bytes(plain, 7) == 7 * (5 * 4 * 4 + 8 + 8)
    ragged = RaggedData(torch.zeros(9, 2), torch.tensor([0, 4, 9]), torch.zeros(9, dtype=torch.int64), per_step=True)
    assert data_bytes(ragged) == 9 * (2 * 4 + 8) + 2 * 8  # unpadded, and the lengths
    assert data_bytes(plain, 0) == 0


def test_rehearsal_keeps_old_answers(trainer: Callable) -> None:
    def first(strategy: Strategy | None) -> float:
        made = learner(strategy, scale=10)
        Run(stream(), made, trainer(), Training(batch_size=10, epochs=5)).go()
        batch = stream()[0].test.batch(torch.arange(N))
        return float(made.objective(made(batch).logits, batch).detach())

    plain = first(None)
    assert first(RehearsalEnvironment("uniform", 0.9)) < plain - 0.1
    assert first(RehearsalBudget(20)) < plain - 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "fibonacci"}, "schedule: got 'fibonacci', allowed are 'uniform', 'powerlaw'"),
        ({"fraction": -0.1}, "fraction: got -0.1, it must be at least 0"),
        ({"fraction": None}, "only 'kernel' goes without a budget"),
        ({"exponent": 2.0}, "exponent: got 2.0, it must be above 2"),
        ({"schedule": "kernel", "exponent": -1.0}, "at least 0 for 'kernel'"),
        ({"scale": 0.0}, "scale: got 0.0, it must be above 0"),
        ({"offset": 0.0}, "offset: got 0.0, it must be above 0"),
        ({"fraction": 1.0, "keep_steps": True}, "keep_steps: got true with fraction 1.0"),
        ({"min_examples": -1}, "min_examples: got -1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RehearsalEnvironment(**options)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"examples: got -1, it must be at least 0"):
        RehearsalBudget(-1)


def test_wanted_counts_are_tensors_of_integers() -> None:
    counts: Tensor = environment([10, 20], "uniform", 0.5)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[10, 10], [0, 20]]
