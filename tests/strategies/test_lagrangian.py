"""Constrained rehearsal: the augmented Lagrangian's value, gradient and multipliers, and problems with known answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from tiny import only
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.mixers.gru import GRU
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import Tagging, objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.lagrangian import Lagrangian
from clplat.strategy import Strategy
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.experience import Batch, Data, Experience, Stream
from clplat.streams.inputs import Inputs

D, C = 5, 6


def experience(k: int, count: int = 12, task: int | None = None) -> Experience:
    generator = torch.Generator().manual_seed(k)
    y = torch.randint(2 * k, 2 * k + 2, (count,), generator=generator)
    data = TensorData(torch.randn(count, D, generator=generator, dtype=torch.float64) + 0.5 * y[:, None], y, task=task)
    return Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data, task_label=task)


def learner(strategy: Strategy | None, head: Any = None) -> Learner:
    torch.manual_seed(1)
    net = mlp(Inputs(features=D, length=0), head or partial(Head, outputs=C), hidden=[7])
    return Learner(net, objective_for("class"), strategy).double()


def consolidated(strategy: Lagrangian, count: int = 2, head: Any = None, tasks: bool = False) -> Learner:
    made = learner(strategy, head)
    with torch.no_grad():
        for k in range(count):
            part = experience(k, task=k if tasks else None)
            strategy.before_experience(made, part)
            strategy.after_experience(made, part)
            for p in made.net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return made


def on(batch: Batch, made: Learner) -> Tensor:
    return made.objective(made(batch).logits, batch)


def whole(k: int, task: int | None = None) -> Batch:
    return experience(k, task=task).train.batch(torch.arange(12))


def gradients(value: Tensor, made: Learner) -> Tensor:
    found = torch.autograd.grad(value, list(made.net.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def term(made: Learner) -> Tensor:
    current = whole(2)
    made.strategy.before_step(made, current)
    assert made.strategy.batch(made, current) is current  # replayed rows have a forward pass of their own
    return made.strategy.loss(made, current, made(current))["lagrangian"]


CASES = {"lagrangian": Case({"capacity": 20, "rows": 4}, off={"capacity": 0})}


def test_at_rho_0_it_is_weighted_replay() -> None:
    made = consolidated(Lagrangian(capacity=100, rows=12, rho=0.0, multiplier=0.3))
    value, right = term(made), 0.3 * (on(whole(0), made) + on(whole(1), made))
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(gradients(value, made), gradients(right, made))
    before = only(made).get_buffer("multipliers")
    made.strategy.after_step(made, whole(2), made(whole(2)))
    assert torch.equal(only(made).get_buffer("multipliers"), before)
    assert before.tolist() == [0.3, 0.3]


@pytest.mark.parametrize("augmented", [True, False])
def test_value_gradient_and_multipliers_are_the_formula(augmented: bool) -> None:
    strategy = Lagrangian(capacity=100, rows=12, rho=5.0, multiplier=0.3, augmented=augmented)
    made = consolidated(strategy)
    with torch.no_grad():  # one constraint violated, one far from it
        strategy.limits = torch.stack([on(whole(0), made) - 0.2, on(whole(1), made) + 0.4])
    losses = torch.stack([on(whole(0), made), on(whole(1), made)])
    raised = torch.relu(0.3 + 5 * (losses - strategy.limits))
    right = (raised.square() - 0.09).sum() / 10 if augmented else 0.3 * losses.sum()
    value = term(made)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(gradients(value, made), gradients(right, made))
    made.strategy.after_step(made, whole(2), made(whole(2)))
    torch.testing.assert_close(strategy.get_buffer("multipliers"), raised.detach())
    assert float(raised.detach()[0]) == pytest.approx(1.3) and float(raised.detach()[1]) == 0


def test_the_ceiling_limits_multipliers_and_slope() -> None:
    strategy = Lagrangian(capacity=100, rows=12, rho=100.0, multiplier=1.0, largest=2.0)
    made = consolidated(strategy, 1)
    with torch.no_grad():
        strategy.limits = on(whole(0), made)[None] - 1.0
    torch.testing.assert_close(gradients(term(made), made), gradients(2.0 * on(whole(0), made), made))
    made.strategy.after_step(made, whole(2), made(whole(2)))
    assert strategy.get_buffer("multipliers").tolist() == [2.0]


@pytest.mark.parametrize(("options", "extra"), [({}, 0.0), ({"slack": 0.5}, 0.5)])
def test_the_limit_is_what_was_reached_on_the_stored_examples(options: dict[str, Any], extra: float) -> None:
    strategy = Lagrangian(capacity=100, **options)
    made = consolidated(strategy, 1)
    fresh = learner(None)
    assert strategy.limits is not None
    with torch.no_grad():
        torch.testing.assert_close(strategy.limits[0], on(whole(0), fresh) + extra)
    given = Lagrangian(capacity=100, threshold=0.1, **options)
    consolidated(given, 2)
    assert given.get_buffer("limits").tolist() == pytest.approx([0.1 + extra] * 2)
    assert made.strategy.stored_bytes() == 12 * (D * 8 + 4 * 8) + 2 * 8  # x; y, index, group and label; two numbers


def test_a_constrained_quadratic_problem_reaches_its_known_point() -> None:
    """min (w - 3)^2 / 2 subject to w^2 / 2 <= 0.02: w = 0.2, with multiplier (3 - 0.2) / 0.2 = 14."""
    net = mlp(Inputs(features=1, length=0), partial(Head, outputs=1), hidden=[])
    strategy = Lagrangian(capacity=10, rows=4, rho=5.0, multiplier=0.0, threshold=0.02)
    made = Learner(net, objective_for("value"), strategy).double()
    net.head.linear.bias.requires_grad_(False).zero_()
    weight = net.head.linear.weight
    ones = torch.ones(4, 1, dtype=torch.float64)
    old, new = TensorData(ones, 0 * ones), TensorData(ones, 3 * ones)
    with torch.no_grad():
        strategy.after_experience(made, Experience(0, "0", (), train=old, test=old))
    batch = new.batch(torch.arange(4))
    for _ in range(1800):
        strategy.before_step(made, batch)
        weight.grad = None
        output = made(batch)
        (made.objective(output.logits, batch) + sum(strategy.loss(made, batch, output).values())).backward()
        with torch.no_grad():
            assert weight.grad is not None
            weight -= 0.02 * weight.grad
            strategy.after_step(made, batch, output)
    assert float(weight.detach()) == pytest.approx(0.2, abs=1e-6)
    assert float(strategy.get_buffer("multipliers")) == pytest.approx(14.0, abs=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_experiences_with_targets_at_every_step_count_as_alone(reduction: str) -> None:
    torch.manual_seed(1)
    net = recurrent(Inputs(features=3, per_step=True), partial(Head, outputs=4), mixer=GRU, hidden=6)
    strategy = Lagrangian(capacity=100, rows=3, rho=0.0, multiplier=1.0)
    made = Learner(net, Tagging(reduction), strategy).double()
    sets: list[Data] = []
    for offsets in ([0, 1, 3, 8], [0, 4, 6, 7]):
        x, y = torch.randn(offsets[-1], 3, dtype=torch.float64), torch.randint(4, (offsets[-1],))
        sets.append(RaggedData(x, torch.tensor(offsets), y, per_step=True))
    with torch.no_grad():
        for k, data in enumerate(sets):
            strategy.after_experience(made, Experience(k, str(k), (), train=data, test=data))
    right = sum(on(data.batch(torch.arange(3)), made) for data in sets)
    batch = sets[0].batch(torch.arange(2))
    strategy.before_step(made, batch)
    torch.testing.assert_close(strategy.loss(made, batch, made(batch))["lagrangian"], right)


def test_stored_rows_keep_their_task_label() -> None:
    head = partial(_task_head)
    strategy = Lagrangian(capacity=100, rows=12, rho=0.0)
    made = consolidated(strategy, 2, head, tasks=True)
    current = whole(2, 2)
    strategy.before_step(made, current)
    value = strategy.loss(made, current, made(current))["lagrangian"]
    right = on(whole(0, 0), made) + on(whole(1, 1), made)
    torch.testing.assert_close(value, right)
    assert float(right.detach()) < 10  # another task's outputs would have the lowest value


def _task_head(features: int) -> Head:
    return TaskHead(features, C, [(0, 1), (2, 3), (4, 5)])


def test_an_experience_whose_share_is_0_is_left_alone() -> None:
    strategy = Lagrangian(capacity=1, rows=4, rho=1.0)
    made = consolidated(strategy, 2)
    value = term(made)
    made.strategy.after_step(made, whole(2), made(whole(2)))
    assert bool(torch.isfinite(value)) and float(strategy.get_buffer("multipliers")[1]) == 1.0


def test_it_holds_old_losses_where_replay_of_nothing_does_not(trainer: Callable) -> None:
    parts = tuple(experience(k, 60) for k in range(3))
    stream = Stream("tiny", parts, "class_incremental", "class", C, features=D, length=0)

    def loss_on_the_first(strategy: Strategy | None) -> float:
        made = learner(strategy)
        made.handover.make = partial(torch.optim.Adam, lr=1e-2)
        Run(stream, made, trainer(), Training(batch_size=12, epochs=12)).go()
        with torch.no_grad():
            return float(on(parts[0].train.batch(torch.arange(60)), made))

    held = loss_on_the_first(Lagrangian(capacity=60, rho=0.5))
    assert held < 1 < loss_on_the_first(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": -1}, "^capacity: got -1, it must be at least 0"),
        ({"rho": -0.1}, "^rho"),
        ({"multiplier": -0.1}, "^multiplier"),
        ({"rows": 0}, "^rows: got 0, it must be at least 1"),
        ({"largest": 0.5}, "largest: got 0.5, it must be at least 1 \\(the multiplier; null for none"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lagrangian(**options)
