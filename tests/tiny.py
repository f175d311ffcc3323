"""What several test files need: small streams, learners and looks into a run."""

from __future__ import annotations

from typing import Any

from clplat.learners.learner import Learner


def only(learner: Learner) -> Any:
    """The one strategy in a learner's list."""
    (part,) = learner.strategy.strategies
    return part
