"""Number formats of inputs and targets: whatever floats and integers come, batches hold float32 (or float64) and int64."""

from __future__ import annotations

import torch
from torch import Tensor

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Integers that torch stores, and computes next to nothing with."""


def computable(t: Tensor) -> Tensor:
    """The tensor in the nearest format that torch computes with, itself in nearly all cases."""
    if t.dtype in UNSIGNED:
        return t.long()
    return t.float() if t.is_floating_point() and t.itemsize == 1 else t


def plain_inputs(x: Tensor) -> Tensor:
    """Inputs with floats below 32 bits as float32; integers and bools stay, since nets read them as token ids.

    float64 stays: a net takes inputs in the precision of its own weights.
    """
    return x.float() if x.is_floating_point() and x.itemsize < 4 else computable(x)


def plain_targets(y: Tensor) -> Tensor:
    """Targets with floats below 32 bits as float32, and integers and bools as int64."""
    if y.is_floating_point():
        return plain_inputs(y)
    return y.long() if is_integer(y) else y


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values; what is not a number is the same as another."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def is_integer(t: Tensor) -> bool:
    """Whether a tensor holds integers or bools."""
    return not t.is_floating_point() and not t.is_complex()
