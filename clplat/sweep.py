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
