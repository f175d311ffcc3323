"""Data in memory: sequences of equal or of different lengths, and the rows of a batch.

Letters: N examples, B batch, T time steps, D features, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from clplat.streams.experience import UNSCORED, Batch, Chunks, StreamError
from clplat.streams.loader import ChunkLoader
from clplat.streams.order import Order

Transform = Callable[[Tensor], Tensor]
"""Changes the inputs of a whole batch, [B, ...] -> [B, ...], without randomness."""


class Examples(ABC):
    """Examples that are independent of one another: `__len__` and `batch` say which, all else of `Data` follows."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples N."""

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B] as one batch."""

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return map(self.batch, indices)

    def targets(self) -> Tensor | None:
        return None

    def training(self, order: Order) -> Chunks:
        if order.carries:
            raise StreamError(
                f"The state is carried from segment to segment, and the training set is {type(self).__name__}, whose "
                "examples do not follow one another: use a strategy that leaves the training set as it is, or set "
                "training.carry_state=false."
            )
        return ChunkLoader(self, order)

    def test_batches(
        self, batch_size: int, examples: int | None = None, carries: bool = False
    ) -> Iterator[tuple[Batch, bool]]:
        index = torch.arange(len(self))
        if examples is not None and examples < len(self):
            index = torch.linspace(0, len(self) - 1, examples, dtype=torch.float64).round().long()
        return ((batch, False) for batch in self.batches(index.split(batch_size)))


class TensorData(Examples):
    """Examples of equal length, or without a time axis, held as two tensors and read by one gather a batch.

    Several experiences share the same tensors: each keeps its own `rows` only.

    Args:
        x: [N, T, D] or [N, D] floats, or [N, T] token ids.
        y: targets, first dimension N.
        rows: [M] the examples that belong to this set; None for all N.
        transform: applied to the inputs of each batch (a permutation of pixels, say).
        task: the task label of every example, None where the learner is not told.
        mask: [N, T] bool, True where the target is scored; None: everywhere.

    Raises:
        StreamError: x and y differ in their number of examples.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        rows: Tensor | None = None,
        transform: Transform | None = None,
        task: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if len(x) != len(y):
            raise StreamError(f"Inputs and targets must have the same number of examples, got {len(x)} and {len(y)}.")
        self.x, self.y, self.mask = x, y, mask
        self.rows = torch.arange(len(x)) if rows is None else rows
        self.transform, self.task = transform, task

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B] as one batch."""
        rows = self.rows.index_select(0, index)
        x = self.x.index_select(0, rows)
        return Batch(
            x=x if self.transform is None else self.transform(x),
            y=self.y.index_select(0, rows),
            mask=None if self.mask is None else self.mask.index_select(0, rows),
            task=None if self.task is None else torch.full((len(index),), self.task),
            index=index,
        )

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class an example."""
        return self.y.index_select(0, self.rows) if self.y.ndim == 1 and not self.y.is_floating_point() else None


class RaggedData(Examples):
    """Sequences of different lengths: one flat tensor of all time steps, cut by offsets, padded batch by batch.

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

    def __init__(
        self,
        x: Tensor,
        offsets: Tensor,
        y: Tensor,
        rows: Tensor | None = None,
        per_step: bool = False,
        task: int | None = None,
    ) -> None:
        if int(offsets[-1]) != len(x):
            raise StreamError(f"The last offset must be the number of time steps {len(x)}, got {int(offsets[-1])}.")
        if len(y) != (len(x) if per_step else len(offsets) - 1):
            expected = len(x) if per_step else len(offsets) - 1
            raise StreamError(f"Expected {expected} targets, got {len(y)}.")
        if int(offsets.diff().min()) < 1:
            raise StreamError("Every sequence needs at least one time step, got an empty one.")
        self.x, self.y, self.offsets, self.per_step, self.task = x, y, offsets, per_step, task
        self.rows = torch.arange(len(offsets) - 1) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """The sequences `index` [B], padded with zeros (targets with `UNSCORED`) to the longest of them."""
        rows = self.rows.index_select(0, index)
        start = self.offsets[rows]
        lengths = self.offsets[rows + 1] - start
        time = torch.arange(int(lengths.max()))
        valid = time < lengths[:, None]  # [B, T]
        source = (start[:, None] + time).clamp(max=len(self.x) - 1)
        x = self.x[source]
        x = x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0)
        if self.per_step:
            y = self.y[source]
            fill = 0 if y.is_floating_point() else UNSCORED
            y = y.masked_fill(~valid.view(*valid.shape, *[1] * (y.ndim - 2)), fill)
        else:
            y = self.y[rows]
        task = None if self.task is None else torch.full((len(index),), self.task)
        return Batch(x=x, y=y, lengths=lengths, task=task, index=index)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class a sequence."""
        return self.y[self.rows] if self.y.ndim == 1 and not self.per_step and not self.y.is_floating_point() else None


class BatchData(Examples):
    """The rows of one batch as a set: what a buffer holds, to be trained on like any other data.

    Args:
        rows: at least one row; `source` and `weight` are not kept.
    """

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
