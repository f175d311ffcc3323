"""Averaged gradient episodic memory (Chaudhry et al. 2019, arXiv 1812.00420)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.rehearsal.policies import ClassBalanced
from clplat.rehearsal.rows import draw, insert_experience
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.weights.flat import flat_gradient, set_gradient


class AGEM(Strategy):
    """Projection of a gradient g that would raise the loss on a draw from the memory (eq. 11):

        g <- g - (g . r / r . r) r    if g . r < 0,    r the gradient on rows drawn from all earlier experiences

    The memory keeps the same number of uniformly drawn rows of every experience, taken when it ends. The draw is one
    sample of the whole memory.

    Args:
        capacity_per_experience: rows kept of each; 0 is finetuning.
        rows: rows of a draw.
        seed: of the memory's random numbers.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"raw_rows"})

    def __init__(self, capacity_per_experience: int, rows: int = 256, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", capacity_per_experience=capacity_per_experience)
        checks.at_least(1, "capacity_per_experience=0 replays nothing", rows=rows)
        self.memory = ClassBalanced(
            capacity_per_group=capacity_per_experience, by="extra", seed=seed, fields=["experience"]
        )
        self.rows = rows
        self.passes = 2.0 if capacity_per_experience else 1.0
        self._drawn: Batch | None = None  # in this step

    def before_step(self, learner: Learner, batch: Batch) -> None:
        drawn = draw(self.memory, batch, self.rows)
        self._drawn = None if drawn is None else replace(drawn, extra={})

    def gradients(self, learner: Learner, batch: Batch) -> None:
        if self._drawn is None:
            return
        weights = list(learner.weights().values())
        with torch.enable_grad():
            loss = learner.objective(learner(self._drawn).logits, self._drawn)
            reference = flat_gradient(torch.autograd.grad(loss, weights, allow_unused=True), weights)
        set_gradient(weights, project(flat_gradient([w.grad for w in weights], weights), reference))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.memory.capacity:
            insert_experience(self.memory, experience, learner.device)

    def stored_bytes(self) -> int:
        return self.memory.stored_bytes()


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """`gradient` [P] without its part against `reference` [P]; as it is where the two do not disagree."""
    with torch.autocast(gradient.device.type, enabled=False):  # products of long vectors are lost in half precision
        along = gradient @ reference
        share = torch.where(along < 0, along / (reference @ reference).clamp_min(torch.finfo(along.dtype).tiny), 0)
        return gradient - share * reference
