"""Contracts of a stream: Batch, Data, Experience and Stream.

Letters: N examples, B batch, T time steps, D input features, O outputs per step, C classes, K experiences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.inputs import Inputs
from clplat.streams.order import Order

__all__ = ["UNSCORED", "Batch", "Chunks", "Data", "Experience", "Scenario", "Stream", "StreamError", "Target"]

Scenario = Literal["task_incremental", "domain_incremental", "class_incremental", "boundary_free"]
Target = Literal["class", "tag", "token", "bits", "value"]


class Chunks(Protocol):
    """Training batches of one experience in chunks, each an iterator of batches to be used up before the next one.

    Attributes:
        nominal: T of the segments where their lengths are drawn around it, else None.
    """

    nominal: int | None

    def __len__(self) -> int:
        """The number of chunks."""
        ...

    def __iter__(self) -> Iterator[Iterator[Batch]]: ...


@runtime_checkable
class Data(Protocol):
    """Examples that can be asked for by whole batches. `clplat.streams.data.Examples` gives all but two methods."""

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

    def training(self, order: Order) -> Chunks:
        """The batches to train on, in order.

        Raises:
            StreamError: a state is to be carried from batch to batch, and these examples do not follow one another.
        """
        ...

    def test_batches(
        self, batch_size: int, examples: int | None = None, carries: bool = False
    ) -> Iterator[tuple[Batch, bool]]:
        """The batches to score, each with whether its rows go on where those of the batch before ended.

        Args:
            batch_size: B; segments whose state is carried come in as many rows as they are laid out in.
            examples: take so many, evenly spaced and always the same; None: all. Of segments whose state is carried:
                the first of them, in whole rows.
            carries: the state is carried where examples follow one another.
        """
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
        return Inputs(self.features, self.vocabulary, self.length, self.per_step)

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
