"""Kinds of data: tensors in memory (of equal or of variable length), unions, and any torch data set read by workers.

Letters: N examples, B batch, T time steps, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clplat.streams.batch import concatenate
from clplat.streams.experience import UNSCORED, Batch, Data, StreamError

Transform = Callable[[Tensor], Tensor]
"""Changes the inputs of a whole batch, [B, ...] -> [B, ...], without randomness."""


class TensorData:
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

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each entry of `indices`."""
        return map(self.batch, indices)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class an example."""
        return self.y.index_select(0, self.rows) if self.y.ndim == 1 and not self.y.is_floating_point() else None


class RaggedData:
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

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each entry of `indices`."""
        return map(self.batch, indices)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class a sequence."""
        return self.y[self.rows] if self.y.ndim == 1 and not self.per_step and not self.y.is_floating_point() else None


class UnionData:
    """The examples of several sets, in order, as one set.

    Args:
        parts: the sets; at least one.
    """

    def __init__(self, parts: Sequence[Data]) -> None:
        self.parts = list(parts)
        self.ends = torch.tensor([len(p) for p in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B]: one gather a part that occurs among them."""
        return replace(gather(index, self.ends, lambda p, own: self.parts[p].batch(own)), index=index)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each entry of `indices`."""
        return map(self.batch, indices)

    def targets(self) -> Tensor | None:
        """[N] classes of all parts, or None if one part has none."""
        parts = [p.targets() for p in self.parts]
        return None if any(t is None for t in parts) else torch.cat([t for t in parts if t is not None])


def gather(index: Tensor, ends: Tensor, read: Callable[[int, Tensor], Batch]) -> Batch:
    """The examples `index` [B] of several sets that stand one behind the other, by one read a set that occurs.

    Args:
        index: [B] int64.
        ends: [parts] the number of examples up to the end of each set.
        read: gives the rows of a set by their numbers in it.
    """
    part = torch.bucketize(index, ends, right=True)
    order, pieces = [], []
    for p in part.unique().tolist():
        here = (part == p).nonzero().squeeze(1)
        order.append(here)
        pieces.append(read(p, index[here] - (int(ends[p - 1]) if p else 0)))
    return concatenate(pieces).rows(torch.cat(order).argsort())


class BatchData:
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

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each entry of `indices`."""
        return map(self.batch, indices)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where an example has no single class."""
        y = self.rows.y
        return y.cpu() if y.ndim == 1 and not y.is_floating_point() else None


class WorkerData:
    """Any map-style torch data set of (input, class) pairs, for data that do not fit in memory.

    Args:
        dataset: yields (x [T, D] or [D], y) for an index.
        workers: processes that read ahead while training; 0 reads in the training process.
        task: the task label of every example, None where the learner is not told.
    """

    def __init__(self, dataset: Dataset, workers: int = 0, task: int | None = None) -> None:
        self.dataset, self.workers, self.task = dataset, workers, task

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B], read one by one."""
        return self._collate([(i, *self.dataset[i]) for i in index.tolist()])

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each entry of `indices`, read ahead by `workers` processes."""
        if self.workers == 0:
            return map(self.batch, indices)
        return iter(
            DataLoader(
                _Numbered(self.dataset),
                batch_sampler=(index.tolist() for index in indices),
                num_workers=self.workers,
                collate_fn=self._collate,
                generator=torch.Generator(),  # else the workers' seed is drawn from the global generator
            )
        )

    def targets(self) -> Tensor | None:
        """None: reading every example to find its class would defeat the purpose."""
        return None

    def _collate(self, rows: list[tuple[int, Tensor, int]]) -> Batch:
        index, x, y = zip(*rows, strict=True)
        task = None if self.task is None else torch.full((len(rows),), self.task)
        return Batch(x=torch.stack(x), y=torch.as_tensor(y), task=task, index=torch.tensor(index))


class _Numbered(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple:
        return (index, *self.dataset[index])
