"""Checks of a composed configuration: keys, and kinds of values, against the constructors that will get them."""

from __future__ import annotations

import difflib
import inspect
import logging
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from clplat.errors import UserError

ROOT = (
    "stream", "learner", "strategy", "objective", "optimizer", "schedule", "training", "evaluation", "trainer",
    "tracking", "experiment", "seed", "output_dir", "resume", "threads", "progress", "debug",
)  # fmt: skip
"""Every key that `conf/train.yaml` may have."""

LEARNER = ("net", "head", "logit_mask", "clip_norm", "optimizer_state")
"""Every key of the group `learner`."""

FILLED = {"learner.net": 2, "objective": 1, "optimizer": 1, "schedule": 1}
"""How many positional arguments clplat fills in itself where it calls what is configured there."""

PRECISIONS = ("32-true", "32", "64-true", "64", "bf16-mixed")
"""What `trainer.precision` may be."""

_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message says what was given, what is allowed, what to do."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint at what may have been meant, the end of a sentence: "; did you mean 'x'?", or "."."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def check(cfg: DictConfig) -> None:
    """Refuse unknown keys and values of the wrong kind anywhere in `cfg`, those added with `+` too.

    Raises:
        ConfigError: names the key, what was given, what is allowed.
    """
    _known("", cfg, ROOT)
    for key in ROOT:
        if key not in cfg and key not in ("experiment", "strategy"):  # the first is merged into the other keys
            raise ConfigError(
                f"{key}: it was taken out and has no default: leave it in (conf/train.yaml has its value)."
            )
    for key, kind in (("seed", int), ("progress", bool), ("debug", bool), ("output_dir", str)):
        _fits(key, cfg[key], kind)
    _fits("threads", cfg.threads, int | None)
    if cfg.threads is not None and cfg.threads < 1:
        raise ConfigError(f"threads: got {cfg.threads}, it must be at least 1, or null for torch's choice.")
    if not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed: got {cfg.seed}, it must lie in 0..{2**32 - 1}.")
    _known("learner", cfg.learner, LEARNER)
    if not cfg.get("strategy"):
        raise ConfigError("strategy: got none, give at least one (strategy=finetune is the plain one).")
    chosen = [str(n) for n in cfg.strategy if "_target_" in list(cfg.strategy[n])]  # "in" alone passes over a ???
    for name in cfg.strategy:
        if name not in chosen:
            raise ConfigError(
                f"strategy.{name}: no strategy of that name was chosen{nearest(str(name), chosen)} "
                f"Chosen: {', '.join(chosen) or 'none'}; strategy=[...] chooses others."
            )
    precision = str(cfg.trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision: got {precision!r}, allowed are 32-true, 64-true and bf16-mixed "
            "(float16 needs loss scaling, which strategies that take gradients more than once a step cannot share)."
        )
    filled = dict(FILLED)
    for path, node in _nodes("", cfg):
        if "_target_" in node:
            _check_call(path, node, filled)


def _nodes(path: str, node: DictConfig | ListConfig) -> Iterable[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        yield path, node
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{_join(path, key)}: no value given, and it has no default: set {_join(path, key)}=...")
        child = node[key]
        if isinstance(child, (DictConfig, ListConfig)):
            yield from _nodes(_join(path, key), child)


def _check_call(path: str, node: DictConfig, filled: dict[str, int]) -> None:
    """Check the keys and values of a call; note in `filled` how many arguments the makers among them will be given."""
    target = _imported(f"{path}._target_", node._target_)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [n for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
    taken = allowed[: filled.get(path, 0)] if node.get("_partial_") else []
    allowed = [n for n in allowed if n not in taken]
    _known(path, node, (*allowed, *_HYDRA), taken)
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # hints of other libraries may not resolve at run time; then nothing can be compared
        return
    for key in node:
        if key in hints:
            _note_makers(_join(path, key), node[key], hints[key], filled)
        if key in hints and isinstance(node[key], ListConfig):
            _fit_all(_join(path, key), node[key], hints[key])
        elif key in hints and not isinstance(node[key], DictConfig):
            _fits(_join(path, key), node[key], hints[key])


def _imported(key: str, name: str) -> Any:
    from hydra.utils import get_object

    from clplat._torchvision import ensure_importable

    ensure_importable()  # what is imported may import Lightning
    said = logging.getLogger("hydra.utils")
    before, said.disabled = said.disabled, True  # the reason is in the error, in one line
    try:
        return get_object(name)
    except Exception as error:
        reason = error.__cause__ or error
        raise ConfigError(
            f"{key}: cannot import {name!r} ({str(reason).splitlines()[0]}). Give an importable path "
            "package.module.Name; a package in the working directory is seen by `python -m clplat`."
        ) from error
    finally:
        said.disabled = before


def _note_makers(path: str, value: Any, hint: Any, filled: dict[str, int]) -> None:
    """Where `hint` is a Callable[[...], X], or a sequence of them, `value` is called with that many arguments."""
    for option in _alternatives(hint):
        arguments = typing.get_args(option)
        if typing.get_origin(option) is Callable and isinstance(arguments[0], list):
            filled[path] = len(arguments[0])
        elif typing.get_origin(option) is Sequence and isinstance(value, ListConfig):
            for i in range(len(value)):
                _note_makers(_join(path, i), value[i], arguments[0], filled)


def _known(path: str, node: DictConfig, allowed: Iterable[str], taken: Sequence[str] = ()) -> None:
    for key in map(str, node):
        if key not in allowed:
            offered = sorted(a for a in allowed if a not in _HYDRA)
            wrong = "clplat fills it in: leave it out." if key in taken else f"unknown key{nearest(key, offered)}"
            raise ConfigError(f"{_join(path, key)}: {wrong} Allowed here: {', '.join(offered) or 'none'}.")


def _fit_all(path: str, values: ListConfig, hint: Any) -> None:
    kinds = [typing.get_args(o)[0] for o in _alternatives(hint) if typing.get_origin(o) is Sequence]
    if len(kinds) == 1 and kinds[0] in (int, float, str):
        for i, value in enumerate(values):
            _fits(f"{path}[{i}]", value, kinds[0])


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _fits(path: str, value: Any, hint: Any) -> None:
    options = _alternatives(hint)
    if typing.get_origin(hint) is Sequence and isinstance(value, (bool, int, float)):
        raise ConfigError(f"{path}: got {value!r}, expected a list: [{value}], say.")
    plain = [o for o in options if o in (int, float, bool, str, type(None)) or typing.get_origin(o) is typing.Literal]
    if len(plain) < len(options) and not isinstance(value, str):
        return  # something that is no plain value may be built from this
    if len(plain) < len(options) and float not in plain:
        return
    for option in plain:
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return
        if option in (bool, str, type(None)) and isinstance(value, option):
            return
    names = " or ".join(_called(o) for o in plain)
    raise ConfigError(f"{path}: got {value!r}, expected {names}.")


def _called(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return ", ".join(map(str, typing.get_args(option)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[option]


def differences(a: DictConfig, b: DictConfig) -> list[str]:
    """The keys in which two configurations differ, as "key: value in a, value in b"."""
    first, second = flatten(OmegaConf.to_container(a, resolve=True)), flatten(OmegaConf.to_container(b, resolve=True))
    return [
        f"{key}: {first.get(key, 'absent')} in the run, {second.get(key, 'absent')} given"
        for key in sorted(first.keys() | second.keys())
        if first.get(key, "absent") != second.get(key, "absent")
    ]


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values."""
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, child in node.items() for k, v in flatten(child, _join(path, key)).items()}


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
