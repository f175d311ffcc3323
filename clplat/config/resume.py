"""Runs that go on: which folder is meant, and which configuration they go on with."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clplat.checkpoint import LAST, PREVIOUS
from clplat.claim import alive
from clplat.config.refusing import ConfigError
from clplat.report.flatten import flatten
from clplat.report.folder import WHERE

VOLATILE = ("resume", "debug", "progress", "output_dir", "tracking", "threads", "sweep")
"""Keys that may be given anew when a run is resumed; all others are the run's own."""


def find(resume: str, output: Path) -> Path:
    """The folder of the run that `resume` means: "latest" in `output`, a run's folder, or its checkpoint file.

    Raises:
        ConfigError: there is no checkpoint there.
    """
    if resume == "latest":
        return _latest(output)
    path = Path(resume)
    folder = path.parent if path.suffix == ".ckpt" else path
    if path.suffix == ".ckpt" and path.name not in (LAST, PREVIOUS):
        raise ConfigError(
            f"resume={resume}: a run goes on from its {LAST} or {PREVIOUS}: give one of them, or its folder."
        )
    if not any((folder / name).is_file() for name in (LAST, PREVIOUS)):
        raise ConfigError(f"resume={resume}: no checkpoint {LAST} there: give the folder of a run, or latest.")
    return folder.resolve()


def _latest(output: Path) -> Path:
    """The run under a folder that was trained last, of those that are not over, and that nobody works on."""
    found = sorted(output.rglob(LAST), key=lambda p: p.stat().st_mtime, reverse=True)
    folders = [path.parent.resolve() for path in found]
    if not folders:
        raise ConfigError(f"resume=latest: no checkpoint under {output}: nothing was begun there (output_dir=...).")
    live = [folder for folder in folders if alive(folder)]
    over = [folder for folder in folders if folder not in live and (folder / WHERE).exists()]
    open_ = [folder for folder in folders if folder not in live and folder not in over]
    skipped = [f"{len(live)} in training" if live else "", f"{len(over)} complete" if over else ""]
    if not open_ and not over:
        raise ConfigError(f"resume=latest: every run under {output} is in training ({len(live)}): wait for their end.")
    taken = (open_ or over)[0]
    said = (
        f"skipped: {', '.join(filter(None, skipped))}" if open_ else "complete already, as all that are not in training"
    )
    print(f"resume=latest: {taken}" + (f" ({said})" if any(skipped) else ""))
    return taken


def file_name(resume: str) -> str:
    """Name of the checkpoint that `resume` means, in the folder of the run."""
    return Path(resume).name if resume.endswith(".ckpt") else LAST


def command(folder: Path, more: Sequence[str] = ()) -> str:
    """The command that goes on with a run, as a shell takes it.

    Args:
        folder: of the run.
        more: words that have to be given again.
    """
    main = sys.modules["__main__"].__spec__
    program = "python -m clplat" if main is not None and main.name == "clplat.__main__" else "clplat"
    return f"{program} train {shlex.join([f'resume={folder}', *more])}"


def relative(base: Path, folder: Path) -> str:
    """The working directory of a run as its checkpoints have it.

    Where it holds the run's folder, it is told from there: a project that is copied or renamed then goes on in its own
    place.
    """
    return os.path.relpath(base, folder) if folder.is_relative_to(base) else str(base)


def base(folder: Path, told: str) -> Path:
    """The directory that relative paths of a run's configuration begin at, from what `relative` gave.

    It is the current one where that of the run is gone.
    """
    found = (folder / told).resolve()
    return found if found.is_dir() else Path.cwd()


def configuration(cfg: DictConfig, saved: Mapping[str, Any], given: Sequence[str] | None) -> DictConfig:
    """The configuration of a run that goes on: its own, with what may be given anew.

    Args:
        cfg: composed now.
        saved: the run's own, from its checkpoint.
        given: the keys that the user gave, None for all.

    Raises:
        ConfigError: a key that was given may not change (`VOLATILE` may), and differs from the run's own.
    """
    own = DictConfig(saved)
    keys = list(map(str, cfg)) if given is None or "experiment" in given else given  # an experiment may set any key
    fixed = [k for k in keys if k.split(".")[0] not in VOLATILE]
    unlike = [d for d in differences(own, cfg) if any(f"{d.split(':')[0]}.".startswith(f"{k}.") for k in fixed)]
    if unlike:
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise ConfigError(
            f"resume: the options given differ from the run's own: {'; '.join(unlike[:3])}{more}. "
            f"Give the same options, or none but {', '.join(VOLATILE)}."
        )
    for key in ["resume", *(k for k in keys if k.split(".")[0] in VOLATILE)]:
        OmegaConf.update(own, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return own


def differences(a: DictConfig, b: DictConfig) -> list[str]:
    """The keys in which two configurations differ, as "key: value in a, value in b"."""
    first, second = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (a, b))  # type: ignore[arg-type]  # mappings
    return [
        f"{key}: {first.get(key, 'absent')} in the run, {second.get(key, 'absent')} given"
        for key in sorted(first.keys() | second.keys())
        if first.get(key, "absent") != second.get(key, "absent")
    ]
