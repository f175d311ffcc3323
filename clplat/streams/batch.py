"""A batch of examples, and batches joined into one.

A step counts, is trained on and scored, if all of these hold:

- it is no padding: `lengths` says how many steps of a row are real;
- `mask` is True there: a task may ask for answers at some steps only;
- its target is not `UNSCORED`, where targets are integers.

Each may be left out, and then excludes nothing. `Objective.scored` puts them together.

Letters: N examples, B batch, T time steps, D input features, O outputs per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.errors import UserError

UNSCORED = -100
"""The target of a step that is neither trained on nor scored (PyTorch's `ignore_index`)."""


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
        """The same batch on another device, its floats in the precision of the run at least; itself if all is so already.

        The precision of the run (`trainer.precision`) is torch's default. Wider floats stay, for nets that are wider.
        """
        floats = torch.get_default_dtype()
        if self.x.device == torch.device(device) and all(
            t.dtype == _wider(t, floats) for t in (self.x, self.y, *self.extra.values())
        ):
            return self
        return self._map(lambda t: t.to(device, _wider(t, floats), non_blocking=True))

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


def _wider(t: Tensor, floats: torch.dtype) -> torch.dtype:
    return torch.promote_types(t.dtype, floats) if t.is_floating_point() else t.dtype


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
