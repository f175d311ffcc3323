"""`clplat train`: from the words that were typed to runs, by way of Hydra."""

from __future__ import annotations

import logging
import math
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
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from clplat.config.own_files import guarded
from clplat.config.refusing import ConfigError
from clplat.config.resume import command
from clplat.config.strangers import judge_environment
from clplat.config.words import hydra_line, parsed, prepared, resolving, strategies
from clplat.errors import UserError
from clplat.report.summary import Names
from clplat.signals import Stopped
from clplat.sweep import SweepRefused
from clplat.train import opened, trained

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from hydra.core.override_parser.types import Override


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
        def job(cfg: DictConfig) -> float:
            began.append(True)
            try:
                with resolving(given):
                    return _job(cfg, given)
            except UserError as error:  # here, since Hydra would add lines of its own; the sweep's other runs go on
                _remove_if_empty(there)
                if debug:
                    raise
                failed.append(error)
                return math.nan  # to a sweeper that searches
            except Stopped:
                _remove_if_empty(there)
                raise

        given = guarded(prepared(arguments))
        there = _folders(given)
        sys.argv = ["clplat train", *given]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through to us, who print one line
        with resolving(given):
            job()
    except Stopped as stop:
        return stop.exit_code, [_stopped(stop, arguments)]
    except SweepRefused as refused:
        return 2, [str(refused)]
    except UserError as error:
        if debug:
            raise
        return error.code, [str(error)]
    except HydraException as error:
        if debug:
            raise
        return 2, [hydra_line(error)]
    except BrokenPipeError:  # nobody reads on: `clplat train --help | head`
        raise
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


def _job(cfg: DictConfig, given: Sequence[str]) -> float:
    hydra_cfg = HydraConfig.get()
    sweep = Path(hydra_cfg.sweep.dir).name if hydra_cfg.mode == RunMode.MULTIRUN else None
    own = parsed(list(hydra_cfg.overrides.task))
    _check_named(cfg, [name for names in strategies(own) for name in names])
    several = [] if sweep is None else _several(given, hydra_cfg)
    if sweep is not None:
        _leave_out(cfg, several)
        if hydra_cfg.job.num == 0:
            _say_sweep(several, hydra_cfg)
    names = Names(
        stream=hydra_cfg.runtime.choices["stream"],
        learner=hydra_cfg.runtime.choices["learner"],
        strategy="+".join(cfg.get("strategy") or []),
        sweep=sweep,
        varied=_varied(several, hydra_cfg),
    )
    keys = [re.split("[=@]", o.lstrip("+~"))[0].replace("/", ".") for o in hydra_cfg.overrides.task]
    judge_environment(cfg, given)
    with opened(cfg, Path(hydra_cfg.runtime.output_dir), names, keys) as (cfg, folder, names, state):
        quiet(cfg.threads)
        return trained(cfg, folder, names, state)[cfg.sweep.objective]


def _several(given: Sequence[str], hydra_cfg: HydraConf) -> list[Override]:
    """The overrides of a sweep that have several values, on the command line or in a yaml."""
    words = [f"{key}={value}" for key, value in (hydra_cfg.sweeper.get("params") or {}).items()]
    return [o for o in parsed([*words, *given]) if o.is_sweep_override()]


def _varied(several: Sequence[Override], hydra_cfg: HydraConf) -> str:
    """The overrides of this run of a sweep that have other values in other runs."""
    keys = {o.key_or_group for o in several}
    own = [o.lstrip("+") for o in hydra_cfg.overrides.task]
    return " ".join(o for o in own if o.partition("=")[0] in keys)


def _say_sweep(several: Sequence[Override], hydra_cfg: HydraConf) -> None:
    counted = [o for o in several if o.is_discrete_sweep() and o.value_type is not ValueType.GLOB_CHOICE_SWEEP]
    counts = {str(o.key_or_group): len(list(o.sweep_string_iterator())) for o in counted}
    if counts and "BasicSweeper" in hydra_cfg.sweeper["_target_"] and len(counts) == len(several):
        what = " x ".join(f"{n} of {key}" for key, n in counts.items())
        print(f"a sweep of {math.prod(counts.values())} runs ({what}); folder: {hydra_cfg.sweep.dir}", flush=True)


def _leave_out(cfg: DictConfig, several: Sequence[Override]) -> None:
    """Drop options of strategies that another run of the sweep has, and this one has not."""
    parts = cfg.get("strategy")
    if not isinstance(parts, DictConfig):
        return
    with open_dict(parts):
        for name in {name for names in strategies(several) for name in names} & parts.keys():
            if isinstance(parts[name], DictConfig) and "_target_" not in parts[name]:
                del parts[name]


def _check_named(cfg: DictConfig, chosen: Sequence[str]) -> None:
    """Refuse a strategy's yaml without the line that gives it a name among others."""
    parts = cfg.get("strategy")
    if isinstance(parts, DictConfig) and "_target_" in parts:
        name = next((name for name in chosen if name not in parts), "NAME")
        raise ConfigError(
            f"strategy={name}: its yaml does not say where its options belong: make `# @package strategy.{name}` the "
            f"first line of strategy/{name}.yaml."
        )


def _folders(given: Sequence[str]) -> set[Path]:
    """The folders that are there before anything is begun, of those that a run may be put in."""
    output = next((str(o.value()) for o in parsed(given) if o.key_or_group == "output_dir"), "runs")
    path = Path(output).absolute()
    found = {Path.cwd(), *Path.cwd().parents, *(p for p in (path, *path.parents) if p.is_dir())}
    return found | (set(path.iterdir()) if path.is_dir() else set())


def _remove_if_empty(there: set[Path]) -> None:
    # Hydra makes a run's folder, and those above it, before we can refuse the run.
    folder = Path(HydraConfig.get().runtime.output_dir).absolute()
    with suppress(OSError):  # it holds something
        for made in (folder, *folder.parents):
            if made in there:
                break
            made.rmdir()
