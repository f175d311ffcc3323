"""Mamba's selective scan in numba: one thread a batch row and slab of channels, vectorised along the channels.

Letters: B batch, T time, D channels, S states a channel.
"""

# Arguments are handed over as tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from clplat.kernels.arguments import SERIAL_BELOW
from clplat.kernels.numba_math import FASTMATH, exp
from clplat.kernels.selective import CHUNK
from clplat.kernels.threads import kernel, threads_worth

SLAB = 32
"""Channels of one task: the states of a chunk of them and their decays stay in a core's cache."""


def forward(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, skip: Tensor, h: Tensor, keep: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the last state [B, D, S], and the states before every chunk [B, chunks, S, D]."""
    (rows, steps, width), states = x.shape, a.shape[1]
    y, kept = x.new_empty(x.shape), h.new_empty(rows, -(-steps // CHUNK), states, width)
    # Channels last, and so next to one another, in every array of states.
    last = h.new_empty(rows, states, width)
    threads = threads_worth(x.numel() * states, SERIAL_BELOW)
    _forward(threads, *_arrays(x, dt, b, c, a.t(), skip, h.transpose(1, 2), keep), reverse, *_arrays(y, last, kept))
    return y, last.transpose(1, 2).contiguous(), kept


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, b, c, a, skip and the initial state."""
    (rows, _, width), size = x.shape, a.shape[1]
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    # Rows are the tasks: what sums over channels then needs no second buffer.
    db, dc = x.new_empty(b.shape), x.new_empty(c.shape)
    da, dskip, dh0 = x.new_empty(rows, size, width), x.new_empty(rows, width), x.new_empty(rows, size, width)
    threads = threads_worth(x.numel() * size if rows > 1 else 0, SERIAL_BELOW)
    given = _arrays(x, dt, b, c, a.t(), skip, keep, states, dy, dh.transpose(1, 2))
    _backward(threads, *given, reverse, *_arrays(dx, ddt, db, dc, da, dskip, dh0))
    return dx, ddt, db, dc, da.sum(0).t().contiguous(), dskip.sum(0), dh0.transpose(1, 2).contiguous()


def _arrays(*tensors: Tensor):
    return tuple(x.detach().contiguous().numpy() for x in tensors)


@kernel(fastmath=FASTMATH)
def _forward(x, dt, b, c, a, skip, h0, keep, reverse, y, h1, kept):
    batch, steps, width = x.shape
    size = a.shape[0]
    slabs = (width + SLAB - 1) // SLAB
    real = x.dtype.type
    for row in prange(batch * slabs):
        r, lo = row // slabs, row % slabs * SLAB
        hi = min(width, lo + SLAB)
        h = np.empty((size, hi - lo), x.dtype)
        for s in range(size):
            for j in range(hi - lo):
                h[s, j] = h0[r, s, lo + j]
        for i in range(steps):
            t = steps - 1 - i if reverse else i
            if i % CHUNK == 0:
                for s in range(size):
                    for j in range(hi - lo):
                        kept[r, i // CHUNK, s, lo + j] = h[s, j]
            if keep[r, t] == 0:
                for s in range(size):
                    for j in range(hi - lo):
                        h[s, j] = real(0)
            xs, dts, ys = x[r, t, lo:hi], dt[r, t, lo:hi], y[r, t, lo:hi]
            for j in range(hi - lo):
                ys[j] = skip[lo + j] * xs[j]
            for s in range(size):
                own, decay = h[s], a[s, lo:hi]
                b_t, c_t = b[r, t, s], c[r, t, s]
                for j in range(hi - lo):
                    new = exp(dts[j] * decay[j]) * own[j] + dts[j] * xs[j] * b_t
                    own[j] = new
                    ys[j] += new * c_t
        for s in range(size):
            for j in range(hi - lo):
                h1[r, s, lo + j] = h[s, j]


@kernel(fastmath=FASTMATH)
def _backward(x, dt, b, c, a, skip, keep, kept, dy, dh, reverse, dx, ddt, db, dc, da, dskip, dh0):
    batch, steps, width = x.shape
    size = a.shape[0]
    slabs = (width + SLAB - 1) // SLAB
    real = x.dtype.type
    for r in prange(batch):
        past = np.empty((CHUNK + 1, size, SLAB), x.dtype)  # the state before each step of a chunk, and one more
        decays = np.empty((CHUNK, size, SLAB), x.dtype)
        for i in range(steps):
            for s in range(size):
                db[r, i, s], dc[r, i, s] = real(0), real(0)
        for slab in range(slabs):
            lo = slab * SLAB
            hi = min(width, lo + SLAB)
            n = hi - lo
            for j in range(n):
                dskip[r, lo + j] = real(0)
            for s in range(size):
                for j in range(n):
                    dh0[r, s, lo + j] = dh[r, s, lo + j]  # A_{t+1} g_{t+1} from here on
                    da[r, s, lo + j] = real(0)
            for chunk in range((steps - 1) // CHUNK, -1, -1):
                start = chunk * CHUNK
                end = min(steps, start + CHUNK)
                for s in range(size):
                    for j in range(n):
                        past[0, s, j] = kept[r, chunk, s, lo + j]
                for i in range(start, end):
                    t = steps - 1 - i if reverse else i
                    xs, dts = x[r, t, lo:hi], dt[r, t, lo:hi]
                    fresh = keep[r, t] == 0
                    for s in range(size):
                        now, then, decay, rate = (
                            past[i - start, s],
                            past[i - start + 1, s],
                            decays[i - start, s],
                            a[s, lo:hi],
                        )
                        b_t = b[r, t, s]
                        if fresh:
                            for j in range(n):
                                now[j] = real(0)
                        for j in range(n):
                            decay[j] = exp(dts[j] * rate[j])
                            then[j] = decay[j] * now[j] + dts[j] * xs[j] * b_t
                for i in range(end - 1, start - 1, -1):
                    t = steps - 1 - i if reverse else i
                    xs, dts, up = x[r, t, lo:hi], dt[r, t, lo:hi], dy[r, t, lo:hi]
                    dxs, ddts = dx[r, t, lo:hi], ddt[r, t, lo:hi]
                    fresh = keep[r, t] == 0
                    for j in range(n):
                        dxs[j] = skip[lo + j] * up[j]
                        ddts[j] = real(0)
                        dskip[r, lo + j] += up[j] * xs[j]
                    for s in range(size):
                        now, decay, rate = past[i - start, s], decays[i - start, s], a[s, lo:hi]
                        back, das = dh0[r, s, lo:hi], da[r, s, lo:hi]
                        b_t, c_t = b[r, t, s], c[r, t, s]
                        b_sum, c_sum = real(0), real(0)
                        for j in range(n):
                            g = back[j] + up[j] * c_t
                            b_sum += g * dts[j] * xs[j]
                            c_sum += up[j] * (decay[j] * now[j] + dts[j] * xs[j] * b_t)
                            left = g * decay[j] * now[j]
                            dxs[j] += g * dts[j] * b_t
                            ddts[j] += g * xs[j] * b_t + left * rate[j]
                            das[j] += left * dts[j]
                            back[j] = g * decay[j]
                        db[r, t, s] += b_sum
                        dc[r, t, s] += c_sum
                        if fresh:
                            for j in range(n):
                                back[j] = real(0)
