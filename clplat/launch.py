"""`clplat train`: from the words that were typed to runs, by way of Hydra."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode

from clplat.catalogue import CONF, groups, options
from clplat.config.own_files import guarded
from clplat.config.refusing import ConfigError, nearest, root_keys
from clplat.config.resume import command, find
from clplat.config.strangers import judge_environment
from clplat.errors import UserError
from clplat.report.summary import Names
from clplat.signals import Stopped
from clplat.sweep import SweepRefused
from clplat.train import opened, trained

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig


def launch(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Run what `clplat train` was told to.

    Args:
        arguments: behind the command's name.

    Returns:
        The exit code, and the refusals, one line each: of a run, or of some runs of a sweep whose others went on.
    """
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
            except Stopped:
                _remove_if_empty()
                raise

        given = guarded(prepared(arguments))
        sys.argv = ["clplat train", *given]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through to us, who print one line
        job()
    except Stopped as stop:
        return stop.code, [_stopped(stop, arguments)]
    except SweepRefused as refused:
        return 2, [str(refused)]
    except UserError as error:
        if debug:
            raise
        return error.code, [str(error)]
    except HydraException as error:
        if debug:
            raise
        return 2, [_hydra_line(error)]
    except OSError as error:
        if began or debug:
            raise
        where = f"{error.filename} ({os.strerror(error.errno or 0)})"
        return 2, [f"output_dir: cannot make {where}: choose another folder with output_dir=PATH."]
    return max((error.code for error in failed), default=0), [str(error) for error in failed]


def _stopped(stop: Stopped, arguments: Sequence[str]) -> str:
    if stop.folder is None:
        return "stopped before training began."
    # What a checkpoint may not name alone has to be given again.
    again = [word for word in arguments if "_target_=" in word]
    return f"stopped. To go on with the run that was in training: {command(stop.folder, again)}"


def quiet(threads: int | None) -> None:
    """Set what holds for the whole process: Lightning's messages off, since they are about loops that it runs itself.

    Args:
        threads: CPU threads of torch; None leaves its choice.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if threads:
        torch.set_num_threads(threads)


def _job(cfg: DictConfig, given: Sequence[str]) -> dict[str, float]:
    hydra_cfg = HydraConfig.get()
    sweep = Path(hydra_cfg.sweep.dir).name if hydra_cfg.mode == RunMode.MULTIRUN else None
    names = Names(
        stream=hydra_cfg.runtime.choices["stream"],
        learner=hydra_cfg.runtime.choices["learner"],
        strategy="+".join(cfg.get("strategy") or []),
        sweep=sweep,
        varied="" if sweep is None else _varied(given, hydra_cfg),
    )
    keys = [re.split("[=@]", o.lstrip("+~"))[0].replace("/", ".") for o in hydra_cfg.overrides.task]
    judge_environment(cfg, given)
    with opened(cfg, Path(hydra_cfg.runtime.output_dir), names, keys) as (cfg, folder, names, state):
        quiet(cfg.threads)
        return trained(cfg, folder, names, state)


def _varied(given: Sequence[str], hydra_cfg: HydraConf) -> str:
    """The overrides of this run of a sweep that were given, on the command line or in a yaml, with several values."""
    several = [f"{key}={value}" for key, value in (hydra_cfg.sweeper.get("params") or {}).items()]
    several += [a for a in given if "=" in a and not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(several)
    keys = {o.key_or_group for o in parsed if o.is_sweep_override()}
    own = [o.lstrip("+") for o in hydra_cfg.overrides.task]
    return " ".join(o for o in own if o.partition("=")[0] in keys)


def _remove_if_empty() -> None:
    # Hydra makes a run's folder before we can refuse the run.
    with suppress(OSError):  # it holds something
        Path(HydraConfig.get().runtime.output_dir).rmdir()


def prepared(arguments: Sequence[str]) -> list[str]:
    """The words as Hydra wants them: flags first, `++` before dotted keys, the folder of a run that is resumed.

    A key that the chosen option lacks is then refused by `clplat.config.check`, which knows what is allowed, and
    arguments of a user's own class need no plus sign.

    Raises:
        ConfigError: a group is set to what is no option's name; there is nothing to resume.
    """
    words = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in groups() and not _may_be_chosen(value):
            if value == "null" and key == "experiment":  # the default
                continue
            raise ConfigError(_unknown(key, value))
        dotted = "." in key and key[0].isalpha() and not key.startswith("hydra") and "@" not in key and "/" not in key
        words.append(f"++{argument}" if equals and dotted else argument)
    words.sort(key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~")))
    given = [a.removeprefix("resume=") for a in words if a.startswith("resume=") and a != "resume=null"]
    if given:
        output = next((a.removeprefix("output_dir=") for a in words if a.startswith("output_dir=")), "runs")
        words.append(f"hydra.run.dir='{find(given[-1], Path(output))}'")
    return words


def _may_be_chosen(value: str) -> bool:
    """Whether Hydra takes a value for a group: a name, or a list of them; and not a number, say, or null."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:  # Hydra's grammar has more
        return True
    return all(isinstance(name, str | dict) for name in (read if isinstance(read, list) else [read]))


def _unknown(group: str, name: str) -> str:
    known = options(CONF / group)
    return f"{group}={name}: unknown{nearest(name, known)} Allowed: {', '.join(known)}."


def _hydra_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if missing := re.match(r".*Could not find '(\w+)/([^']+)'", line):
            return _unknown(*missing.groups())
        if key := re.match(r"Could not override '([\w.]+)'", line):
            return f"{key[1]}: unknown key{nearest(key[1], root_keys())} Allowed: {', '.join(root_keys())}."
        if key := re.match(r"You must specify '(\w+)', e.g", line):
            return f"{key[1]}: nothing chosen. `clplat list {key[1]}` shows what there is."
    return " ".join(lines)
