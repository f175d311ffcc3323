"""Checks of a composed configuration: its keys, and the kinds of its values, before anything is built."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from clplat.checks import shown
from clplat.config.kinds import Built, misfit, whole
from clplat.config.refusing import ConfigError, nearest, root_keys
from clplat.config.renamed import KEYS, path_now
from clplat.config.trust import judge
from clplat.errors import first_line
from clplat.metrics import METRICS

FILLED = {"learner.net": 2, "objective": 1, "optimizer": 1, "schedule": 1}
"""How many positional arguments clplat fills in itself where it calls what is configured there."""

PRECISIONS = ("32-true", "32", "64-true", "64", "bf16-mixed")
"""What `trainer.precision` may be."""

MANY_THREADS = 256
"""Threads that may be asked for on any machine: as many as a run had elsewhere, and not so many that none can start."""

BUILT = ("stream", "learner", "objective", "optimizer", "schedule", "training", "evaluation", "trainer", "tracking")
"""Groups of which one option is chosen and built."""

_OBJECTS = ("stream", "training", "evaluation", "trainer", "tracking")  # the others may be functions that make one
_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_LARGEST = 2**63

MANY = 2**31 - 1
"""What is counted may not be more: no memory holds it, and no kernel counts further."""


def check(cfg: DictConfig) -> None:
    """Refuse unknown keys and values of the wrong kind anywhere in `cfg`, those added with `+` too.

    Raises:
        ConfigError: names the key, what was given, what is allowed.
    """
    roots = root_keys()
    _known("", cfg, roots)
    for key in roots:
        if key not in cfg and key not in ("experiment", "strategy"):  # the first is merged into the other keys
            raise ConfigError(
                f"{key}: it was taken out and has no default: leave it in (conf/train.yaml has its value)."
            )
    for key in BUILT:
        if not isinstance(cfg[key], DictConfig) or (key != "learner" and "_target_" not in cfg[key]):
            raise ConfigError(f"{key}: got {cfg[key]}, it has no _target_: choose one of `clplat list {key}`.")
    nodes = list(_nodes("", cfg))
    judge(cfg, _imported)
    kinds = {"seed": int, "progress": bool, "debug": bool, "output_dir": str, "threads": int | None}
    for key, kind in kinds.items():
        _fits(key, cfg[key], kind)
    most = max(MANY_THREADS, os.cpu_count() or 1)
    if cfg.threads is not None and not 1 <= cfg.threads <= most:
        raise ConfigError(f"threads: got {cfg.threads}, it must lie in 1..{most}, or be null for torch's choice.")
    if cfg.seed >= 2**32:  # numpy's bound
        raise ConfigError(f"seed: got {cfg.seed}, it must lie in 0..{2**32 - 1}.")
    _fits("sweep", cfg.sweep, dict[str, str])
    _known("sweep", cfg.sweep, ["objective"])
    if cfg.sweep.get("objective") not in METRICS:
        given = shown(cfg.sweep.get("objective"))
        raise ConfigError(f"sweep.objective: got {given}, it must be one of {', '.join(METRICS)}.")
    _check_learner(cfg.learner)
    _check_strategy(cfg.get("strategy"))
    precision = str(cfg.trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision: got {precision!r}, allowed are 32-true, 64-true and bf16-mixed "
            "(float16 needs loss scaling, which strategies that take gradients more than once a step cannot share)."
        )
    filled = dict(FILLED)
    for path, node in nodes:
        if "_target_" in node:
            _check_call(path, node, filled)


def _nodes(path: str, node: DictConfig | ListConfig) -> Iterable[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        yield path, node
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        where = _join(path, key)
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{where}: no value given, and it has no default: set {where}=...")
        child = node[key]
        if key == "_partial_" and not isinstance(child, bool):
            raise ConfigError(f"{where}: got {shown(plain(child))}, expected true or false.")
        if isinstance(child, (DictConfig, ListConfig)):
            yield from _nodes(where, child)
        elif isinstance(child, int) and not -_LARGEST <= child < _LARGEST:
            raise ConfigError(f"{where}: got {shown(child)}, a whole number must fit into 64 bits.")
        elif isinstance(child, float) and not math.isfinite(child):
            raise ConfigError(f"{where}: got {child}, it must be a finite number.")


def _check_learner(node: DictConfig) -> None:
    from clplat.learners.learner import Learner

    hints = {"head": str, **_hints(Learner)}
    allowed = [key for key in hints if key == "net" or key not in (*root_keys(), "return")]
    _known("learner", node, allowed)
    for key in {"net", "head"} - set(node):
        raise ConfigError(f"learner.{key}: it was taken out and has no default: leave it in.")
    for key in node:
        _fits(f"learner.{key}", node[key], hints[str(key)])


def _check_strategy(node: DictConfig | None) -> None:
    if not isinstance(node, DictConfig) or not node:
        raise ConfigError("strategy: got none, give at least one (strategy=finetune is the plain one).")
    parts = {str(n): node[n] if isinstance(node[n], DictConfig) else {} for n in node}
    chosen = [name for name, part in parts.items() if "_target_" in list(part)]
    for name in parts:
        if name not in chosen:
            raise ConfigError(
                f"strategy.{name}: no strategy of that name was chosen{nearest(name, chosen)} "
                f"Chosen: {', '.join(chosen) or 'none'}; strategy=[...] chooses others."
            )


def _check_call(path: str, node: DictConfig, filled: dict[str, int]) -> None:
    """Check the keys and values of a call; note in `filled` how many arguments the makers among them will be given."""
    target = _imported(f"{path}._target_", node._target_)
    if path in _OBJECTS or re.fullmatch(r"strategy\.\w+", path):
        _refuse_partial(path, node)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return
    needed = [n for n, p in list(parameters.items())[: filled.get(path, 0)] if p.default is p.empty]
    if needed and not node.get("_partial_"):
        raise ConfigError(f"{path}._partial_: expected true, since clplat fills in {' and '.join(needed)}.")
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [n for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
    taken = allowed[: filled.get(path, 0)] if node.get("_partial_") else []
    allowed = [n for n in allowed if n not in taken]
    _known(path, node, (*allowed, *_HYDRA), taken)
    hints = _hints(target)
    for key in map(str, node):
        if key in hints:
            _note_makers(_join(path, key), node[key], hints[key], filled)
            if inspect.isclass(hints[key]) and hints[key] is not Any:  # which is a class itself
                _refuse_partial(_join(path, key), node[key])
            _fits(_join(path, key), node[key], hints[key])


def _refuse_partial(path: str, node: Any) -> None:
    """Refuse what would be a function where an object is wanted."""
    if isinstance(node, DictConfig) and node.get("_partial_"):
        raise ConfigError(f"{path}._partial_: got true, and an object is wanted here: leave it out.")


def _imported(key: str, name: str) -> Any:
    from hydra.utils import get_object

    from clplat._home import ADVICE, stopped_at_home, unheard
    from clplat._torchvision import ensure_importable

    if now := path_now(name):
        raise ConfigError(f"{key}: {name} is called {now} since clplat 0.2: set {key}={now}.")
    ensure_importable()  # what is imported may import Lightning
    said = logging.getLogger("hydra.utils")
    before, said.disabled = said.disabled, True  # the reason is in the error, in one line
    try:
        with unheard():
            return get_object(name)
    except Exception as error:
        reason = error.__cause__ or error
        advice = (
            f"Nothing can be written there: {ADVICE}."
            if stopped_at_home(reason)
            else "Give an importable path package.module.Name; a package in the working directory is seen by "
            "`python -m clplat`."
        )
        raise ConfigError(f"{key}: cannot import {name!r} ({first_line(reason)}). {advice}") from error
    finally:
        said.disabled = before


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints of other libraries may not resolve at run time; then nothing can be compared
        return {}


def _note_makers(path: str, value: Any, hint: Any, filled: dict[str, int]) -> None:
    """Where `hint` is a Callable[[...], X], or a sequence of them, `value` is called with that many arguments."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Callable and isinstance(arguments[0], list):
        filled[path] = len(arguments[0])
    elif origin is Sequence and isinstance(value, ListConfig):
        for i in range(len(value)):
            _note_makers(_join(path, i), value[i], arguments[0], filled)


def _known(path: str, node: DictConfig, allowed: Iterable[str], taken: Sequence[str] = ()) -> None:
    for key in map(str, node):
        if key not in allowed:
            offered = sorted(a for a in allowed if a not in _HYDRA)
            wrong = "clplat fills it in: leave it out." if key in taken else f"unknown key{nearest(key, offered)}"
            if key in KEYS and KEYS[key] in allowed:
                wrong = f"it is called {_join(path, KEYS[key])} since clplat 0.2."
            raise ConfigError(f"{_join(path, key)}: {wrong} Allowed here: {', '.join(offered) or 'none'}.")


def _fits(path: str, value: Any, hint: Any) -> None:
    wrong = misfit(plain(value), hint)
    if wrong is not None:
        where = path + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in wrong.path)
        raise ConfigError(f"{where}: got {shown(wrong.given)}, expected {wrong.expected}.")
    if re.search(r"(^|_)seed$", path.rpartition(".")[2]):
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"{path}: got {value}, a seed must be at least 0.")
    elif (most := max(map(abs, whole(plain(value), hint)), default=0)) > MANY:
        raise ConfigError(f"{path}: got {value}, a whole number here may be at most {MANY} ({most} is more).")


def plain(node: Any) -> Any:
    """A node's lists and mappings as Python's own, with `Built` in place of what a `_target_` makes."""
    if isinstance(node, DictConfig):
        return Built(node._target_) if "_target_" in node else {k: plain(node[k]) for k in node}
    return [plain(child) for child in node] if isinstance(node, ListConfig) else node


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
