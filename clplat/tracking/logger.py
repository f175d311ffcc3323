"""Adapter from Lightning's loggers to a tracker: `self.log` of a module or callback reaches the run's tracker."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from clplat.lightning import Logger, rank_zero_only
from clplat.tracking.base import Tracker


class RunLogger(Logger):
    """Lightning logger over a tracker. Lightning finalises its loggers after every `fit`; the run goes on.

    Args:
        tracker: that gets the values and params.
    """

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.experiment = tracker
        """The tracker itself, for what Lightning's methods do not cover."""

    @property
    def name(self) -> str:
        return self.experiment.experiment

    @property
    def version(self) -> str:
        return self.experiment.run_id

    @property
    def save_dir(self) -> str:
        return str(self.experiment.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass on what `self.log` collected, without Lightning's automatic `epoch`."""
        self.experiment.log({key: value for key, value in metrics.items() if key != "epoch"}, step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.experiment.log_params(vars(params) if isinstance(params, Namespace) else params)
