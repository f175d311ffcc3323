"""Folder of a run: configuration and origin when it begins; scores, tables and figures when it ends.

The folder is the same whatever the tracker is; a tracker uploads what lies there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "environment.txt").write_text(provenance.installed(), encoding="utf-8")
    (folder / "code.json").write_text(json.dumps(provenance.code(), indent=1), encoding="utf-8")


def finish(
    folder: Path,
    summary: RunSummary,
    results: Results,
    experiences: Sequence[str],
    where: str,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Write the scores first, then tables and figures.

    Args:
        folder: of the run.
        summary: of `results`.
        results: the scores.
        experiences: their K names.
        where: the line that tells where to see more.
        found: arrays that the strategies report.
    """
    labels = figures.labels(results.all.experiences, experiences)
    np.savez_compressed(folder / "results.npz", allow_pickle=False, **results.arrays())
    (folder / "result.json").write_text(json.dumps(summary.plain(), indent=1), encoding="utf-8")
    if found:
        np.savez(folder / "strategy.npz", allow_pickle=False, **found)
    (folder / "where.txt").write_text(where + "\n", encoding="utf-8")
    (folder / "results_table.json").write_text(json.dumps(_table(results, labels)), encoding="utf-8")
    (folder / "table.md").write_text(markdown(results, summary.metrics, labels), encoding="utf-8")
    figures.curves(results.all, experiences).savefig(folder / "curves.png", dpi=130)
    figures.matrix(results.all, experiences).savefig(folder / "matrix.png", dpi=130)
    (folder / "figures.html").write_text(figures.html(results.all, experiences), encoding="utf-8")


def _table(results: Results, labels: Sequence[str]) -> dict[str, list[Any]]:
    # The form in which MLflow's UI shows a json file as a table. R is whole in results.npz.
    chosen = spread(len(labels), figures.CELLS)
    rows = [["untrained", *results.all.baseline[chosen].tolist()]]
    rows += [[f"after {labels[i]}", *results.R[i, chosen].tolist()] for i in chosen]
    data = [[None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows]
    return {"columns": ["trained", *(labels[i] for i in chosen)], "data": data}
