"""Training batches of one experience, in chunks: the order is a function of (seed, experience, pass) alone.

One chunk is one call of Lightning's training step, so that its cost a call is paid once for many optimiser steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.streams.batch import Batch
from clplat.streams.order import Order
from clplat.streams.reading import BadValues, finite_only, seeded_each
from clplat.streams.seeds import stable_seed as stable_seed

if TYPE_CHECKING:
    from clplat.streams.experience import Data

Read = Callable[[Iterable[Tensor], Iterable[int]], Iterator[Batch]]
"""Reads one batch for each entry of indices [B], under the seed that stands at its place."""


class ChunkLoader:
    """Yields chunks, iterators of batches, until `order.steps` batches were given.

    A batch is read when the step before it is done: read a chunk ahead, it would have left the cache by its turn. So
    use up each chunk before asking for the next one.

    The data are passed over as often as needed, in a new order each pass; a pass ends with a short batch. Nothing
    here draws from a global random generator, and what a transform draws follows from (seed, experience, step): a run
    that starts at step `order.start` sees what an uninterrupted run sees from there on.

    Args:
        data: the training set of the experience.
        order: which batches.
        read: reads them; None: `data.batches`, each batch under its seed.
    """

    nominal: int | None = None

    def __init__(self, data: Data, order: Order, read: Read | None = None) -> None:
        self.data, self.order, self.steps = data, order, order.steps
        self.read: Read = read or (lambda indices, seeds: map(finite_only, seeded_each(data.batches(indices), seeds)))
        self.ends = order.ends()

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.ends)

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        batches = self._batches()
        at = self.order.start
        for end in self.ends:
            yield islice(batches, end - at)
            at = end

    def _batches(self) -> Iterator[Batch]:
        order = self.order
        seeds = (stable_seed(order.seed, "reading", order.experience, step) for step in range(order.start, order.steps))
        try:
            yield from self.read(self._indices(), seeds)
        except BadValues as error:
            raise BadValues(f"experience {order.experience}, train set, {error}") from error

    def _indices(self) -> Iterator[Tensor]:
        order, examples = self.order, len(self.data)
        per_pass = batches_per_pass(examples, order.batch_size)
        batches: list[Tensor] = []
        for step in range(order.start, order.steps):
            number, at = divmod(step, per_pass)
            if at == 0 or not batches:
                generator = torch.Generator().manual_seed(stable_seed(order.seed, "order", order.experience, number))
                batches = list(torch.randperm(examples, generator=generator).split(order.batch_size))
            yield batches[at]


def batches_per_pass(examples: int, batch_size: int) -> int:
    """Batches in one pass over the data."""
    return -(-examples // batch_size)
