"""Which code runs a recurrence: chosen by the tensor and by `backend=` at every call, never by the import.

| back end | what it is | where |
|---|---|---|
| `reference` | a plain loop over time in torch, differentiated by autograd: the definition, and the oracle of the tests | anywhere |
| `cpu` | kernels compiled by numba, or the fastest form in torch where there is no numba | CPU tensors |
| `triton` | Triton kernels | CUDA tensors; CPU tensors under Triton's interpreter |

Arguments that all recurrences share, besides their inputs:

- `initial_state`: the state before the first step, a tuple of tensors [B, ...]; None for a fresh one;
- `reset` [B, T], bool or 0/1: where it is 1 a fresh sequence starts, and what was before that step is forgotten;
- `reverse`: from the last step to the first, with the final state after step 0; equal to flipping time in inputs, reset
  and outputs;
- `backend`: one of the table, or None for the fastest that the tensor's device and dtype have.

All return outputs [B, T, ...] in the dtype of their inputs and the state after the last step, in float32 (float64 for
float64 inputs). They raise ValueError for shapes, dtypes and back ends that do not fit, and for no time step (T = 0).

Letters: B batch, T time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton")
HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None

State = tuple[Tensor, ...]
"""What a recurrence remembers: tensors [B, ...], float32 (float64 for float64 inputs)."""


def choose(backend: str | None, x: Tensor) -> str:
    """The back end that runs on x: the one asked for, or the fastest that its device and dtype have.

    Args:
        backend: "reference", "cpu" or "triton"; None chooses.
        x: one of the inputs.

    Under the transforms of `torch.func` (vmap, grad, vjp, ...), which torch's custom ops have no rules for, None chooses
    the reference.

    Raises:
        ValueError: an unknown back end, or one that cannot run on x's device.
    """
    if backend is None:
        if not (x.is_floating_point() or x.is_complex()) or _transformed():
            return "reference"
        if x.device.type == "cpu":
            return "cpu"
        return "triton" if x.is_cuda and HAS_TRITON and state_dtype(x) != torch.float64 else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(map(repr, BACKENDS))} and None.")
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend='cpu' got a tensor on {x.device}: move it to the CPU, or leave backend out.")
    if backend == "triton" and not (x.is_cuda or (x.device.type == "cpu" and interpreting())):
        raise ValueError(
            f"backend='triton' got a tensor on {x.device}: it needs a CUDA device, "
            "or TRITON_INTERPRET=1 set before Python starts."
        )
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton': the package triton is not installed (pip install triton).")
    return backend


def choose_compiled(backend: str | None, x: Tensor) -> str:
    """As `choose`, for an op that has nothing but numba on CPUs: without numba it is the reference there."""
    chosen = choose(backend, x)
    return "reference" if chosen == "cpu" and not HAS_NUMBA else chosen


def _transformed() -> bool:
    # torch has no public name for this; its own `autograd/function.py` asks in this way.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: slow, and for tests only."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def without_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in which autocast does not turn products of states to half precision."""

    @functools.wraps(call)
    def wide(x: Tensor, *args: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return call(x, *args)

    return wide


def state_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 (and complex128) inputs, else float32: a state in half precision forgets what is small."""
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
