"""Chosen examples of several sets as one set, and what a set weighs.

Letters: N examples, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clplat.streams.examples import Examples, draws
from clplat.streams.experience import Batch, Data, StreamError
from clplat.streams.union import gather

WEIGHED = 256
"""Examples that `data_bytes` looks at."""


class MixedData(Examples):
    """Chosen examples of the current set and of earlier ones, in order, as one set.

    Unlike in a union, `Batch.index` stays the example's number in its own set, and the rows of all parts but the
    first are marked as replayed (source 1).

    Args:
        parts: the sets; the first one is the current experience's.
        rows: for each part the examples that belong to it, [M] int64 (one may occur several times); None for all.

    Raises:
        StreamError: no part, or not as many entries in `rows`.
    """

    def __init__(self, parts: Sequence[Data], rows: Sequence[Tensor | None]) -> None:
        if not parts or len(parts) != len(rows):
            raise StreamError(f"Mixed data need one entry of rows a part, got {len(parts)} parts and {len(rows)}.")
        self.parts = list(parts)
        self.rows = [torch.arange(len(p)) if r is None else r for p, r in zip(parts, rows, strict=True)]
        self.ends = torch.tensor([len(r) for r in self.rows]).cumsum(0)
        self.draws = any(map(draws, self.parts))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B]: one gather a part that occurs among them."""
        return gather(index, self.ends, self._read)

    def targets(self) -> Tensor | None:
        """[N] classes of all parts, or None if one part has none."""
        found = [p.targets() for p in self.parts]
        if any(t is None for t in found):
            return None
        return torch.cat([t.index_select(0, r) for t, r in zip(found, self.rows, strict=True) if t is not None])

    def _read(self, part: int, rows: Tensor) -> Batch:
        batch, replayed = self.parts[part].batch(self.rows[part].index_select(0, rows)), part > 0
        if not replayed and batch.source is not None:  # a mixture itself
            return batch
        return replace(batch, source=torch.full((len(batch),), int(replayed), dtype=torch.uint8))


def data_bytes(data: Data, examples: int | None = None) -> int:
    """Bytes of `examples` examples of a set (None: all): inputs, targets, lengths, masks, task labels and resets, unpadded.

    Measured on the first 256 examples and scaled: exact where all have the same length, an estimate elsewhere.
    """
    count = len(data) if examples is None else examples
    if len(data) == 0 or count == 0:
        return 0
    looked = min(len(data), WEIGHED)
    batch = data.batch(torch.arange(looked))
    valid = None if batch.lengths is None else int(batch.lengths.sum())
    total = 0
    for name in ("x", "y", "lengths", "mask", "task", "reset"):
        tensor: Tensor | None = getattr(batch, name)
        if tensor is None:
            continue
        size = tensor.numel() * tensor.element_size()
        per_step = name in ("x", "mask", "reset") or (name == "y" and tensor.ndim >= 2 and not _one_vector(tensor))
        total += size if valid is None or not per_step else size * valid // (looked * batch.x.shape[1])
    return total * count // looked


def _one_vector(targets: Tensor) -> bool:
    return targets.ndim == 2 and targets.is_floating_point()
