"""Runs that go on: which folder is meant, and which configuration they go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clplat.config.refusing import ConfigError
from clplat.report.flatten import flatten

VOLATILE = ("resume", "debug", "progress", "output_dir", "tracking", "threads")
"""Keys that may be given anew when a run is resumed; all others are the run's own."""


def find(resume: str, output: Path) -> Path:
    """The folder of the run that `resume` means: "latest" in `output`, a run's folder, or its checkpoint file.

    Raises:
        ConfigError: there is no checkpoint there.
    """
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
