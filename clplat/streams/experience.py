"""Contracts of a stream: Batch, Data, Experience and Stream.

Letters: N examples, B batch, T time steps, D input features, O outputs per step, C classes, K experiences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.inputs import Inputs
from clplat.streams.look import Seen, look
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
        symbols: what the tokens stand for, in order, where that is known; else empty.
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
    symbols: tuple[str, ...] = ()

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

    @cached_property
    def contents(self) -> tuple[tuple[str, Seen], ...]:
        """What a look at every row found in each set, by the set's name."""
        return look(self)

    def check(self) -> None:
        """Refuse what could not be learned, before any training. All rows of all sets are looked at, once.

        Raises:
            StreamError: no experience; an empty set; inputs or targets of the wrong shape, number format or range, or
                not finite; lengths outside 1..T; a class that only a test set has; the set and the row are named.
        """
        _ = self.contents

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether data are still the same, as plain values: check sums over the contents of all sets."""
        return {
            "stream": [self.target, self.outputs, self.features, self.vocabulary, "".join(self.symbols)],
            "sets": [[name, seen.examples, seen.digest] for name, seen in self.contents],
        }
