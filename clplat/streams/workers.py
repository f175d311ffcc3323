"""Any torch data set, read ahead by worker processes.

Letters: N examples, B batch, T time steps, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from clplat.streams.batch import Batch, StreamError
from clplat.streams.dtypes import plain_inputs, plain_targets
from clplat.streams.examples import Examples
from clplat.streams.reading import finite_only, seed_all, seeded_each, seeds_of


class WorkerData(Examples):
    """Any map-style torch data set of (input, class) pairs, for data that do not fit in memory.

    What its transforms draw from the generators of torch, NumPy and Python follows from the run's seed, and is the
    same with any number of workers. Inputs of different lengths are padded with zeros and get lengths.

    Args:
        dataset: yields (x [T, D] or [D] floats, or [T] token ids, y) for an index.
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
        """One batch for each entry of `indices`, read ahead by `workers` processes; draws are the same in each pass."""
        return self.read(indices, seeds_of("batches"))

    def read(self, indices: Iterable[Tensor], seeds: Iterable[int]) -> Iterator[Batch]:
        """One batch for each entry of `indices`, each under its seed, read ahead by `workers` processes."""
        if self.workers == 0:
            return map(finite_only, seeded_each(map(self.batch, indices), seeds))
        places = ((seed, index.tolist()) for index, seed in zip(indices, seeds, strict=False))
        return map(
            finite_only,
            DataLoader(
                _Numbered(self.dataset),
                batch_sampler=places,  # type: ignore[arg-type]  # typed for lists of numbers; it hands on what it gets
                num_workers=self.workers,
                collate_fn=self._collate,
                generator=torch.Generator(),  # else the workers' seed is drawn from the global generator
            ),
        )

    def _collate(self, rows: list[tuple[int, Tensor, int]]) -> Batch:
        index, x, y = zip(*rows, strict=True)
        task = None if self.task is None else torch.full((len(rows),), self.task)
        number = torch.tensor(index)
        if not all(isinstance(one, Tensor) for one in x):
            raise StreamError(
                f"example {index[0]}: inputs must be tensors, got {type(x[0]).__name__}: let the data set give "
                "(tensor, class), by torchvision.transforms.ToTensor where it gives pictures."
            )
        if len({one.shape[1:] for one in x}) > 1:
            raise StreamError(
                f"example {index[0]}: inputs must have one width, got {sorted({tuple(o.shape) for o in x})}."
            )
        lengths = torch.tensor([len(one) for one in x])
        inputs = plain_inputs(pad_sequence(list(x), batch_first=True))
        targets = plain_targets(torch.stack([torch.as_tensor(one) for one in y]))
        ragged = None if bool((lengths == lengths[0]).all()) else lengths
        return Batch(x=inputs, y=targets, lengths=ragged, task=task, index=number)


class _Numbered(Dataset):
    """The examples of a data set with their numbers, a whole batch at a time and under its seed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, place: tuple[int, list[int]]) -> list[tuple]:
        seed, index = place
        seed_all(seed)
        return [(i, *self.dataset[i]) for i in index]
