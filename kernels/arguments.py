"""What the recurrences with more than one kind of input share: checks of shapes, the keep mask, numba's threads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat.kernels import backend
from clplat.kernels.backend import State, state_dtype

SERIAL_BELOW = 65_536
"""Numbers read below which a second thread costs more than it takes off."""


def sizes(op: str, given: Mapping[str, tuple[Tensor, str]]) -> dict[str, int]:
    """The size of each letter.

    Args:
        op: name for the message.
        given: name -> (tensor, its letters, as in "B T D").

    Raises:
        ValueError: a tensor without floating point, of another number of dimensions, or that gives a letter another
            size than one before it; no time step.
    """
    known: dict[str, int] = {}
    for name, (tensor, letters) in given.items():
        expected = letters.split()
        wanted = "[" + ", ".join(f"{x}={known[x]}" if x in known else x for x in expected) + "]"
        fits = tensor.ndim == len(expected)
        for letter, size in zip(expected, tensor.shape, strict=False):
            fits = fits and known.setdefault(letter, size) == size
        if not fits:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, it must be {wanted}.")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype}, it must be a real floating-point one: convert it."
            )
    if known.get("T") == 0:
        raise ValueError(f"{op}: got no time step (T=0), it needs at least one: leave the call out.")
    return known


def keep_mask(op: str, keep: Tensor | None, x: Tensor) -> Tensor:
    """keep [B, T] as int8, all ones for None.

    Raises:
        ValueError: another shape than x's first two dimensions.
    """
    if keep is None:
        return torch.ones(x.shape[:2], dtype=torch.int8, device=x.device)
    if keep.shape != x.shape[:2]:
        raise ValueError(f"{op}: keep has shape {list(keep.shape)}, it must be [B, T]={list(x.shape[:2])}.")
    return (keep != 0).to(torch.int8)


def first_state(
    op: str, given: State | None, x: Tensor, known: dict[str, int], letters: Mapping[str, tuple[str, float]]
) -> State:
    """The initial state in the dtype of states: the given one, or the fresh one.

    Args:
        op: name for the message.
        given: by the caller.
        x: an input, for device and dtype.
        known: sizes of letters.
        letters: name -> (letters, value of the fresh state).

    Raises:
        ValueError: another number of tensors, or other shapes.
    """
    dtype = state_dtype(x)
    if given is None:
        return tuple(
            torch.full([known[k] for k in shape.split()], fresh, dtype=dtype, device=x.device)
            for shape, fresh in letters.values()
        )
    if len(given) != len(letters):
        names = ", ".join(letters)
        raise ValueError(f"{op}: got {len(given)} tensors as initial state, it takes {len(letters)}: ({names}).")
    for s, (name, (shape, _)) in zip(given, letters.items(), strict=True):
        wanted = [known[k] for k in shape.split()]
        if list(s.shape) != wanted:
            raise ValueError(f"{op}: {name} of the initial state has shape {list(s.shape)}, it must be {wanted}.")
    return tuple(s.to(dtype) for s in given)


def use_threads(work: int) -> None:
    """As many of numba's threads as the work is worth: one, or as many as torch may use."""
    backend.use_threads(torch.get_num_threads() if work >= SERIAL_BELOW else 1)


def flipped(x: Tensor, reverse: bool) -> Tensor:
    """x [B, T, ...] with time turned round, if `reverse`."""
    return x.flip(1) if reverse else x
