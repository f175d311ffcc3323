"""The contracts of a stream: Batch, Data, Experience and Stream.

Letters: N examples, B batch, T time steps, D input features, O outputs per step, C classes, K experiences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.errors import UserError
from clplat.streams.inputs import Inputs

UNSCORED = -100
"""The target of a step that is neither trained on nor scored (PyTorch's `ignore_index`)."""

Scenario = Literal["task_incremental", "domain_incremental", "class_incremental", "boundary_free"]
Target = Literal["class", "tag", "token", "bits", "value"]


class StreamError(UserError, ValueError):
    """A stream, or what is asked of it, that cannot be learned; the message says what was given and what is allowed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples, tensors only. Absent fields mean the plain case, so that plain batches cost nothing.

    Attributes:
        x: inputs, [B, T, D] or [B, D] floats, or [B, T] token ids.
        y: targets, by the stream's target kind: class [B]; tag and token [B, T] (`UNSCORED` where nothing is scored);
            bits [B, T, O] of 0 and 1; value [B, O] or [B, T, O].
        lengths: [B] valid time steps of each row, the rest of T is padding. None: all T are valid.
        mask: [B, T] bool, True where the target is scored. None: everywhere within `lengths`.
        task: [B] the task label of each row. None: the learner is not told (any stream but task-incremental).
        index: [B] the example's number in its data set.
        source: [B] uint8, 0 for the current experience, 1 for replay. None: all current.
        weight: [B] weight of each row in the objective. None: all 1.
        extra: further [B, ...] fields that a strategy stored (logits, features, codes).
        reset: [B, T] bool, True where a document starts: nothing before that step may be seen from it. None: nowhere
            but at the first step.
    """

    x: Tensor
    y: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    task: Tensor | None = None
    index: Tensor | None = None
    source: Tensor | None = None
    weight: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    reset: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows B."""
        return self.x.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; itself if it is there already."""
        if self.x.device == torch.device(device):
            return self
        return self._map(lambda t: t.to(device, non_blocking=True))

    def rows(self, index: Tensor) -> Batch:
        """The rows `index` ([M] integers, or [B] bool) of every field."""
        return self._map(lambda t: t[index])

    def valid(self) -> Tensor | None:
        """[B, T] bool, False on padding; None when there is no padding."""
        if self.lengths is None:
            return None
        return torch.arange(self.x.shape[1], device=self.x.device) < self.lengths[:, None]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        extra = {name: change(t) for name, t in present.pop("extra").items()}
        return Batch(**{name: change(t) for name, t in present.items()}, extra=extra)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of all rows in order. Rows of different T are padded on the right and get lengths.

    A field that only some have is filled with what its absence means: full lengths, scored everywhere, source 0,
    weight 1, no reset. `extra` fields must be in all batches or are dropped.

    Raises:
        StreamError: some batches carry task labels and some do not.
    """
    if len(batches) == 1:
        return batches[0]
    if len({b.task is None for b in batches}) == 2:
        raise StreamError("Cannot join a batch with task labels and one without: give all rows a task label, or none.")
    sequences = batches[0].x.ndim >= 2 and any(b.lengths is not None for b in batches)
    ragged = batches[0].x.ndim >= 2 and len({b.x.shape[1] for b in batches}) > 1
    if ragged or sequences:
        batches = [_pad(b, max(b.x.shape[1] for b in batches)) for b in batches]
    if any(b.mask is not None for b in batches):
        batches = [replace(b, mask=_scored(b)) if b.mask is None else b for b in batches]
    if any(b.reset is not None for b in batches):
        batches = [replace(b, reset=_nowhere(b)) if b.reset is None else b for b in batches]

    def joined(name: str, absent: int) -> Tensor | None:
        parts = [getattr(b, name) for b in batches]
        if all(p is None for p in parts):
            return None
        like = next(p for p in parts if p is not None)
        return torch.cat(
            [like.new_full((len(b),), absent) if p is None else p for b, p in zip(batches, parts, strict=True)]
        )

    common = set.intersection(*(set(b.extra) for b in batches))
    return Batch(
        x=torch.cat([b.x for b in batches]),
        y=torch.cat([b.y for b in batches]),
        lengths=joined("lengths", -1),
        mask=torch.cat([b.mask for b in batches if b.mask is not None]) if batches[0].mask is not None else None,
        task=joined("task", -1),
        index=joined("index", -1),
        source=joined("source", 0),
        weight=joined("weight", 1),
        extra={name: torch.cat([b.extra[name] for b in batches]) for name in sorted(common)},
        reset=torch.cat([b.reset for b in batches if b.reset is not None]) if batches[0].reset is not None else None,
    )


def _nowhere(batch: Batch) -> Tensor:
    return batch.x.new_zeros(batch.x.shape[:2], dtype=torch.bool)


def _scored(batch: Batch) -> Tensor:
    valid = batch.valid()
    return batch.x.new_ones(batch.x.shape[:2], dtype=torch.bool) if valid is None else valid


def _pad(batch: Batch, length: int) -> Batch:
    more, rows = length - batch.x.shape[1], len(batch)
    lengths = (
        batch.lengths if batch.lengths is not None else torch.full((rows,), batch.x.shape[1], device=batch.x.device)
    )
    if more == 0:
        return replace(batch, lengths=lengths)
    # Targets a step are [B, T] integers or [B, T, O]; float [B, O] is one vector a sequence, also where O equals T.
    per_step = batch.y.ndim == 3 or (batch.y.ndim == 2 and not batch.y.is_floating_point())
    fill = 0 if batch.y.is_floating_point() else UNSCORED
    after = [0] * (2 * (batch.x.ndim - 2)) + [0, more]
    return replace(
        batch,
        x=F.pad(batch.x, after),
        y=F.pad(batch.y, [0] * (2 * (batch.y.ndim - 2)) + [0, more], value=fill) if per_step else batch.y,
        lengths=lengths,
        mask=None if batch.mask is None else F.pad(batch.mask, [0, more]),
        reset=None if batch.reset is None else F.pad(batch.reset, [0, more]),
    )


@runtime_checkable
class Data(Protocol):
    """Examples that can be asked for by whole batches."""

    def __len__(self) -> int:
        """The number of examples N."""
        ...

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` ([B] int64, each in 0..N-1) as one batch."""
        ...

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each entry of `indices`, in order; where reading is slow, read ahead here."""
        ...

    def targets(self) -> Tensor | None:
        """[N] class of every example, or None where an example has no single class."""
        ...


@dataclass(frozen=True)
class Experience:
    """One step of a stream: what is learned then, and what it is tested on.

    Attributes:
        index: place in the stream, from 0.
        name: what a person calls it ("digits 0 1").
        classes: the classes that occur in it, in ascending order; empty where targets are not classes.
        train: training data.
        test: test data; never trained on.
        valid: data to choose hyperparameters on; None if the stream holds none out.
        task_label: the label the learner is given in a task-incremental stream, else None.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    train: Data
    test: Data
    valid: Data | None = None
    task_label: int | None = None


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of experiences.

    Attributes:
        name: of the stream, for tables and MLflow.
        experiences: in the order of training.
        scenario: what changes between experiences, and whether the learner is told which one it sees.
        target: kind of the targets (see `Batch.y`).
        outputs: number of classes, tags or tokens C, of bits, or of regression values O.
        features: D, the width of float inputs; None for token inputs.
        vocabulary: the number of token ids; None for float inputs.
        length: T where every sequence has the same number of time steps. None: lengths differ. 0: no time axis.
        per_step: True when there is a target at every time step.
    """

    name: str
    experiences: tuple[Experience, ...]
    scenario: Scenario
    target: Target
    outputs: int
    features: int | None = None
    vocabulary: int | None = None
    length: int | None = None
    per_step: bool = False

    @property
    def inputs(self) -> Inputs:
        """What a net is built for."""
        return self.inputs

    def __len__(self) -> int:
        """The number of experiences K."""
        return len(self.experiences)

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    def seen_classes(self, index: int) -> tuple[int, ...]:
        """The classes of experiences 0..index, ascending."""
        return tuple(sorted({c for e in self.experiences[: index + 1] for c in e.classes}))

    def check(self) -> None:
        """Refuse what could not be learned, before any training.

        Raises:
            StreamError: no experience; an empty train or test set; inputs of the wrong shape or type; labels out of
                range; lengths outside 1..T.
        """
        if not self.experiences:
            raise StreamError(f"Stream {self.name!r} has no experience: it needs at least one.")
        for experience in self.experiences:
            for part, data in (("train", experience.train), ("valid", experience.valid), ("test", experience.test)):
                if data is None:
                    continue
                where = f"experience {experience.index} ({experience.name}), {part} set"
                if len(data) == 0:
                    raise StreamError(f"{where}: it is empty, every set needs at least one example.")
                self._check_batch(data.batch(torch.arange(min(len(data), 32))), where)
                labels = data.targets()
                if labels is not None and self.target == "class":
                    self._check_range(labels, where)

    def _check_batch(self, batch: Batch, where: str) -> None:
        shape = tuple(batch.x.shape)
        if self.vocabulary is not None:
            if batch.x.ndim != 2 or batch.x.is_floating_point():
                raise StreamError(f"{where}: token inputs must be integers [B, T], got {batch.x.dtype} {list(shape)}.")
            low, high = int(batch.x.min()), int(batch.x.max())
            if low < 0 or high >= self.vocabulary:
                raise StreamError(f"{where}: token ids must lie in 0..{self.vocabulary - 1}, got {low}..{high}.")
        elif batch.x.ndim not in (2, 3) or not batch.x.is_floating_point() or shape[-1] != self.features:
            raise StreamError(
                f"{where}: inputs must be floats [B, D] or [B, T, D] with D = {self.features}, "
                f"got {batch.x.dtype} {list(shape)}."
            )
        if self.target in ("tag", "token"):
            if batch.y.shape != batch.x.shape[:2]:
                raise StreamError(f"{where}: targets must be [B, T] = {list(shape[:2])}, got {list(batch.y.shape)}.")
            self._check_range(batch.y[batch.y != UNSCORED], where)
        elif self.target == "class":
            if batch.y.shape != batch.x.shape[:1]:
                raise StreamError(f"{where}: targets must be [B] = [{shape[0]}], got {list(batch.y.shape)}.")
            self._check_range(batch.y, where)
        elif batch.y.shape[-1] != self.outputs:
            raise StreamError(f"{where}: targets must end in O = {self.outputs}, got {list(batch.y.shape)}.")
        if batch.lengths is not None and not bool(((batch.lengths >= 1) & (batch.lengths <= shape[1])).all()):
            raise StreamError(f"{where}: lengths must lie in 1..{shape[1]}, got {batch.lengths.tolist()}.")

    def _check_range(self, labels: Tensor, where: str) -> None:
        if labels.numel() == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.outputs:
            raise StreamError(f"{where}: labels must lie in 0..{self.outputs - 1}, got {low}..{high}.")
