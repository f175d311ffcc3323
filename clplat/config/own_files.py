"""Yaml files of the user's own (`--config-dir`): they configure runs, and Hydra itself only in how a sweep goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from clplat.config.refusing import ConfigError
from clplat.config.words import quoted

CHOSEN = ("hydra/launcher", "hydra/sweeper")
"""Groups of Hydra's own of which a file may choose an option."""


class OwnFiles(FileConfigSource):
    """Source of yaml files that looks at each one as Hydra reads it, before Hydra acts on it."""

    @staticmethod
    def scheme() -> str:
        """The beginning of such a source's address."""
        return "own"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file of the folder.

        Raises:
            ConfigError: it sets what may come from the command line only.
        """
        parts = Path(config_path).parts
        if ".." in parts or parts[:1] == ("hydra",):
            raise ConfigError(f"{config_path}: {_ONLY}")
        read = super().load_config(config_path)
        _judge(str(Path(self.path, config_path).with_suffix(".yaml")), Path(config_path).stem, read)
        return read


_ONLY = "a file below --config-dir may set hydra.mode and hydra.sweeper.params; the rest of hydra comes from the command line."


def guarded(words: Sequence[str]) -> list[str]:
    """The words with the user's own folder of files read by `OwnFiles`.

    Raises:
        ConfigError: there is no such folder; a flag of Hydra's that reads files past it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c")  # handed on; argparse would take -c for the beginning of the others
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--experimental-rerun")
    flags = [w for w in words if w.startswith("-")]
    if not flags and not any(w.lstrip("+").startswith("hydra.searchpath=") for w in words):
        return list(words)
    known, rest = parser.parse_known_args(list(words))
    rest = [*(["--cfg", known.cfg] if known.cfg is not None else []), *rest]
    for flag in ("config_path", "config_name", "experimental_rerun"):
        if getattr(known, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')}: not taken: put yaml files into groups below --config-dir.")
    if any(w.lstrip("+").startswith("hydra.searchpath=") and "file:" in w for w in rest):
        raise ConfigError("hydra.searchpath: give a folder with --config-dir.")
    for word in rest:  # as Hydra takes a flag that is cut short
        if word.startswith(("--con", "--e")):
            raise ConfigError(f"{word}: write the flag in full (--config-dir).")
    if known.config_dir is None:
        return rest
    folder = Path(known.config_dir).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {folder}.")
    Plugins.instance().register(OwnFiles)
    return [*rest, f"hydra.searchpath=[{quoted(f'own://{folder}')}]"]


def _judge(file: str, name: str, read: ConfigResult) -> None:
    content: Any = OmegaConf.to_container(read.config, resolve=False)
    if not isinstance(content, dict):
        return
    package = (read.header or {}).get("package") or ""
    if _of_hydra(package) or ("_name_" in package and name == "hydra") or "${" in package:
        raise ConfigError(f"{file}: its package is {package}: {_ONLY}")
    node = content.get("hydra", {})
    node = node if isinstance(node, dict) else {str(node): None}
    sweeper = node.get("sweeper", {})
    sweeper = sweeper if isinstance(sweeper, dict) else {str(sweeper): None}
    params = sweeper.get("params") or {}
    wrong = [f"hydra.{key}" for key in node if key not in ("mode", "sweeper")]
    wrong += [f"hydra.sweeper.{key}" for key in sweeper if key != "params"]
    wrong += [f"hydra.sweeper.params.{key}" for key in params if _of_hydra(str(key).lstrip("+~/"))]
    if not isinstance(params, dict) or "${" in str(params):
        wrong.append("hydra.sweeper.params")
    if wrong:
        raise ConfigError(f"{file}: {wrong[0]}: {_ONLY}")
    entries = content.get("defaults", [])
    for entry in entries if isinstance(entries, list) else [entries]:
        for group, option in entry.items() if isinstance(entry, dict) else [(entry, "")]:
            _judge_default(file, str(group), str(option))


def _judge_default(file: str, group: str, option: str) -> None:
    chosen, _, package = group.removeprefix("override ").removeprefix("optional ").strip().partition("@")
    chosen = chosen.strip().strip("/")
    hidden = "${" in group or ".." in group or ".." in option or option.rpartition("/")[2] == "hydra"
    if hidden or _of_hydra(package) or (_of_hydra(chosen.replace("/", ".")) and chosen not in CHOSEN):
        raise ConfigError(f"{file}: defaults: {group}: {_ONLY}")


def _of_hydra(package: str) -> bool:
    parts = [part for part in package.replace("/", ".").replace("@", ".").split(".") if part and part != "_global_"]
    return parts[:1] == ["hydra"]
