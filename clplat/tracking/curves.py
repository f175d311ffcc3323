"""Curves of a run: what is tracked of R after each experience, and what charts of it need."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clplat.metrics import forgetting_so_far
from clplat.report.figures import labels
from clplat.report.spread import spread
from clplat.scores import Results
from clplat.tracking.view import LEARNED, Shown, average_key, experience_keys, forgetting_key


def curve_values(results: Results, stream: str, names: Sequence[str], most: int | None) -> dict[str, float]:
    """Values by key after the last finished experience; what is undefined is left out.

    Args:
        results: with at least one experience finished.
        stream: its name.
        names: the K names of experiences, empty if they have none.
        most: at most so many experiences get a curve of their own; None: all, K^2 / 2 values of K experiences.
    """
    table, n = results.all, results.all.finished
    row = table.R[n - 1, :n]
    values = {average_key(table.score): float(row.mean()), LEARNED: float(n)}
    values[forgetting_key(table.score)] = forgetting_so_far(table)
    keys = experience_keys(table.score, stream, names or labels(table.experiences))
    values |= {keys[j]: float(row[j]) for j in spread(table.experiences, most) if j < n}
    if results.seen.finished == n:
        values[f"{average_key(table.score)} - seen classes"] = float(results.seen.R[n - 1, :n].mean())
    return {key: value for key, value in values.items() if not math.isnan(value)}


def shown(results: Results, stream: str, names: Sequence[str], most: int | None) -> Shown:
    """What the charts of this run's score show; arguments as for `curve_values`."""
    table = results.all
    keys = experience_keys(table.score, stream, names or labels(table.experiences))
    known = table.R[~table.R.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (None, None)
    return Shown(table.higher_is_better, {stream: [keys[j] for j in spread(len(keys), most)]}, low, high)
