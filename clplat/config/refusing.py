"""Refusals of a configuration: one line that begins with the whole key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clplat.errors import UserError

_OPTION = re.compile(r"([a-z_]\w*(?:\.\w+)*)(?:\[\d+\])*(?: or [a-z_]\w*)*: ")


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message says what was given, what is allowed, what to do."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint at what may have been meant, the end of a sentence: "; did you mean 'x'?", or "."."""
    lower = {each.lower(): each for each in allowed}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[close[0]]!r}?" if close else "."


@cache
def root_keys() -> tuple[str, ...]:
    """Every key that a configuration may have: the groups and the values of `conf/train.yaml`, in its order."""
    shipped = OmegaConf.load(Path(__file__).parents[1] / "conf" / "train.yaml")
    groups = [str(key) for entry in shipped.defaults if not isinstance(entry, str) for key in entry]
    values = [str(key) for key in shipped if key not in ("defaults", "hydra")]
    return (*(g for g in groups if not g.startswith("override ")), *values)


@contextmanager
def refusing(cfg: DictConfig, key: str = "") -> Iterator[None]:
    """Turn an error of what is built inside into a refusal of the configuration.

    Args:
        cfg: the configuration.
        key: of what is built; "" where several things are, and a TypeError is no refusal but a bug.

    Raises:
        ConfigError: names the key that was refused.
    """
    refusals = (UserError, ValueError, OmegaConfBaseException, OverflowError, *([TypeError] if key else []))
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__ or error
        where = re.search(r"full_key: (\S+)", str(error))
        raise _refusal(cfg, where[1] if where else key, cause) from error
    except refusals as error:
        raise _refusal(cfg, key, error) from error
    except (MemoryError, RuntimeError) as error:
        if not _too_large(error):
            raise
        raise _refusal(cfg, key, error) from error


def _refusal(cfg: DictConfig, key: str, error: BaseException) -> BaseException:
    # A strategy that refuses what it is set up for is named by a note (`clplat.composition`).
    note = next((n for n in getattr(error, "__notes__", []) if n.startswith("strategy.")), None)
    line = (str(error) or type(error).__name__).splitlines()[0]
    if _too_large(error):
        place = note or key
        place, most = max(_numbers(OmegaConf.select(cfg, place) if place else cfg, place), key=lambda found: found[1])
        size = re.search(r"allocate (\d+)", line, re.IGNORECASE)
        needed = f"{int(size[1]) / 1e9:,.1f} GB at once" if size else "more than can be counted"
        return ConfigError(f"{place}: got {most}, which needs {needed}: more than there is, make it smaller.")
    if isinstance(error, UserError) and (note is None or not _OPTION.match(line)):
        return error
    return ConfigError(whole_key(cfg, note or key, line))


def _too_large(error: BaseException) -> bool:
    return isinstance(error, MemoryError | OverflowError) or bool(
        re.search("allocate|Storage size calculation|out of memory", str(error))
    )


def _numbers(node: Any, path: str) -> Iterator[tuple[str, int | float]]:
    """Every number below a node but seeds, with its key; the node's own key with 0 comes first."""
    yield path, 0
    keys = list(node) if isinstance(node, DictConfig) else range(len(node)) if isinstance(node, ListConfig) else []
    for key in keys:
        below = f"{path}.{key}" if path else str(key)
        if isinstance(node[key], int | float) and not isinstance(node[key], bool) and not str(key).endswith("seed"):
            yield below, node[key]
        yield from _numbers(node[key], below)


def whole_key(cfg: DictConfig, key: str, line: str) -> str:
    """A refusal with the whole key in front.

    Args:
        cfg: the configuration.
        key: of what was being built, "" if that is not known.
        line: the refusal: it begins with an option's name, or with some of the keys above that too, or is a sentence.
    """
    found = _OPTION.match(line)
    if not found or not key:
        return f"{key}: {line}" if key else line
    above, option = key.split("."), found[1].split(".")
    if option[: len(above)] == above:
        return line
    for n in range(min(len(above), len(option)), 0, -1):
        if above[-n:] == option[:n]:
            return ".".join([*above[:-n], line])
    between = _between(OmegaConf.select(cfg, key, default=None), option[0])
    if between is None and option[0] in root_keys():
        return line
    return ".".join([*above, *(between or []), line])


def _between(node: Any, option: str) -> list[str] | None:
    """The keys from a node down to the only mapping in it that has an option; [] for the node itself."""
    if isinstance(node, DictConfig) and option in node:
        return []
    keys = list(node) if isinstance(node, DictConfig) else range(len(node)) if isinstance(node, ListConfig) else []
    below = {str(key): _between(node[key], option) for key in keys}
    found = [[key, *rest] for key, rest in below.items() if rest is not None]
    return found[0] if len(found) == 1 else None
