"""The recurrence with a block-diagonal transition in numba: one thread a batch row and slab of blocks.

Letters: B batch, T time, N blocks, b rows and columns of a block.
"""

# Arguments are handed over as tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from clplat.kernels.arguments import SERIAL_BELOW
from clplat.kernels.numba_math import FASTMATH
from clplat.kernels.threads import kernel, threads_worth

SLAB = 32
"""Blocks of one task."""


def forward(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """All h [B, T, N, b] and the last one."""
    y, last = u.new_empty(u.shape), h.new_empty(h.shape)
    threads = threads_worth(a.numel(), SERIAL_BELOW)
    _forward(threads, *_arrays(a, u, h, keep), reverse, *_arrays(y, last))
    return y, last


def backward(
    a: Tensor, h: Tensor, keep: Tensor, y: Tensor, dy: Tensor, dh: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, u and the first h."""
    made = a.new_empty(a.shape), y.new_empty(y.shape), h.new_empty(h.shape)
    threads = threads_worth(a.numel(), SERIAL_BELOW)
    _backward(threads, *_arrays(a, h, keep, y, dy, dh), reverse, *_arrays(*made))
    return made


def _arrays(*tensors: Tensor):
    return tuple(x.detach().contiguous().numpy() for x in tensors)


@kernel(fastmath=FASTMATH)
def _forward(a, u, h0, keep, reverse, y, h1):
    batch, steps, blocks, size = u.shape
    slabs = (blocks + SLAB - 1) // SLAB
    real = u.dtype.type
    for row in prange(batch * slabs):
        r, lo = row // slabs, row % slabs * SLAB
        hi = min(blocks, lo + SLAB)
        h = h1[r]
        made = np.empty(size, u.dtype)
        for n in range(lo, hi):
            for j in range(size):
                h[n, j] = h0[r, n, j]
        for i in range(steps):
            t = steps - 1 - i if reverse else i
            if keep[r, t] == 0:
                for n in range(lo, hi):
                    for j in range(size):
                        h[n, j] = real(0)
            for n in range(lo, hi):
                for j in range(size):
                    total = u[r, t, n, j]
                    for k in range(size):
                        total += a[r, t, n, j, k] * h[n, k]
                    made[j] = total
                for j in range(size):
                    h[n, j] = made[j]
                    y[r, t, n, j] = made[j]


@kernel(fastmath=FASTMATH)
def _backward(a, h0, keep, y, dy, dh, reverse, da, du, dh0):
    batch, steps, blocks, size = y.shape
    slabs = (blocks + SLAB - 1) // SLAB
    real = y.dtype.type
    for row in prange(batch * slabs):
        r, lo = row // slabs, row % slabs * SLAB
        hi = min(blocks, lo + SLAB)
        back = dh0[r]
        made = np.empty(size, y.dtype)
        for n in range(lo, hi):
            for j in range(size):
                back[n, j] = dh[r, n, j]
        for i in range(steps - 1, -1, -1):
            t = steps - 1 - i if reverse else i
            before = t + 1 if reverse else t - 1
            fresh = keep[r, t] == 0
            for n in range(lo, hi):
                for k in range(size):
                    made[k] = real(0)
                for j in range(size):
                    g = back[n, j] + dy[r, t, n, j]
                    du[r, t, n, j] = g
                    for k in range(size):
                        past = real(0)
                        if not fresh:
                            past = y[r, before, n, k] if i > 0 else h0[r, n, k]
                        da[r, t, n, j, k] = g * past
                        made[k] += g * a[r, t, n, j, k]
                for k in range(size):
                    back[n, k] = real(0) if fresh else made[k]
