"""EWC and its penalty: against naive sums, on problems whose answer is known, and off when it is off."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from cases import Case
from tiny import flat, only, shaken, stream
from torch import Tensor, nn

from clplat.composition import Composite
from clplat.importance.penalty import Quadratic, quadratic_penalty
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import objective_for
from clplat.strategies.ewc import EWC
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience
from clplat.streams.inputs import Inputs

D, C, K = 5, 6, 3
learner = partial(tiny.learner, optimizer=partial(torch.optim.Adam, lr=1e-2))


def trained(strategy: Strategy | None) -> Learner:
    return tiny.trained(learner(strategy), epochs=2)


def term(made: Learner) -> Tensor:
    batch = stream()[0].train.batch(torch.arange(4))
    return made.strategy.loss(made, batch, made(batch))["ewc"]


CASES = {"ewc": Case({"strength": 50.0, "examples": 20}, off={"strength": 0.0})}


def test_the_penalty_and_its_gradient() -> None:
    shapes = [(3, 4), (5,), (), (2, 1, 3)]
    params, anchor = ([torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes] for _ in range(2))
    importance = [torch.rand(s, dtype=torch.float64) for s in shapes]
    anchor = [a.detach() for a in anchor]
    value = 3 * quadratic_penalty(params, importance, anchor, 7.0)
    right = 3 * 3.5 * sum((f * (p - a) ** 2).sum() for f, p, a in zip(importance, params, anchor, strict=True))
    torch.testing.assert_close(value, right)
    got = torch.autograd.grad(value, params, retain_graph=True)
    again = torch.autograd.grad(value, params)
    for g, h, f, p, a in zip(got, again, importance, params, anchor, strict=True):
        torch.testing.assert_close(g, (21 * f * (p - a)).detach())
        assert torch.equal(g, h)
    assert torch.autograd.gradcheck(lambda *p: quadratic_penalty(p, importance, anchor, 7.0), params)


@pytest.mark.parametrize("mode", ["separate", "single"])
def test_zero_at_the_anchor_and_lambda_f_d_off_it(mode: str) -> None:
    made = learner(EWC(strength=40.0, mode=mode))
    made.strategy.after_experience(made, stream()[0])
    value = term(made)
    assert float(value.detach()) == 0
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(value, list(made.weights().values())))
    anchor = {n: p.detach().clone() for n, p in made.weights().items()}
    shaken(made)
    importance = only(made).past.importances()
    for (name, p), g in zip(
        made.weights().items(), torch.autograd.grad(term(made), list(made.weights().values())), strict=True
    ):
        torch.testing.assert_close(g, 40 * importance[name] * (p.detach() - anchor[name]))


def test_separate_is_the_sum_of_all_penalties() -> None:
    made, parts = learner(EWC(strength=40.0, mode="separate")), []
    for experience in stream():
        one = learner(EWC(strength=40.0))
        one.net.load_state_dict(made.net.state_dict())
        for both in (made, one):
            both.strategy.after_experience(both, experience)
        parts.append((only(one).past.importances(), only(one).past.anchors()))
        shaken(made)
    right = sum(20 * (f[n] * (p - a[n]) ** 2).sum() for f, a in parts for n, p in made.weights().items())
    assert isinstance(right, Tensor)
    torch.testing.assert_close(term(made), right, rtol=1e-4, atol=0)
    weights = list(made.weights().values())
    for g, h in zip(torch.autograd.grad(term(made), weights), torch.autograd.grad(right, weights), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-6)


def test_online_decays_when_accumulating_and_in_the_penalty() -> None:
    made, fishers, anchor = learner(EWC(strength=40.0, mode="online", gamma=0.5)), [], {}
    for experience in stream():
        made.strategy.after_experience(made, experience)
        alone = EWC(strength=1.0)
        alone.after_experience(made, experience)
        fishers.append(alone.past.importances())
        anchor = {n: p.detach().clone() for n, p in made.weights().items()}
        shaken(made)
    first, second, third = fishers
    right = sum(
        20 * 0.5 * ((0.25 * first[n] + 0.5 * second[n] + third[n]) * (p - anchor[n]) ** 2).sum()
        for n, p in made.weights().items()
    )
    torch.testing.assert_close(term(made), right)


@pytest.mark.parametrize(("mode", "optimum"), [("single", 1.0), ("separate", 17 / 21)])
def test_quadratic_tasks_reach_the_known_point(mode: str, optimum: float) -> None:
    """Curvatures 1, 2, 1/2 and minima 0, 1, 3: the joint optimum is 1; separate anchors count old tasks twice."""
    net = mlp(Inputs(features=1, length=0), partial(Head, outputs=1), hidden=[])
    made = Learner(net, objective_for("value"), EWC(strength=1.0, mode=mode)).double()
    made.net.head.linear.bias.requires_grad_(False).zero_()
    weight = made.net.head.linear.weight
    for k, (curvature, minimum) in enumerate([(1.0, 0.0), (2.0, 1.0), (0.5, 3.0)]):
        x = torch.full((4, 1), curvature**0.5, dtype=torch.float64)
        data = TensorData(x, x * minimum)
        experience = Experience(k, str(k), (), train=data, test=data)
        batch = data.batch(torch.arange(4))
        optimizer = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe")

        def closure(batch=batch, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            output = made(batch)
            total = made.objective(output.logits, batch)
            total = total + sum(made.strategy.loss(made, batch, output).values())
            total.backward()
            return total

        optimizer.step(closure)
        made.strategy.after_experience(made, experience)
    assert float(weight.detach()) == pytest.approx(optimum, abs=1e-6)


def test_a_frozen_parameter_keeps_its_entries() -> None:
    made = learner(EWC(strength=40.0, mode="single"))
    made.strategy.after_experience(made, stream()[0])
    before = only(made).past.importances()
    frozen = "head.linear.weight"
    made.net.head.linear.weight.requires_grad_(False)
    shaken(made)
    assert float(term(made).detach()) > 0
    made.strategy.after_experience(made, stream()[1])
    after = only(made).past.importances()
    assert torch.equal(after[frozen], before[frozen])
    assert not torch.equal(after["head.linear.bias"], before["head.linear.bias"])


def test_the_state_goes_through_a_safe_checkpoint() -> None:
    made = learner(EWC(strength=40.0))
    for experience in stream():
        made.strategy.after_experience(made, experience)
        shaken(made)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = learner(EWC(strength=40.0))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(term(made), term(other))
    parameters = flat(made).numel()
    assert made.strategy.stored_bytes() == other.strategy.stored_bytes() == (2 * parameters + 1) * 4


def test_tied_weights_count_once() -> None:
    made = learner(hidden=(7, 7, 7))
    one, two = (m for m in made.net.modules() if isinstance(m, nn.Linear) and m.weight.shape == (7, 7))
    two.weight = one.weight
    quadratic, weights = Quadratic(), made.weights()
    quadratic.renew({n: torch.ones_like(w) for n, w in weights.items()}, weights)
    value = quadratic.penalty({n: w + 1 for n, w in weights.items()}, 2.0)
    numbers = (5 * 7 + 7) + (7 * 7 + 7) + 7 + (7 * 6 + 6)  # a layer each; of the tied one its bias alone
    assert float(value.detach()) == pytest.approx(numbers, rel=1e-5)


class Ends(Strategy):
    """Keeps the weights at the end of each experience."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.kept.append(flat(learner))


def test_it_holds_the_weights_back_and_the_more_the_stronger() -> None:
    moved, starts = [], []
    for strength in (0.0, 100.0, 1e4):
        ends = Ends()
        trained(Composite({"ewc": EWC(strength=strength, examples=20), "ends": ends}))
        starts.append(ends.kept[0])
        moved.append(float((ends.kept[1] - ends.kept[0]).norm()))
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])  # nothing is held in the first
    assert moved[2] < moved[1] < moved[0], moved


def test_strength_zero_is_finetuning_bit_for_bit(trainer: Callable) -> None:
    off = trained(EWC(strength=0.0))
    assert torch.equal(flat(trained(None)), flat(off))
    assert off.strategy.stored_bytes() == 0  # and no time was spent on a Fisher


def test_separate_and_single_are_the_same_with_one_past_experience(trainer: Callable) -> None:
    a, b = (learner(EWC(strength=40.0, mode=mode)) for mode in ("separate", "single"))
    for made in (a, b):
        made.strategy.after_experience(made, stream()[0])
        torch.manual_seed(2)
        shaken(made)
    assert torch.equal(term(a), term(b))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "got 'both', allowed are 'separate', 'online', 'single'"),
        ({"fisher": "true"}, "got 'true', allowed are 'exact', 'sampled', 'empirical', 'batched'"),
        ({"strength": -1.0}, "at least 0"),
        ({"gamma": 1.5, "mode": "online"}, "must lie in 0..1"),
        ({"gamma": 0.5}, "only 'online' has it"),
        ({"examples": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWC(**dict[str, Any](strength=1.0) | options)


def test_exact_on_tokens_is_refused_before_training() -> None:
    made = learner(EWC(strength=1.0))
    made.objective = objective_for("token")
    with pytest.raises(ValueError, match=r"^fisher: got 'exact'.* set fisher=sampled or fisher=empirical"):
        made.strategy.setup(made, stream())
