"""Training batches of one experience, in chunks: the order is a function of (seed, experience, pass) alone.

One chunk is one call of Lightning's training step, so that its cost a call is paid once for many optimiser steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from clplat.streams.experience import Batch, Data
from clplat.streams.order import Order


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable values, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ChunkLoader:
    """Yields chunks, iterators of batches, until `order.steps` batches were given.

    A batch is read when the step before it is done: read a chunk ahead, it would have left the cache by its turn. So
    use up each chunk before asking for the next one.

    The data are passed over as often as needed, in a new order each pass; a pass ends with a short batch. Nothing
    here draws from a global random generator, so a run that starts at step `order.start` sees what an uninterrupted
    run sees from there on.

    Args:
        data: the training set of the experience.
        order: which batches.
    """

    nominal: int | None = None

    def __init__(self, data: Data, order: Order) -> None:
        self.data, self.order, self.steps = data, order, order.steps
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
        return self.data.batches(self._indices())

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
