"""Herding (Welling 2009): the examples whose mean stays nearest to the mean of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.learners.modes import evaluating
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch, Data

if TYPE_CHECKING:
    from clplat.learners.learner import Learner


def herding(features: Tensor, count: int) -> Tensor:
    """The first `count` rows of features [N, H] in herding order (Rebuffi et al. 2017, algorithm 4), [count] int64.

    Each next row is the one that brings the mean of the chosen ones nearest to the mean of all.
    """
    mean, chosen = features.mean(0), []
    total, free = torch.zeros_like(mean), torch.ones(len(features), dtype=torch.bool, device=features.device)
    squares = features.square().sum(1)
    for k in range(1, min(count, len(features)) + 1):
        # || k * mean - total - f ||^2 without what is the same for all rows
        gap = squares - 2 * features @ (k * mean - total)
        best = gap.masked_fill(~free, torch.inf).argmin()
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.stack(chosen)


def unit_features(learner: Learner, batch: Batch) -> Tensor:
    """Features [B, H] of unit length; those of sequences with a target a step as their mean over scored steps."""
    features = learner.features(batch)
    if features.ndim == 3:
        scored = learner.objective.scored(batch)
        share = torch.ones_like(features[..., 0]) if scored is None else scored.to(features.dtype)
        features = (features * share[..., None]).sum(1) / share.sum(1, keepdim=True)
    return F.normalize(features, dim=-1)


@torch.no_grad()
def herd(learner: Learner, data: Data, count: int, batch_size: int = 1000) -> tuple[Batch, Tensor]:
    """The first `count` examples of each class in herding order of their unit features, in evaluation mode.

    Args:
        learner: gives the features.
        data: with one class an example.
        count: of each class, at most.
        batch_size: examples a pass; no effect on the result.

    Returns:
        The examples, class by class, and the rank [B] of each within its class.

    Raises:
        ValueError: examples without a class.
    """
    targets = data.targets()
    if targets is None:
        raise ValueError("Herding goes class by class, and these examples have no single class: use another policy.")
    rows, ranks = [], []
    for label in targets.unique().tolist():
        members = (targets == label).nonzero().squeeze(1)
        with evaluating(learner):
            batches = data.batches(members.split(batch_size))
            features = torch.cat([unit_features(learner, b.to(learner.device)) for b in batches])
        order = herding(features, count).cpu()
        rows.append(data.batch(members[order]))
        ranks.append(torch.arange(len(order)))
    return concatenate(rows), torch.cat(ranks)
