"""Compiled CPU kernels of `clplat.kernels.cells`, for float32 and float64.

A job is one head and a few rows of the batch, and owns all their steps: threads never wait for one another, and the
recurrent weights stay in the second cache. Loops over d write one array each: LLVM gives up vectorising a loop that
needs many checks for overlap. Rows are copied element by element, since numba takes several times as long to compile the
assignment of a slice. Constants have the arrays' type, since numba makes float64 of a float32 and a literal.

Arrays: gates [B, T, N, G, d] as [B, T, N, G d], w [N, d, G d] (forward) or [N, G d, d] (backward), extra [N, E, d],
state [S, B, N, d], keep [B, T] bool, y [B, T, N, d], saved [B, T, N, A, d].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from clplat.kernels.numba_cache import njit
from clplat.kernels.numba_math import FASTMATH, exp, log1p, tanh
from clplat.kernels.threads import kernel, threads_worth

SERIAL_BELOW = 1 << 20
"""Multiplications below which a team of threads costs more than it saves."""
ROWS = 16
"""Rows of a job at most, a multiple of 4."""

# forceinline: see `clplat.kernels.diagonal_cpu`.
_HELPER: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy", "forceinline": True}


def forward(
    gates: Tensor,
    recurrent: Tensor,
    extra: Tensor | None,
    state: Tensor,
    keep: Tensor | None,
    cell: str,
    options: list[float],
    reverse: bool,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what the backward pass needs; all tensors of one dtype, float32 or float64."""
    b, t, n, g, d = gates.shape
    y, last, saved = (
        gates.new_empty(b, t, n, d),
        state.clone(memory_format=torch.contiguous_format),
        gates.new_empty(b, t, n, slots, d),
    )
    flat = recurrent.transpose(1, 2).reshape(n, d, g * d)
    common = _common(gates, flat, extra, keep, options, reverse)
    _FORWARD[cell](*common, *map(_array, (last, y, saved)))
    return y, last, saved


def backward(
    dy: Tensor,
    dlast: Tensor,
    y: Tensor,
    saved: Tensor,
    last: Tensor,
    recurrent: Tensor,
    extra: Tensor | None,
    state: Tensor,
    keep: Tensor | None,
    cell: str,
    options: list[float],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates and of the initial state."""
    b, t, n, d = y.shape
    g = recurrent.shape[1]
    dgates, dstate = y.new_empty(b, t, n, g, d), dlast.clone(memory_format=torch.contiguous_format)
    flat = recurrent.transpose(2, 3).reshape(n, g * d, d)
    common = _common(dgates, flat, extra, keep, options, reverse)
    _BACKWARD[cell](*common, *map(_array, (dstate, dy, y, saved, state, last)))
    return dgates, dstate


def _common(
    gates: Tensor, flat: Tensor, extra: Tensor | None, keep: Tensor | None, options: list[float], reverse: bool
) -> tuple[Any, ...]:
    b, t, n, g, d = gates.shape
    threads = threads_worth(b * t * flat.numel(), SERIAL_BELOW)
    rows = 4 * max(1, min(ROWS // 4, b * n // (4 * threads)))
    no_extra, no_keep = gates.new_empty(n, 0, d), torch.empty(0, 0, dtype=torch.bool)
    return (
        threads,
        _array(gates).reshape(b, t, n, g * d),
        _array(flat),
        _array(no_extra if extra is None else extra),
        _array(no_keep if keep is None else keep),
        np.array(options, dtype=np.float64),
        reverse,
        rows,
    )


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


@njit(**_HELPER)
def _sigmoid(x, first, last):
    """In place on columns first..last of the rows of x."""
    one = x.dtype.type(1)
    for r in range(x.shape[0]):
        for j in range(first, last):
            x[r, j] = one / (one + exp(-x[r, j]))


@njit(**_HELPER)
def _product(a, a0, w, k0, count, z, z0, width):
    """z[:, z0 : z0 + width] += a[:, a0 : a0 + count] @ w[k0 : k0 + count, z0 : z0 + width]; rows a multiple of 4.

    Tiles of 4 rows by 4 of the inner dimension live in registers.
    """
    fours = count - count % 4
    for r in range(0, z.shape[0], 4):
        for k in range(0, fours, 4):
            p, q = a0 + k, k0 + k
            a00, a01, a02, a03 = a[r, p], a[r, p + 1], a[r, p + 2], a[r, p + 3]
            a10, a11, a12, a13 = a[r + 1, p], a[r + 1, p + 1], a[r + 1, p + 2], a[r + 1, p + 3]
            a20, a21, a22, a23 = a[r + 2, p], a[r + 2, p + 1], a[r + 2, p + 2], a[r + 2, p + 3]
            a30, a31, a32, a33 = a[r + 3, p], a[r + 3, p + 1], a[r + 3, p + 2], a[r + 3, p + 3]
            for j in range(z0, z0 + width):
                w0, w1, w2, w3 = w[q, j], w[q + 1, j], w[q + 2, j], w[q + 3, j]
                z[r, j] += a00 * w0 + a01 * w1 + a02 * w2 + a03 * w3
                z[r + 1, j] += a10 * w0 + a11 * w1 + a12 * w2 + a13 * w3
                z[r + 2, j] += a20 * w0 + a21 * w1 + a22 * w2 + a23 * w3
                z[r + 3, j] += a30 * w0 + a31 * w1 + a32 * w2 + a33 * w3
        for k in range(fours, count):
            for i in range(r, r + 4):
                x = a[i, a0 + k]
                for j in range(z0, z0 + width):
                    z[i, j] += x * w[k0 + k, j]


@njit(**_HELPER)
def _fill(x, first, last, value):
    """Columns first..last of all rows become value."""
    for r in range(x.shape[0]):
        for j in range(first, last):
            x[r, j] = value


@njit(**_HELPER)
def _load(source, b0, n, target):
    """Rows b0.. of one head of a state [B, N, d]; rows past the batch are 0."""
    for r in range(target.shape[0]):
        for j in range(target.shape[1]):
            target[r, j] = source[b0 + r, n, j] if b0 + r < source.shape[0] else 0


@njit(**_HELPER)
def _store(source, target, b0, n):
    for r in range(min(source.shape[0], target.shape[0] - b0)):
        for j in range(source.shape[1]):
            target[b0 + r, n, j] = source[r, j]


@njit(**_HELPER)
def _refresh(x, keep, b0, t, fresh):
    """Rows whose keep is 0 become fresh."""
    if keep.shape[0] > 0:
        for r in range(min(x.shape[0], keep.shape[0] - b0)):
            if not keep[b0 + r, t]:
                for j in range(x.shape[1]):
                    x[r, j] = fresh


@njit(**_HELPER)
def _previous(x, initial, b0, t, n, s, slot, reverse, keep, target):
    """What the state was before step t, after its reset: of saved [B, T, N, A, d], or [B, N, d] at the first step."""
    before = t + 1 if reverse else t - 1
    for r in range(min(target.shape[0], x.shape[0] - b0)):
        for j in range(target.shape[1]):
            if keep.shape[0] > 0 and not keep[b0 + r, t]:
                target[r, j] = 0
            elif s == 0:
                target[r, j] = initial[b0 + r, n, j]
            else:
                target[r, j] = x[b0 + r, before, n, slot, j]


@njit(**_HELPER)
def _gather(x, b0, t, n, target, first):
    """Step t's rows of [B, T, N, width] into columns first.. of target."""
    for r in range(min(target.shape[0], x.shape[0] - b0)):
        for j in range(x.shape[3]):
            target[r, first + j] = x[b0 + r, t, n, j]


@njit(**_HELPER)
def _add(x, b0, t, n, target):
    for r in range(min(target.shape[0], x.shape[0] - b0)):
        for j in range(x.shape[3]):
            target[r, j] += x[b0 + r, t, n, j]


@njit(**_HELPER)
def _scatter(source, first, width, x, b0, t, n, slot):
    """Columns first.. of the rows of source into [B, T, N, A, d], all of a slot and of those that follow it."""
    d = x.shape[4]
    for r in range(min(source.shape[0], x.shape[0] - b0)):
        for k in range(width // d):
            for j in range(d):
                x[b0 + r, t, n, slot + k, j] = source[r, first + k * d + j]


@njit(**_HELPER)
def _scatter_flat(source, x, b0, t, n):
    """The rows of source into [B, T, N, width]."""
    for r in range(min(source.shape[0], x.shape[0] - b0)):
        for j in range(x.shape[3]):
            x[b0 + r, t, n, j] = source[r, j]


@kernel(fastmath=FASTMATH)
def _lstm_forward(gates, w, extra, keep, options, reverse, rows, state, y, saved):
    batch, steps, heads, d = y.shape
    coupled, has_i, has_f = options[0] != 0, options[1] != 0, options[2] != 0
    has_o, squash_in, squash_out = options[3] != 0, options[4] != 0, options[5] != 0
    peep = extra.shape[1] > 0
    one = y.dtype.type(1)
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        h, c, z = np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype), np.zeros((rows, 4 * d), y.dtype)
        _load(state[0], b0, n, h)
        _load(state[1], b0, n, c)
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            _refresh(h, keep, b0, t, 0)
            _refresh(c, keep, b0, t, 0)
            _gather(gates, b0, t, n, z, 0)
            _product(h, 0, w[n], 0, d, z, 0, 4 * d)
            if peep:
                for r in range(rows):
                    for j in range(d):
                        z[r, j] += extra[n, 0, j] * c[r, j]
                    for j in range(d):
                        z[r, d + j] += extra[n, 1, j] * c[r, j]
            _sigmoid(z, 0, 2 * d)
            if not has_i:
                _fill(z, 0, d, one)
            if not has_f:
                _fill(z, d, 2 * d, one)
            for r in range(rows):
                if coupled:
                    for j in range(d):
                        z[r, d + j] = one - z[r, j]
                if squash_in:
                    for j in range(2 * d, 3 * d):
                        z[r, j] = tanh(z[r, j])
                for j in range(d):
                    c[r, j] = z[r, d + j] * c[r, j] + z[r, j] * z[r, 2 * d + j]
                if peep:
                    for j in range(d):
                        z[r, 3 * d + j] += extra[n, 2, j] * c[r, j]
            _sigmoid(z, 3 * d, 4 * d)
            if not has_o:
                _fill(z, 3 * d, 4 * d, one)
            for r in range(rows):
                if squash_out:
                    for j in range(d):
                        h[r, j] = z[r, 3 * d + j] * tanh(c[r, j])
                else:
                    for j in range(d):
                        h[r, j] = z[r, 3 * d + j] * c[r, j]
            _scatter_flat(h, y, b0, t, n)
            _scatter(z, 0, 4 * d, saved, b0, t, n, 0)
            _scatter(c, 0, d, saved, b0, t, n, 4)
        _store(h, state[0], b0, n)
        _store(c, state[1], b0, n)


@kernel(fastmath=FASTMATH)
def _lstm_backward(dgates, w, extra, keep, options, reverse, rows, dstate, dy, y, saved, state, last):
    batch, steps, heads, d = y.shape
    coupled, has_i, has_f = options[0] != 0, options[1] != 0, options[2] != 0
    has_o, squash_in, squash_out = options[3] != 0, options[4] != 0, options[5] != 0
    peep = extra.shape[1] > 0
    zero, one = y.dtype.type(0), y.dtype.type(1)
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        dh, dc, cp = np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype), np.zeros((rows, d), y.dtype)
        tc, z = np.empty((rows, d), y.dtype), np.zeros((rows, 4 * d), y.dtype)
        _load(dstate[0], b0, n, dh)
        _load(dstate[1], b0, n, dc)
        for back in range(steps):
            s = steps - 1 - back
            t = steps - 1 - s if reverse else s
            _add(dy, b0, t, n, dh)
            _previous(saved, state[1], b0, t, n, s, 4, reverse, keep, cp)
            for r in range(min(rows, batch - b0)):
                a = saved[b0 + r, t, n]
                if squash_out:
                    for j in range(d):
                        tc[r, j] = tanh(a[4, j])
                    for j in range(d):
                        dc[r, j] += dh[r, j] * a[3, j] * (one - tc[r, j] * tc[r, j])
                else:
                    for j in range(d):
                        tc[r, j] = a[4, j]
                    for j in range(d):
                        dc[r, j] += dh[r, j] * a[3, j]
                if has_o:
                    for j in range(d):
                        z[r, 3 * d + j] = dh[r, j] * tc[r, j] * a[3, j] * (one - a[3, j])
                    if peep:
                        for j in range(d):
                            dc[r, j] += extra[n, 2, j] * z[r, 3 * d + j]
                if coupled:
                    for j in range(d):
                        z[r, j] = dc[r, j] * (a[2, j] - cp[r, j]) * a[0, j] * (one - a[0, j])
                elif has_i:
                    for j in range(d):
                        z[r, j] = dc[r, j] * a[2, j] * a[0, j] * (one - a[0, j])
                if has_f and not coupled:
                    for j in range(d):
                        z[r, d + j] = dc[r, j] * cp[r, j] * a[1, j] * (one - a[1, j])
                if squash_in:
                    for j in range(d):
                        z[r, 2 * d + j] = dc[r, j] * a[0, j] * (one - a[2, j] * a[2, j])
                else:
                    for j in range(d):
                        z[r, 2 * d + j] = dc[r, j] * a[0, j]
                for j in range(d):
                    dc[r, j] *= a[1, j]
                if peep:
                    for j in range(d):
                        dc[r, j] += extra[n, 0, j] * z[r, j] + extra[n, 1, j] * z[r, d + j]
            _scatter_flat(z, dgates, b0, t, n)
            _fill(dh, 0, d, zero)
            _product(z, 0, w[n], 0, 4 * d, dh, 0, d)
            _refresh(dh, keep, b0, t, 0)
            _refresh(dc, keep, b0, t, 0)
        _store(dh, dstate[0], b0, n)
        _store(dc, dstate[1], b0, n)


@kernel(fastmath=FASTMATH)
def _gru_forward(gates, w, extra, keep, options, reverse, rows, state, y, saved):
    batch, steps, heads, d = y.shape
    after = options[0] != 0
    one = y.dtype.type(1)
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        h, x = np.empty((rows, d), y.dtype), np.zeros((rows, 3 * d), y.dtype)
        z, q = np.zeros((rows, 3 * d), y.dtype), np.zeros((rows, d), y.dtype)
        _load(state[0], b0, n, h)
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            _refresh(h, keep, b0, t, 0)
            _gather(gates, b0, t, n, x, 0)
            for r in range(rows):
                for j in range(2 * d):
                    z[r, j] = x[r, j]
                for j in range(d):
                    z[r, 2 * d + j] = extra[n, 0, j]
            _product(h, 0, w[n], 0, d, z, 0, 3 * d if after else 2 * d)
            _sigmoid(z, 0, 2 * d)
            if after:
                for r in range(rows):
                    for j in range(d):
                        q[r, j] = z[r, 2 * d + j]
                    for j in range(d):
                        z[r, 2 * d + j] = x[r, 2 * d + j] + z[r, j] * q[r, j]
            else:
                for r in range(rows):
                    for j in range(d):
                        q[r, j] = z[r, j] * h[r, j]
                    for j in range(2 * d, 3 * d):
                        z[r, j] += x[r, j]
                _product(q, 0, w[n], 0, d, z, 2 * d, d)
            for r in range(rows):
                for j in range(2 * d, 3 * d):
                    z[r, j] = tanh(z[r, j])
                for j in range(d):
                    h[r, j] = (one - z[r, d + j]) * z[r, 2 * d + j] + z[r, d + j] * h[r, j]
            _scatter_flat(h, y, b0, t, n)
            _scatter(z, 0, 3 * d, saved, b0, t, n, 0)
            _scatter(q, 0, d, saved, b0, t, n, 3)
        _store(h, state[0], b0, n)


@kernel(fastmath=FASTMATH)
def _gru_backward(dgates, w, extra, keep, options, reverse, rows, dstate, dy, y, saved, state, last):
    batch, steps, heads, d = y.shape
    after = options[0] != 0
    zero, one = y.dtype.type(0), y.dtype.type(1)
    blocks = (batch + rows - 1) // rows
    outputs = y.reshape(batch, steps, heads, 1, d)
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        dh, hp, ds = np.empty((rows, d), y.dtype), np.zeros((rows, d), y.dtype), np.empty((rows, d), y.dtype)
        z = np.zeros((rows, 3 * d), y.dtype)
        _load(dstate[0], b0, n, dh)
        for back in range(steps):
            s = steps - 1 - back
            t = steps - 1 - s if reverse else s
            _add(dy, b0, t, n, dh)
            _previous(outputs, state[0], b0, t, n, s, 0, reverse, keep, hp)
            for r in range(min(rows, batch - b0)):
                a = saved[b0 + r, t, n]
                for j in range(d):
                    z[r, 2 * d + j] = dh[r, j] * (one - a[1, j]) * (one - a[2, j] * a[2, j])
                for j in range(d):
                    z[r, d + j] = dh[r, j] * (hp[r, j] - a[2, j]) * a[1, j] * (one - a[1, j])
                for j in range(d):
                    dh[r, j] *= a[1, j]
            if after:
                for r in range(min(rows, batch - b0)):
                    a = saved[b0 + r, t, n]
                    for j in range(d):
                        z[r, j] = z[r, 2 * d + j] * a[3, j] * a[0, j] * (one - a[0, j])
                _scatter_flat(z, dgates, b0, t, n)
                for r in range(min(rows, batch - b0)):
                    a = saved[b0 + r, t, n]
                    for j in range(d):
                        z[r, 2 * d + j] *= a[0, j]
                _product(z, 0, w[n], 0, 3 * d, dh, 0, d)
            else:
                _fill(ds, 0, d, zero)
                _product(z, 2 * d, w[n], 2 * d, d, ds, 0, d)
                for r in range(min(rows, batch - b0)):
                    a = saved[b0 + r, t, n]
                    for j in range(d):
                        z[r, j] = ds[r, j] * hp[r, j] * a[0, j] * (one - a[0, j])
                    for j in range(d):
                        dh[r, j] += ds[r, j] * a[0, j]
                _scatter_flat(z, dgates, b0, t, n)
                _product(z, 0, w[n], 0, 2 * d, dh, 0, d)
            _refresh(dh, keep, b0, t, 0)
        _store(dh, dstate[0], b0, n)


@kernel(fastmath=FASTMATH)
def _elman_forward(gates, w, extra, keep, options, reverse, rows, state, y, saved):
    batch, steps, heads, d = y.shape
    relu = options[0] != 0
    zero = y.dtype.type(0)
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        h, z = np.empty((rows, d), y.dtype), np.zeros((rows, d), y.dtype)
        _load(state[0], b0, n, h)
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            _refresh(h, keep, b0, t, 0)
            _gather(gates, b0, t, n, z, 0)
            _product(h, 0, w[n], 0, d, z, 0, d)
            for r in range(rows):
                if relu:
                    for j in range(d):
                        # Not max(z, 0): NaN has to stay NaN.
                        h[r, j] = zero if z[r, j] < zero else z[r, j]
                else:
                    for j in range(d):
                        h[r, j] = tanh(z[r, j])
            _scatter_flat(h, y, b0, t, n)
        _store(h, state[0], b0, n)


@kernel(fastmath=FASTMATH)
def _elman_backward(dgates, w, extra, keep, options, reverse, rows, dstate, dy, y, saved, state, last):
    batch, steps, heads, d = y.shape
    relu = options[0] != 0
    zero, one = y.dtype.type(0), y.dtype.type(1)
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        dh, z = np.empty((rows, d), y.dtype), np.zeros((rows, d), y.dtype)
        _load(dstate[0], b0, n, dh)
        for back in range(steps):
            s = steps - 1 - back
            t = steps - 1 - s if reverse else s
            _add(dy, b0, t, n, dh)
            for r in range(min(rows, batch - b0)):
                a = y[b0 + r, t, n]
                if relu:
                    for j in range(d):
                        z[r, j] = dh[r, j] if a[j] > zero else zero
                else:
                    for j in range(d):
                        z[r, j] = dh[r, j] * (one - a[j] * a[j])
            _scatter_flat(z, dgates, b0, t, n)
            _fill(dh, 0, d, zero)
            _product(z, 0, w[n], 0, d, dh, 0, d)
            _refresh(dh, keep, b0, t, 0)
        _store(dh, dstate[0], b0, n)


@kernel(fastmath=FASTMATH)
def _slstm_forward(gates, w, extra, keep, options, reverse, rows, state, y, saved):
    batch, steps, heads, d = y.shape
    zero, one = y.dtype.type(0), y.dtype.type(1)
    scale = y.dtype.type(options[0])
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        h, c, norm = np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype)
        m, z, away = np.empty((rows, d), y.dtype), np.zeros((rows, 4 * d), y.dtype), np.empty((rows, d), y.dtype)
        _load(state[0], b0, n, h)
        _load(state[1], b0, n, c)
        _load(state[2], b0, n, norm)
        _load(state[3], b0, n, m)
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            _refresh(h, keep, b0, t, 0)
            _refresh(c, keep, b0, t, 0)
            _refresh(norm, keep, b0, t, 0)
            _refresh(m, keep, b0, t, scale)
            _gather(gates, b0, t, n, z, 0)
            _product(h, 0, w[n], 0, d, z, 0, 4 * d)
            for r in range(rows):
                for j in range(d):
                    away[r, j] = one / (one + exp(z[r, d + j]))
                for j in range(d):
                    f = z[r, d + j]
                    z[r, d + j] = (f if f < zero else zero) - log1p(exp(-abs(f))) + m[r, j]
                for j in range(d):
                    m[r, j] = z[r, d + j] if z[r, d + j] > z[r, j] else z[r, j]
                for j in range(d):
                    z[r, j] = exp(z[r, j] - m[r, j])
                for j in range(d):
                    z[r, d + j] = exp(z[r, d + j] - m[r, j])
                for j in range(2 * d, 3 * d):
                    z[r, j] = tanh(z[r, j])
                for j in range(3 * d, 4 * d):
                    z[r, j] = one / (one + exp(-z[r, j]))
                for j in range(d):
                    c[r, j] = z[r, d + j] * c[r, j] + z[r, j] * z[r, 2 * d + j]
                for j in range(d):
                    norm[r, j] = z[r, d + j] * norm[r, j] + z[r, j]
                for j in range(d):
                    h[r, j] = z[r, 3 * d + j] * (c[r, j] / norm[r, j])
            _scatter_flat(h, y, b0, t, n)
            _scatter(z, 0, 4 * d, saved, b0, t, n, 0)
            _scatter(c, 0, d, saved, b0, t, n, 4)
            _scatter(norm, 0, d, saved, b0, t, n, 5)
            _scatter(away, 0, d, saved, b0, t, n, 6)
        _store(h, state[0], b0, n)
        _store(c, state[1], b0, n)
        _store(norm, state[2], b0, n)
        _store(m, state[3], b0, n)


@kernel(fastmath=FASTMATH)
def _slstm_backward(dgates, w, extra, keep, options, reverse, rows, dstate, dy, y, saved, state, last):
    batch, steps, heads, d = y.shape
    zero, one = y.dtype.type(0), y.dtype.type(1)
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        dh, dc, dn = np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype)
        cp, np_, z = np.zeros((rows, d), y.dtype), np.zeros((rows, d), y.dtype), np.zeros((rows, 4 * d), y.dtype)
        # What the loss loses or gains by the scale alone: 0 unless a use of the final state depends on the scale.
        beyond = np.empty((rows, d), y.dtype)
        _load(dstate[0], b0, n, dh)
        _load(dstate[1], b0, n, dc)
        _load(dstate[2], b0, n, dn)
        _load(dstate[3], b0, n, beyond)
        _load(last[1], b0, n, cp)
        _load(last[2], b0, n, np_)
        for r in range(rows):
            for j in range(d):
                beyond[r, j] -= dc[r, j] * cp[r, j] + dn[r, j] * np_[r, j]
        for back in range(steps):
            s = steps - 1 - back
            t = steps - 1 - s if reverse else s
            _add(dy, b0, t, n, dh)
            _previous(saved, state[1], b0, t, n, s, 4, reverse, keep, cp)
            _previous(saved, state[2], b0, t, n, s, 5, reverse, keep, np_)
            for r in range(min(rows, batch - b0)):
                a, out = saved[b0 + r, t, n], y[b0 + r, t, n]
                for j in range(d):
                    z[r, 3 * d + j] = dh[r, j] * out[j] * (one - a[3, j])
                for j in range(d):
                    dc[r, j] += dh[r, j] * a[3, j] / a[5, j]
                for j in range(d):
                    dn[r, j] -= dh[r, j] * out[j] / a[5, j]
                for j in range(d):
                    z[r, j] = a[0, j] * (dc[r, j] * a[2, j] + dn[r, j])
                for j in range(d):
                    z[r, d + j] = (dc[r, j] * cp[r, j] + dn[r, j] * np_[r, j]) * a[1, j]
                # The larger of two arguments made the scale: i < 1 where it was the kept one.
                for j in range(d):
                    z[r, j] += zero if a[0, j] < one else beyond[r, j]
                for j in range(d):
                    beyond[r, j] = beyond[r, j] if a[0, j] < one else zero
                for j in range(d):
                    z[r, d + j] = (z[r, d + j] + beyond[r, j]) * a[6, j]
                for j in range(d):
                    z[r, 2 * d + j] = dc[r, j] * a[0, j] * (one - a[2, j] * a[2, j])
                for j in range(d):
                    dc[r, j] *= a[1, j]
                for j in range(d):
                    dn[r, j] *= a[1, j]
            _scatter_flat(z, dgates, b0, t, n)
            _fill(dh, 0, d, zero)
            _product(z, 0, w[n], 0, 4 * d, dh, 0, d)
            _refresh(dh, keep, b0, t, 0)
            _refresh(dc, keep, b0, t, 0)
            _refresh(dn, keep, b0, t, 0)
            _refresh(beyond, keep, b0, t, 0)
        for r in range(rows):
            for j in range(d):
                beyond[r, j] += dc[r, j] * cp[r, j] + dn[r, j] * np_[r, j]
        _store(dh, dstate[0], b0, n)
        _store(dc, dstate[1], b0, n)
        _store(dn, dstate[2], b0, n)
        _store(beyond, dstate[3], b0, n)


@kernel(fastmath=FASTMATH)
def _lem_forward(gates, w, extra, keep, options, reverse, rows, state, y, saved):
    batch, steps, heads, d = y.shape
    one, dt = y.dtype.type(1), y.dtype.type(options[0])
    blocks = (batch + rows - 1) // rows
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        h, c, z = np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype), np.zeros((rows, 4 * d), y.dtype)
        _load(state[0], b0, n, h)
        _load(state[1], b0, n, c)
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            _refresh(h, keep, b0, t, 0)
            _refresh(c, keep, b0, t, 0)
            _gather(gates, b0, t, n, z, 0)
            _product(h, 0, w[n], 0, d, z, 0, 3 * d)
            _sigmoid(z, 0, 2 * d)
            for r in range(rows):
                for j in range(2 * d):
                    z[r, j] *= dt
                for j in range(2 * d, 3 * d):
                    z[r, j] = tanh(z[r, j])
                for j in range(d):
                    c[r, j] = (one - z[r, j]) * c[r, j] + z[r, j] * z[r, 2 * d + j]
            _product(c, 0, w[n], 0, d, z, 3 * d, d)
            for r in range(rows):
                for j in range(3 * d, 4 * d):
                    z[r, j] = tanh(z[r, j])
                for j in range(d):
                    h[r, j] = (one - z[r, d + j]) * h[r, j] + z[r, d + j] * z[r, 3 * d + j]
            _scatter_flat(h, y, b0, t, n)
            _scatter(z, 0, 4 * d, saved, b0, t, n, 0)
            _scatter(c, 0, d, saved, b0, t, n, 4)
        _store(h, state[0], b0, n)
        _store(c, state[1], b0, n)


@kernel(fastmath=FASTMATH)
def _lem_backward(dgates, w, extra, keep, options, reverse, rows, dstate, dy, y, saved, state, last):
    batch, steps, heads, d = y.shape
    one, dt = y.dtype.type(1), y.dtype.type(options[0])
    per = one / dt
    blocks = (batch + rows - 1) // rows
    outputs = y.reshape(batch, steps, heads, 1, d)
    for job in prange(heads * blocks):
        n, b0 = job // blocks, job % blocks * rows
        dh, dc, z = np.empty((rows, d), y.dtype), np.empty((rows, d), y.dtype), np.zeros((rows, 4 * d), y.dtype)
        hp, cp = np.zeros((rows, d), y.dtype), np.zeros((rows, d), y.dtype)
        _load(dstate[0], b0, n, dh)
        _load(dstate[1], b0, n, dc)
        for back in range(steps):
            s = steps - 1 - back
            t = steps - 1 - s if reverse else s
            _add(dy, b0, t, n, dh)
            _previous(outputs, state[0], b0, t, n, s, 0, reverse, keep, hp)
            _previous(saved, state[1], b0, t, n, s, 4, reverse, keep, cp)
            for r in range(min(rows, batch - b0)):
                a = saved[b0 + r, t, n]
                for j in range(d):
                    z[r, 3 * d + j] = dh[r, j] * a[1, j] * (one - a[3, j] * a[3, j])
                for j in range(d):
                    z[r, d + j] = dh[r, j] * (a[3, j] - hp[r, j]) * a[1, j] * (one - a[1, j] * per)
                for j in range(d):
                    dh[r, j] *= one - a[1, j]
            _product(z, 3 * d, w[n], 3 * d, d, dc, 0, d)
            for r in range(min(rows, batch - b0)):
                a = saved[b0 + r, t, n]
                for j in range(d):
                    z[r, 2 * d + j] = dc[r, j] * a[0, j] * (one - a[2, j] * a[2, j])
                for j in range(d):
                    z[r, j] = dc[r, j] * (a[2, j] - cp[r, j]) * a[0, j] * (one - a[0, j] * per)
                for j in range(d):
                    dc[r, j] *= one - a[0, j]
            _product(z, 0, w[n], 0, 3 * d, dh, 0, d)
            _scatter_flat(z, dgates, b0, t, n)
            _refresh(dh, keep, b0, t, 0)
            _refresh(dc, keep, b0, t, 0)
        _store(dh, dstate[0], b0, n)
        _store(dc, dstate[1], b0, n)


_FORWARD = {
    "lstm": _lstm_forward,
    "gru": _gru_forward,
    "elman": _elman_forward,
    "slstm": _slstm_forward,
    "lem": _lem_forward,
}
_BACKWARD = {
    "lstm": _lstm_backward,
    "gru": _gru_backward,
    "elman": _elman_backward,
    "slstm": _slstm_backward,
    "lem": _lem_backward,
}
