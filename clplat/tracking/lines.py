"""Lines of the charts: runs of one configuration are one line, named by what tells it from the others.

What varies in an MLflow experiment is known only from all of its runs, so a run's line is a tag, which can change, and
not a param. MLflow averages the runs of a line and shows their spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from clplat.report.runs import what_differs
from clplat.report.summary import DIFFERENCES
from clplat.tracking.limits import cut

LINE = "line"
"""The tag that holds a run's line. A run that another one repeats has none."""

MARKS = (
    "#a6630c", "#c83243", "#b45091", "#8a63bf", "#434a93", "#137dae", "#04867d", "#308613", "#facb66", "#1f272d",
    "#445461", "#5f7281", "#8396a5", "#93320b", "#be501e", "#de7921", "#f2be88", "#115026", "#277c43", "#3ba65e",
    "#8ddda8", "#9e102c", "#c82d4c", "#e65b77", "#f792a6", "#0e538b", "#2272b4", "#4299e0", "#8acaff",
)  # fmt: skip
"""The colours among which MLflow (3.17) chooses one for a group of runs, by a hash of the group's name."""

PALETTE = (
    "#0e538b", "#c82d4c", "#4299e0", "#a6630c", "#f792a6", "#1f272d", "#5f7281", "#93320b", "#de7921", "#115026",
)  # fmt: skip
"""Of these, ten that are far apart, for colour-blind eyes too, in the order in which lines get them."""


@dataclass(frozen=True)
class TrackedRun:
    """What the store knows of a run.

    Attributes:
        run_id: the store's name of it.
        params: flat.
        started: ms since 1970.
        finished: it ended as complete.
    """

    run_id: str
    params: Mapping[str, str]
    started: int
    finished: bool


def lines(runs: Sequence[TrackedRun]) -> dict[str, tuple[str, str]]:
    """Name and colour of each run's line, by run id; runs that are repeated by a later one are left out.

    Of runs with the same configuration and seeds the last that finished counts, or the last begun if none did.

    Args:
        runs: of one MLflow experiment, in any order.
    """
    ordered = sorted(runs, key=lambda run: (run.started, run.run_id))
    last: dict[Hashable, TrackedRun] = {}
    for run in sorted(ordered, key=lambda run: run.finished):
        last[tuple(sorted(_described(run.params, seeds=True).items()))] = run
    described = {run.run_id: _described(run.params) for run in ordered}
    differing = what_differs(list(described.values()))
    colours: dict[Hashable, str] = {}
    names: dict[Hashable, str] = {}
    for d in described.values():
        key = tuple(d.get(name) for name in differing)
        if key not in names:
            colours[key] = PALETTE[len(names) % len(PALETTE)]
            names[key] = _distinct(_name(d, differing), names.values())
    kept = {run.run_id for run in last.values()}
    found = {}
    for run_id, d in described.items():
        key = tuple(d.get(name) for name in differing)
        if run_id in kept:
            found[run_id] = (coloured(names[key], colours[key]), colours[key])
    return found


def coloured(name: str, colour: str) -> str:
    """The name with blanks behind it, which nobody sees, such that MLflow draws its group in this colour."""
    for length in range(12):
        for blanks in itertools.product(" \N{NO-BREAK SPACE}", repeat=length):
            if MARKS[_hash(f"tag.{LINE}.{name}{''.join(blanks)}") % len(MARKS)] == colour:
                return f"{name}{''.join(blanks)}"
    return name


def _hash(text: str) -> int:
    # As MLflow's UI hashes the name of a group, over UTF-16.
    units, low, high = text.encode("utf-16-le", "surrogatepass"), 0, 0
    for i in range(0, len(units), 2):
        low = (low + int.from_bytes(units[i : i + 2], "little")) % 255
        high = (high + low) % 255
    return low | high << 8


def _described(params: Mapping[str, str], seeds: bool = False) -> dict[str, str]:
    # Names under the headings of tables, and every key that makes two runs different configurations.
    named = {f"{name}.name": name for name in ("stream", "learner", "strategy")}
    found = {heading: params.get(key, "") for key, heading in named.items()}
    for key, value in params.items():
        part = key.partition(".")[0]
        if key not in named and (key == "seed" or part in DIFFERENCES) and (seeds or not key.endswith("seed")):
            found[key] = value
    return found


def _name(described: Mapping[str, str], differing: Sequence[str]) -> str:
    """The strategy first, then other names, then options by the last part of their key; of classes only the path."""
    words = [described["strategy"]]
    words += [described[name] for name in ("learner", "stream") if name in differing]
    for key in differing:
        if key in described and key not in ("strategy", "learner", "stream"):
            value = cut(described[key], 60)
            words.append(value if key.endswith("_target_") else f"{key.rpartition('.')[2]}={value}")
    return cut(", ".join(words), 200)


def _distinct(name: str, taken: object) -> str:
    number = 1
    wanted = name
    while wanted in taken:  # type: ignore[operator]
        number += 1
        wanted = f"{name} ({number})"
    return wanted
