"""Avalanche's data sets as `Data`: in memory where that gives the same, else read batch by batch.

Avalanche reads example by example through several layers of Python (some 50 microseconds each). Here every experience
is read once, and at once where the data set lies in memory and its transforms are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clplat.streams.avalanche_reader import Reader, checked_reader
from clplat.streams.batch import Batch, StreamError
from clplat.streams.data import Examples, RaggedData, TensorData
from clplat.streams.dtypes import plain_inputs, same_values
from clplat.streams.experience import Data
from clplat.streams.labelled import Layout, lay_out
from clplat.streams.workers import WorkerData


@dataclass(frozen=True)
class Options:
    """How the inputs are given, see `from_avalanche`."""

    layout: Layout
    vocabulary: int | None
    cache: bool
    workers: int

    def lay_out(self, x: Tensor) -> Tensor:
        return (x if self.vocabulary is not None else lay_out(x, self.layout)).contiguous()


def data_of(dataset: Any, y: Tensor | None, options: Options, task: int | None, name: str) -> Data:
    """An Avalanche data set, its transform group chosen already, as the fastest kind of data that gives the same."""
    if len(dataset) == 0:
        raise StreamError(f"{name}: an experience is empty, every set needs at least one example.")
    y = targets_of(dataset) if y is None else y
    sample = torch.linspace(0, len(dataset) - 1, min(len(dataset), 16)).long()
    expected = _inputs([dataset[i] for i in sample.tolist()])
    one_shape = len({x.shape for x in expected}) == 1
    reader = checked_reader(dataset, sample, torch.stack(expected)) if one_shape else None
    if not options.cache:
        if reader is None:
            return _ItemData(_Items(dataset, options), y, options.workers, task)
        return _LazyData(reader, y, options, task)
    if reader is not None:
        parts = torch.arange(len(dataset)).split(4096)  # what a transform makes in between stays in the cache
        return TensorData(torch.cat([options.lay_out(reader(rows)) for rows in parts]), y, task=task)
    again = _inputs([dataset[i] for i in sample.tolist()])
    if not all(map(same_values, expected, again)):
        raise StreamError(
            f"{name}: reading an example twice gives two different inputs, so a transform is random. Reading once "
            "would freeze it: set stream.cache=false, or take the transform out of the benchmark."
        )
    loader = DataLoader(dataset, batch_size=512, num_workers=options.workers, collate_fn=_inputs)
    return _cached([x for batch in loader for x in batch], y, options, task)


def _cached(inputs: Sequence[Tensor], y: Tensor, options: Options, task: int | None) -> Data:
    """All examples in memory: as one tensor where they have one shape, else as sequences [T, D] or [T] of their own."""
    shapes = sorted({tuple(x.shape) for x in inputs})
    if len(shapes) == 1:
        return TensorData(options.lay_out(torch.stack(list(inputs))), y, task=task)
    sequences = 1 if options.vocabulary is not None else 2
    if options.layout != "rows" or any(len(s) != sequences for s in shapes) or len({s[1:] for s in shapes}) > 1:
        raise StreamError(
            f"Avalanche examples must have one shape, or differ in their number of steps T alone ([T, D], or [T] token "
            f"ids, with stream.layout=rows), got {shapes[:4]}."
        )
    ends = torch.tensor([0, *map(len, inputs)]).cumsum(0)
    return RaggedData(torch.cat(list(inputs)), ends, y, task=task)


def targets_of(dataset: Any) -> Tensor:
    """[N] the classes of an Avalanche data set, which it keeps apart from the examples."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise StreamError(
            "An Avalanche data set has no targets: make it with avalanche.benchmarks.utils.as_classification_dataset."
        )
    values = [t.item() if isinstance(t, (Tensor, np.generic)) else t for t in targets]
    wrong = next((row for row, value in enumerate(values) if not isinstance(value, int)), None)
    if wrong is not None:
        raise StreamError(
            f"An Avalanche data set, row {wrong}: targets must be whole numbers, got {values[wrong]!r} "
            f"({type(values[wrong]).__name__}): number the classes from 0."
        )
    return torch.tensor(values, dtype=torch.int64)


def _inputs(items: Sequence[Sequence[Any]]) -> list[Tensor]:
    """The inputs of examples (input, class, ...)."""
    inputs = [item[0] for item in items]
    if not all(isinstance(x, Tensor) for x in inputs):
        raise StreamError(
            f"Avalanche examples must be tensors, got {type(inputs[0]).__name__}: add "
            "torchvision.transforms.ToTensor to the benchmark's transforms."
        )
    return inputs


class _LazyData(Examples):
    """Reads whole batches through a reader."""

    draws = False

    def __init__(self, reader: Reader, y: Tensor, options: Options, task: int | None) -> None:
        self.reader, self.y, self.options, self.task = reader, y, options, task

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor) -> Batch:
        task = None if self.task is None else torch.full((len(index),), self.task)
        return Batch(x=plain_inputs(self.options.lay_out(self.reader(index))), y=self.y[index], task=task, index=index)

    def targets(self) -> Tensor | None:
        return self.y


class _Items(Dataset):
    """(input in the layout, class) of one example of an Avalanche data set."""

    def __init__(self, dataset: Any, options: Options) -> None:
        self.dataset, self.options = dataset, options

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.dataset[index]
        return self.options.lay_out(_inputs([item])[0][None])[0], int(item[1])


class _ItemData(WorkerData):
    """Reads example by example, but knows the classes."""

    def __init__(self, dataset: Dataset, y: Tensor, workers: int, task: int | None) -> None:
        super().__init__(dataset, workers, task)
        self.y = y

    def targets(self) -> Tensor | None:
        return self.y
