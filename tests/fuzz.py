"""Wrong and odd overrides of every key of `conf/`, and what `clplat train` makes of one before training.

A case is one override. The parts of a run that it needs are chosen beside it, so that the override alone can be wrong.

    for case in sample(700, seed=0):
        print(case, tried(case).fault)

A case is right if it is refused with exit code 2, in one line that names its key, leaving nothing behind; or accepted,
where `nonsense` finds nothing against its value.
"""

from __future__ import annotations

import math
import os
import random
import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, Node, OmegaConf

import clplat.train
from clplat import catalogue
from clplat.launch import launch

BASE = ("tracking=none", "progress=false", "threads=1")
"""Words of every run."""

SMALL = ("learner.net.hidden=8",)
"""Words that make the learner small where it is not what is tried."""

TASKS = ("stream=split_digits", "stream.task_incremental=true")
"""A stream on which every strategy can be set up."""

NOT_HERE = (
    "avalanche",
    "permuted_mnist",
    "rotated_mnist",
    "split_mnist",
    "split_fashion_mnist",
    "custom",
    "gpu",
    "regression",
)
"""Options that need a download, an answer of the user's, a GPU, or targets that no stream here has."""

ALSO = {"cwr_star": ("learner.head=shared",), "remind": ("learner.net.hidden=16", "strategy.remind.parts=4")}
"""Words that a strategy needs beside its name."""

VALUES = (
    *("abc", "''", "naïve☃", "a" * 5000, "9" * 5000),
    *("true", "false", "null"),
    *("0", "0.0", "-0.0", "-1", "-2.5", "0.5", "1", "3", "1e-400"),
    *(str(10**30), str(-(10**30)), str(2**63), str(2**63 - 1), str(2**31), str(10**12), str(10**7)),
    *("1e30", "-1e30", "1e400", "nan", "inf", "-inf"),
    *("[]", "[1,2]", "[true]", "[a]", "[[1]]", "[-1]", "[inf]", f"[{10**30}]"),
    *("{}", "{a:1}", "{a:true}", "{a:[1]}"),
)
"""What is given for every value."""

TARGETS = (
    *("builtins.int", "builtins.dict", "builtins.open", "os.system", "torch.nn.Linear", "torch.nn", "torch.optim.SGD"),
    *("clplat.loop.Run", "clplat.run.Run", "clplat.checks.one_of", "clplat", "clplat.strategies.replay.Replay"),
    *("nope.Nope", "Nope", "''", "null", "5", "[a]", "{a:1}", "naïve.Über", "a" * 5000),
)
"""What is given for every `_target_`."""

PARTIALS = ("true", "false", "null", "5", "abc", "[true]", "{a:1}")
"""What is given for every `_partial_`, and where there is none."""

NEGATIVE = re.compile(r"(bias|angles|time_vectors\.scale)$")
"""Keys of numbers that may be below zero."""

TEXTS = re.compile(r"(^|\.)(output_dir|experiment|uri|separator|files|name|data_root|_target_)$")
"""Keys of free text: any that is not empty."""

SECONDS = 20
"""What takes longer hangs."""


@dataclass(frozen=True)
class Case:
    """One override.

    Attributes:
        words: of the command line, the override last.
        key: that is overridden.
        text: its new value, as typed.
        shipped: its value in the yaml; None for null and for a key that is not there.
        kind: "value", "unknown" (a key that does not exist), "target" or "partial".
    """

    words: tuple[str, ...]
    key: str
    text: str
    shipped: Any
    kind: str

    @property
    def override(self) -> str:
        """The word that is tried."""
        return f"{self.key}={self.text}"

    def __str__(self) -> str:
        chosen = [w for w in self.words[:-1] if w not in (*BASE, *SMALL)]
        return " ".join([*chosen, self.override if len(self.override) < 200 else self.override[:60] + "..."])


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        code: exit code; None if all parts were built, and training would begin.
        lines: refusals.
        fault: what is wrong with that, "" if nothing is.
    """

    code: int | None
    lines: tuple[str, ...]
    fault: str


@cache
def cases() -> tuple[Case, ...]:
    """Every case there is, in order."""
    found = []
    for group in sorted(catalogue.groups()):
        if group in ("experiment", "paper"):
            continue
        found += [
            Case((*BASE, f"{group}={text}"), group, text, {}, "value") for text in ("5", "null", "[]", "nope", "''")
        ]
        for name in catalogue.options(catalogue.CONF / group):
            if name in NOT_HERE:
                continue
            prefix = f"strategy.{name}" if group == "strategy" else group
            found += _below(prefix, _shipped(group, name), _chosen(group, name))
    root = OmegaConf.load(catalogue.CONF / "train.yaml")
    assert isinstance(root, DictConfig)
    plain = OmegaConf.create(
        {k: root[k] for k in root if k not in ("defaults", "hydra", "resume", "debug", "output_dir")}
    )
    found += _below("", plain, (*BASE, *SMALL))
    found += [
        Case((*BASE, f"{key}={v}"), key, v, None, "value") for key in ("experiment", "stream") for v in ("7", "true")
    ]
    found += [_unknown(key, (*BASE, *SMALL)) for key in ("strategy.bogus", "bogus", "learner.bogus")]
    return tuple({case.words: case for case in found}.values())


def sample(number: int, seed: int) -> list[Case]:
    """Some cases, at most 6 of a key before any key has more; the same for the same seed."""
    drawn = random.Random(seed)
    every = list(cases())
    drawn.shuffle(every)
    met: dict[tuple[tuple[str, ...], str], int] = {}
    first, rest = [], []
    for case in every:
        place = (case.words[:-1], case.key)
        met[place] = met.get(place, 0) + 1
        (first if met[place] <= 6 else rest).append(case)
    return (first + rest)[:number]


def tried(case: Case) -> Outcome:
    """What `clplat train` makes of a case in the working directory, up to where training would begin."""
    before = _files()
    try:
        with _ready(), _at_most(SECONDS):
            code, lines = launch(case.words)
    except _Ready:
        return Outcome(None, (), nonsense(case) or "")
    except _TooLong:
        return Outcome(None, (), "hangs")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(1, (), f"traceback: {type(error).__name__} {str(error)[:200]} ({where.filename}:{where.lineno})")
    return Outcome(code, tuple(lines), _refused_wrongly(case, code, lines) or _left(before))


def nonsense(case: Case) -> str | None:
    """What speaks against a value that was accepted; None for a harmless one.

    Harmless is a finite value of the kind of the one shipped, not below zero where that means nothing, not a count
    beyond 2^31 - 1. Null may stand wherever it was accepted. What is null in the yaml may be a number, text or a list.
    """
    if case.kind == "unknown":
        return "accepted, an unknown key"
    value = _plain(OverridesParser.create().parse_override(f"k={_typed(case.text)}").value())
    if case.kind == "target" or (case.kind == "partial" and not isinstance(value, bool)):
        return "accepted"
    if value in (None, {}) or case.kind == "partial":
        return None
    numbers = list(_numbers(value))
    if not all(map(math.isfinite, numbers)):
        return "accepted, not finite"
    counts = isinstance(case.shipped, int | str | list) and not case.key.endswith("seed")
    if counts and any(isinstance(n, int) and n > 2**31 - 1 for n in numbers):
        return "accepted, absurdly many"
    if any(n < 0 for n in numbers) and not NEGATIVE.search(case.key):
        return "accepted, below zero"
    if isinstance(value, str) and not (TEXTS.search(case.key) and value):
        return "accepted, no such choice"
    if not _same_kind(value, case.shipped):
        return f"accepted, of the wrong kind: {value!r:.50} for {case.shipped!r}"
    return None


def _same_kind(value: Any, shipped: Any) -> bool:
    if shipped is None:
        return not isinstance(value, bool | dict)
    if isinstance(shipped, bool) or isinstance(value, bool):
        return isinstance(shipped, bool) and isinstance(value, bool)
    if isinstance(shipped, float):
        return isinstance(value, int | float)
    if isinstance(shipped, str) and shipped.startswith("${"):  # a seed, or a number of rows
        return isinstance(value, int)
    return isinstance(value, type(shipped))


def _refused_wrongly(case: Case, code: int, lines: Sequence[str]) -> str:
    if code != 2:
        return f"exit code {code}: {lines}"
    if len(lines) != 1 or "\n" in lines[0]:
        return f"{len(lines)} lines: {lines}"
    names = case.key.split(".")
    if case.kind in ("target", "partial") and len(names) > 1:
        names = names[:-1]
    if names[0] not in lines[0] or not re.search(rf"(?<!\w){re.escape(names[-1])}(?!\w)", lines[0]):
        return f"the key is not named: {lines[0][:300]}"
    return "" if len(lines[0]) < 1500 else f"a line of {len(lines[0])} characters"


def _left(before: set[str]) -> str:
    more = sorted(_files() - before)
    return f"left behind: {', '.join(more[:5])}" if more else ""


def _files() -> set[str]:
    return {str(p) for p in Path().rglob("*")}


class _Ready(BaseException):
    """Training would begin."""


class _TooLong(BaseException):
    """The time is up."""


@contextmanager
def _ready() -> Iterator[None]:
    """End a run where its folder would be begun: all parts are built then, and the first experience is prepared."""
    GlobalHydra.instance().clear()
    before = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra composes once more to find out whether a yaml asks for a sweep; that is half of its time.
    one_run = mock.patch.object(Hydra, "get_mode", return_value=None)
    with (
        mock.patch.object(clplat.train, "_begin_folder", side_effect=_Ready),
        mock.patch("sys.argv", ["clplat"]),
        one_run,
    ):
        try:
            yield
        finally:
            GlobalHydra.instance().clear()
            os.environ.pop("HYDRA_FULL_ERROR", None)
            if before is not None:
                os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def _shipped(group: str, name: str) -> DictConfig:
    """An option's values, with those of the yaml that it builds on."""
    own = OmegaConf.load(catalogue.CONF / group / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    defaults = own.pop("defaults", [])
    above = [OmegaConf.load(catalogue.CONF / group / f"{d}.yaml") for d in defaults if d != "_self_"]
    merged = OmegaConf.merge(*above, own)
    assert isinstance(merged, DictConfig)
    return merged


def _chosen(group: str, name: str) -> tuple[str, ...]:
    """Words that choose an option and what goes with it."""
    if group == "strategy":
        return (*BASE, *SMALL, *TASKS, f"strategy=[{name}]", *ALSO.get(name, ()))
    if group == "stream":
        text = (catalogue.CONF / group / f"{name}.yaml").read_text()
        tiny = re.search(r"^# tiny:(.*)$", text, re.MULTILINE)
        words = [f"stream.{word}" for word in (tiny[1].split() if tiny else [])]
        return (*BASE, *SMALL, "strategy=[finetune]", f"stream={name}", *words)
    if group == "learner":
        return (*BASE, f"learner={name}")
    if group == "objective":
        streams = {"bits": "permuted_copy", "tagging": "mqar", "next_token": "markov_text"}
        if name in streams:
            return (*_chosen("stream", streams[name]), f"objective={name}")
    return (*[w for w in BASE if not w.startswith(group)], *SMALL, f"{group}={name}")


def _below(prefix: str, node: DictConfig | ListConfig, chosen: tuple[str, ...]) -> Iterator[Case]:
    """Cases of every key below one."""
    if isinstance(node, ListConfig):
        return  # Hydra sets no items of lists
    if prefix and prefix != "strategy":
        yield _unknown(f"{prefix}.bogus", chosen)
    if prefix and "_target_" in node:
        for text in PARTIALS:
            key = f"{prefix}._partial_"
            yield Case(_with(chosen, key, text), key, text, node.get("_partial_"), "partial")
    for name in map(str, node):
        key = f"{prefix}.{name}" if prefix else name
        shipped = _plain(node._get_node(name))
        if name == "_target_":
            yield from (Case(_with(chosen, key, text), key, text, shipped, "target") for text in TARGETS)
        elif name != "_partial_":
            yield from (Case(_with(chosen, key, text), key, text, shipped, "value") for text in VALUES)
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            yield from _below(key, child, chosen)


def _unknown(key: str, chosen: tuple[str, ...]) -> Case:
    return Case(_with(chosen, key, "1"), key, "1", None, "unknown")


def _with(chosen: tuple[str, ...], key: str, text: str) -> tuple[str, ...]:
    """The words with the override last; one that sets the same key goes."""
    words = [w for w in chosen if w.partition("=")[0] != key and not w.startswith(f"{key}.")]
    return (*words, f"{key}={text}")


def _typed(text: str) -> str:
    return text if text.isascii() else f"'{text}'"


def _plain(node: Any) -> Any:
    if isinstance(node, DictConfig | ListConfig):
        return OmegaConf.to_container(node, resolve=False)
    return node._value() if isinstance(node, Node) else node


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
