"""The diagonal of the Fisher information, always from gradients of single examples.

    F_i = mean over x of E_y [ (d log p(y | x) / d theta_i)^2 ]

with y from the model ("exact": the expectation in full; "sampled": one draw) or from the data ("empirical"), as named
by van de Ven (2025). His "batched" is here too, for comparison: the square of a batch's mean gradient, which is not a
Fisher information, depends on the batch size, and needs a strength orders of magnitude larger. log p of a sequence is
the sum over its scored steps, and the square is taken of that sum.

Letters: B batch, T time, C classes, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat import checks
from clplat.importance.per_example import SquaredGradients, Way
from clplat.learners.modes import evaluating
from clplat.streams.experience import Batch, Data

if TYPE_CHECKING:
    from clplat.learners.learner import Learner
    from clplat.learners.objective import Objective

KINDS = ("exact", "sampled", "empirical", "batched")


def check_kind(kind: str, objective: Objective | None = None) -> None:
    """Refuse an estimate that does not exist, or that an objective lacks.

    Raises:
        ValueError: names what is allowed.
        Unsupported: the objective has no exact Fisher, or no draw of targets.
    """
    checks.one_of("fisher", kind, KINDS)
    if objective is None:
        return
    none = torch.zeros(0, 1, 1)
    empty = Batch(none, none)
    if kind == "exact":
        objective.fisher_factors(none, empty)
    if kind == "sampled":
        objective.sample(none, empty, torch.Generator())


def fisher(
    learner: Learner,
    data: Data,
    kind: str,
    examples: int | None,
    generator: torch.Generator,
    batch_size: int = 128,
    way: Way = "taps",
) -> dict[str, Tensor]:
    """The diagonal Fisher information of the learner's weights, as a mean over examples.

    Everything is computed in eval mode, with the learner's logit mask and on scored steps only; nothing of the
    learner changes, `.grad`, training modes and global random states included.

    "exact" costs one backward pass for each class with probability above 0, less one; for bits and values one for
    each scored output of the sequence, so T * O (values are unit Gaussians, which makes it the Gauss-Newton diagonal).

    Args:
        learner: gives `learner(batch).logits`, `weights()`, `objective` and `device`.
        data: where examples come from.
        kind: "exact", "sampled", "empirical" or "batched".
        examples: a random subset of this size; None or more than there are: all.
        generator: on the CPU; draws the subset and the labels of "sampled".
        batch_size: examples a pass; changes the cost, not the result (but for "batched").
        way: see `clplat.importance.per_example`; anything but "taps" is slower, for tests.

    Returns:
        For each name in `learner.weights()` a tensor of that parameter's shape.

    Raises:
        ValueError: an unknown kind; no example.
        Unsupported: the objective lacks what the kind needs.
    """
    objective = learner.objective
    check_kind(kind, objective)
    if (examples is not None and examples < 1) or len(data) == 0:
        raise ValueError(f"fisher: got examples={examples} of {len(data)}, it needs at least 1 (or null for all).")
    count = len(data) if examples is None else min(examples, len(data))
    chosen = torch.randperm(len(data), generator=generator)[:count]

    def cotangents(logits: Tensor, batch: Batch) -> Iterable[Tensor]:
        if kind == "exact":
            return objective.fisher_factors(logits, batch)
        if kind == "sampled":
            batch = replace(batch, y=objective.sample(logits, batch, generator))
        return [_score_function(learner, logits, batch)]

    if kind == "batched":
        return _batched(learner, data, chosen.split(batch_size))
    squares = SquaredGradients(learner, learner.weights(), way)
    with evaluating(learner, grad=True):
        for batch in data.batches(chosen.split(batch_size)):
            squares.add(batch.to(learner.device), cotangents)
    return {name: total.div_(count) for name, total in squares.total.items()}


def _batched(learner: Learner, data: Data, indices: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The mean over batches of the square of their mean gradient."""
    weights = learner.weights()
    total = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
    with evaluating(learner, grad=True):
        for batch in data.batches(indices):
            batch = batch.to(learner.device)
            likelihood = learner.objective.log_likelihood(learner(batch).logits, batch).mean()
            found = torch.autograd.grad(likelihood, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[name].addcmul_(gradient, gradient)
    return {name: t.div_(len(indices)) for name, t in total.items()}


def _score_function(learner: Learner, logits: Tensor, batch: Batch) -> Tensor:
    """d log p(y | x) / d logits, [B, ...]."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(learner.objective.log_likelihood(logits, batch).sum(), logits)[0]
