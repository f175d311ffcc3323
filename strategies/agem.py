"""Averaged gradient episodic memory (Chaudhry et al. 2019, arXiv 1812.00420)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.rehearsal.policies import ClassBalanced
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.weights.flat import flat_gradient, set_gradient

READ = 1024
"""Examples read at once when an experience is offered to the memory."""


class AGEM(Strategy):
    """Where the gradient g would raise the loss on a draw from the memory, it is projected (eq. 11):

        g <- g - (g . r / r . r) r    if g . r < 0,    r the gradient on rows drawn from all earlier experiences

    The memory keeps the same number of uniformly drawn rows of every experience, taken when it ends. The draw is one
    sample of the whole memory.

    Args:
        capacity_per_experience: rows kept of each; 0 is finetuning.
        rows: rows of a draw.
        seed: of the memory's random numbers.

    Raises:
        ValueError: an option that is not allowed.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"raw_rows"})

    def __init__(self, capacity_per_experience: int, rows: int = 256, seed: int = 0) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"agem.rows: got {rows}, it must be at least 1 (capacity 0 replays nothing).")
        self.memory = ClassBalanced(
            capacity_per_group=capacity_per_experience, by="extra", seed=seed, fields=["experience"]
        )
        self.rows = rows
        self.passes = 2.0 if capacity_per_experience else 1.0
        self._drawn: Batch | None = None

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch as it is; the reference rows are drawn here, once a step."""
        count = min(self.rows, len(self.memory))
        self._drawn = replace(self.memory.sample(count).to(batch.x.device), extra={}) if count else None
        return batch

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Project, where needed."""
        if self._drawn is None:
            return
        weights = list(learner.weights().values())
        with torch.enable_grad():
            loss = learner.objective(learner(self._drawn).logits, self._drawn)
            reference = flat_gradient(torch.autograd.grad(loss, weights, allow_unused=True), weights)
        set_gradient(weights, project(flat_gradient([w.grad for w in weights], weights), reference))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Offer the whole training set to the memory."""
        if not self.memory.capacity:
            return
        for batch in experience.train.batches(torch.arange(len(experience.train)).split(READ)):
            label = torch.full((len(batch),), experience.index, device=batch.x.device)
            self.memory.insert(replace(batch, extra={"experience": label}).to(learner.device))

    def stored_bytes(self) -> int:
        """Bytes of the rows kept."""
        return self.memory.stored_bytes()


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """`gradient` [P] without its part against `reference` [P]; as it is where the two do not disagree."""
    with torch.autocast(gradient.device.type, enabled=False):  # products of long vectors are lost in half precision
        along = gradient @ reference
        share = torch.where(along < 0, along / (reference @ reference).clamp_min(torch.finfo(along.dtype).tiny), 0)
        return gradient - share * reference
