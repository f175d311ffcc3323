"""Any torch data set, read ahead by worker processes.

Letters: N examples, B batch, T time steps, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clplat.streams.data import Examples
from clplat.streams.experience import Batch


class WorkerData(Examples):
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

    def _collate(self, rows: list[tuple[int, Tensor, int]]) -> Batch:
        index, x, y = zip(*rows, strict=True)
        task = None if self.task is None else torch.full((len(rows),), self.task)
        return Batch(x=torch.stack(x), y=torch.as_tensor(y), task=task, index=torch.tensor(index))


class _Numbered(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple:
        return (index, *self.dataset[index])
