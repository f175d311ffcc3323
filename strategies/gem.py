"""Gradient episodic memory (Lopez-Paz & Ranzato 2017, arXiv 1706.08840)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.rehearsal.policies import ClassBalanced, Ring
from clplat.rehearsal.rows import insert_experience
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.weights.flat import flat_gradient, set_gradient


class GEM(Strategy):
    """Projection of a gradient g to the nearest one that raises the loss of no memory, to first order (eq. 11):

        min over v >= margin of 1/2 v'(GG' + eps I)v + (Gg)'v,    g <- g + G'v,    only if some (Gg)_k < 0

    Each earlier experience has a memory, and G one row for it: the gradient on all of that memory. The dual has as
    many unknowns as there are earlier experiences. It is solved by coordinate descent on the CPU, which waits for the
    device in every step.

    Args:
        capacity_per_experience: rows kept of each; 0 is finetuning.
        margin: the least each v_k may be (memory strength in the paper), at least 0.
        eps: added to the diagonal of GG'.
        policy: "latest" rows of an experience (the paper) or a "uniform" sample.
        seed: of the sample.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"raw_rows"})

    def __init__(
        self,
        capacity_per_experience: int,
        margin: float = 0.5,
        eps: float = 1e-3,
        policy: str = "latest",
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", capacity_per_experience=capacity_per_experience)
        checks.at_least(0, margin=margin)
        checks.above(0, eps=eps)
        checks.one_of("policy", policy, ("latest", "uniform"))
        kind = Ring if policy == "latest" else ClassBalanced
        self.memory = kind(capacity_per_group=capacity_per_experience, by="extra", seed=seed, fields=["experience"])
        self.margin, self.eps = margin, eps
        self._past: list[Batch] = []  # the memory of each earlier experience

    def enter(self, learner: Learner, experience: Experience) -> None:
        self._past = []  # the memories stay the same during an experience
        if len(self.memory):
            held = self.memory.contents().to(learner.device)
            label = held.extra["experience"]
            self._past = [replace(held.rows(label == k), extra={}) for k in label.unique().tolist()]
        self.passes = 1.0 + len(self._past)

    def gradients(self, learner: Learner, batch: Batch) -> None:
        if not self._past:
            return
        weights, rows = list(learner.weights().values()), []
        for memory in self._past:
            with torch.enable_grad():
                loss = learner.objective(learner(memory).logits, memory)
                rows.append(flat_gradient(torch.autograd.grad(loss, weights, allow_unused=True), weights))
        own = flat_gradient([w.grad for w in weights], weights)
        set_gradient(weights, project(own, torch.stack(rows), self.margin, self.eps))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.memory.capacity:
            insert_experience(self.memory, experience, learner.device)

    def stored_bytes(self) -> int:
        return self.memory.stored_bytes()


def project(gradient: Tensor, past: Tensor, margin: float = 0.5, eps: float = 1e-3) -> Tensor:
    """The projected gradient [P] of a gradient [P] and those of K memories [K, P]."""
    with torch.autocast(gradient.device.type, enabled=False):  # products of long vectors are lost in half precision
        along = past @ gradient
        dual = solve_dual((past @ past.mT).double().cpu(), along.double().cpu(), margin, eps)
        return gradient + dual.to(gradient) @ past


def solve_dual(gram: Tensor, along: Tensor, margin: float, eps: float, tolerance: float = 1e-12) -> Tensor:
    """v >= margin [K] that minimises 1/2 v'(gram + eps I)v + along'v; zeros if no entry of `along` is negative.

    Coordinate descent: each step solves for one entry exactly. The matrix is positive definite, so it converges.

    Args:
        gram: [K, K] float64, positive semi-definite.
        along: [K] float64.
        margin: lower bound.
        eps: above 0.
        tolerance: of the largest change of an entry in a round, relative to the largest entry.
    """
    if bool((along >= 0).all()):
        return torch.zeros_like(along)
    q = (gram + eps * torch.eye(len(gram), dtype=gram.dtype)).tolist()
    b, v = along.tolist(), [margin] * len(along)
    for _ in range(100_000):
        moved = 0.0
        for k, row in enumerate(q):
            rest = b[k] + sum(x * y for x, y in zip(row, v, strict=True)) - row[k] * v[k]
            new = max(margin, -rest / row[k])
            moved, v[k] = max(moved, abs(new - v[k])), new
        if moved <= tolerance * max(1.0, *v):
            break
    return torch.tensor(v, dtype=gram.dtype)
