"""Kinds of objects that stand at the keys of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def base(key: str) -> Any:
    """The class of what is built at a whole key, Callable for a schedule; None where no group is built."""
    from torch.optim import Optimizer

    from clplat.learners.nets.net import Net
    from clplat.learners.objective import Objective
    from clplat.lightning import pl
    from clplat.settings import Evaluation, Training
    from clplat.strategy import Strategy
    from clplat.streams.experience import Stream
    from clplat.tracking.base import Tracker

    group, _, name = key.partition(".")
    if group == "strategy" and name and "." not in name:
        return Strategy
    return {
        "stream": Stream,
        "learner.net": Net,
        "objective": Objective,
        "optimizer": Optimizer,
        "schedule": Callable[[int], float],
        "training": Training,
        "evaluation": Evaluation,
        "trainer": pl.Trainer,
        "tracking": Tracker,
    }.get(key)
