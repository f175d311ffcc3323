"""Finished runs found under folders: read, damaged ones named, and each configuration and seed counted once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clplat.report.summary import RunSummary, read_run

NAMES = ("stream", "learner", "strategy", "scored on")
"""Names that tell configurations apart before any key of the config does."""


@dataclass(frozen=True)
class Found:
    """Runs that a table can show.

    Attributes:
        runs: one for each configuration and seed, in the order of their paths.
        notes: what was left out and why, one sentence each.
    """

    runs: list[RunSummary]
    notes: list[str]


def find_runs(folders: Iterable[Path]) -> Found:
    """Read every `result.json` under some folders. A damaged one is named and left out, the rest is used."""
    paths = dict.fromkeys(path.resolve() for folder in folders for path in sorted(folder.rglob("result.json")))
    runs, notes = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except ValueError as error:
            notes.append(f"Left out: {error}")
    once, repeated = latest(runs)
    if repeated:
        places = ", ".join(shown(run.folder) for run in repeated if run.folder is not None)
        one = len(repeated) == 1
        notes.append(
            f"{len(repeated)} {'run repeats' if one else 'runs repeat'} the configuration and seed of a later one and "
            f"{'is' if one else 'are'} not counted: {places}."
        )
    return Found(once, notes)


def latest(runs: Sequence[RunSummary]) -> tuple[list[RunSummary], list[RunSummary]]:
    """Split runs into the latest of each configuration and seed, and those that it repeats. Both keep their order.

    A seed that was run twice is one draw: counted as two it would narrow the spread and shift the mean.
    """
    last: dict[Hashable, RunSummary] = {}
    for run in sorted(runs, key=_written):
        last[(*identity(run).items(), run.seed, run.score, *sorted(run.seeds.items()))] = run
    kept = {id(run) for run in last.values()}
    return [run for run in runs if id(run) in kept], [run for run in runs if id(run) not in kept]


def identity(run: RunSummary) -> dict[str, str]:
    """All that tells one configuration from another, by name: the chosen options, and every key that is no seed."""
    names = {"stream": run.stream, "learner": run.learner, "strategy": run.strategy, "scored on": run.on}
    return names | dict(sorted(run.config.items()))


def what_differs(described: Sequence[Mapping[str, str]]) -> list[str]:
    """Names and keys by which configurations are told apart: `strategy` always, others only if they differ.

    A key counts if it differs between two configurations that the names alone do not tell apart. So what only some
    strategies have tells apart the configurations of one strategy.

    Args:
        described: configurations as `identity` gives them.
    """
    names = [n for n in NAMES if n == "strategy" or len({d.get(n) for d in described}) > 1]
    keys = []
    for key in sorted({key for d in described for key in d if key not in NAMES}):
        values: dict[tuple[str | None, ...], set[str | None]] = {}
        for d in described:
            values.setdefault(tuple(d.get(n) for n in NAMES), set()).add(d.get(key))
        if any(len(found) > 1 for found in values.values()):
            keys.append(key)
    return names + keys


def shown(folder: Path) -> str:
    """The folder as seen from here, if it lies below."""
    folder, here = folder.resolve(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _written(run: RunSummary) -> tuple[float, str]:
    path = None if run.folder is None else run.folder / "result.json"
    return (os.stat(path).st_mtime if path is not None and path.exists() else 0.0, str(path))
