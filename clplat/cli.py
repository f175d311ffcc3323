"""The commands. Nothing heavy is imported before a command needs it: `clplat --help` answers at once."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from clplat.catalogue import CONF, groups, options, table, update
from clplat.errors import UserError

HELP = """commands:
  train [KEY=VALUE ...]   one run, or a sweep: clplat train strategy=ewc learner=gru stream=permuted_mnist seed=1
  demo  [KEY=VALUE ...]   three strategies, three seeds, on real data that needs no download
  list  [GROUP]           what there is: strategies, learners, streams, experiments, and all other groups
  ui    [--port N]        the MLflow UI on this machine, on the store of this folder
  reproduce [PAPER [ROW ...]]  published numbers again, seed by seed, judged; without PAPER: what there is
  compare FOLDER ...      the forgetting table of finished runs and sweeps
  sync FOLDER ...         send what could not be sent while the tracking server was away
  doctor                  versions, devices, kernels, data sets, store: what works and what to do about the rest

`clplat train --help` shows the configuration, `clplat train --cfg job` the composed one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 failed while running, 2 refused before running, 128 and the number of the signal that ended it, which is
    SIGPIPE's where nobody reads the output on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # signs that a terminal lacks
    try:
        try:
            return _command(argv)
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # as rich ends a program, with code 1
            return 128 + 13
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + 13


def _command(argv: Sequence[str] | None) -> int:
    from clplat import __version__

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="clplat",
        usage="clplat COMMAND ...",
        description="Continual learning on sequences.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clplat {__version__}")
    commands = {
        "train": train,
        "demo": demo,
        "list": list_,
        "ui": ui,
        "reproduce": reproduce,
        "compare": compare,
        "sync": sync,
        "doctor": doctor,
    }
    parser.add_argument("command", help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        return 2
    known = parser.parse_args(arguments[:1])
    if known.command not in commands:
        from clplat.config.refusing import nearest

        return _refuse(
            f"unknown command {known.command!r}{nearest(known.command, commands)} Allowed: {', '.join(commands)}."
        )
    return commands[known.command](arguments[1:])


def train(arguments: Sequence[str]) -> int:
    """`clplat train`: compose the configuration from the overrides and run it."""
    from clplat.signals import ending, heeded_at_once

    with ending("clplat: stopped before anything was begun.\n"):  # the imports take seconds
        from clplat.launch import launch
    with heeded_at_once():
        code, refused = launch(arguments)
    for line in refused:
        _refuse(line)
    return code


def demo(arguments: Sequence[str]) -> int:
    """`clplat demo`: the sweep of conf/experiment/demo.yaml."""
    return train(["experiment=demo", *arguments])


def list_(arguments: Sequence[str]) -> int:
    """`clplat list`: the options of every group, one line each, from the first line of each yaml; or as markdown."""
    from rich.console import Console
    from rich.table import Table

    known = groups()
    parser = argparse.ArgumentParser(prog="clplat list", description="What there is: options of every group.")
    parser.add_argument("group", nargs="?", help=", ".join(known))
    parser.add_argument("--markdown", action="store_true", help="the group's table as the pages have it")
    parser.add_argument("--update", nargs="+", type=Path, metavar="FILE", help="make the tables in these pages anew")
    given = parser.parse_args(arguments)
    if given.group is not None and given.group not in known:
        from clplat.config.refusing import nearest

        return _refuse(f"unknown group {given.group!r}{nearest(given.group, known)} Allowed: {', '.join(known)}.")
    for page in given.update or []:
        page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
    if given.update:
        return 0
    if given.markdown:
        for group in [given.group] if given.group else known:
            print(table(group))
        return 0
    console = Console(markup=False)  # descriptions hold lists in brackets
    for group in [given.group] if given.group else known:
        title = f"{group}=" if group != "paper" else "clplat reproduce"
        rows = Table(box=None, title=title, title_justify="left", show_header=False, pad_edge=False)
        for name, line in options(CONF / group).items():
            rows.add_row(f"  {name}", line)
        console.print(rows)
    return 0


def ui(arguments: Sequence[str]) -> int:
    """`clplat ui`: the MLflow UI on loopback."""
    parser = argparse.ArgumentParser(prog="clplat ui", description="The MLflow UI on this machine.")
    parser.add_argument("--uri", help="store; default: MLFLOW_TRACKING_URI, else mlruns.db in this folder")
    parser.add_argument("--port", type=int, default=5000, help="default 5000")
    given = parser.parse_args(arguments)
    from clplat.tracking import server

    try:
        return server.ui(given.uri, given.port)
    except UserError as error:
        return _refuse(str(error))


def reproduce(arguments: Sequence[str]) -> int:
    """`clplat reproduce`: the rows of a paper's table, run, and judged by what was published."""
    parser = argparse.ArgumentParser(prog="clplat reproduce", description="Published numbers again. Can be stopped.")
    parser.add_argument("paper", nargs="?", help="one of `clplat list paper`")
    parser.add_argument("row", nargs="*", help="names or patterns; default: all rows")
    parser.add_argument("--list", action="store_true", help="only show the rows, and what is there so far")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the table's own")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all rows")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), help="default runs/reproduce")
    given = parser.parse_args(arguments)
    if given.paper is None:
        return list_(["paper"])
    from clplat.signals import Stopped, ending, heeded_at_once

    with ending("clplat: stopped before anything was begun.\n"):
        from clplat import reproduce as program

    try:
        with heeded_at_once():
            return program.main(given.paper, given.row, given.list, given.seeds, given.set, given.output)
    except UserError as error:
        return _refuse(str(error), error.code)
    except Stopped as stop:
        return _refuse("stopped. The same command goes on.", stop.exit_code)


def compare(arguments: Sequence[str]) -> int:
    """`clplat compare`: the forgetting table of the runs found under some folders."""
    parser = argparse.ArgumentParser(prog="clplat compare", description="The forgetting table of finished runs.")
    parser.add_argument("folder", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    from clplat.report.references import with_references
    from clplat.report.runs import find_runs
    from clplat.report.tables import print_sweep

    found = find_runs(given.folder)
    if not found.runs:
        where = ", ".join(map(str, given.folder))
        return _refuse(" ".join(found.notes) or f"no result.json under {where}: give folders of finished runs.")
    print_sweep(with_references(found.runs), notes=found.notes)
    return 0


def sync(arguments: Sequence[str]) -> int:
    """`clplat sync`: send spilled values of some run folders to their tracking server."""
    parser = argparse.ArgumentParser(prog="clplat sync", description="Send what could not be sent during a run.")
    parser.add_argument("folder", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    from clplat.tracking import mlflow_run

    try:
        for folder in given.folder:
            sent = mlflow_run.sync(folder, show=lambda uri, folder=folder: print(f"{folder}: sends to {uri}"))
            print(f"{folder}: {sent} values sent")
    except UserError as error:
        return _refuse(str(error), code=1)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """`clplat doctor`: what works here, what does not, and what to do."""
    from clplat import doctor as checks

    return checks.main()


def _refuse(line: str, code: int = 2) -> int:
    print(f"clplat: {line}", file=sys.stderr)
    return code
