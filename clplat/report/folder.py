"""Folder of a run: configuration and origin when it begins; scores, tables and figures when it ends.

The folder is the same whatever the tracker is; a tracker uploads what lies there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clplat.report import figures, provenance
from clplat.report.spread import spread
from clplat.report.summary import RunSummary
from clplat.report.tables import markdown
from clplat.scores import Results

ORIGIN = ("config.yaml", "environment.txt", "code.json")
"""Files of a run that has begun."""

WHERE = "where.txt"
"""File that is written last: a run is complete when it is there."""

OUTCOME = (
    "results.npz", "result.json", "results_table.json", "table.md", "curves.png", "matrix.png", "figures.html",
    "strategy.npz",
)  # fmt: skip
"""Files of a run that has ended, besides `where.txt`; the last one only if a strategy reports something."""


def begin(folder: Path, config: str) -> None:
    """Write configuration (yaml), installed packages, and code version.

    Args:
        folder: of the run; it exists.
        config: the resolved configuration as yaml.
    """
    _write(folder / "config.yaml", config)
    _write(folder / "environment.txt", provenance.installed())
    _write(folder / "code.json", json.dumps(provenance.code(), indent=1))


def forget(folder: Path) -> None:
    """Take back what `begin` wrote, for a run that was refused after all."""
    for name in ORIGIN:
        (folder / name).unlink(missing_ok=True)


def finish(
    folder: Path,
    summary: RunSummary,
    results: Results,
    experiences: Sequence[str],
    where: str,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Write the scores first, then tables and figures, and `where.txt` last: with it the run is complete.

    A file is there whole or not at all.

    Args:
        folder: of the run.
        summary: of `results`.
        results: the scores.
        experiences: their K names.
        where: the line that tells where to see more.
        found: arrays that the strategies report.

    Raises:
        OSError: no room, or no right to write.
    """
    labels = figures.labels(results.all.experiences, experiences)
    _write(folder / "result.json", json.dumps(summary.plain(), indent=1))
    with _whole(folder / "results.npz") as path:
        np.savez_compressed(path, allow_pickle=False, **results.arrays())
    if found:
        with _whole(folder / "strategy.npz") as path:
            np.savez(path, allow_pickle=False, **found)
    _write(folder / "results_table.json", json.dumps(_table(results, labels)))
    _write(folder / "table.md", markdown(results, summary.metrics, labels))
    for name, figure in (("curves.png", figures.curves), ("matrix.png", figures.matrix)):
        with _whole(folder / name) as path:
            figure(results.all, experiences).savefig(path, dpi=130)
    _write(folder / "figures.html", figures.html(results.all, experiences))
    _write(folder / WHERE, where + "\n")


def _write(path: Path, text: str) -> None:
    with _whole(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when all of it is there; nothing is left of one that fails."""
    part = path.with_name(f".part.{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _table(results: Results, labels: Sequence[str]) -> dict[str, list[Any]]:
    # The form in which MLflow's UI shows a json file as a table. R is whole in results.npz.
    chosen = spread(len(labels), figures.CELLS)
    rows = [["untrained", *results.all.baseline[chosen].tolist()]]
    rows += [[f"after {labels[i]}", *results.R[i, chosen].tolist()] for i in chosen]
    data = [[None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows]
    return {"columns": ["trained", *(labels[i] for i in chosen)], "data": data}
