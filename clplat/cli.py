"""The commands. Nothing heavy is imported before a command needs it: `clplat --help` answers at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clplat.errors import UserError

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

HELP = """commands:
  train [KEY=VALUE ...]   one run, or a sweep: clplat train strategy=ewc learner=gru stream=permuted_mnist seed=1
  demo  [KEY=VALUE ...]   three strategies, three seeds, on real data that needs no download
  list  [GROUP]           what there is: strategies, learners, streams, experiments, and all other groups
  ui    [--port N]        the MLflow UI on this machine, on the store of this folder
  compare FOLDER ...      the forgetting table of finished runs and sweeps
  sync FOLDER ...         send what could not be sent while the tracking server was away
  doctor                  versions, devices, kernels, data sets, store: what works and what to do about the rest

`clplat train --help` shows the configuration, `clplat train --cfg job` the composed one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed while running, 2 refused before running."""
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
        from clplat.config import nearest

        return _refuse(
            f"unknown command {known.command!r}{nearest(known.command, commands)} Allowed: {', '.join(commands)}."
        )
    return commands[known.command](arguments[1:])


def train(arguments: Sequence[str]) -> int:
    """`clplat train`: compose the configuration from the overrides and run it."""
    import hydra
    from hydra.errors import HydraException

    debug = any(a.lower() in ("debug=true", "+debug=true", "++debug=true") for a in arguments)
    failed: list[UserError] = []
    began: list[bool] = []
    try:

        @hydra.main(version_base="1.3", config_path="pkg://clplat.conf", config_name="train")
        def job(cfg: DictConfig) -> dict[str, float] | None:
            began.append(True)
            try:
                return _job(cfg, given)
            except UserError as error:  # here, since Hydra would add lines of its own; the sweep's other runs go on
                _remove_if_empty()
                if debug:
                    raise
                failed.append(error)
                return None

        given = _prepared(arguments)
        sys.argv = ["clplat train", *given]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through to us, who print one line
        job()
    except KeyboardInterrupt:
        return _refuse("stopped. `clplat train resume=latest` goes on exactly where the last checkpoint was.", code=130)
    except UserError as error:
        if debug:
            raise
        return _refuse(str(error), error.code)
    except HydraException as error:
        if debug:
            raise
        return _refuse(_hydra_line(error))
    except OSError as error:
        if began or debug:
            raise
        where = f"{error.filename} ({os.strerror(error.errno or 0)})"
        return _refuse(f"output_dir: cannot make {where}: choose another folder with output_dir=PATH.")
    for error in failed:
        _refuse(str(error))
    return max((error.code for error in failed), default=0)


def demo(arguments: Sequence[str]) -> int:
    """`clplat demo`: the sweep of conf/experiment/demo.yaml."""
    return train(["experiment=demo", *arguments])


def list_(arguments: Sequence[str]) -> int:
    """`clplat list`: the options of every group, one line each, from the first line of each yaml."""
    from rich.console import Console
    from rich.table import Table

    root = Path(__file__).parent / "conf"
    groups = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("_"))
    first = ["strategy", "learner", "stream", "experiment"]
    groups = first + [g for g in groups if g not in first]
    if arguments and arguments[0] not in groups:
        from clplat.config import nearest

        return _refuse(f"unknown group {arguments[0]!r}{nearest(arguments[0], groups)} Allowed: {', '.join(groups)}.")
    console = Console(markup=False)  # descriptions hold lists in brackets
    for group in [arguments[0]] if arguments else groups:
        table = Table(box=None, title=f"{group}=", title_justify="left", show_header=False, pad_edge=False)
        for name, line in options(root / group).items():
            table.add_row(f"  {name}", line)
        console.print(table)
    return 0


def options(folder: Path) -> dict[str, str]:
    """Name and description (the first comment that is no Hydra header) of every option in a group's folder."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        comments = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
        if not path.stem.startswith("_"):
            found[path.stem] = comments[0].removeprefix("#").strip() if comments else ""
    return found


def ui(arguments: Sequence[str]) -> int:
    """`clplat ui`: the MLflow UI on loopback."""
    parser = argparse.ArgumentParser(prog="clplat ui", description="The MLflow UI on this machine.")
    parser.add_argument("--uri", help="store; default: MLFLOW_TRACKING_URI, else mlruns.db in this folder")
    parser.add_argument("--port", type=int, default=5000, help="default 5000")
    given = parser.parse_args(arguments)
    from clplat.tracking import tracker as tracking

    try:
        return tracking.ui(given.uri, given.port)
    except UserError as error:
        return _refuse(str(error))


def compare(arguments: Sequence[str]) -> int:
    """`clplat compare`: the forgetting table of the runs found under some folders."""
    parser = argparse.ArgumentParser(prog="clplat compare", description="The forgetting table of finished runs.")
    parser.add_argument("folder", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    from clplat.report import tables as report

    files = [f for folder in given.folder for f in sorted(folder.rglob("result.json"))]
    if not files:
        return _refuse(f"no result.json under {', '.join(map(str, given.folder))}: give folders of finished runs.")
    report.print_sweep([report.read_run(f) for f in files])
    return 0


def sync(arguments: Sequence[str]) -> int:
    """`clplat sync`: send spilled values of some run folders to their tracking server."""
    parser = argparse.ArgumentParser(prog="clplat sync", description="Send what could not be sent during a run.")
    parser.add_argument("folder", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    from clplat.tracking import tracker as tracking

    try:
        for folder in given.folder:
            print(f"{folder}: {tracking.sync(folder)} values sent")
    except UserError as error:
        return _refuse(str(error), code=1)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """`clplat doctor`: what works here, what does not, and what to do."""
    from clplat import doctor as checks

    return checks.main()


def _job(cfg: DictConfig, given: Sequence[str]) -> dict[str, float]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from clplat.train import Names
    from clplat.train import train as run

    hydra_cfg = HydraConfig.get()
    sweep = Path(hydra_cfg.sweep.dir).name if hydra_cfg.mode == RunMode.MULTIRUN else None
    names = Names(
        stream=hydra_cfg.runtime.choices["stream"],
        learner=hydra_cfg.runtime.choices["learner"],
        strategy="+".join(cfg.strategy),
        sweep=sweep,
        varied="" if sweep is None else _varied(given, hydra_cfg),
    )
    keys = [re.split("[=@]", o.lstrip("+~"))[0].replace("/", ".") for o in hydra_cfg.overrides.task]
    return run(cfg, Path(hydra_cfg.runtime.output_dir), names, keys)


def _varied(given: Sequence[str], hydra_cfg: HydraConf) -> str:
    """The overrides of this run of a sweep that were given, on the command line or in a yaml, with several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    several = [f"{key}={value}" for key, value in (hydra_cfg.sweeper.get("params") or {}).items()]
    several += [a for a in given if "=" in a and not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(several)
    keys = {o.key_or_group for o in parsed if o.is_sweep_override()}
    own = [o.lstrip("+") for o in hydra_cfg.overrides.task]
    return " ".join(o for o in own if o.partition("=")[0] in keys)


def _remove_if_empty() -> None:
    # Hydra makes a run's folder before we can refuse the run.
    from hydra.core.hydra_config import HydraConfig

    with suppress(OSError):  # it holds something
        Path(HydraConfig.get().runtime.output_dir).rmdir()


def _prepared(arguments: Sequence[str]) -> list[str]:
    # `a.b=c` becomes `++a.b=c`: a key that the chosen option lacks is then caught by `clplat.config.check`, which knows
    # what is allowed, and arguments of a user's own class need no plus sign.
    prepared = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        dotted = "." in key and key[0].isalpha() and not key.startswith("hydra") and "@" not in key and "/" not in key
        prepared.append(f"++{argument}" if equals and dotted else argument)
    # Hydra wants its flags, with their values, before the overrides.
    prepared.sort(key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~")))
    given = [a.removeprefix("resume=") for a in prepared if a.startswith("resume=") and a != "resume=null"]
    if given:
        output = next((a.removeprefix("output_dir=") for a in prepared if a.startswith("output_dir=")), "runs")
        prepared.append(f"hydra.run.dir='{find(given[-1], Path(output))}'")
    return prepared


def find(resume: str, output: Path) -> Path:
    """The folder of the run that `resume` means: "latest" in `output`, a run's folder, or its checkpoint file.

    Raises:
        ConfigError: there is no checkpoint there.
    """
    from clplat.config import ConfigError

    if resume == "latest":
        found = sorted(output.rglob("last.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise ConfigError(f"resume=latest: no checkpoint under {output}: nothing was begun there (output_dir=...).")
        return found[-1].parent.resolve()
    path = Path(resume)
    folder = path.parent if path.suffix == ".ckpt" else path
    if not (folder / "last.ckpt").is_file():
        raise ConfigError(f"resume={resume}: no checkpoint last.ckpt there: give the folder of a run, or latest.")
    return folder.resolve()


def _hydra_line(error: Exception) -> str:
    from clplat.config import ROOT, nearest

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if missing := re.match(r".*Could not find '(\w+)/([^']+)'", line):
            group, name = missing.groups()
            known = options(Path(__file__).parent / "conf" / group)
            return f"{group}={name}: unknown{nearest(name, known)} Allowed: {', '.join(known)}."
        if key := re.match(r"Could not override '([\w.]+)'", line):
            return f"{key[1]}: unknown key{nearest(key[1], ROOT)} Allowed: {', '.join(ROOT)}."
        if key := re.match(r"You must specify '(\w+)', e.g", line):
            return f"{key[1]}: nothing chosen. `clplat list {key[1]}` shows what there is."
    return " ".join(lines)


def _refuse(line: str, code: int = 2) -> int:
    print(f"clplat: {line}", file=sys.stderr)
    return code
