"""Learning rate by how often a class was seen (Hayes et al. 2020, arXiv 1910.02509)."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


def class_rate(seen: int, final: float, final_after: int, every: int) -> float:
    """The factor of the learning rate for a class of which `seen` rows came before.

    gamma ** floor(seen / every) with gamma = final ** (every / final_after), and never below `final`.
    """
    return final ** min(1.0, every * (seen // every) / final_after)


def mean_class_rate(classes: Tensor | None, met: Counter[int], final: float, final_after: int, every: int) -> float:
    """Mean of the factors of some rows, each counted as seen by those behind it.

    Args:
        classes: [B], on the CPU; None, or no row: 1.
        met: rows of each class seen before.
        final: see `class_rate`.
        final_after: likewise.
        every: likewise.
    """
    if classes is None or len(classes) == 0:
        return 1.0
    ahead, total = Counter[int](), 0.0
    for label in classes.tolist():
        total += class_rate(met[label] + ahead[label], final, final_after, every)
        ahead[label] += 1
    return total / len(classes)
