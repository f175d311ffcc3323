"""The selective scan of Mamba: a diagonal state-space model whose step, input and output depend on the input.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`.

Letters: B batch, T time, D channels, S states a channel.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes, widened
from clplat.kernels.backend import State, choose_compiled
from clplat.kernels.custom_op import register

CHUNK = 32
"""Steps between two states that are kept for the backward pass, which computes those in between once more."""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    skip: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """A state-space model with input-dependent step sizes, "Mamba" (Gu & Dao 2023, arXiv 2312.00752, section 3.2).

    In channel d with state s, h and y being

        h_t[d, s] = exp(dt_t[d] a[d, s]) h_{t-1}[d, s] + dt_t[d] x_t[d] b_t[s]
        y_t[d] = sum_s c_t[s] h_t[d, s] + skip[d] x_t[d]

    The decay is discretised by zero-order hold (equation 4), the input by its simplification dt b, as in the authors'
    code. Nothing of size B * T * D * S is ever stored: every 32nd state is, and the backward pass computes the states
    of one chunk at a time once more. (Autograd stores all of them for the reference.)

    Args:
        x: inputs [B, T, D].
        dt: step sizes [B, T, D], after the softplus: at least 0; a step of size 0 changes no state.
        b: [B, T, S].
        c: [B, T, S].
        a: log decay a unit of time [D, S], negative.
        skip: [D].
        initial_state: (h [B, D, S],); fresh is 0.

    Returns:
        y [B, T, D] in the dtype of x, and (h,) after the last step.
    """
    given = {
        "x": (x, "B T D"),
        "dt": (dt, "B T D"),
        "b": (b, "B T S"),
        "c": (c, "B T S"),
        "a": (a, "D S"),
        "skip": (skip, "D"),
    }
    known = sizes("selective_scan", given)
    (h,) = first_state("selective_scan", initial_state, x, known, {"h": ("B D S", 0.0)})
    keep = keep_mask("selective_scan", reset, x)
    chosen = choose_compiled(backend, x)
    if chosen == "reference":
        return _reference(x, dt, b, c, a, skip, h, keep, reverse)
    y, last, _ = _scan(*widened(chosen, x, x, dt, b, c, a, skip), h, keep, reverse, chosen)
    return y.to(x.dtype), (last,)


def _reference(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    skip: Tensor,
    h: Tensor,
    keep: Tensor,
    reverse: bool,
) -> tuple[Tensor, State]:
    """The definition, in the dtype of the state."""
    wide = h.dtype
    a, skip = a.to(wide), skip.to(wide)
    rows = []
    time = (flipped(z, reverse).unbind(1) for z in (x.to(wide), dt.to(wide), b.to(wide), c.to(wide), keep != 0))
    for x_t, dt_t, b_t, c_t, keep_t in zip(*time, strict=True):
        h = torch.where(keep_t[:, None, None], h, 0)
        h = torch.exp(dt_t[..., None] * a) * h + (dt_t * x_t)[..., None] * b_t[:, None]
        rows.append((h * c_t[:, None]).sum(-1) + skip * x_t)
    return flipped(torch.stack(rows, 1), reverse).to(x.dtype), (h,)


def _code(backend: str) -> ModuleType:
    if backend == "cpu":
        from clplat.kernels import selective_cpu as code
    else:
        from clplat.kernels import selective_triton as code
    return code


def _forward(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    skip: Tensor,
    h: Tensor,
    keep: Tensor,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states before every chunk [B, chunks, S, D]."""
    return _code(backend).forward(x, dt, b, c, a, skip, h, keep, reverse)


def _like(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, skip: Tensor, h: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    rows, steps, width = x.shape
    return x, h, h.new_empty(rows, (steps + CHUNK - 1) // CHUNK, h.shape[2], width)


def _backward(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    skip: Tensor,
    keep: Tensor,
    states: Tensor,
    dy: Tensor,
    dh: Tensor,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, b, c, a, skip and the initial state.

    With A_t = exp(dt_t a), and g_t the gradient of h_t:

        g_t = dy_t c_t + A_{t+1} g_{t+1}
        dx_t = sum_s g_t dt_t b_t + skip dy_t       ddt_t = sum_s g_t (x_t b_t + a A_t h_{t-1})
        db_t = sum_d g_t dt_t x_t                   dc_t = sum_d dy_t h_t
        da = sum_t g_t dt_t A_t h_{t-1}             dskip = sum_t dy_t x_t
    """
    return _code(backend).backward(x, dt, b, c, a, skip, keep, states, dy, dh, reverse)


_scan = register(
    "selective_scan",
    _forward,
    _backward,
    like=_like,
    gradients_like=lambda x, dt, b, c, a, skip, keep, states, dy, dh, *_: (x, dt, b, c, a, skip, dh),
    saved=lambda x, dt, b, c, a, skip, h, keep, reverse, backend, y, last, states: (x, dt, b, c, a, skip, keep, states),
    options=2,
)
