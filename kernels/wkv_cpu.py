"""RWKV-4's time mixing in numba: one thread a batch row and slab of channels, vectorised along the channels.

Letters: B batch, T time, D channels.
"""

# Arguments are handed over as tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from clplat.kernels.arguments import SERIAL_BELOW
from clplat.kernels.numba_math import FASTMATH, exp
from clplat.kernels.threads import kernel, threads_worth
from clplat.kernels.wkv import CHUNK

SLAB = 128
"""Channels of one task: their states, and those of a chunk in the backward pass, stay in a core's cache."""


def forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, num: Tensor, den: Tensor, top: Tensor, keep: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, D], the last state, and the states before every chunk [3, B, chunks, D]."""
    b, t, d = v.shape
    made = v.new_empty(b, t, d), num.new_empty(b, d), num.new_empty(b, d), num.new_empty(b, d)
    states = num.new_empty(3, b, -(-t // CHUNK), d)
    threads = threads_worth(v.numel(), SERIAL_BELOW)
    _forward(threads, *_arrays(k, v, w, u, num, den, top, keep), reverse, *_arrays(*made, states))
    return *made, states


def backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    num: Tensor,
    den: Tensor,
    keep: Tensor,
    states: Tensor,
    dy: Tensor,
    dnum: Tensor,
    dden: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial state."""
    b, _, d = v.shape
    dk, dv, dw, du = k.new_empty(k.shape), v.new_empty(v.shape), v.new_empty(b, d), v.new_empty(b, d)
    first = num.new_empty(b, d), num.new_empty(b, d), num.new_empty(b, d)
    threads = threads_worth(v.numel(), SERIAL_BELOW)
    given = _arrays(k, v, w, u, num, den, keep, states, dy, dnum, dden)
    _backward(threads, *given, reverse, *_arrays(dk, dv, dw, du, *first))
    return dk, dv, dw.sum(0), du.sum(0), *first


def _arrays(*tensors: Tensor):
    return tuple(x.detach().contiguous().numpy() for x in tensors)


@kernel(fastmath=FASTMATH)
def _forward(k, v, w, u, num0, den0, top0, keep, reverse, y, num1, den1, top1, states):
    batch, steps, width = v.shape
    slabs = (width + SLAB - 1) // SLAB
    real = v.dtype.type
    for row in prange(batch * slabs):
        b, lo = row // slabs, row % slabs * SLAB
        hi = min(width, lo + SLAB)
        num, den, top = num1[b, lo:hi], den1[b, lo:hi], top1[b, lo:hi]
        ws, us = w[lo:hi], u[lo:hi]
        for j in range(hi - lo):
            num[j], den[j], top[j] = num0[b, lo + j], den0[b, lo + j], top0[b, lo + j]
        for i in range(steps):
            t = steps - 1 - i if reverse else i
            if i % CHUNK == 0:
                for j in range(hi - lo):
                    states[0, b, i // CHUNK, lo + j] = num[j]
                    states[1, b, i // CHUNK, lo + j] = den[j]
                    states[2, b, i // CHUNK, lo + j] = top[j]
            if keep[b, t] == 0:
                for j in range(hi - lo):
                    num[j], den[j], top[j] = real(0), real(0), real(-1e30)
            ks, vs, ys = k[b, t, lo:hi], v[b, t, lo:hi], y[b, t, lo:hi]
            for j in range(hi - lo):
                n, d, m, key, val = num[j], den[j], top[j], ks[j], vs[j]
                q = max(m, us[j] + key)
                old, new = exp(m - q), exp(us[j] + key - q)
                ys[j] = (old * n + new * val) / (old * d + new)
                q = max(m - ws[j], key)
                old, new = exp(m - ws[j] - q), exp(key - q)
                num[j], den[j], top[j] = old * n + new * val, old * d + new, q


@kernel(fastmath=FASTMATH)
def _backward(k, v, w, u, num0, den0, keep, states, dy, dnum, dden, reverse, dk, dv, dw, du, dnum0, dden0, dtop0):
    batch, steps, width = v.shape
    slabs = (width + SLAB - 1) // SLAB
    real = v.dtype.type
    for row in prange(batch * slabs):
        b, lo = row // slabs, row % slabs * SLAB
        hi = min(width, lo + SLAB)
        p, q, ws, us = dnum0[b, lo:hi], dden0[b, lo:hi], dw[b, lo:hi], du[b, lo:hi]
        decay, bonus = w[lo:hi], u[lo:hi]
        past = np.empty((CHUNK, 3, hi - lo), v.dtype)  # the state before each step of a chunk
        for j in range(hi - lo):
            p[j], q[j], ws[j], us[j] = dnum[b, lo + j], dden[b, lo + j], real(0), real(0)
        for chunk in range((steps - 1) // CHUNK, -1, -1):
            start = chunk * CHUNK
            end = min(steps, start + CHUNK)
            for j in range(hi - lo):
                for x in range(3):
                    past[0, x, j] = states[x, b, chunk, lo + j]
            for i in range(start, end):
                t = steps - 1 - i if reverse else i
                now = past[i - start]
                if keep[b, t] == 0:
                    for j in range(hi - lo):
                        now[0, j], now[1, j], now[2, j] = real(0), real(0), real(-1e30)
                if i + 1 < end:
                    then = past[i - start + 1]
                    ks, vs = k[b, t, lo:hi], v[b, t, lo:hi]
                    for j in range(hi - lo):
                        top = max(now[2, j] - decay[j], ks[j])
                        old, new = exp(now[2, j] - decay[j] - top), exp(ks[j] - top)
                        then[0, j] = old * now[0, j] + new * vs[j]
                        then[1, j] = old * now[1, j] + new
                        then[2, j] = top
            for i in range(end - 1, start - 1, -1):
                t = steps - 1 - i if reverse else i
                now = past[i - start]
                ks, vs, up = k[b, t, lo:hi], v[b, t, lo:hi], dy[b, t, lo:hi]
                dks, dvs = dk[b, t, lo:hi], dv[b, t, lo:hi]
                for j in range(hi - lo):
                    n, d, m, key, val = now[0, j], now[1, j], now[2, j], ks[j], vs[j]
                    top = max(m, bonus[j] + key)
                    e1, e2 = exp(m - top), exp(bonus[j] + key - top)
                    below = e1 * d + e2
                    da = up[j] / below
                    de = -da * (e1 * n + e2 * val) / below
                    top = max(m - decay[j], key)
                    f1, f2 = exp(m - decay[j] - top), exp(key - top)
                    own = e2 * (val * da + de)
                    us[j] += own
                    ws[j] -= f1 * (n * p[j] + d * q[j])
                    dvs[j] = e2 * da + f2 * p[j]
                    dks[j] = own + f2 * (val * p[j] + q[j])
                    p[j] = f1 * p[j] + e1 * da
                    q[j] = f1 * q[j] + e1 * de
                if keep[b, t] == 0:
                    for j in range(hi - lo):
                        p[j], q[j] = real(0), real(0)
        kept = keep[b, steps - 1 if reverse else 0] != 0
        for j in range(hi - lo):
            # Not multiplied: a state that overflowed must not reach a sequence that starts afresh.
            dtop0[b, lo + j] = num0[b, lo + j] * p[j] + den0[b, lo + j] * q[j] if kept else real(0)
