"""Base of data whose examples are independent of one another.

Letters: N examples, B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.streams.batch import Batch, StreamError
from clplat.streams.loader import ChunkLoader
from clplat.streams.order import Order
from clplat.streams.reading import finite_only, seeded_each, seeds_of

if TYPE_CHECKING:
    from clplat.streams.experience import Chunks, Data

Transform = Callable[[Tensor], Tensor]
"""Changes the inputs of a whole batch, [B, ...] -> [B, ...]."""


class FixedTransform(ABC):
    """A transform that draws nothing and keeps finite values finite, so that its tensors say all about it."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The batch x changed."""


@dataclass(frozen=True)
class Stored:
    """The tensors that the examples of a set are made of, if they say all about it.

    Attributes:
        x: inputs; other sets may share them, and rows may belong to none.
        y: targets, of the set's own examples where there is one an example.
        others: whatever else decides what is read.
    """

    x: Tensor
    y: Tensor
    others: tuple[Tensor, ...]


class Examples(ABC):
    """Examples that are independent of one another: `__len__` and `batch` say which, all else of `Data` follows.

    Attributes:
        draws: reading may draw from global random generators, so that each batch is read under a seed of its own
            (`clplat.streams.reading`). A subclass that never draws says so, and saves some 40 microseconds a batch.
    """

    draws: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples N."""

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B] as one batch."""

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return map(self.batch, indices)

    def read(self, indices: Iterable[Tensor], seeds: Iterable[int]) -> Iterator[Batch]:
        """One batch for each entry of `indices`, what is random in it drawn under the seed at its place.

        Raises:
            BadValues: what was drawn makes inputs that are not finite.
        """
        batches = self.batches(indices)
        return map(finite_only, seeded_each(batches, seeds)) if self.draws else batches

    def targets(self) -> Tensor | None:
        return None

    def stored(self) -> Stored | None:
        """The tensors that the examples are made of; None where only reading tells."""
        return None

    def origin(self, row: int) -> int:
        """The number of an example in the arrays that the set was made of."""
        return row

    def training(self, order: Order) -> Chunks:
        if order.carries:
            raise StreamError(
                f"The state is carried from segment to segment, and the training set is {type(self).__name__}, whose "
                "examples do not follow one another: use a strategy that leaves the training set as it is, or set "
                "training.carry_state=false."
            )
        return ChunkLoader(self, order, self.read)

    def test_batches(
        self, batch_size: int, examples: int | None = None, carries: bool = False
    ) -> Iterator[tuple[Batch, bool]]:
        index = torch.arange(len(self))
        if examples is not None and examples < len(self):
            index = torch.linspace(0, len(self) - 1, examples, dtype=torch.float64).round().long()
        return ((batch, False) for batch in self.read(index.split(batch_size), seeds_of("scored")))


def draws(data: Data) -> bool:
    """Whether reading a set may draw from global random generators."""
    return data.draws if isinstance(data, Examples) else True
