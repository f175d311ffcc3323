"""What a person reads after training: the table of one run, and the forgetting table over many."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from clplat.metrics import ScoreTable

COLUMNS = {
    "average": "average {score}",
    "average_incremental": "incremental {score}",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "intransigence": "intransigence",
    "omega": "omega",
    "minimum": "worst {score} since learned",
    "worst_case": "worst-case {score}",
}
"""Heading of each metric, in the order of columns."""

DIFFERENCES = ("stream", "learner", "strategy", "objective", "optimizer", "schedule", "training", "trainer")
"""Parts of the config that make two runs of one strategy different configurations; seeds do not."""


class RunNames(Protocol):
    """What a run is called; `clplat.train.Names` is one."""

    @property
    def stream(self) -> str:
        """The stream's option."""
        ...

    @property
    def learner(self) -> str:
        """The learner's option."""
        ...

    @property
    def strategy(self) -> str:
        """The strategies in order, joined by "+"."""
        ...

    @property
    def sweep(self) -> str | None:
        """The sweep's identifier, None for a single run."""
        ...


@dataclass(frozen=True)
class RunSummary:
    """One finished run, as `result.json` in its folder holds it.

    Attributes:
        strategy: the strategies in order, joined by "+".
        stream: its option.
        learner: its option.
        seed: of the training.
        metrics: `clplat.metrics.summary`, by name; NaN where undefined.
        seen: the same of the scores with unseen classes masked; empty where targets are not classes.
        score: what was scored.
        higher_is_better: False for losses.
        config: the flattened config of `DIFFERENCES`, from `config.yaml` beside `result.json`; empty if there is none.
    """

    strategy: str
    stream: str
    learner: str
    seed: int
    metrics: dict[str, float]
    seen: dict[str, float] = field(default_factory=dict)
    score: str = "accuracy"
    higher_is_better: bool = True
    config: dict[str, str] = field(default_factory=dict)


def summarise(names: RunNames, seed: int, results: ScoreTable, seen: ScoreTable | None = None) -> dict[str, Any]:
    """The content of `result.json`: plain values, NaN as null. `metrics` holds the metrics.

    Args:
        names: of the run.
        seed: of the training.
        results: the scores.
        seen: the scores with unseen classes masked.
    """
    from clplat.metrics import summary

    masked = summary(seen) if seen is not None else {}
    run = RunSummary(
        strategy=names.strategy,
        stream=names.stream,
        learner=names.learner,
        seed=seed,
        metrics=summary(results),
        seen={} if all(math.isnan(value) for value in masked.values()) else masked,
        score=results.score,
        higher_is_better=results.higher_is_better,
    )
    plain = asdict(run)
    del plain["config"]
    for part in ("metrics", "seen"):
        plain[part] = {name: None if math.isnan(value) else value for name, value in plain[part].items()}
    return plain


def read_run(path: str | Path) -> RunSummary:
    """Read a `result.json`, and the `config.yaml` beside it.

    Raises:
        ValueError: it is not the result of a run.
    """
    path = Path(path)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        for part in ("metrics", "seen"):
            plain[part] = {name: math.nan if value is None else value for name, value in plain[part].items()}
        return RunSummary(**plain, config=_config(path.parent / "config.yaml"))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the result of a run ({type(error).__name__}: {error}).") from error


def print_run(
    results: ScoreTable,
    seen: ScoreTable | None = None,
    names: RunNames | None = None,
    where: str = "",
    console: Console | None = None,
) -> None:
    """Print R and the summary of one run.

    Args:
        results: the scores.
        seen: the scores with unseen classes masked; adds a column.
        names: of the run, for the title.
        where: a line that tells where to see more.
        console: None for standard output.
    """
    from rich.console import Console

    console = console or Console()
    console.print()
    if names is not None:
        console.print(f"[bold]{names.strategy} · {names.learner} · {names.stream}[/]", highlight=False)
    if results.experiences <= 10:
        console.print(f"{_words(results.score)} after training on (rows), tested on (columns)", highlight=False)
        console.print(_matrix(results))
    console.print(_summary(results, seen))
    if where:
        console.print(f"curves: {where}", soft_wrap=True, highlight=False)


def print_sweep(runs: Sequence[RunSummary], console: Console | None = None) -> None:
    """Print the forgetting table: a row for each configuration, mean ± standard deviation over its seeds.

    Configurations are told apart by whatever differs between them: stream, learner, strategy, then keys of the config.
    The deviation is the sample's (n - 1), and absent for one seed. A metric that is undefined for one seed is undefined
    for the row. The best average comes first.

    Args:
        runs: in any order.
        console: None for standard output.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    for score in dict.fromkeys(run.score for run in runs):
        rows = group([run for run in runs if run.score == score])
        count = sum(len(members) for _, members in rows)
        columns: dict[str, list[str]] = {key: [described[key] for described, _ in rows] for key in rows[0][0]}
        for metric, heading in COLUMNS.items():
            cells = [mean_and_spread([run.metrics.get(metric, math.nan) for run in members]) for _, members in rows]
            columns |= {heading.format(score=_words(score)): cells}
            if metric == "average" and any(run.seen for _, members in rows for run in members):
                cells = [mean_and_spread([run.seen.get(metric, math.nan) for run in members]) for _, members in rows]
                columns |= {"seen classes only": cells}
        columns = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
        columns |= {"seeds": [str(len(members)) for _, members in rows]}
        dropped = _fit(columns, console.width)
        table = Table(box=_box(), pad_edge=False, collapse_padding=True)
        for heading, cells in columns.items():
            table.add_column(
                heading, justify="left" if heading in rows[0][0] else "right", min_width=_width(heading, cells)
            )
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        console.print(f"\n{count} {'run' if count == 1 else 'runs'}, mean ± std over seeds", highlight=False)
        console.print(table)
        if dropped:
            console.print(f"left out for want of room: {', '.join(dropped)}", highlight=False)


def _fit(columns: dict[str, list[str]], width: int) -> list[str]:
    # Takes columns out until the table fits, those that the others tell the most about first.
    dropped = []
    for name in ("average_incremental", "forward_transfer", "worst_case", "minimum", "backward_transfer"):
        if sum(_width(heading, cells) + 2 for heading, cells in columns.items()) <= width:
            break
        start = COLUMNS[name].partition("{")[0]
        for heading in [h for h in columns if start and h.startswith(start)]:
            del columns[heading]
            dropped.append(heading)
    return dropped


def _width(heading: str, cells: Sequence[str]) -> int:
    return max(len(part) for part in [*heading.split(), *cells])


def group(runs: Sequence[RunSummary]) -> list[tuple[dict[str, str], list[RunSummary]]]:
    """Runs by configuration, best average first; each with the values that tell it from the others.

    `strategy` is always among these; stream, learner and keys of the config only if they differ. Keys that only some
    strategies have tell apart the configurations of one strategy, and are not shown for others.
    """
    described = [(_identity(run), run) for run in runs]
    names = ("stream", "learner", "strategy")
    shown = [n for n in names if n == "strategy" or len({d[n] for d, _ in described}) > 1]
    for key in sorted({key for d, _ in described for key in d if key not in names}):
        # A key counts if it differs between two runs that the names alone do not tell apart.
        values: dict[tuple[str, ...], set[str | None]] = {}
        for d, _ in described:
            values.setdefault(tuple(d[n] for n in names), set()).add(d.get(key))
        if any(len(found) > 1 for found in values.values()):
            shown.append(key)
    groups: dict[tuple[str, ...], list[RunSummary]] = {}
    for d, run in described:
        groups.setdefault(tuple(d.get(key, "") for key in shown), []).append(run)
    sign = -1.0 if runs and runs[0].higher_is_better else 1.0

    def rank(item: tuple[tuple[str, ...], list[RunSummary]]) -> tuple[float, tuple[str, ...]]:
        average = statistics.fmean(run.metrics.get("average", math.nan) for run in item[1])
        return (math.inf if math.isnan(average) else sign * average, item[0])

    return [(dict(zip(shown, key, strict=True)), members) for key, members in sorted(groups.items(), key=rank)]


def mean_and_spread(values: Sequence[float]) -> str:
    """ "0.912 ± 0.004", "0.912" for one value, "-" if any is NaN."""
    if any(math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def markdown(results: ScoreTable, metrics: Mapping[str, float], labels: Sequence[str]) -> str:
    """Summary, and R up to 12 experiences, as markdown tables.

    Args:
        results: the scores.
        metrics: `clplat.metrics.summary` of them.
        labels: of the K experiences.
    """
    words = _words(results.score)
    lines = ["| metric | value |", "|---|---|"]
    known = {name: value for name, value in metrics.items() if not math.isnan(value)}
    lines += [f"| {COLUMNS[name].format(score=words)} | {value:.4f} |" for name, value in known.items()]
    if results.experiences <= 12:
        lines += ["", f"| {words} after ↓ on → | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
        for label, row in zip(labels, results.R.tolist(), strict=True):
            lines.append(f"| {label} | " + " | ".join("" if math.isnan(x) else f"{x:.3f}" for x in row) + " |")
    return "\n".join(lines)


def _identity(run: RunSummary) -> dict[str, str]:
    return {"stream": run.stream, "learner": run.learner, "strategy": run.strategy, **run.config}


def _config(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    import yaml

    flat: dict[str, str] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, f"{name}.{key}")
        elif not name.endswith(("seed", "_target_")):
            flat[name] = str(node)

    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for part in DIFFERENCES:
        walk(config.get(part, {}), part)
    return flat


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


def _summary(results: ScoreTable, seen: ScoreTable | None) -> Table:
    from rich.table import Table

    from clplat.metrics import summary

    metrics, masked = summary(results), summary(seen) if seen is not None else {}
    second = any(not math.isnan(value) for value in masked.values())
    table = Table(box=_box())
    table.add_column("metric")
    table.add_column("all classes" if second else "value", justify="right")
    if second:
        table.add_column("seen classes", justify="right")
    for name, heading in COLUMNS.items():
        if not math.isnan(metrics[name]):
            cells = [f"{metrics[name]:.4f}"] + ([_number(masked[name])] if second else [])
            table.add_row(heading.format(score=_words(results.score)), *cells)
    return table


def _number(value: float) -> str:
    """A number for a cell, "-" if it is undefined."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _words(score: str) -> str:
    return score.replace("_", " ")


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD
