"""Tables for a person: one run's after training, and the forgetting table over many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clplat.metrics import METRICS
from clplat.report.runs import identity, shown, what_differs
from clplat.report.summary import Names, RunSummary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from clplat.scores import Results, ScoreTable

ALWAYS = ("average", "forgetting")
"""Metrics that every table over runs shows, undefined or not."""


def print_run(
    results: Results,
    summary: RunSummary,
    names: Names | None = None,
    where: str = "",
    console: Console | None = None,
) -> None:
    """Print R and the summary of one run.

    Args:
        results: the scores.
        summary: of them; scores of seen classes add a column.
        names: of the run, for the title.
        where: a line that tells where to see more.
        console: None for standard output.
    """
    from rich.console import Console

    console = console or Console()
    console.print()
    if names is not None:
        console.print(f"[bold]{names.strategy} · {names.learner} · {names.stream}[/]", highlight=False)
    if results.all.experiences <= 10:
        console.print(
            f"{_words(summary.score)} after training on (rows), {_tested(summary.on)} (columns)", highlight=False
        )
        console.print(_matrix(results.all))
    console.print(_summary(summary))
    if where:
        console.print(f"curves: {where}", soft_wrap=True, highlight=False)


def print_sweep(runs: Sequence[RunSummary], console: Console | None = None, notes: Sequence[str] = ()) -> None:
    """Print the forgetting table: a row for each configuration, mean ± standard deviation over its seeds.

    Configurations are told apart by whatever differs: stream, learner, strategy, the sets that were scored, then keys of
    the config.
    The deviation is the sample's (n - 1), and absent for one seed. A metric that is undefined for one seed is undefined
    for the row. The best average comes first.

    Args:
        runs: in any order, none twice.
        console: None for standard output.
        notes: sentences to print below, such as what was left out.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    for score in dict.fromkeys(run.score for run in runs):
        rows = group([run for run in runs if run.score == score])
        columns, left = _columns(rows, _words(score)), [*rows[0][0]]
        dropped = _fit(columns, _words(score), console.width)
        table = Table(box=_box(), pad_edge=False, collapse_padding=True)
        for heading, cells in columns.items():
            side = "left" if heading in left else "right"
            table.add_column(heading, justify=side, min_width=_width(heading, cells))
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        members = [run for _, group_ in rows for run in group_]
        sets = " on the validation sets" if {run.on for run in members} == {"valid"} else ""
        count = f"{len(members)} {'run' if len(members) == 1 else 'runs'}"
        console.print(f"\n{count}{sets}, mean ± std over seeds", highlight=False)
        console.print(table)
        if dropped:
            console.print(f"left out for want of room: {', '.join(dropped)}", highlight=False)
        _print_references(members, console)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _columns(rows: Sequence[tuple[dict[str, str], list[RunSummary]]], words: str) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {key: [described[key] for described, _ in rows] for key in rows[0][0]}
    for metric in METRICS:
        cells = [mean_and_spread([run.metrics.get(metric, math.nan) for run in members]) for _, members in rows]
        columns |= {_heading(metric, words): cells}
        if metric == "average" and any(run.seen for _, members in rows for run in members):
            cells = [mean_and_spread([run.seen.get(metric, math.nan) for run in members]) for _, members in rows]
            columns |= {"seen classes only": cells}
    always = {*rows[0][0], *(_heading(name, words) for name in ALWAYS)}
    columns = {heading: cells for heading, cells in columns.items() if heading in always or set(cells) != {"-"}}
    return columns | {"seeds": [str(len(members)) for _, members in rows]}


def _fit(columns: dict[str, list[str]], words: str, width: int) -> list[str]:
    # Takes columns out until the table fits.
    dropped = []
    for name in sorted({*METRICS} - {*ALWAYS}, key=lambda name: METRICS[name].priority):
        if sum(_width(heading, cells) + 2 for heading, cells in columns.items()) <= width:
            break
        if columns.pop(_heading(name, words), None):
            dropped.append(_heading(name, words))
    return dropped


def _print_references(runs: Sequence[RunSummary], console: Console) -> None:
    folders = sorted({folder for run in runs for folder in run.references})
    if folders:
        console.print(
            f"intransigence and omega against {', '.join(shown(folder) for folder in folders)}",
            soft_wrap=True,
            highlight=False,
        )


def _heading(metric: str, words: str) -> str:
    return METRICS[metric].title.format(score=words)


def _width(heading: str, cells: Sequence[str]) -> int:
    return max(len(part) for part in [*heading.split(), *cells])


def group(runs: Sequence[RunSummary]) -> list[tuple[dict[str, str], list[RunSummary]]]:
    """Runs by configuration, best average first; each with the values that tell it from the others.

    `strategy` is always among these; stream, learner, sets and keys of the config only if they differ. Keys that only some
    strategies have tell apart the configurations of one strategy, and are not shown for others.
    """
    described = [(identity(run), run) for run in runs]
    differing = what_differs([d for d, _ in described])
    groups: dict[tuple[str, ...], list[RunSummary]] = {}
    for d, run in described:
        groups.setdefault(tuple(d.get(key, "") for key in differing), []).append(run)
    sign = -1.0 if runs and runs[0].higher_is_better else 1.0

    def rank(item: tuple[tuple[str, ...], list[RunSummary]]) -> tuple[float, tuple[str, ...]]:
        average = statistics.fmean(run.metrics.get("average", math.nan) for run in item[1])
        return (math.inf if math.isnan(average) else sign * average, item[0])

    return [(dict(zip(differing, key, strict=True)), members) for key, members in sorted(groups.items(), key=rank)]


def mean_and_spread(values: Sequence[float]) -> str:
    """ "0.912 ± 0.004", "0.912" for one value, "-" if any is NaN."""
    if any(math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def markdown(results: Results, metrics: Mapping[str, float], labels: Sequence[str]) -> str:
    """Summary, and R up to 12 experiences, as markdown tables.

    Args:
        results: the scores.
        metrics: `clplat.metrics.summary` of them.
        labels: of the K experiences.
    """
    words, table = _words(results.all.score), results.all
    lines = ["| metric | value |", "|---|---|"]
    known = {name: value for name, value in metrics.items() if not math.isnan(value)}
    lines += [f"| {_heading(name, words)} | {value:.4f} |" for name, value in known.items()]
    if results.on != "test":
        lines += [f"| scored on | {results.on} |"]
    if table.experiences <= 12:
        lines += ["", f"| {words} after ↓ on → | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
        for label, row in zip(labels, results.R.tolist(), strict=True):
            lines.append(f"| {label} | " + " | ".join("" if math.isnan(x) else f"{x:.3f}" for x in row) + " |")
    return "\n".join(lines)


def _matrix(results: ScoreTable) -> Table:
    from rich.table import Table

    table = Table(box=_box())
    table.add_column("")
    for j in range(results.experiences):
        table.add_column(str(j), justify="right")
    digits = 3 if results.experiences <= 7 else 2  # so that ten experiences fit into 80 characters
    rows = [("untrained", -1, results.baseline), *((str(i), i, row) for i, row in enumerate(results.R))]
    for label, i, row in rows:
        if row.isnan().all():
            continue
        cells = ["" if math.isnan(x) else f"{x:.{digits}f}" for x in row.tolist()]
        # What was not trained yet is shown faintly: it is not what forgetting is about.
        table.add_row(
            label, *(f"[dim]{c}[/]" if j > i else f"[bold]{c}[/]" if j == i else c for j, c in enumerate(cells))
        )
    return table


def _summary(run: RunSummary) -> Table:
    from rich.table import Table

    table = Table(box=_box())
    table.add_column("metric")
    table.add_column("all classes" if run.seen else "value", justify="right")
    if run.seen:
        table.add_column("seen classes", justify="right")
    for name, value in run.metrics.items():
        if not math.isnan(value):
            cells = [f"{value:.4f}"] + (
                ["-" if math.isnan(run.seen[name]) else f"{run.seen[name]:.4f}"] if run.seen else []
            )
            table.add_row(_heading(name, _words(run.score)), *cells)
    return table


def _tested(on: str) -> str:
    return "tested on" if on == "test" else "validated on"


def _words(score: str) -> str:
    return score.replace("_", " ")


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD
