"""Rehearsal with multipliers: the ideal continual learner with constraints (Peng et al. 2023, arXiv 2305.00316)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.policies import ClassBalanced
from clplat.rehearsal.rows import in_order
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience


class Lagrangian(Strategy):
    """Constrained rehearsal: minimise L_t, subject to L_k <= eps_k on stored examples of each old experience k.

    Each old experience k has a multiplier lambda_k; with m_k = [lambda_k + rho (L_k - eps_k)]_+ the loss gets

        sum over k of (m_k^2 - lambda_k^2) / (2 rho)      and after the step      lambda_k <- m_k,

    which is the augmented Lagrangian of inequality constraints (Rockafellar 1973; Bertsekas 1982), L_k being the mean
    loss of a few stored examples of k drawn anew each step. Its gradient is the sum of m_k times the gradient of L_k:
    experience replay whose weights follow how much is being forgotten. With `augmented` false the term is
    sum of lambda_k L_k, the multipliers moving in the same way. At rho 0 they stay at `multiplier`, and the term is
    lambda sum of L_k: weighted experience replay.

    eps_k is what was reached, the loss on the stored examples of k when k ended, or `threshold`; plus `slack`.

    Deviations: the paper states the constrained problem, not an algorithm; that constraints are estimated from a few
    examples a step, and multipliers moved once a step, is this implementation's choice.

    Args:
        capacity: examples held in all, shared equally among the experiences met; 0 is finetuning.
        rows: stored examples of every old experience a step.
        rho: step size of the multipliers and weight of the augmented term.
        multiplier: lambda of an experience when it becomes an old one.
        largest: multipliers stay below this (a constraint that cannot be met would raise its own for ever); null: none.
        threshold: eps of all experiences; null: what was reached.
        slack: added to eps.
        augmented: False for the plain Lagrangian.
        seed: of the buffer's random numbers.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"raw_rows"})
    multipliers: Tensor | None  # [old experiences]
    limits: Tensor | None  # [old experiences], eps

    def __init__(
        self,
        capacity: int = 200,
        rows: int = 16,
        rho: float = 0.1,
        multiplier: float = 1.0,
        largest: float | None = 100.0,
        threshold: float | None = None,
        slack: float = 0.0,
        augmented: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", capacity=capacity)
        checks.at_least(0, rho=rho, multiplier=multiplier, threshold=threshold, slack=slack)
        checks.at_least(1, "capacity=0 replays nothing", rows=rows)
        checks.at_least(multiplier, "the multiplier; null for none", largest=largest)
        self.rows, self.rho, self.multiplier, self.largest = rows, rho, multiplier, largest
        self.threshold, self.slack, self.augmented = threshold, slack, augmented
        self.on = capacity > 0 and (rho > 0 or multiplier > 0)
        self.passes = 2.0 if self.on else 1.0
        # Grouped by experience, in the place of the task label; the label itself is kept beside it.
        self.buffer = ClassBalanced(capacity, None, "task", seed, fields=("label",))
        for name in ("multipliers", "limits"):
            self.register_buffer(name, None)
        self._replayed: tuple[Batch, Tensor] | None = None  # of the current step, with the experience of each row
        self._proposed: Tensor | None = None  # the multipliers after it

    def before_step(self, learner: Learner, batch: Batch) -> None:
        if self.multipliers is not None:
            self._replayed = self._drawn(self.rows, batch)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        if self.multipliers is None or self.limits is None or self._replayed is None:
            return {}
        reached, held = _losses(learner, *self._replayed, len(self.multipliers))
        # A share of 0 examples says nothing about its constraint.
        raised = F.relu(self.multipliers + torch.where(held, self.rho * (reached - self.limits), 0))
        if self.largest is not None:
            raised = raised.clamp_max(self.largest)
        self._proposed = raised.detach()
        if self.rho == 0 or not self.augmented:
            return {"lagrangian": (self.multipliers * reached).sum()}
        # Where the ceiling is reached the term goes on linearly, with the ceiling as its slope.
        slope = raised.detach()
        value = (slope.square() - self.multipliers.square()) / (2 * self.rho)
        return {"lagrangian": (value + slope * (reached - reached.detach())).sum()}

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        if self._proposed is not None:
            self.multipliers = self._proposed
        self._replayed = self._proposed = None

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if not self.on:
            return
        batch = None
        for batch in in_order(experience.train, learner.device):
            group = torch.full((len(batch),), experience.index, device=batch.x.device)
            label = group if batch.task is None else batch.task
            self.buffer.insert(replace(batch, task=group, extra={"label": label}))
        assert batch is not None
        with learner.evaluating():
            reached, _ = _losses(learner, *self._drawn(len(self.buffer), batch), experience.index + 1)
        limit = reached[-1:] if self.threshold is None else torch.full_like(reached[-1:], self.threshold)
        old = [] if self.limits is None or self.multipliers is None else [self.limits, self.multipliers]
        self.limits = torch.cat([*old[:1], limit + self.slack])
        self.multipliers = torch.cat([*old[1:], torch.full_like(limit, self.multiplier)])

    def stored_bytes(self) -> int:
        own = [t for t in (self.multipliers, self.limits) if t is not None]
        return self.buffer.stored_bytes() + sum(t.numel() * t.element_size() for t in own)

    def _drawn(self, rows: int, like: Batch) -> tuple[Batch, Tensor]:
        """`rows` stored examples of every old experience, told their task where `like` is, and their experiences."""
        stored = self.buffer.sample_per_group(rows).to(like.x.device)
        assert stored.task is not None
        return replace(stored, task=None if like.task is None else stored.extra["label"]), stored.task


def _losses(learner: Learner, stored: Batch, group: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Objective [number] on the rows of each experience, and whether it has any [number]."""
    objective = learner.objective
    losses, scored = objective.losses(learner(stored).logits, stored), objective.scored(stored)
    counts = torch.ones(len(stored), dtype=losses.dtype, device=losses.device)
    if losses.ndim == 2 and objective.reduction == "mean":
        counts = counts * losses.shape[1] if scored is None else scored.sum(1).to(losses.dtype)
    losses = losses if losses.ndim == 1 else losses.sum(1)
    member = F.one_hot(group, number).to(losses.dtype)  # sums by it are the same on every run, on a GPU too
    total, count = ((member * values[:, None]).sum(0) for values in (losses, counts))
    return total / count.clamp_min(1), count > 0
