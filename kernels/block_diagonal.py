"""The linear recurrence with small dense blocks on the diagonal of its transition, each step its own.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`.

Letters: B batch, T time, N blocks, b rows and columns of a block.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes, widened
from clplat.kernels.backend import State, choose_compiled
from clplat.kernels.custom_op import register

LARGEST = 8
"""The largest block: a block's state is kept in registers."""


def block_scan(
    a: Tensor,
    u: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
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
        initial_state: (h [B, N, b],); fresh is 0.

    Returns:
        h [B, T, N, b] in the dtype of u, and (h,) after the last step.
    """
    if a.ndim != 5 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"block_scan: a has shape {list(a.shape)}, it must be [B, T, N, b, b]: square blocks.")
    known = sizes("block_scan", {"a": (a, "B T N b b"), "u": (u, "B T N b")})
    if not 1 <= known["b"] <= LARGEST:
        raise ValueError(f"block_scan: got blocks of {known['b']}, allowed is 1..{LARGEST}: take more, smaller blocks.")
    (h,) = first_state("block_scan", initial_state, u, known, {"h": ("B N b", 0.0)})
    keep = keep_mask("block_scan", reset, u)
    chosen = choose_compiled(backend, u)
    if chosen == "reference":
        return _reference(a, u, h, keep, reverse)
    y, last = _scan(*widened(chosen, u, a, u), h, keep, reverse, chosen)
    return y.to(u.dtype), (last,)


def _reference(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool) -> tuple[Tensor, State]:
    """The definition, in the dtype of the state."""
    rows = []
    time = (flipped(x, reverse).unbind(1) for x in (a.to(h.dtype), u.to(h.dtype), keep != 0))
    for a_t, u_t, keep_t in zip(*time, strict=True):
        h = torch.where(keep_t[:, None, None], h, 0)
        h = (a_t * h[..., None, :]).sum(-1) + u_t
        rows.append(h)
    return flipped(torch.stack(rows, 1), reverse).to(u.dtype), (h,)


def _code(backend: str) -> ModuleType:
    if backend == "cpu":
        from clplat.kernels import block_diagonal_cpu as code
    else:
        from clplat.kernels import block_diagonal_triton as code
    return code


def _forward(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    """All h and the last one."""
    return _code(backend).forward(a, u, h, keep, reverse)


def _backward(
    a: Tensor, h: Tensor, keep: Tensor, y: Tensor, dy: Tensor, dh: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, u and the first h: g_t = dy_t + A_{t+1}^T g_{t+1}, dA_t = g_t h_{t-1}^T, du_t = g_t."""
    return _code(backend).backward(a, h, keep, y, dy, dh, reverse)


_scan = register(
    "block_scan",
    _forward,
    _backward,
    like=lambda a, u, h, *_: (u, h),
    gradients_like=lambda a, h, keep, y, dy, dh, *_: (a, y, dh),
    saved=lambda a, u, h, keep, reverse, backend, y, last: (a, h, keep, y),
    options=2,
)
