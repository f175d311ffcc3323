"""Several sets as one.

Letters: N examples, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clplat.streams.batch import concatenate
from clplat.streams.examples import Examples, draws
from clplat.streams.experience import Batch, Data


class UnionData(Examples):
    """The examples of several sets, in order, as one set.

    Args:
        parts: the sets; at least one.
    """

    def __init__(self, parts: Sequence[Data]) -> None:
        self.parts = list(parts)
        self.ends = torch.tensor([len(p) for p in self.parts]).cumsum(0)
        self.draws = any(map(draws, self.parts))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B]: one gather a part that occurs among them."""
        return replace(gather(index, self.ends, lambda p, own: self.parts[p].batch(own)), index=index)

    def targets(self) -> Tensor | None:
        """[N] classes of all parts, or None if one part has none."""
        parts = [p.targets() for p in self.parts]
        return None if any(t is None for t in parts) else torch.cat([t for t in parts if t is not None])


def gather(index: Tensor, ends: Tensor, read: Callable[[int, Tensor], Batch]) -> Batch:
    """The examples `index` [B] of several sets that stand one behind the other, by one read a set that occurs.

    Args:
        index: [B] int64.
        ends: [parts] the number of examples up to the end of each set.
        read: gives the rows of a set by their numbers in it.
    """
    part = torch.bucketize(index, ends, right=True)
    order, pieces = [], []
    for p in part.unique().tolist():
        here = (part == p).nonzero().squeeze(1)
        order.append(here)
        pieces.append(read(p, index[here] - (int(ends[p - 1]) if p else 0)))
    return concatenate(pieces).rows(torch.cat(order).argsort())
