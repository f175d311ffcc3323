"""Training batches of one experience, in chunks: the order is a function of (seed, experience, pass) alone.

One chunk is one call of Lightning's training step, so that its cost a call is paid once for many optimiser steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from clplat.streams.experience import Batch, Data


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable values, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ChunkLoader:
    """Yields chunks, iterators of batches, until `steps` batches were given.

    A batch is read when the step before it is done: read a chunk ahead, it would have left the cache by its turn. So
    use up each chunk before asking for the next one.

    The data are passed over as often as needed, in a new order each pass; a pass ends with a short batch. Nothing
    here draws from a global random generator, so a run that starts at step `start` sees what an uninterrupted run
    sees from there on.

    Args:
        data: the training set of the experience.
        batch_size: B, rows a batch.
        steps: batches in total.
        seed: of the order.
        experience: number of the experience, part of the seed.
        start: the first batch to give, 0..steps.
        chunk: at most this many batches a chunk.
        cuts: a chunk also ends after every batch whose number (from `offset`) is a multiple of one of these.
        offset: number of steps taken before this experience.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        steps: int,
        seed: int,
        experience: int,
        start: int = 0,
        chunk: int = 32,
        cuts: Sequence[int] = (),
        offset: int = 0,
    ) -> None:
        self.data, self.batch_size, self.steps, self.start = data, batch_size, steps, start
        self.seed, self.experience = seed, experience
        self.ends = chunk_ends(start, steps, chunk, cuts, offset)

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.ends)

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        batches = self._batches()
        at = self.start
        for end in self.ends:
            yield islice(batches, end - at)
            at = end

    def _batches(self) -> Iterator[Batch]:
        return self.data.batches(self._indices())

    def _indices(self) -> Iterator[Tensor]:
        per_pass = batches_per_pass(len(self.data), self.batch_size)
        order: list[Tensor] = []
        for step in range(self.start, self.steps):
            number, at = divmod(step, per_pass)
            if at == 0 or not order:
                generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", self.experience, number))
                order = list(torch.randperm(len(self.data), generator=generator).split(self.batch_size))
            yield order[at]


def batches_per_pass(examples: int, batch_size: int) -> int:
    """Batches in one pass over the data."""
    return -(-examples // batch_size)


def chunk_ends(start: int, steps: int, chunk: int, cuts: Sequence[int], offset: int) -> list[int]:
    """The step numbers, counted within the experience, after which a chunk ends."""
    ends, last = [], start
    for step in range(start + 1, steps + 1):
        if step == steps or step - last == chunk or any(every and (offset + step) % every == 0 for every in cuts):
            ends.append(step)
            last = step
    return ends
