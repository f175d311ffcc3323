"""Orthogonal gradient descent: its basis against gradients in closed form, and outputs that stay what they are."""

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
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import GrowingHead, Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.ogd import OGD
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs

D, C = 7, 6
SGD, ADAM = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experience(k: int, count: int = 3, target: str = "class") -> Experience:
    x, y = draw(count, D, seed=k), 2 * k + torch.arange(count) % 2
    data = TensorData(x, draw(count, C, seed=k + 50) if target == "value" else y)
    return Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data)


def linear(strategy: OGD, target: str = "class", head: Any = Head) -> Learner:
    torch.manual_seed(1)
    net = mlp(Inputs(features=D, length=0), partial(head, outputs=C), hidden=[])
    return Learner(net, objective_for(target), strategy).double()  # type: ignore[arg-type]  # a name from a parameter


def consolidated(strategy: OGD, *parts: Experience, head: Any = Head, target: str = "class") -> Learner:
    made = linear(strategy, target, head)
    strategy.setup(made, Stream("s", (experience(0),), "class_incremental", "class", C, features=D))
    with torch.no_grad():
        for part in parts:
            made.shape_for(part)
            strategy.after_experience(made, part)
    return made


def spans(strategy: OGD, rows: Tensor) -> None:
    """The basis is orthonormal and spans exactly these rows."""
    basis = strategy.basis
    assert basis is not None
    torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=basis.dtype))
    torch.testing.assert_close(rows @ basis.mT @ basis, rows)
    assert len(basis) == int(torch.linalg.matrix_rank(rows))


def gradient(x: Tensor, by_logit: Tensor) -> Tensor:
    """[C * D + C] of a linear layer, from the gradient [C] by its logits."""
    return torch.cat([torch.outer(by_logit, x).flatten(), by_logit])


CASES = {"ogd": Case({"examples": 5, "capacity": 12}, off={"capacity": 0})}


@pytest.mark.parametrize("of", ["true", "mean", "all"])
def test_the_basis_spans_the_gradients_of_the_outputs(of: str) -> None:
    parts = [experience(0), experience(1, 5)]
    strategy = OGD(of=of)
    consolidated(strategy, *parts)
    rows, eye = [], torch.eye(C, dtype=torch.float64)
    for part in parts:
        batch = part.train.batch(torch.arange(len(part.train)))
        for x, y in zip(batch.x, batch.y.tolist(), strict=True):
            rows += {"true": [gradient(x, eye[y])], "mean": [gradient(x, eye.mean(0))]}.get(
                of, [gradient(x, one) for one in eye]
            )
    spans(strategy, torch.stack(rows))


def test_it_is_gram_schmidt() -> None:
    """The projection equals the paper's, one stored gradient after the other."""
    part, strategy = experience(0, 5), OGD(apply_to="gradient")
    made = consolidated(strategy, part)
    batch, eye = part.train.batch(torch.arange(5)), torch.eye(C, dtype=torch.float64)
    directions: list[Tensor] = []
    for x, y in zip(batch.x, batch.y.tolist(), strict=True):
        g = gradient(x, eye[y])
        for v in directions:
            g = g - (g @ v) * v
        directions.append(g / g.norm())
    weight, bias = made.net.head.linear.weight, made.net.head.linear.bias
    weight.grad, bias.grad = draw(C, D, seed=8), draw(C, seed=9)
    right = torch.cat([weight.grad.flatten(), bias.grad])
    for v in directions:
        right = right - (right @ v) * v
    strategy.gradients(made, batch)
    torch.testing.assert_close(torch.cat([weight.grad.flatten(), bias.grad]), right)


def test_a_class_that_is_not_offered_has_no_gradient() -> None:
    strategy, part = OGD(of="all"), experience(0)
    consolidated(strategy, part, head=GrowingHead)
    x, eye = part.train.batch(torch.arange(3)).x, torch.eye(C, dtype=torch.float64)
    spans(strategy, torch.stack([gradient(one, eye[c]) for one in x for c in (0, 1)]))


def test_the_capacity_is_kept_and_holds_the_largest_directions() -> None:
    parts, strategy = [experience(0), experience(1, 5)], OGD(of="all", capacity=25)
    made = consolidated(strategy, *parts)
    assert strategy.basis is not None
    assert strategy.basis.shape == (25, C * D + C)
    assert strategy.stored_bytes() == 25 * (C * D + C) * 8
    whole = OGD(of="all")
    consolidated(whole, *parts)
    assert whole.basis is not None
    torch.testing.assert_close(strategy.basis, whole.basis[:25])
    missed = [b - b @ whole.basis[:18].mT @ whole.basis[:18] for b in _gradients(parts[1])]
    leading = torch.linalg.svd(torch.stack(missed), full_matrices=False).S[:7].square().sum()
    held = (torch.stack(missed) @ strategy.basis[18:].mT).square().sum()
    torch.testing.assert_close(held, leading)
    before = strategy.basis
    with torch.no_grad():
        strategy.after_experience(made, experience(2))
    assert strategy.basis is before


def _gradients(part: Experience) -> list[Tensor]:
    eye = torch.eye(C, dtype=torch.float64)
    return [gradient(x, one) for x in part.train.batch(torch.arange(len(part.train))).x for one in eye]


def run(trainer: Callable, strategy: OGD | None, optimizer: Callable, count: int = 3, target: str = "class") -> Run:
    parts = tuple(experience(k, target=target) for k in range(count))
    stream = Stream("tiny", parts, "class_incremental", target, C, features=D, length=0)  # type: ignore[arg-type]  # as above
    torch.manual_seed(1)
    net = mlp(Inputs(features=D, length=0), partial(Head, outputs=C), hidden=[])
    made = Run(
        stream,
        Learner(net, objective_for(stream.target), strategy, optimizer).double(),
        trainer(),
        Training(batch_size=3, steps=20),
    )
    made.go()
    return made


def answers(made: Run) -> Tensor:
    with torch.no_grad():
        return made.learner.net(experience(0).train.batch(torch.arange(3))).logits


@pytest.mark.parametrize(("apply_to", "optimizer"), [("gradient", SGD), ("update", SGD), ("update", ADAM)])
def test_a_linear_net_keeps_the_protected_outputs(trainer: Callable, apply_to: str, optimizer: Callable) -> None:
    one = run(trainer, OGD(of="all", apply_to=apply_to), optimizer, 1)
    all_ = run(trainer, OGD(of="all", apply_to=apply_to), optimizer)
    torch.testing.assert_close(answers(one), answers(all_), rtol=0, atol=1e-10)
    weight = "net.head.linear.weight"
    assert float((one.learner.get_parameter(weight) - all_.learner.get_parameter(weight)).detach().abs().max()) > 1e-3
    # The true logit alone is protected by "true".
    true = run(trainer, OGD(apply_to=apply_to), optimizer)
    y = experience(0).train.batch(torch.arange(3)).y
    change = (answers(one) - answers(true)).abs()
    assert float(change.gather(1, y[:, None]).max()) < 1e-10
    assert float(change.max()) > 1e-3


def test_adam_breaks_the_gradient_form_and_finetuning_forgets(trainer: Callable) -> None:
    for strategy in (OGD(of="all", apply_to="gradient"), OGD(capacity=0)):
        one, all_ = run(trainer, OGD(of="all"), ADAM, 1), run(trainer, strategy, ADAM)
        assert float((answers(one) - answers(all_)).abs().max()) > 0.01


def test_on_a_linear_layer_it_is_the_ideal_continual_learner() -> None:
    """Four experiences of 8 rows in 40 dimensions with a common solution: the joint minimum-norm solution."""
    right, strategy = draw(40, 1, seed=9), OGD(of="all", apply_to="gradient")
    net = mlp(Inputs(features=40, length=0), partial(Head, outputs=1), hidden=[])
    made = Learner(net, objective_for("value"), strategy).double()
    net.head.linear.bias.requires_grad_(False).zero_()
    weight = net.head.linear.weight
    with torch.no_grad():
        weight.zero_()
    strategy.setup(made, Stream("s", (experience(0),), "class_incremental", "class", C, features=D))
    inputs = [draw(8, 40, seed=k) for k in range(4)]
    for k, x in enumerate(inputs):
        data = TensorData(x, x @ right)
        batch, rate = data.batch(torch.arange(8)), 1.0 / float(torch.linalg.matrix_norm(x, 2)) ** 2
        for _ in range(1500):
            weight.grad = None
            (made.objective(made.net(batch).logits, batch) * 8).backward()
            strategy.gradients(made, batch)
            with torch.no_grad():
                assert weight.grad is not None
                weight -= rate * weight.grad
        with torch.no_grad():
            strategy.after_experience(made, Experience(k, str(k), (), train=data, test=data))
    x = torch.cat(inputs)
    torch.testing.assert_close(weight.detach().mT, torch.linalg.pinv(x) @ x @ right, rtol=0, atol=1e-8)


@pytest.mark.parametrize("per_step", [False, True])
def test_recurrent_outputs_stay_to_first_order(per_step: bool) -> None:
    """Half the step, a quarter of the change in the protected logits; of others half."""
    torch.manual_seed(1)
    net = recurrent(Inputs(features=4, length=3, per_step=per_step), partial(Head, outputs=C), mixer=LSTM, hidden=9)
    kind = "tag" if per_step else "class"
    strategy = OGD(apply_to="gradient", seed=4)
    made = Learner(net, objective_for(kind), strategy).double()
    x = draw(6, 3, 4)
    y = torch.randint(C, (6, 3) if per_step else (6,))
    mask = torch.tensor([False, True, False]).expand(6, 3) if per_step else None
    data = TensorData(x, y, mask=mask)
    with torch.no_grad():
        strategy.after_experience(made, Experience(0, "0", (), train=data, test=data))
    batch = data.batch(torch.arange(6))
    old = made.net(batch).logits.detach()
    new = TensorData(draw(6, 3, 4, seed=3), y).batch(torch.arange(6))
    made.objective(made.net(new).logits, new).backward()
    strategy.gradients(made, new)
    start = [p.detach().clone() for p in net.parameters()]

    def changes(rate: float) -> tuple[float, float]:
        with torch.no_grad():
            for p, first in zip(net.parameters(), start, strict=True):
                assert p.grad is not None
                p.copy_(first - rate * p.grad)
            change = (made.net(batch).logits - old).abs()
        change = change[:, 1] if per_step else change  # the step that is scored
        protected = change.gather(1, (y[:, 1] if per_step else y)[:, None])
        return float(protected.max()), float(change.max())

    (small, other), (smaller, another) = changes(2e-3), changes(1e-3)
    assert small / smaller == pytest.approx(4, rel=0.05)
    assert other / another == pytest.approx(2, rel=0.05)
    assert other > 20 * small


def test_frozen_weights_are_no_direction() -> None:
    strategy = OGD()
    made = linear(strategy)
    made.net.head.linear.bias.requires_grad_(False)
    with torch.no_grad():
        strategy.after_experience(made, experience(0))
    assert strategy.basis is not None
    assert strategy.basis.shape == (3, C * D + C)
    assert float(strategy.basis[:, C * D :].abs().max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "examples: got 0, it must be at least 1"),
        ({"capacity": -1}, "capacity: got -1, it must be at least 0"),
        ({"of": "some"}, "allowed are 'true', 'mean', 'all'"),
        ({"apply_to": "step"}, "allowed are 'update', 'gradient'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OGD(**options)


def test_a_true_logit_that_does_not_exist_is_refused_before_training() -> None:
    made = linear(OGD(), "value")
    with pytest.raises(ValueError, match="use 'mean' or 'all'"):
        only(made).setup(made, Stream("s", (experience(0),), "class_incremental", "class", C, features=D))
