"""Which batches of a training set are given, in which order, and where chunks of them end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """The batches to train on in one experience; see `clplat.streams.loader`.

    Attributes:
        batch_size: B, rows a batch.
        steps: batches in total; the data are passed over as often as needed.
        seed: of the order.
        experience: number of the experience, part of the seed.
        start: the first batch to give, 0..steps.
        chunk: at most this many batches a chunk.
        cuts: a chunk also ends after every batch whose number (from `offset`) is a multiple of one of these.
        offset: number of steps taken before this experience.
        carries: the learner's state goes on from batch to batch.
        vary: segments whose state is carried are of random length.
    """

    batch_size: int
    steps: int
    seed: int
    experience: int
    start: int = 0
    chunk: int = 32
    cuts: Sequence[int] = ()
    offset: int = 0
    carries: bool = False
    vary: bool = False

    def ends(self) -> list[int]:
        """The step numbers, counted within the experience, after which a chunk ends, from `start` on.

        They do not depend on `start`: what is left of a chunk that a run stopped in is a chunk.
        """
        return [end for end in self._ends() if end > self.start]

    def begun(self) -> int:
        """The number of steps before `start` that are of the chunk that `start` lies in."""
        return self.start - max((end for end in self._ends() if end <= self.start), default=0)

    def _ends(self) -> list[int]:
        ends, last = [], 0
        for step in range(1, self.steps + 1):
            due = any(every and (self.offset + step) % every == 0 for every in self.cuts)
            if step == self.steps or step - last == self.chunk or due:
                ends.append(step)
                last = step
        return ends
