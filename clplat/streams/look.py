"""Look at every row of every set, once, before training: faults are refused, and what was seen is noted.

Sets whose tensors say all about them are looked at as a whole, tensors that several sets share only once. All others
are read batch by batch, so that nothing large is loaded whole.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.dtypes import plain_targets, same_values
from clplat.streams.examples import Examples, Stored, draws
from clplat.streams.faults import Place, check_kind, check_rows, extremes, finite, scored_steps
from clplat.streams.padding import looks_padded
from clplat.streams.reading import BadValues, seeded, seeded_each, seeds_of

if TYPE_CHECKING:
    from clplat.streams.experience import Data, Experience, Stream

log = logging.getLogger(__name__)

BYTES = 1 << 21
"""Bytes that are looked at in one go: small enough for the cache."""

FIRST = 32
"""Examples by which shapes and number formats are told."""


@dataclass(frozen=True)
class Seen:
    """What a look found in a set.

    Attributes:
        examples: their number.
        digest: of the contents.
        classes: those that occur; empty where a target is no class.
    """

    examples: int
    digest: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What a tensor holds: its extremes, and a check sum of its bytes, kind and shape."""

    low: float
    high: float
    sum: int


def look(stream: Stream) -> tuple[tuple[str, Seen], ...]:
    """Look at all sets of a stream; returns what each holds, by its name.

    Raises:
        StreamError: a set holds what cannot be learned or scored; the set and the row are named.
    """
    if not stream.experiences:
        raise StreamError(f"Stream {stream.name!r} has no experience: it needs at least one.")
    looking, found = _Looking(stream), []
    for experience in stream.experiences:
        _check_experience(stream, experience)
        for part, data in (("train", experience.train), ("valid", experience.valid), ("test", experience.test)):
            if data is not None:
                found.append((Place(stream, experience, part), data, looking.at(data, Place(stream, experience, part))))
    if stream.target == "class":
        _check_learnable(stream, found)
    return tuple((str(place), seen) for place, _, seen in found)


def _check_experience(stream: Stream, experience: Experience) -> None:
    where = f"experience {experience.index} ({experience.name})"
    wrong = [c for c in experience.classes if not isinstance(c, Integral) or not 0 <= c < stream.outputs]
    if wrong:
        raise StreamError(
            f"{where}: its classes must be whole numbers in 0..{stream.outputs - 1}, got {wrong[0]!r}: number the "
            "classes of the stream from 0."
        )
    label = experience.task_label
    if stream.scenario == "task_incremental" and (not isinstance(label, Integral) or abs(label) >= 2**62):
        raise StreamError(
            f"{where}: a task-incremental stream needs one whole number as task label an experience, got {label!r}."
        )


def _check_learnable(stream: Stream, found: list[tuple[Place, Data, Seen]]) -> None:
    """Refuse a test set with a class that no training set has (of the same task, where the learner is told)."""
    told = stream.scenario == "task_incremental"
    trained: dict[int | None, set[int]] = {}
    for place, _, seen in found:
        if place.part == "train":
            trained.setdefault(place.experience.task_label if told else None, set()).update(seen.classes)
    for place, data, seen in found:
        known = trained[place.experience.task_label if told else None]
        new = sorted(set(seen.classes) - known)
        if new:
            labels = data.targets()
            row = "" if labels is None else f", row {int((labels == new[0]).nonzero()[0])}"
            task = f" of task {place.experience.task_label}" if told else ""
            raise StreamError(
                f"{place}{row}: class {new[0]} occurs in no training set{task}, so it can never be answered: leave its "
                "examples out, or train on some."
            )


class _Looking:
    """One look at a stream, with what was found so far."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.warned = False
        self._facts: dict[int, tuple[Tensor, Facts]] = {}  # the tensors too, so that no other takes their place
        self._seen: dict[tuple[int, object, object], Seen] = {}

    def at(self, data: Data, place: Place) -> Seen:
        """What a set holds; a set that several experiences share is looked at once."""
        key = (id(data), place.experience.task_label, place.experience.classes if place.part == "train" else None)
        if key not in self._seen:
            if len(data) == 0:
                raise StreamError(f"{place}: it is empty, every set needs at least one example.")
            try:
                first = _sample(data, torch.arange(min(len(data), FIRST)))
            except StreamError as error:
                raise StreamError(f"{place}, {error}") from error
            stored = data.stored() if isinstance(data, Examples) else None
            check_kind(first, place, None if stored is None else (stored.x.dtype, stored.y.dtype))
            self._warn_of_padding(data, place)
            seen = None if stored is None else self._stored(stored, data, first, place)
            try:
                self._seen[key] = seen or self._read(data, first, place)
            except BadValues as error:
                raise StreamError(f"{place}, {error}") from error
        return self._seen[key]

    def _stored(self, stored: Stored, data: Data, first: Batch, place: Place) -> Seen | None:
        """What a set holds by its tensors as a whole; None if something in them is wrong."""
        stream = self.stream
        facts = [self._look(t) for t in (stored.x, stored.y, *stored.others)]
        x, y = facts[:2]
        labels = stream.target in ("class", "tag", "token")
        sound = finite(x.low, x.high) if stream.vocabulary is None else x.low >= 0 and x.high < stream.vocabulary
        sound &= y.low >= 0 and y.high < stream.outputs if labels else finite(y.low, y.high)
        sound &= stream.target != "bits" or (y.low >= 0 and y.high <= 1)
        classes = _classes(stored.y) if stream.target == "class" else ()
        if place.part == "train" and place.experience.classes:
            sound &= set(classes) <= set(place.experience.classes)
        if not sound:
            return None
        check_rows(first, place, lambda row: (row, _origin(data, row)))  # what is the same in all rows
        return Seen(len(data), f"{zlib.crc32(repr([f.sum for f in facts]).encode()):08x}", classes)

    def _look(self, t: Tensor) -> Facts:
        if id(t) not in self._facts:
            self._facts[id(t)] = t, _facts(t)
        return self._facts[id(t)][1]

    def _read(self, data: Data, first: Batch, place: Place) -> Seen:
        """What a set holds by all its batches, as they are read in training."""
        repeats = not draws(data) or _same(first, _sample(data, torch.arange(len(first))))
        if not repeats:
            log.warning(
                "%s: an example that is read twice under the same seeds differs, so something random in it follows "
                "neither torch's, NumPy's nor Python's global generator. Draw from one of these: else no run can be "
                "repeated, or resumed exactly.",
                place,
            )
        total, classes, any_scored, at = 0, torch.zeros(self.stream.outputs, dtype=torch.bool), False, 0
        for batch in _batches(data, len(data), max(1, min(4096, BYTES * len(first) // max(first.x.nbytes, 1)))):
            check_kind(batch, place)
            check_rows(batch, place, lambda row, at=at: (at + row, _origin(data, at + row)))
            scored = scored_steps(batch)
            any_scored = any_scored or scored is None or bool(scored.any())
            if self.stream.target == "class":
                classes[batch.y] = True
            for t in (batch.x if repeats else None, batch.y, batch.lengths, batch.mask, batch.reset):
                total = total if t is None else _sum(t, total)
            at += len(batch)
        if not any_scored:
            raise StreamError(
                f"{place}: no step of it is scored: give targets that are not {UNSCORED}, or a mask with True."
            )
        return Seen(len(data), f"{total:08x}", tuple(classes.nonzero().squeeze(1).tolist()))

    def _warn_of_padding(self, data: Data, place: Place) -> None:
        if self.warned:
            return
        found = looks_padded(_sample(data, torch.linspace(0, len(data) - 1, min(len(data), 256)).long()))
        if found is not None:
            self.warned = True
            log.warning(
                "%s: %.0f %% of its rows end in several steps of nothing but %g, as padding does, and no lengths are "
                "given, so that nets read them as data. Give train_lengths and test_lengths to Labelled, or lengths to "
                "TensorData, or use RaggedData.",
                place,
                100 * found[0],
                found[1],
            )


def _sample(data: Data, index: Tensor) -> Batch:
    """Some examples, drawn under one seed."""
    with seeded(0) if draws(data) else nullcontext():
        return data.batch(index)


def _same(a: Batch, b: Batch) -> bool:
    return same_values(a.x, b.x) and same_values(a.y, b.y)


def _batches(data: Data, examples: int, size: int) -> Iterator[Batch]:
    indices, seeds = torch.arange(examples).split(size), seeds_of("look")
    return data.read(indices, seeds) if isinstance(data, Examples) else seeded_each(data.batches(indices), seeds)


def _origin(data: Data, row: int) -> int:
    return data.origin(row) if isinstance(data, Examples) else row


def _classes(y: Tensor) -> tuple[int, ...]:
    return tuple(plain_targets(y).unique().tolist())


def _facts(t: Tensor) -> Facts:
    """Extremes and check sum of a tensor, piece by piece: one pass through memory."""
    lows, highs, total = [], [], zlib.crc32(f"{t.dtype} {list(t.shape)}".encode())
    rows = max(1, BYTES * len(t) // max(t.nbytes, 1)) if t.ndim else 1
    for piece in t.split(rows) if t.ndim else [t[None]]:
        low, high = extremes(piece)
        lows.append(low)
        highs.append(high)
        total = _sum(piece, total)
    bad = [v for v in lows + highs if v != v]
    return Facts(*((bad[0], bad[0]) if bad else (min(lows, default=0), max(highs, default=0))), total)


def _sum(t: Tensor, start: int) -> int:
    return zlib.crc32(t.contiguous().view(-1).view(torch.uint8).numpy(force=True).data, start)
