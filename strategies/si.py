"""Synaptic intelligence (Zenke, Poole & Ganguli 2017, arXiv 1703.04200)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat import checks
from clplat.importance.path_integral import Before, after_step, before_step
from clplat.importance.penalty import Quadratic
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.weights.named import NamedTensors


class SI(Strategy):
    """Adds strength * sum_i Omega_i (theta_i - theta*_i)^2 (eq. 4), Omega from the path that each weight took:

        omega_i = - sum over steps of g_i * (change of theta_i in the step)                         (eq. 3)
        Omega_i <- Omega_i + omega_i / ((theta_i(end) - theta_i(start))^2 + damping)                (eq. 5)

    g is the gradient of everything but this penalty, whose own gradient is known and taken off: the paper's path is
    that of the task's loss. Terms of other strategies in the same list count as the task's.

    The paper does not say what becomes of negative omega (a weight whose change raised the loss). By default it
    counts as 0, which keeps the penalty bounded below; `clip_negative=False` keeps it.

    Args:
        strength: c; 0 is finetuning.
        damping: xi, above 0.
        clip_negative: True counts a negative omega as 0.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"weight_values"})

    def __init__(self, strength: float, damping: float = 0.1, clip_negative: bool = True) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", strength=strength)
        checks.above(0, damping=damping)
        self.strength, self.damping, self.clip_negative = strength, damping, clip_negative
        self.past = Quadratic()
        self.path, self.start = NamedTensors(), NamedTensors()  # omega so far, and the weights before the experience
        self._before: Before = {}  # of the current step

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if self.strength == 0:
            return
        self.start.keep(learner.weights())
        self.path.zero(learner.weights())

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        return {"si": self.past.penalty(learner.weights(), 2 * self.strength)} if self.past else {}

    @torch.no_grad()
    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Note the weights and the task's gradient before the optimiser moves."""
        if self.strength == 0:
            return
        self._before = before_step(learner.weights(), self.path.views(), self.past, 2 * self.strength)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        if not self._before:
            return
        after_step(self.path.views(), self._before, learner.weights())
        self._before = {}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.strength == 0:
            return
        weights, start, new = learner.weights(), self.start.views(), {}
        for name, omega in self.path.views().items():
            if name in weights:
                omega = omega.clamp_min(0) if self.clip_negative else omega
                new[name] = omega / ((weights[name] - start[name]).square() + self.damping)
        self.past.renew(new, weights)
