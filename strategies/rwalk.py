"""Riemannian walk (Chaudhry et al. 2018, arXiv 1801.10112)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, _foreach_addcmul_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim

from clplat import checks
from clplat.importance.path_integral import Before, after_step, before_step
from clplat.importance.penalty import Quadratic
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.weights.named import NamedTensors


class RWalk(Strategy):
    """Adds strength * sum_i (F_i + s_i) (theta_i - theta*_i)^2 (eq. 8), both parts scaled to a maximum of 1.

        F <- alpha g^2 + (1 - alpha) F at every step                                                (EWC++, eq. 6)
        s <- s + [sum of -g_i * change of theta_i] / (F_i (change over the interval)^2 / 2 + eps)   (eq. 7)

    where an interval is `interval` steps (the steps after the last whole one of an experience do not count). After an
    experience s is averaged with that of the past, and negative s count as 0. g is the gradient of a batch, not of
    single examples, as the paper has it for its running F; it is that of everything but this penalty, taken from the
    training pass itself (the paper's other passes cost double).

    Args:
        strength: lambda; 0 is finetuning.
        alpha: weight of the newest squared gradient, in 0..1.
        interval: steps between two updates of s, at least 1.
        eps: what keeps the score finite where a weight hardly moved. The paper does not give it.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"weight_values"})

    def __init__(self, strength: float, alpha: float = 0.9, interval: int = 10, eps: float = 1e-7) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", strength=strength)
        checks.within(0, 1, alpha=alpha)
        checks.at_least(1, interval=interval)
        checks.above(0, eps=eps)
        self.strength, self.alpha, self.interval, self.eps = strength, alpha, interval, eps
        self.past = Quadratic()
        self.fisher, self.score, self.old_score = NamedTensors(), NamedTensors(), NamedTensors()
        self.gain, self.start = NamedTensors(), NamedTensors()  # of the current interval
        self.steps = 0
        self._before: Before = {}  # of the current step

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """The path begins anew; the running F goes on."""
        if self.strength == 0:
            return
        weights = learner.weights()
        for part in (self.score, self.gain):
            part.zero(weights)
        if not self.fisher:
            self.fisher.zero(weights)
        self.start.keep(weights)
        self.steps = 0

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        return {"rwalk": self.past.penalty(learner.weights(), 2 * self.strength)} if self.past else {}

    @torch.no_grad()
    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Note weights and gradient before the optimiser moves, and follow F."""
        if self.strength == 0:
            return
        fisher = self.fisher.views()
        self._before = before_step(learner.weights(), fisher, self.past, 2 * self.strength)
        grads = {n: gradient for n, (_, gradient) in self._before.items()}
        first = self.steps == 0 and not self.past  # a mean needs something to start from
        decayed, alpha = [fisher[n] for n in grads], 1.0 if first else self.alpha
        _foreach_mul_(decayed, 1 - alpha)
        _foreach_addcmul_(decayed, list(grads.values()), list(grads.values()), value=alpha)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Add the step to the path; at the end of an interval update the scores."""
        if not self._before:
            return
        weights, gain = learner.weights(), self.gain.views()
        names = after_step(gain, self._before, weights)
        self._before = {}
        self.steps += 1
        if self.steps % self.interval:
            return
        score, fisher, start = self.score.views(), self.fisher.views(), self.start.views()
        for n in names:
            moved = (weights[n] - start[n]).square_()
            score[n].addcdiv_(gain[n], moved.mul_(fisher[n]).mul_(0.5).add_(self.eps))
            gain[n].zero_()
            start[n].copy_(weights[n])

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Average the scores with the past's, and make the next penalty of them and F."""
        if self.strength == 0:
            return
        score, old = self.score.views(), self.old_score.views()
        averaged = {n: 0.5 * (s + old[n]) if n in old else s for n, s in score.items()}
        self.old_score.keep(averaged)
        weights, fisher = learner.weights(), self.fisher.views()
        names = [n for n in averaged if n in weights]
        tiny = torch.finfo(torch.float32).tiny
        highest = torch.stack([fisher[n].max() for n in names]).max().clamp_min(tiny)
        best = torch.stack([averaged[n].max() for n in names]).max().clamp_min(tiny)
        new = {n: fisher[n] / highest + averaged[n].clamp_min(0) / best for n in names}
        self.past.renew(new, weights, decay=0.0)

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]
