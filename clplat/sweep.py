"""What happens when a sweep is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Hydra callback: when a sweep is over, print its forgetting table and where to look."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table of all runs of the sweep that finished."""
        from clplat.report import tables as report

        folder = Path(config.hydra.sweep.dir)
        runs = [report.read_run(f) for f in sorted(folder.rglob("result.json"))]
        if runs:
            report.print_sweep(runs)
            print(f"curves: {next(folder.rglob('where.txt')).read_text()}runs:   {folder}")
