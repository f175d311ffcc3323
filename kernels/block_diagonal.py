"""The linear recurrence with small dense blocks on the diagonal of its transition, each step its own.

Letters: B batch, T time, N blocks, b rows and columns of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat.kernels import backend as backends
from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes
from clplat.kernels.backend import State, choose, state_dtype

LARGEST = 8
"""The largest block: a block's state is kept in registers."""


def block_scan(
    a: Tensor,
    u: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """h_t = A_t h_{t-1} + u_t with A_t block-diagonal: N blocks of b x b.

    The recurrence of "Advancing Regular Language Reasoning in Linear Recurrent Neural Networks" (Fan, Chi & Rudnicky
    2024, arXiv 2309.07412, section 4), whose transitions depend on the input; how they are made and bounded is the
    caller's part. One pass over the time, where the paper has a parallel scan of products of matrices, b times the
    work.

    Args:
        a: A [B, T, N, b, b], row by row: (A h)_i = sum_j A[i, j] h_j; b at most 8. Column norms (1-norm, and close
            above it) of at most 1 keep h bounded.
        u: [B, T, N, b].
        initial_state: (h [B, N, b],), None for zeros.
        keep: [B, T], 0 where the state is fresh before the step.
        reverse: from the last step to the first.
        backend: see `clplat.kernels.backend`.

    Returns:
        h [B, T, N, b] in the dtype of u, and (h,) after the last step.

    Raises:
        ValueError: shapes that do not fit, a block above 8, no time step, a back end that cannot run here.
    """
    if a.ndim != 5 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"block_scan: a has shape {list(a.shape)}, it must be [B, T, N, b, b]: square blocks.")
    known = sizes("block_scan", {"a": (a, "B T N b b"), "u": (u, "B T N b")})
    if not 1 <= known["b"] <= LARGEST:
        raise ValueError(f"block_scan: got blocks of {known['b']}, allowed is 1..{LARGEST}: take more, smaller blocks.")
    (h,) = first_state("block_scan", initial_state, u, known, {"h": ("B N b", 0.0)})
    mask = keep_mask("block_scan", keep, u)
    chosen, wide = choose(backend, u), state_dtype(u)
    if chosen == "reference" or (chosen == "cpu" and not backends.HAS_NUMBA):
        return _reference(a, u, h, mask, reverse)
    if chosen == "cpu":
        y, last = _forward(a.to(wide), u.to(wide), h, mask, reverse, chosen)
        return y.to(u.dtype), (last,)
    y, last = _forward(a, u, h, mask, reverse, chosen)
    return y, (last,)


def _reference(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool) -> tuple[Tensor, State]:
    """The definition, in the dtype of the state."""
    rows = []
    time = (flipped(x, reverse).unbind(1) for x in (a.to(h.dtype), u.to(h.dtype), keep != 0))
    for a_t, u_t, keep_t in zip(*time, strict=True):
        h = torch.where(keep_t[:, None, None], h, 0)
        h = (a_t * h[..., None, :]).sum(-1) + u_t
        rows.append(h)
    return flipped(torch.stack(rows, 1), reverse).to(u.dtype), (h,)


@torch.library.custom_op("clplat::block_scan", mutates_args=())
def _forward(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    """All h and the last one."""
    if backend == "cpu":
        from clplat.kernels import block_diagonal_cpu

        return block_diagonal_cpu.forward(a, u, h, keep, reverse)
    from clplat.kernels import block_diagonal_triton

    return block_diagonal_triton.forward(a, u, h, keep, reverse)


@_forward.register_fake
def _(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), h.new_empty(h.shape)


@torch.library.custom_op("clplat::block_scan_backward", mutates_args=())
def _backward(
    a: Tensor, h: Tensor, keep: Tensor, y: Tensor, dy: Tensor, dh: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, u and the first h: g_t = dy_t + A_{t+1}^T g_{t+1}, dA_t = g_t h_{t-1}^T, du_t = g_t."""
    if backend == "cpu":
        from clplat.kernels import block_diagonal_cpu

        return block_diagonal_cpu.backward(a, h, keep, y, dy, dh, reverse)
    from clplat.kernels import block_diagonal_triton

    return block_diagonal_triton.backward(a, h, keep, y, dy, dh, reverse)


@_backward.register_fake
def _(
    a: Tensor, h: Tensor, keep: Tensor, y: Tensor, dy: Tensor, dh: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), y.new_empty(y.shape), dh.new_empty(dh.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, _, h, keep, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(a, h, keep, output[0])


def _gradient(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, dy, dh, ctx.reverse, ctx.backend), None, None, None)


_forward.register_autograd(_gradient, setup_context=_setup)
