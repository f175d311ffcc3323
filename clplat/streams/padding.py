"""Padding of sequences: lengths that are right, batches cut to them, and rows that look padded without lengths.

Letters: N examples, B batch, T time steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.dtypes import computable, is_integer


def need_tensors(**given: object) -> None:
    """Refuse what is no tensor, by name.

    Raises:
        StreamError: says how to make one.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise StreamError(
                f"{name}: must be a torch.Tensor, got {type(value).__name__}: give torch.as_tensor(...), which copies no "
                "numpy array; number classes that are words first."
            )


def checked_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    """Lengths as int64, one an example, each in 1..T.

    Raises:
        StreamError: others; the first row that is wrong is named.
    """
    need_tensors(lengths=lengths)
    if not is_integer(lengths) or lengths.dtype == torch.bool or lengths.shape != x.shape[:1] or x.ndim < 2:
        raise StreamError(
            f"lengths: must be integers [{len(x)}], one for each row of inputs {list(x.shape)}, got {lengths.dtype} "
            f"{list(lengths.shape)}."
        )
    lengths = lengths.long()
    wrong = (lengths < 1) | (lengths > x.shape[1])
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise StreamError(
            f"lengths: must lie in 1..{x.shape[1]}, got {int(lengths[row])} in row {row}: leave empty sequences out."
        )
    return lengths


def unpadded(batch: Batch, lengths: Tensor) -> Batch:
    """The batch cut to its longest row, zeros and unscored targets behind the others: as `RaggedData` gives it."""
    longest = int(lengths.max()) if len(lengths) else batch.x.shape[1]
    valid = torch.arange(longest) < lengths[:, None]
    x, y, mask = batch.x[:, :longest], batch.y, batch.mask
    x = x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0)
    if y.ndim == 3 or (y.ndim == 2 and not y.is_floating_point()):  # a target a step; floats [B, O] are one a row
        fill = 0 if y.is_floating_point() else UNSCORED
        y = y[:, :longest].masked_fill(~valid.view(*valid.shape, *[1] * (y.ndim - 2)), fill)
    return replace(batch, x=x, y=y, mask=None if mask is None else mask[:, :longest])


def looks_padded(batch: Batch) -> tuple[float, float] | None:
    """Share of rows that end in two or more equal steps, and their value, if these look like padding; else None.

    Padding stands at the end, one value fills it, and rows have more or less of it. A border of pictures stands at
    the beginning as well. Where there is a target a step, it must be constant there, too.
    """
    x, y = computable(batch.x), batch.y
    sequences = x.ndim == 3 or not x.is_floating_point()
    if not sequences or batch.lengths is not None or batch.mask is not None or x.shape[1] < 3:
        return None
    steps = x if x.ndim == 3 else x[..., None]
    value = steps[:, -1, 0].mode().values
    filled = (steps == value).all(-1)  # [B, T]
    if y.ndim == 2 and not y.is_floating_point():
        filled &= (y == y[:, -1:]) & (y != UNSCORED)
    elif y.ndim == 3:
        filled &= (y == y[:, -1:]).all(-1)
    behind, before = (f.long().cumprod(1).sum(1) for f in (filled.flip(1), filled))
    some = (behind > 1) & (behind < x.shape[1])
    varied = len(behind[some].unique()) > 1
    if not varied or float(some.float().mean()) < 0.25 or int(behind[some].sum()) <= 4 * int(before[some].sum()):
        return None
    return float(some.float().mean()), float(value)
