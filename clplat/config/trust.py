"""Names of classes in a configuration: which may be imported, and what each must be where it stands.

An import runs code, so a name is judged by its path first: clplat's own, some packages of what clplat depends on, or a
module of the user's. What was imported is then judged by what it is: a class of the kind that belongs there, or a
function that declares to return one.
"""

from __future__ import annotations

import collections.abc
import importlib.metadata
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from clplat.checks import shown
from clplat.config.bases import base
from clplat.config.refusing import ConfigError

LISTED = (
    "avalanche.benchmarks.",
    "clplat.",
    "pytorch_lightning.accelerators.",
    "pytorch_lightning.callbacks.",
    "pytorch_lightning.plugins.",
    "pytorch_lightning.strategies.",
    "pytorch_lightning.trainer.trainer.Trainer",
    "pytorch_lightning.Trainer",
    "torch.nn.",
    "torch.optim.",
    "torchvision.transforms.",
)
"""Beginnings of names that anybody's file may use; the rest of these packages, and of Python's own, nobody's."""

BENCHMARKS = tuple(f"avalanche.benchmarks.{part}." for part in ("classic", "generators", "scenarios"))
"""Where what makes a benchmark of Avalanche is at home; the rest of that package downloads and unpacks."""

_WRITES = ("OnExceptionCheckpoint", "ModelCheckpoint")  # where a yaml says; clplat writes checkpoints itself
_ADVICE = (
    "A name may be clplat's, a class of torch.optim, torch.nn, torchvision.transforms or Lightning (Trainer, callbacks, "
    "plugins, strategies), a benchmark of Avalanche, or of a module of your own"
)


def judge(cfg: DictConfig, imported: Callable[[str, str], Any]) -> None:
    """Refuse a configuration that names what it may not; nothing is imported before every name was looked at.

    Args:
        cfg: composed configuration.
        imported: the object of a key and a name.

    Raises:
        ConfigError: names the key, what was given, what is allowed.
    """
    for path, name in named(cfg):
        if not may_be_imported(name):
            raise ConfigError(f"{path}: {shown(name)} is no name that a configuration may use here. {_ADVICE}.")
    for key in cfg:
        child = cfg._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            _below(str(key), child, None, imported)


def named(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below that ends in `_target_`, with its value; a value that is missing is left out."""
    if isinstance(node, DictConfig | ListConfig):
        node = (
            {k: node[k] for k in node if not OmegaConf.is_missing(node, k)} if isinstance(node, DictConfig) else [*node]
        )
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in pairs:
        where = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield where, child
        else:
            yield from named(child, where)


def may_be_imported(name: Any) -> bool:
    """Whether a name is one of `LISTED` or of a module of the user's own, found out without importing it."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)+", name) or "__main__" in name:
        return False
    return listed(name) or _own(name)


def listed(name: Any) -> bool:
    """Whether a name is clplat's own or of a package that anybody's file may use."""
    return (
        isinstance(name, str)
        and name.startswith(LISTED)
        and "__main__" not in name
        and name.rpartition(".")[2] not in _WRITES
    )


def _own(name: str) -> bool:
    """Whether a name's module is neither Python's, nor clplat's, nor installed because clplat needs it."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or root == "clplat":
        return False
    try:
        found = find_spec(root)  # of a first name: nothing is imported
    except (ImportError, ValueError):
        return False
    where = [] if found is None else [found.origin or "", *(found.submodule_search_locations or [])]
    if not any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in where):
        return True
    makers = _distributions().get(root, [])
    return not {_plain(maker) for maker in makers} & _needed()


@cache
def _distributions() -> Mapping[str, list[str]]:
    """The distributions that install each first name; reading all of them takes a second."""
    return importlib.metadata.packages_distributions()


@cache
def _needed() -> set[str]:
    """Every distribution that clplat depends on, directly or not, and those that install others."""
    seen: set[str] = {"pip", "setuptools", "wheel"}
    waiting = ["clplat"]
    while waiting:
        name = _plain(waiting.pop())
        if name not in seen:
            seen.add(name)
            try:
                required = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [re.split(r"[\s;<>=!~\[(]", line, maxsplit=1)[0] for line in required]
    return seen


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _below(path: str, node: DictConfig | ListConfig, hint: Any, imported: Callable[[str, str], Any]) -> None:
    """Judge what a node builds, then what stands below it; a hint of None lets nothing be built but at known keys."""
    hints: dict[str, Any] = {}
    if isinstance(node, DictConfig) and "_target_" in node:
        hint = base(path) or hint
        target = imported(f"{path}._target_", node._target_)
        _judge_kind(path, node._target_, target, hint)
        hints = _parameters(target, free=not listed(node._target_) or _home(target).startswith(BENCHMARKS))
    elif isinstance(node, ListConfig):
        hints = dict.fromkeys(map(str, range(len(node))), hint)
    elif isinstance(node, DictConfig):
        hints = dict.fromkeys(map(str, node), hint)
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        child = node[key]  # pyright: ignore[reportArgumentType]  # the key is of this node, mapping or list
        if isinstance(child, DictConfig | ListConfig):
            _below(f"{path}.{key}", child, hints.get(str(key), hints.get("")), imported)


def _parameters(target: Any, free: bool) -> dict[str, Any]:
    """The hints of a call by its keys; under "" that of a key that has none: anything where the caller is `free`."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints of other libraries may not resolve at run time
        hints = {}
    return hints | {"": Any if free else None}


def _home(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def _judge_kind(path: str, name: str, target: Any, hint: Any) -> None:
    kinds = list(_kinds(hint))
    if Any in kinds or object in kinds:
        home = _home(target)
        known = home.startswith(BENCHMARKS) or (inspect.isclass(target) and listed(home)) or _own(home)
        if known or target is None:
            return
        raise ConfigError(f"{path}._target_: {name} is {home} at home. {_ADVICE}.")
    if not kinds:
        raise ConfigError(f"{path}._target_: got {name!r}, and nothing is built here: give a plain value.")
    made = target if inspect.isclass(target) else _returned(target)
    if any(_is(made, kind) for kind in kinds):
        return
    words = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(
        f"{path}._target_: {name} is no {words}: name a subclass, or a function that declares to return one (-> {words})."
    )


def _kinds(hint: Any) -> Iterator[Any]:
    """The classes of objects that fit a hint; of something that is called, what it returns; Callable for a function."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        yield Any
    elif origin in (typing.Union, types.UnionType):
        for part in arguments:
            yield from _kinds(part)
    elif origin is collections.abc.Callable:
        plain = arguments and arguments[-1] in (int, float, bool, str)
        yield from [collections.abc.Callable] if plain else _kinds(arguments[-1]) if arguments else []
    elif origin is type:
        return
    elif origin is not None and inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable):
        for part in arguments:
            yield from _kinds(part)
    elif inspect.isclass(hint) and hint not in (int, float, bool, str, bytes, list, tuple, dict, set, type(None)):
        yield hint


def _returned(target: Any) -> Any:
    """What a function declares to return; None if it declares nothing."""
    try:
        return typing.get_type_hints(target).get("return")
    except Exception:  # of names that only a type checker sees
        said = getattr(target, "__annotations__", {}).get("return")
        return said.rpartition(".")[2] if isinstance(said, str) else said


def _is(made: Any, kind: Any) -> bool:
    if isinstance(made, str):  # a declared name that could not be looked up
        return made == getattr(kind, "__name__", None)
    if kind is collections.abc.Callable:
        return made is kind or typing.get_origin(made) is kind
    return inspect.isclass(made) and kind in inspect.getmro(made)  # a protocol has no issubclass
