"""Schedules of the learning rate: a factor for every optimiser step of an experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from clplat import checks

Schedule = Callable[[int], float]
"""Factor of the learning rate at each optimiser step of an experience, from 0."""


def constant(steps: int) -> Schedule:
    """Factor 1 at every one of `steps` steps."""
    return lambda step: 1.0


def warmup_cosine(steps: int, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to 1, then half a cosine down to `final`, anew in every experience.

    Args:
        steps: optimiser steps of the experience.
        warmup: fraction of them spent warming up, 0 to 1.
        final: the factor at the last step, 0 to 1.

    Raises:
        ValueError: a fraction outside 0..1.
    """
    checks.within(0, 1, warmup=warmup, final=final)
    rising = round(steps * warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        progress = (step - rising) / max(1, steps - 1 - rising)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def steps_down(steps: int, at: list[float], factor: float = 0.1) -> Schedule:
    """Multiply the rate by `factor` after each fraction of the experience given in `at`.

    Args:
        steps: optimiser steps of the experience.
        at: fractions of the experience, 0 to 1.
        factor: of each drop.

    Raises:
        ValueError: a fraction outside 0..1, or a factor that is not above 0.
    """
    if not isinstance(at, Iterable) or not all(0 <= a <= 1 for a in at):
        raise ValueError(f"at: got {at}, it must be a list of fractions in 0..1.")
    checks.above(0, factor=factor)
    return lambda step: factor ** sum(step >= a * steps for a in at)
