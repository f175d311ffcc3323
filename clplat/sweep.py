"""Report of a sweep that is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Hydra callback: when a sweep is over, print its forgetting table and where to look."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table of all runs of the sweep that finished."""
        from clplat.report.references import with_references
        from clplat.report.summary import read_run
        from clplat.report.tables import print_sweep

        folder = Path(config.hydra.sweep.dir)
        runs = [read_run(f) for f in sorted(folder.rglob("result.json"))]
        if runs:
            print_sweep(with_references(runs))
            print(f"curves: {next(folder.rglob('where.txt')).read_text()}runs:   {folder}")
