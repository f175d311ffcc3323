"""References for intransigence and omega: cumulative runs among the runs that are compared.

After experience j the strategy `cumulative` has trained on experiences 0..j together. So `R[j, j]` of such a run is the
joint reference of Chaudhry et al. (2018), and the mean of its row j over 0..j the offline one of Hayes et al. (2020).
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clplat.metrics import METRICS, summary
from clplat.report.summary import RunSummary
from clplat.scores import ScoreTable

log = logging.getLogger(__name__)

REFERENCE = "cumulative"
"""The strategy whose runs are references."""


def with_references(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """The same runs, those for which a reference was found with `intransigence` and `omega`.

    A reference has the same stream (its seeds included), learner and configuration apart from the strategy, and was
    scored on the same sets. The one of the same seed is taken; else R is the mean over all of them. A reference has
    none itself. Runs whose folder lacks R are left as they are.
    """
    found: dict[Hashable, list[tuple[RunSummary, Tensor]]] = {}
    for run in runs:
        if run.strategy == REFERENCE and (r := _scores(run)) is not None:
            found.setdefault(_setting(run), []).append((run, r))
    return [run if run.strategy == REFERENCE else _compared(run, found.get(_setting(run), [])) for run in runs]


def _compared(run: RunSummary, candidates: list[tuple[RunSummary, Tensor]]) -> RunSummary:
    r = _scores(run)
    if r is None:
        return run
    same = [(other, s) for other, s in candidates if s.shape == r.shape]
    chosen = [(other, s) for other, s in same if other.seed == run.seed] or same
    if not chosen:
        return run
    table = ScoreTable(len(r), run.score, run.higher_is_better)
    for i, row in enumerate(r):
        table.append(row, i, i)
    metrics = summary(table, reference=torch.stack([s for _, s in chosen]).mean(0))
    referenced = {name: metrics[name] for name, metric in METRICS.items() if {"joint", "offline"} & {*metric.needs}}
    folders = tuple(other.folder for other, _ in chosen if other.folder is not None)
    return replace(run, metrics=run.metrics | referenced, references=folders)


def _setting(run: RunSummary) -> Hashable:
    config = {key: value for key, value in run.config.items() if not key.startswith(("strategy.", "evaluation."))}
    seeds = {key: value for key, value in run.seeds.items() if key.startswith("stream.")}
    return run.stream, run.learner, run.score, run.on, *sorted((config | seeds).items())


def _scores(run: RunSummary) -> Tensor | None:
    path = run.folder and run.folder / "results.npz"
    if not path or not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["R"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s cannot be read (%s): this run is compared without its R.", path, error)
        return None
