"""The running softmax mean in numba: one thread a batch row and head, vectorised along a head's values.

Letters: B batch, T time, N heads, d width of a head's values.
"""

# Arguments are handed over as tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import torch
from numba import prange
from torch import Tensor

from clplat.kernels.arguments import SERIAL_BELOW
from clplat.kernels.numba_math import FASTMATH
from clplat.kernels.threads import kernel, threads_worth


def forward(
    s: Tensor, v: Tensor, lse: Tensor, o: Tensor, keep: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, N, d], all log-sum-exps [B, T, N], the last of these and the last o."""
    made = torch.empty_like(v, memory_format=torch.contiguous_format), lse.new_empty(s.shape)
    last = lse.new_empty(lse.shape), o.new_empty(o.shape)
    threads = threads_worth(v.numel(), SERIAL_BELOW)
    _forward(threads, *_arrays(s, v, lse, o, keep), reverse, *_arrays(*made, *last))
    return *made, *last


def backward(
    s: Tensor,
    v: Tensor,
    lse: Tensor,
    o: Tensor,
    keep: Tensor,
    y: Tensor,
    lses: Tensor,
    last_o: Tensor,
    dy: Tensor,
    dlse: Tensor,
    do: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, v, the first log-sum-exp and the first o."""
    made = s.new_empty(s.shape), v.new_empty(v.shape), dlse.new_empty(dlse.shape), do.new_empty(do.shape)
    threads = threads_worth(v.numel(), SERIAL_BELOW)
    _backward(threads, *_arrays(s, v, lse, o, keep, y, lses, last_o, dy, dlse, do), reverse, *_arrays(*made))
    return made


def _arrays(*tensors: Tensor):
    return tuple(x.detach().contiguous().numpy() for x in tensors)


@kernel(fastmath=FASTMATH)
def _forward(s, v, lse0, o0, keep, reverse, y, lses, lse1, o1):
    batch, steps, heads = s.shape
    width = v.shape[3]
    real = v.dtype.type
    for row in prange(batch * heads):
        b, n = row // heads, row % heads
        lse = lse0[b, n]
        o = o1[b, n]
        for j in range(width):
            o[j] = o0[b, n, j]
        for i in range(steps):
            t = steps - 1 - i if reverse else i
            if keep[b, t] == 0:
                lse = real(-1e30)
                for j in range(width):
                    o[j] = real(0)
            score = s[b, t, n]
            top = max(lse, score)
            after = top + math.log(math.exp(lse - top) + math.exp(score - top))
            a, g = math.exp(lse - after), math.exp(score - after)
            lse = after
            lses[b, t, n] = after
            for j in range(width):
                new = a * o[j] + g * v[b, t, n, j]
                o[j] = new
                y[b, t, n, j] = new
        lse1[b, n] = lse


@kernel(fastmath=FASTMATH)
def _backward(s, v, lse0, o0, keep, y, lses, last_o, dy, dlse, do, reverse, ds, dv, dlse1, do1):
    batch, steps, heads = s.shape
    width = v.shape[3]
    real = v.dtype.type
    for row in prange(batch * heads):
        b, n = row // heads, row % heads
        carried = do1[b, n]  # a_{t+1} G_{t+1}
        h = -dlse[b, n]
        for j in range(width):
            carried[j] = do[b, n, j]
            h += do[b, n, j] * last_o[b, n, j]
        for i in range(steps - 1, -1, -1):
            t = steps - 1 - i if reverse else i
            g = math.exp(s[b, t, n] - lses[b, t, n])
            along = real(0)
            for j in range(width):
                h += dy[b, t, n, j] * y[b, t, n, j]
            for j in range(width):
                down = carried[j] + dy[b, t, n, j]
                carried[j] = down
                dv[b, t, n, j] = g * down
                along += down * v[b, t, n, j]
            ds[b, t, n] = g * (along - h)
            a = real(0)
            if keep[b, t] != 0:
                before = lse0[b, n]
                if i > 0:
                    before = lses[b, t + 1 if reverse else t - 1, n]
                a = math.exp(before - lses[b, t, n])
            h *= a
            for j in range(width):
                carried[j] *= a
        first = steps - 1 if reverse else 0
        if keep[b, first] == 0:
            dlse1[b, n] = real(0)
        else:
            along = real(0)
            for j in range(width):
                along += carried[j] * o0[b, n, j]
            dlse1[b, n] = along - h
