"""Data in memory: sequences of equal or of different lengths, and the rows of a batch.

Letters: N examples, B batch, T time steps, D features, C classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.dtypes import computable, plain_inputs, plain_targets
from clplat.streams.examples import Examples as Examples
from clplat.streams.examples import FixedTransform, Stored
from clplat.streams.examples import Transform as Transform
from clplat.streams.padding import checked_lengths, need_tensors, unpadded


class TensorData(Examples):
    """Examples held as two tensors, padded to one length or without a time axis, and read by one gather a batch.

    Several experiences share the same tensors: each keeps its own `rows` only. Floats below 32 bits are read as
    float32, integer targets as int64.

    Args:
        x: [N, T, D] or [N, D] floats, or [N, T] token ids.
        y: targets, first dimension N.
        rows: [M] the examples that belong to this set; None for all N.
        transform: applied to the inputs of each batch (a permutation of pixels, say). What it draws at random from the
            generators of torch, NumPy and Python follows from the run's seed.
        task: the task label of every example, None where the learner is not told.
        mask: [N, T] bool, True where the target is scored; None: everywhere.
        lengths: [N] time steps of each example that are real, the rest of T is padding and is never looked at; None:
            all are.

    Raises:
        StreamError: x, y, mask and lengths differ in their number of examples, or lengths are no integers in 1..T.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        rows: Tensor | None = None,
        transform: Transform | None = None,
        task: int | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        need_tensors(inputs=x, targets=y)
        if len(x) != len(y):
            raise StreamError(f"Inputs and targets must have the same number of examples, got {len(x)} and {len(y)}.")
        if mask is not None and mask.shape != x.shape[:2]:
            raise StreamError(f"A mask must be {list(x.shape[:2])} as the inputs' steps, got {list(mask.shape)}.")
        self.x, self.y, self.mask = x, computable(y), mask
        self.lengths = None if lengths is None else checked_lengths(lengths, x)
        self.rows = torch.arange(len(x)) if rows is None else rows
        self.transform, self.task = transform, task
        self.draws = not (transform is None or isinstance(transform, FixedTransform))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B] as one batch."""
        rows = self.rows.index_select(0, index)
        x = plain_inputs(self.x.index_select(0, rows))
        batch = Batch(
            x=x if self.transform is None else plain_inputs(self.transform(x)),
            y=plain_targets(self.y.index_select(0, rows)),
            mask=None if self.mask is None else self.mask.index_select(0, rows),
            lengths=None if self.lengths is None else self.lengths.index_select(0, rows),
            task=None if self.task is None else torch.full((len(index),), self.task),
            index=index,
        )
        return batch if batch.lengths is None else unpadded(batch, batch.lengths)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class an example."""
        one_class = self.y.ndim == 1 and not self.y.is_floating_point()
        return plain_targets(self.y.index_select(0, self.rows)) if one_class else None

    def stored(self) -> Stored | None:
        """Inputs, targets, rows, lengths, and what the transform is made of."""
        if self.draws or self.mask is not None:
            return None
        fixed = self.transform.tensors() if isinstance(self.transform, FixedTransform) else ()
        others = (self.rows, *([] if self.lengths is None else [self.lengths]), *fixed)
        return Stored(self.x, self.y.index_select(0, self.rows), others)

    def origin(self, row: int) -> int:
        return int(self.rows[row])


class RaggedData(Examples):
    """Sequences of different lengths: one flat tensor of all time steps, cut by offsets, padded batch by batch.

    Floats below 32 bits are read as float32, integer targets as int64.

    Args:
        x: [sum of T, D] floats or [sum of T] token ids of all sequences, one after the other.
        offsets: [N + 1] int64, sequence n is `x[offsets[n]:offsets[n + 1]]`.
        y: [N] or [N, ...] targets a sequence, or [sum of T, ...] targets a step (`per_step=True`).
        rows: [M] the sequences that belong to this set; None for all N.
        per_step: True when y holds a target for every step.
        task: the task label of every sequence, None where the learner is not told.

    Raises:
        StreamError: the sizes do not fit each other, or a sequence is empty.
    """

    draws = False

    def __init__(
        self,
        x: Tensor,
        offsets: Tensor,
        y: Tensor,
        rows: Tensor | None = None,
        per_step: bool = False,
        task: int | None = None,
    ) -> None:
        need_tensors(inputs=x, targets=y, offsets=offsets)
        if int(offsets[-1]) != len(x):
            raise StreamError(f"The last offset must be the number of time steps {len(x)}, got {int(offsets[-1])}.")
        if len(y) != (len(x) if per_step else len(offsets) - 1):
            expected = len(x) if per_step else len(offsets) - 1
            raise StreamError(f"Expected {expected} targets, got {len(y)}.")
        if int(offsets.diff().min()) < 1:
            raise StreamError("Every sequence needs at least one time step, got an empty one.")
        self.x, self.y, self.offsets, self.per_step, self.task = x, y, offsets.long(), per_step, task
        self.rows = torch.arange(len(offsets) - 1) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """The sequences `index` [B], padded with zeros (targets with `UNSCORED`) to the longest of them."""
        rows = self.rows.index_select(0, index)
        start = self.offsets[rows]
        lengths = self.offsets[rows + 1] - start
        time = torch.arange(int(lengths.max()) if len(lengths) else 1)
        valid = time < lengths[:, None]  # [B, T]
        source = (start[:, None] + time).clamp(max=len(self.x) - 1)
        x = plain_inputs(self.x[source])
        x = x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0)
        if self.per_step:
            y = plain_targets(self.y[source])
            fill = 0 if y.is_floating_point() else UNSCORED
            y = y.masked_fill(~valid.view(*valid.shape, *[1] * (y.ndim - 2)), fill)
        else:
            y = plain_targets(self.y[rows])
        task = None if self.task is None else torch.full((len(index),), self.task)
        return Batch(x=x, y=y, lengths=lengths, task=task, index=index)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class a sequence."""
        one_class = self.y.ndim == 1 and not self.per_step and not self.y.is_floating_point()
        return plain_targets(self.y[self.rows]) if one_class else None

    def stored(self) -> Stored:
        """All steps, targets, offsets and rows."""
        return Stored(self.x, self.y if self.per_step else self.y[self.rows], (self.offsets, self.rows))

    def origin(self, row: int) -> int:
        return int(self.rows[row])


class BatchData(Examples):
    """The rows of one batch as a set: what a buffer holds, to be trained on like any other data.

    Args:
        rows: at least one row; `source` and `weight` are not kept.
    """

    draws = False

    def __init__(self, rows: Batch) -> None:
        self.rows = replace(rows, source=None, weight=None)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B]."""
        return replace(self.rows.rows(index.to(self.rows.x.device)), index=index)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where an example has no single class."""
        y = self.rows.y
        return y.cpu() if y.ndim == 1 and not y.is_floating_point() else None
