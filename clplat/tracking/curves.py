"""Curves of a run: what is tracked of R after each experience, and what charts of it need."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clplat.metrics import forgetting_so_far
from clplat.report.figures import labels
from clplat.report.spread import spread
from clplat.scores import Results
from clplat.tracking.view import LEARNED, Shown, experience_key


def curve_values(results: Results, stream: str, most: int | None) -> dict[str, float]:
    """Values by key after the last finished experience; what is undefined is left out.

    Args:
        results: with at least one experience finished.
        stream: its name, which keeps the curves of streams apart.
        most: at most so many experiences get a curve of their own; None: all, K^2 / 2 values of K experiences.
    """
    table, n = results.all, results.all.finished
    row = table.R[n - 1, :n]
    values = {f"{table.score}/average": float(row.mean()), "forgetting/average": forgetting_so_far(table), LEARNED: n}
    chosen = spread(table.experiences, most)
    values |= {experience_key(table.score, stream, j): float(row[j]) for j in chosen if j < n}
    if results.seen.finished == n:
        values[f"{table.score}_seen/average"] = float(results.seen.R[n - 1, :n].mean())
    return {key: value for key, value in values.items() if not math.isnan(value)}


def shown(results: Results, stream: str, titles: Sequence[str], most: int | None) -> Shown:
    """What the charts of this run's score show.

    Args:
        results: so far.
        stream: its name.
        titles: the K names of experiences, empty if they have none.
        most: as for `curve_values`.
    """
    table = results.all
    names = titles or labels(table.experiences)
    experiences = {str(j): names[j] for j in spread(table.experiences, most)}
    known = table.R[~table.R.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (None, None)
    return Shown(table.higher_is_better, {stream: experiences}, low, high)
