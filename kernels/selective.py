"""The selective scan of Mamba: a diagonal state-space model whose step, input and output depend on the input.

Letters: B batch, T time, D channels, S states a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat.kernels import backend as backends
from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes
from clplat.kernels.backend import State, choose, state_dtype

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
    keep: Tensor | None = None,
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
        initial_state: (h [B, D, S],), None for zeros.
        keep: [B, T], 0 where the state is fresh before the step.
        reverse: from the last step to the first.
        backend: see `clplat.kernels.backend`.

    Returns:
        y [B, T, D] in the dtype of x, and (h,) after the last step.

    Raises:
        ValueError: shapes that do not fit, no time step, a back end that cannot run here.
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
    mask = keep_mask("selective_scan", keep, x)
    chosen, wide = choose(backend, x), state_dtype(x)
    if chosen == "reference" or (chosen == "cpu" and not backends.HAS_NUMBA):
        return _reference(x, dt, b, c, a, skip, h, mask, reverse)
    if chosen == "cpu":
        y, last, _ = _forward(*(z.to(wide) for z in (x, dt, b, c, a, skip)), h, mask, reverse, chosen)
        return y.to(x.dtype), (last,)
    y, last, _ = _forward(x, dt, b, c, a, skip, h, mask, reverse, chosen)
    return y, (last,)


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


@torch.library.custom_op("clplat::selective_scan", mutates_args=())
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
    if backend == "cpu":
        from clplat.kernels import selective_cpu

        return selective_cpu.forward(x, dt, b, c, a, skip, h, keep, reverse)
    from clplat.kernels import selective_triton

    return selective_triton.forward(x, dt, b, c, a, skip, h, keep, reverse)


@_forward.register_fake
def _(
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
    rows, steps, width = x.shape
    chunks = (steps + CHUNK - 1) // CHUNK
    return x.new_empty(x.shape), h.new_empty(h.shape), h.new_empty(rows, chunks, h.shape[2], width)


@torch.library.custom_op("clplat::selective_scan_backward", mutates_args=())
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
    if backend == "cpu":
        from clplat.kernels import selective_cpu

        return selective_cpu.backward(x, dt, b, c, a, skip, keep, states, dy, dh, reverse)
    from clplat.kernels import selective_triton

    return selective_triton.backward(x, dt, b, c, a, skip, keep, states, dy, dh, reverse)


@_backward.register_fake
def _(
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
    x1, dt1, b1, c1, a1, skip1 = (z.new_empty(z.shape) for z in (x, dt, b, c, a, skip))
    return x1, dt1, b1, c1, a1, skip1, dh.new_empty(dh.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, b, c, a, skip, _, keep, ctx.reverse, ctx.backend = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(x, dt, b, c, a, skip, keep, states)


def _gradient(ctx: Any, dy: Tensor, dh: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    found = _backward(*ctx.saved_tensors, dy, dh, ctx.reverse, ctx.backend)
    return (*found, None, None, None)


_forward.register_autograd(_gradient, setup_context=_setup)
