"""Arguments that all recurrences share: sizes by letter, the initial state, resets, the direction of time.

Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat.kernels.backend import State, state_dtype

SERIAL_BELOW = 65_536
"""Numbers read below which a second thread costs more than it takes off."""


def sizes(op: str, given: Mapping[str, tuple[Tensor | None, str]], allow_complex: bool = False) -> dict[str, int]:
    """The size of each letter.

    Args:
        op: name for the message.
        given: name -> (tensor, its letters, as in "B T D", or numbers where a size is fixed); None is passed over.
        allow_complex: whether complex numbers will do.

    Raises:
        ValueError: a tensor without floating point, of another number of dimensions, or that gives a letter another
            size than one before it; no time step.
    """
    known: dict[str, int] = {}
    for name, (tensor, letters) in given.items():
        if tensor is None:
            continue
        expected = letters.split()
        wanted = "[" + ", ".join(f"{x}={known[x]}" if x in known else x for x in expected) + "]"
        fits = tensor.ndim == len(expected)
        for letter, size in zip(expected, tensor.shape, strict=False):
            fits = fits and size == (int(letter) if letter.isdigit() else known.setdefault(letter, size))
        if not fits:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, it must be {wanted}.")
        if not (tensor.is_floating_point() or (allow_complex and tensor.is_complex())):
            kind = "floating-point" if allow_complex else "real floating-point"
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, it must be a {kind} one: convert it.")
    if known.get("T") == 0:
        raise ValueError(f"{op}: got no time step (T=0), it needs at least one: leave the call out.")
    return known


def kept(op: str, reset: Tensor | None, x: Tensor) -> Tensor | None:
    """Where the past goes on, [B, T] bool, of `reset`; None for everywhere.

    Raises:
        ValueError: another shape than x's first two dimensions.
    """
    if reset is None:
        return None
    if reset.shape != x.shape[:2]:
        raise ValueError(f"{op}: reset has shape {list(reset.shape)}, it must be [B, T]={list(x.shape[:2])}.")
    return reset == 0


def keep_mask(op: str, reset: Tensor | None, x: Tensor) -> Tensor:
    """As `kept` in int8, all ones for None."""
    keep = kept(op, reset, x)
    return torch.ones(x.shape[:2], dtype=torch.int8, device=x.device) if keep is None else keep.to(torch.int8)


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
    dtype = torch.promote_types(x.dtype, state_dtype(x))  # complex stays complex
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


def widened(chosen: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as a back end wants them: for numba in the dtype of x's states, for Triton as they are."""
    return tuple(each.to(state_dtype(x)) for each in tensors) if chosen == "cpu" else tensors


def flipped(x: Tensor, reverse: bool) -> Tensor:
    """x [B, T, ...] with time turned round, if `reverse`."""
    return x.flip(1) if reverse else x
