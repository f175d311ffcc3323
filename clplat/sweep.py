"""Sweep: its folder is its own, and its report is shown when it is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepRefused(BaseException):
    """A sweep that may not begin. Hydra makes a mere warning of any `Exception` that a callback raises."""


class SweepReport(Callback):
    """Hydra callback: a sweep begins in a folder of its own; when it is over, its forgetting table is printed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a folder that holds runs already, before anything in it changes.

        Raises:
            SweepRefused: it does.
        """
        from clplat.claim import ClaimError, check_unused_below

        try:
            check_unused_below(Path(config.hydra.sweep.dir))
        except ClaimError as error:
            raise SweepRefused(str(error)) from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table of all runs of the sweep that finished."""
        from clplat.report.references import with_references
        from clplat.report.runs import find_runs
        from clplat.report.tables import print_sweep

        folder = Path(config.hydra.sweep.dir)
        found = find_runs([folder])
        if found.runs:
            print_sweep(with_references(found.runs), notes=found.notes)
            where = next(folder.rglob("where.txt"), None)
            if where is not None:
                print(f"curves: {where.read_text(encoding='utf-8')}", end="")
            print(f"runs:   {folder}")
        else:
            print("\n".join(found.notes))
