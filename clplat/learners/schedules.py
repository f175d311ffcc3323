"""Learning-rate schedules: each makes, for an experience of `steps` optimiser steps, a factor for every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from clplat.learners.learner import Schedule, unchanged


def constant(steps: int) -> Schedule:
    """The factor 1 at every step.

    Args:
        steps: optimiser steps of the experience; makes no difference.
    """
    return unchanged


def warmup_cosine(steps: int, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to 1, then half a cosine down to `final`, anew in every experience.

    Args:
        steps: optimiser steps of the experience.
        warmup: fraction of them spent warming up, 0 to 1.
        final: the factor at the last step, 0 to 1.

    Raises:
        ValueError: a fraction outside 0..1.
    """
    for name, value in (("warmup", warmup), ("final", final)):
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{name}: got {value}, it must lie in 0..1.")
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
        raise ValueError(f"schedule.at: got {at}, it must be a list of fractions in 0..1.")
    if not factor > 0:
        raise ValueError(f"schedule.factor: got {factor}, it must be above 0.")
    return lambda step: factor ** sum(step >= a * steps for a in at)
