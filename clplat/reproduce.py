"""Published numbers again: the rows of a paper's table, seed by seed, judged by what was published.

A table is a file of `conf/paper/`. Each finished seed is one line of `reproduce.jsonl` in the output folder, and is not
run again; a seed that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import fnmatch
import json
import statistics
import subprocess
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table as Shown

from clplat.catalogue import CONF, options
from clplat.config.check import check
from clplat.config.refusing import ConfigError, nearest
from clplat.launch import prepared, quiet
from clplat.report.summary import Names
from clplat.train import train


class Row(BaseModel):
    """One published number and the configuration that should give it.

    Attributes:
        set: overrides of the table's base, as on the command line.
        published: mean of the average accuracy after the last experience, %; None: not published.
        spread: its standard deviation over seeds, %; None: not published.
        deviates: what is known to differ, from the protocol or in the result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    set: str = ""
    published: Decimal | None = None
    spread: float | None = None
    deviates: str = ""


class Table(BaseModel):
    """Rows of one column of a paper.

    Attributes:
        where: table and column of the paper, and the mean of how many seeds it is.
        base: experiment of `conf/experiment/` that the rows begin with.
        rows: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    where: str
    base: str
    rows: dict[str, Row]


class Paper(BaseModel):
    """Tables of a paper.

    Attributes:
        title: authors, year, title, number.
        seeds: that are run here.
        tables: in the order they are shown in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    seeds: list[int]
    tables: list[Table]

    def rows(self) -> dict[str, tuple[Table, Row]]:
        """Every row by its name, with its table."""
        return {name: (table, row) for table in self.tables for name, row in table.rows.items()}


def read(name: str) -> Paper:
    """A paper of `conf/paper/`.

    Raises:
        ConfigError: no such file, or one that is no table of a paper.
    """
    known = options(CONF / "paper")
    if name not in known:
        raise ConfigError(f"{name}: unknown paper{nearest(name, known)} Allowed: {', '.join(known)}.")
    try:
        return Paper.model_validate(yaml.safe_load((CONF / "paper" / f"{name}.yaml").read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"conf/paper/{name}.yaml: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def words(table: Table, row: Row) -> list[str]:
    """Overrides that make a row's configuration, as on the command line."""
    return [f"experiment={table.base}", *row.set.split()]


def composed(table: Table, row: Row, *overrides: str) -> DictConfig:
    """The configuration of a row."""
    with initialize_config_module("clplat.conf", version_base="1.3"):
        return compose("train", prepared([*words(table, row), *overrides]))


def main(name: str, patterns: list[str], only_list: bool, seeds: list[int] | None, more: list[str], to: Path) -> int:
    """Run rows of a paper, show what is there, and judge it.

    Args:
        name: of the paper.
        patterns: of rows; none: all of them.
        only_list: run nothing.
        seeds: None: the paper's own.
        more: overrides for all rows.
        to: folder of the runs.

    Returns:
        0, or 1 if a row that was measured here differs from what was published, and no reason for that is known.

    Raises:
        ConfigError: no such paper or row, or overrides that cannot be.
    """
    paper = read(name)
    rows = paper.rows()
    chosen = []
    for pattern in patterns or ["*"]:
        found = fnmatch.filter(rows, pattern)
        if not found:
            raise ConfigError(f"{pattern}: no row of {name}{nearest(pattern, rows)} Allowed: {', '.join(rows)}.")
        chosen += [row for row in found if row not in chosen]
    log = to / "reproduce.jsonl"
    for row in [] if only_list else chosen:
        for seed in seeds or paper.seeds:
            _run(name, row, *rows[row], seed, more, to, log)
    return _show(paper, {row: rows[row] for row in chosen}, more, [one for one in lines(log) if one["paper"] == name])


def _run(paper: str, name: str, table: Table, row: Row, seed: int, more: list[str], to: Path, log: Path) -> None:
    """One seed, unless it is there already."""
    key = {"paper": paper, "row": name, "seed": seed, "overrides": more}
    if any({k: line.get(k) for k in key} == key for line in lines(log)):
        return
    folder = to / name / "_".join([str(seed), *(o.replace("/", "-") for o in more)])
    begun = (folder / "last.ckpt").is_file()
    cfg = composed(table, row, f"seed={seed}", "tracking=none", "progress=false", "threads=1", *more)
    cfg.resume = str(folder) if begun else None
    check(cfg)
    quiet(cfg.threads)
    started = time.time()
    metrics = train(cfg, folder, Names("stream", "learner", "+".join(cfg.strategy)))
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=CONF.resolve(), check=False).stdout
    line = key | {"metrics": metrics, "seconds": round(time.time() - started), "commit": commit.strip()}
    with log.open("a") as file:
        file.write(json.dumps(line | {"torch": torch.__version__}) + "\n")


def lines(log: Path) -> list[dict[str, Any]]:
    """The seeds that are there so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def judged(row: Row, here: list[float]) -> str:
    """Verdict on what was measured: "as published", "deviates", or "" where nothing can be said.

    A difference counts as one if it is larger than two standard deviations (over seeds, the larger of the two that are
    known) and half a unit of the last digit that was published.

    Args:
        row: with what was published, %.
        here: average accuracy of each seed, %.
    """
    spreads = [row.spread] if row.spread is not None else []
    spreads += [statistics.stdev(here)] if len(here) > 1 else []
    if row.published is None or not here or not spreads:
        return ""
    exponent = row.published.as_tuple().exponent
    rounding = 0.5 * 10.0 ** (exponent if isinstance(exponent, int) else 0)
    difference = abs(statistics.mean(here) - float(row.published))
    return "as published" if difference <= 2 * max(spreads) + rounding else "deviates"


def _show(paper: Paper, rows: dict[str, tuple[Table, Row]], more: list[str], done: list[dict[str, Any]]) -> int:
    console = Console()
    console.print(paper.title, markup=False)
    unexplained = 0
    for table in paper.tables:
        shown = Shown("row", "set", "published", "here", "seeds", "verdict", title=table.where, title_justify="left")
        for name in (n for n in table.rows if n in rows):
            row = table.rows[name]
            own = [line for line in done if line["row"] == name and line["overrides"] == more]
            here = [100 * line["metrics"]["average"] for line in own]
            verdict = judged(row, here)
            unexplained += verdict == "deviates" and not row.deviates
            published = "" if row.published is None else str(row.published)
            published += "" if row.spread is None else f" ± {row.spread:g}"
            measured = f"{statistics.mean(here):.1f}" if here else ""
            measured += f" ± {statistics.stdev(here):.1f}" if len(here) > 1 else ""
            known = f"{verdict}; known: {row.deviates}".removeprefix("; ") if row.deviates else verdict
            given = " ".join([*words(table, row), *more])
            shown.add_row(name, given, published, measured, " ".join(str(line["seed"]) for line in own), known)
        if shown.row_count:
            console.print(shown, markup=False)
    return int(unexplained > 0)
