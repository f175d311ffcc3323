"""What a checkpoint's notes, and a file that names a store, may not ask for: other names, and values looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clplat.config.refusing import ConfigError
from clplat.config.trust import listed, named


def judge_notes(config: Any, now: DictConfig) -> None:
    """Refuse what somebody else's checkpoint may not ask for: names that were not given again, interpolations.

    Args:
        config: the configuration in the checkpoint's notes.
        now: composed from what the user gives now.

    Raises:
        ConfigError: names the key, and how to allow it.
    """
    again = {name for _, name in named(now)}
    for path, name in named(config):
        if not listed(name) and name not in again:
            raise ConfigError(
                f"resume: the checkpoint names {name!r} at {path}, which is not clplat's: "
                f"if you trust it, give it again ({path}={name})."
            )
    for path, text in _texts(config):
        if "${" in text:
            raise ConfigError(
                f"resume: the checkpoint holds an interpolation at {path} ({text}): nothing of it is looked up."
            )


def judge_environment(cfg: DictConfig, words: Sequence[str]) -> None:
    """Refuse a file that sends the environment away: it names a store, and holds interpolations beyond plain keys.

    Args:
        cfg: composed configuration.
        words: of the command line, whose own interpolations and store are the user's.

    Raises:
        ConfigError: names the key.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    tracking = raw.get("tracking") if isinstance(raw.get("tracking"), dict) else {}
    uri = tracking.get("uri")
    typed = any(word.lstrip("+").startswith("tracking.uri=") for word in words)
    if typed or uri is None or re.fullmatch(r"\$\{oc\.env:\w+\}", str(uri)):
        return
    for path, text in _texts(raw):
        left, before = text, None
        while left != before:
            before, left = left, re.sub(r"\$\{[\w.\[\]]+\}", "", left)
        if "${" in left and not any(text in word for word in words):
            raise ConfigError(
                f"{path}: {text} is looked up by a file that also names the store ({uri}), so it would be sent there: "
                "give tracking.uri on the command line, or a plain value here."
            )


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in pairs:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(key, str) and "${" in key:
            yield path, key
        yield from _texts(child, where)
