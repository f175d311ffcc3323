"""Refresh learning: closed form on a quadratic, the noise's law, both modes by hand, the unified objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.composition import Composite
from clplat.importance.fisher import fisher
from clplat.learners.learner import Learner
from clplat.strategies.der import DER
from clplat.strategies.ewc import EWC
from clplat.strategies.lwf import LwF
from clplat.strategies.refresh import Refresh
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy


class Bowl:
    """Stands in for a learner: one weight vector, the loss a / 2 |w|^2, and plain gradient descent."""

    def __init__(self, start: Tensor, curvature: float, lr: float) -> None:
        self.w, self.a, self.lr = nn.Parameter(start.clone()), curvature, lr
        self.seen: list[float] = []

    def weights(self) -> dict[str, Tensor]:
        return {"w": self.w}

    def closure(self) -> Any:
        self.w.grad = None
        loss = 0.5 * self.a * self.w.square().sum()
        self.seen.append(float(loss))
        loss.backward()
        return loss

    def update(self, closure: Callable) -> Any:
        loss = closure()
        with torch.no_grad():
            assert self.w.grad is not None
            self.w -= self.lr * self.w.grad
        return loss


def stepped(strategy: Refresh, bowl: Bowl) -> Tensor:
    learner: Any = bowl
    strategy.step(learner, bowl.closure, bowl.update)
    return bowl.w.detach()


CASES = {"refresh": Case({"rate": 1e-3, "examples": 20}, off={"rate": 0.0})}


@pytest.mark.parametrize("j", [1, 3])
def test_a_step_on_a_quadratic(j: int) -> None:
    """w' = (1 - eta a) (1 + gamma a)^J w, without noise and with F the identity."""
    start = torch.randn(6, dtype=torch.float64)
    bowl = Bowl(start, curvature=1.7, lr=0.1)
    found = stepped(Refresh(rate=0.03, noise=0.0, unlearn_steps=j), bowl)
    torch.testing.assert_close(found, (1 - 0.1 * 1.7) * (1 + 0.03 * 1.7) ** j * start)
    assert len(bowl.seen) == j + 1
    assert bowl.seen == sorted(bowl.seen)  # unlearning raises the loss


def test_important_weights_unlearn_less() -> None:
    start = torch.ones(4, dtype=torch.float64)
    strategy, bowl = Refresh(rate=0.1, noise=0.0, damping=0.5), Bowl(start, 1.0, lr=0.0)
    strategy.information.keep({"w": torch.tensor([0.0, 0.5, 2.0, 99.5], dtype=torch.float64)})
    moved = stepped(strategy, bowl) - start
    torch.testing.assert_close(moved, 0.1 / torch.tensor([0.5, 1.0, 2.5, 100.0], dtype=torch.float64))


def test_the_noise_has_covariance_two_gamma_over_f() -> None:
    importance = torch.tensor([0.0, 1.0, 3.0]).repeat_interleave(40_000)
    strategy, bowl = Refresh(rate=0.02, noise=1.5), Bowl(torch.zeros(120_000), 1.0, lr=0.0)
    strategy.information.keep({"w": importance})
    moved = stepped(strategy, bowl).view(3, -1)
    for row, f in zip(moved, (1.0, 2.0, 4.0), strict=True):
        right = 1.5**2 * 2 * 0.02 / f
        # the variance of 40 000 normal numbers has a relative deviation of sqrt(2 / n)
        assert abs(float(row.var()) / right - 1) < 4.5 * math.sqrt(2 / 40_000)
        assert abs(float(row.mean())) < 4.5 * math.sqrt(right / 40_000)


def test_rate_zero_takes_no_extra_pass() -> None:
    bowl = Bowl(torch.ones(3), 1.0, lr=0.1)
    strategy = Refresh(rate=0.0)
    stepped(strategy, bowl)
    assert len(bowl.seen) == 1
    assert strategy.passes == 1.0
    assert Refresh(rate=0.1, unlearn_steps=3).passes == 4.0


def test_the_reference_mode_by_hand(tiny: Any) -> None:
    strategy = Refresh(rate=1e-3, mode="reference", noise=0.0)
    learner = tiny.learner(strategy)
    batch = tiny.stream()[0].train.batch(torch.arange(12))
    joined = replace(batch, source=torch.tensor([0] * 8 + [1] * 4, dtype=torch.uint8))
    current = batch.rows(torch.arange(8))
    weights = learner.weights()
    information = {n: 50 * torch.rand_like(w, requires_grad=False) for n, w in weights.items()}
    strategy.information.keep(information)
    found = torch.autograd.grad(F.cross_entropy(learner(current).logits, current.y), list(weights.values()))
    right = {
        n: w + 1e-3 * g * w.norm() / g.norm() / (1 + 1e-3 * information[n])
        for (n, w), g in zip(weights.items(), found, strict=True)
    }
    right = {n: w.detach() for n, w in right.items()}
    strategy.batch(learner, joined)
    strategy.before_step(learner, joined)
    assert strategy.step(learner, lambda: learner(batch), lambda closure: closure()) is not None
    for n, w in learner.weights().items():
        torch.testing.assert_close(w.detach(), right[n])


def test_the_reference_fisher_weighs_by_the_probability(tiny: Any) -> None:
    strategy = Refresh(rate=1e-5, mode="reference", examples=None, decay=0.25)
    stream = tiny.stream()
    learner = tiny.learner(strategy, stream)
    total = {n: torch.zeros_like(w) for n, w in learner.weights().items()}
    for experience in stream.experiences[:2]:
        strategy.after_experience(learner, experience)
        fresh = {n: torch.zeros_like(w) for n, w in learner.weights().items()}
        for i in range(40):
            one = experience.train.batch(torch.tensor([i]))
            likelihood = learner(one).logits.log_softmax(-1)[0, one.y[0]]
            found = torch.autograd.grad(likelihood, list(learner.weights().values()))
            for n, g in zip(fresh, found, strict=True):
                fresh[n] += likelihood.exp().detach() * g.square() / 40
        total = {n: f + 0.25 * total[n] for n, f in fresh.items()}
    for n, right in total.items():
        torch.testing.assert_close(strategy.information.views()[n], right)


def test_it_wraps_what_is_inside(tiny: Any) -> None:
    """The unlearning gradient is that of the whole loss, penalties of inner strategies included; the diary is outside
    of the optimiser and inside of refresh, so it sees the closure called twice."""
    calls: list[int] = []

    class Count(Strategy):
        def loss(self, learner: Learner, batch: Any, output: Any) -> Any:
            calls.append(1)
            return {"count": 0 * output.logits.sum()}

    parts = {"refresh": Refresh(rate=1e-3), "replay": Replay(capacity=10), "count": Count()}
    learner = tiny.trained(Composite(parts))
    assert len(calls) == 2 * learner.steps


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_refreshed_weights_differ_and_runs_repeat(tiny: Any, mode: str) -> None:
    def go(rate: float) -> Tensor:
        learner = tiny.trained(Composite({"refresh": Refresh(rate=rate, mode=mode), "replay": Replay(capacity=10)}))
        return torch.cat([w.detach().flatten() for w in learner.weights().values()])

    assert torch.equal(go(1e-3), go(1e-3))
    assert not torch.equal(go(1e-3), go(0.0))


# The unified objective: D_Phi(a, b) = Phi(a) - Phi(b) - <grad Phi(b), a - b> with the Phi of each method.


def bregman(phi: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    b = b.detach().requires_grad_()
    value = phi(b)
    (slope,) = torch.autograd.grad(value, b)
    return phi(a) - value.detach() - (slope * (a - b.detach())).sum()


def negative_entropy(p: Tensor) -> Tensor:
    return torch.xlogy(p, p).sum()


def past_and_present(tiny: Any, strategy: Strategy) -> tuple[Learner, Any, Any]:
    stream = tiny.stream()
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    learner.begin(stream[0])
    batch = stream[0].train.batch(torch.arange(20))
    strategy.batch(learner, batch)
    strategy.before_step(learner, batch)
    strategy.after_step(learner, batch, learner(batch))
    learner.end(stream[0])
    learner.begin(stream[1])
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return learner, stream[1].train.batch(torch.arange(9)), batch


def test_ewc_is_the_bregman_distance_of_a_quadratic(tiny: Any) -> None:
    strategy = EWC(strength=4.0, examples=None)
    learner, batch, _ = past_and_present(tiny, strategy)
    total = torch.zeros(())
    for name, importance in strategy.past.importances().items():
        psi = lambda w, f=importance: 0.5 * (f * w.square()).sum()  # noqa: E731  # one for each weight
        total = total + 4.0 * bregman(psi, learner.weights()[name], strategy.past.anchors()[name])
    torch.testing.assert_close(strategy.loss(learner, batch, learner(batch))["ewc"], total, rtol=1e-4, atol=1e-7)


def test_der_is_the_bregman_distance_of_squared_logits(tiny: Any) -> None:
    strategy = DER(capacity=50, alpha=0.3, beta=0.0)
    learner, batch, _ = past_and_present(tiny, strategy)
    strategy.batch(learner, batch)
    strategy.before_step(learner, batch)
    (drawn,) = strategy._drawn
    now, then = learner(drawn).logits, drawn.extra["logits"]
    right = 0.3 * bregman(lambda z: z.square().sum() / z.numel(), now, then)
    torch.testing.assert_close(strategy.loss(learner, batch, learner(batch))["der_logits"], right)


def test_lwf_is_the_bregman_distance_of_negative_entropy(tiny: Any) -> None:
    strategy = LwF(strength=0.7, temperature=2.0)
    learner, batch, _ = past_and_present(tiny, strategy)
    now = (learner(batch).logits[:, :2] / 2).softmax(-1)
    then = (strategy.teacher(batch).logits[:, :2] / 2).softmax(-1)
    right = 0.7 * bregman(negative_entropy, then, now) / 9
    torch.testing.assert_close(strategy.loss(learner, batch, learner(batch))["lwf"], right, rtol=1e-4, atol=1e-6)


def test_replay_is_the_bregman_distance_of_negative_entropy_to_one_hot(tiny: Any) -> None:
    learner, _, old = past_and_present(tiny, Strategy())
    p = learner(old).logits.double().softmax(-1)
    right = bregman(negative_entropy, F.one_hot(old.y, 6).double(), p) / len(old)
    torch.testing.assert_close(learner.objective(learner(old).logits, old).double(), right, rtol=1e-5, atol=1e-6)


def test_paper_mode_adds_up_the_fisher(tiny: Any) -> None:
    strategy, stream = Refresh(rate=0.1, fisher="exact", examples=None, decay=0.5), tiny.stream()
    learner = tiny.learner(strategy, stream)
    parts = []
    for k in range(2):
        strategy.after_experience(learner, stream[k])
        parts.append(fisher(learner, stream[k].train, "exact", None, torch.Generator()))
    for n, found in strategy.information.views().items():
        torch.testing.assert_close(found, 0.5 * parts[0][n] + parts[1][n])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "x"}, "allowed are 'paper', 'reference'"),
        ({"rate": -1.0}, "rate: got -1"),
        ({"noise": -1.0}, "noise: got -1"),
        ({"damping": 0.0}, "damping: got 0"),
        ({"decay": 2.0}, "decay: got 2"),
        ({"unlearn_steps": 0}, "unlearn_steps: got 0"),
        ({"unlearn_steps": 2, "mode": "reference"}, "mode 'reference' takes one"),
        ({"fisher": "x"}, "fisher: got 'x'"),
        ({"examples": 0}, "examples: got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Refresh(**options)
