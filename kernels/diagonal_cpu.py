"""Compiled CPU kernels of `clplat.kernels.diagonal`: whole rows of D, one after the other in memory, in float32 or 64.

A job is one batch element (cut in slabs of channels where there are fewer of them than threads); it owns all its steps,
so threads never wait for one another. Loops over a row write few arrays each: LLVM gives up vectorising a loop that
needs many checks for overlap. They are compiled without the assumption that there are no NaNs or infinities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from clplat.kernels.numba_cache import njit
from clplat.kernels.numba_math import FASTMATH, exp, expm1, number, sigmoid
from clplat.kernels.threads import Kernel, kernel, threads_worth

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": FASTMATH,
    "error_model": "numpy",
    "forceinline": True,
}
"""Python's error model tests each divisor for zero, and what can raise is not vectorised.

All code of a kernel is in the kernel: a function that it calls would be the one compiled beside it in the process that
compiles it, and the kernel's own copy in those that read the cache; the two may round differently.
"""
MODES = {"min_gru": 1, "min_lstm": 2, "rg_lru": 3, "hgrn": 4}
SERIAL_BELOW = 65_536
"""Elements below which a team of threads costs more than it saves."""
WIDEST_SLAB = 4096
"""Channels a job works on: several rows of scratch stay in the first two caches."""


@njit(**OPTIONS)
def _share(f: Any, i: Any) -> Any:
    """sigmoid(f) / (sigmoid(f) + sigmoid(i)); with arguments swapped it is the rest to 1."""
    zero = number(0, f)
    low = f if f < i else i
    low = low if low < zero else zero
    e = exp(low)
    p, q = e + exp(low - i), e + exp(low - f)
    return p / (p + q)


@njit(**OPTIONS)
def _scan_forward_job(
    job: int, slabs: int, width: int, a: Any, b: Any, constant: bool, initial: Any, keep: Any, flags: Any, h: Any
) -> None:
    has_initial, has_keep, reverse = flags[0], flags[1], flags[2]
    steps, channels = b.shape[1:]
    row, lo = job // slabs, (job % slabs) * width
    hi = min(channels, lo + width)
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        out, added = h[row, t, lo:hi], b[row, t, lo:hi]
        if (i == 0 and not has_initial) or (has_keep and not keep[row, t]):
            for d in range(hi - lo):
                out[d] = added[d]
        else:
            decay = a[0, 0, lo:hi] if constant else a[row, t, lo:hi]
            before = initial[row, lo:hi] if i == 0 else h[row, t + 1 if reverse else t - 1, lo:hi]
            for d in range(hi - lo):
                out[d] = decay[d] * before[d] + added[d]


@njit(**OPTIONS)
def _scan_backward_job(
    job: int,
    slabs: int,
    width: int,
    a: Any,
    constant: bool,
    initial: Any,
    keep: Any,
    flags: Any,
    h: Any,
    dh: Any,
    carried: Any,
    da: Any,
    db: Any,
) -> None:
    """`carried` [B, D] enters as the final state's gradient and leaves as the initial state's."""
    has_initial, has_keep, reverse = flags[0], flags[1], flags[2]
    steps, channels = h.shape[1:]
    row, lo = job // slabs, (job % slabs) * width
    hi = min(channels, lo + width)
    s = carried[row, lo:hi]
    for i in range(steps - 1, -1, -1):
        t = steps - 1 - i if reverse else i
        g, given = db[row, t, lo:hi], dh[row, t, lo:hi]
        for d in range(hi - lo):
            g[d] = given[d] + s[d]
        to = da[row, 0, lo:hi] if constant else da[row, t, lo:hi]
        if (i == 0 and not has_initial) or (has_keep and not keep[row, t]):
            for d in range(hi - lo):
                s[d] = 0
            if not constant:
                for d in range(hi - lo):
                    to[d] = 0
            continue
        decay = a[0, 0, lo:hi] if constant else a[row, t, lo:hi]
        before = initial[row, lo:hi] if i == 0 else h[row, t + 1 if reverse else t - 1, lo:hi]
        if constant:
            for d in range(hi - lo):
                to[d] += g[d] * np.conj(before[d])
                s[d] = g[d] * np.conj(decay[d])
        else:
            for d in range(hi - lo):
                to[d] = g[d] * np.conj(before[d])
                s[d] = g[d] * np.conj(decay[d])


@njit(**OPTIONS)
def _gated_forward_job(
    job: int,
    slabs: int,
    width: int,
    mode: int,
    x: Any,
    y: Any,
    z: Any,
    w: Any,
    initial: Any,
    keep: Any,
    flags: Any,
    h: Any,
) -> None:
    has_initial, has_keep, reverse = flags[0], flags[1], flags[2]
    steps, channels = h.shape[1:]
    row, lo = job // slabs, (job % slabs) * width
    n = min(channels, lo + width) - lo
    hi = lo + n
    one = number(1, w[0])
    zeros = np.zeros(n, h.dtype)
    v = w[lo:hi]
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        fresh = (i == 0 and not has_initial) or (has_keep and not keep[row, t])
        out, p, q, r = h[row, t, lo:hi], x[row, t, lo:hi], y[row, t, lo:hi], z[row, t, lo:hi]
        before = h[row, t + 1 if reverse else t - 1, lo:hi] if i else initial[row, lo:hi]
        if fresh:
            before = zeros
        if mode == 1:
            for d in range(n):
                out[d] = sigmoid(-p[d]) * before[d] + sigmoid(p[d]) * q[d]
        elif mode == 2:
            for d in range(n):
                out[d] = _share(p[d], q[d]) * before[d] + _share(q[d], p[d]) * r[d]
        elif mode == 3 and fresh:
            for d in range(n):
                out[d] = sigmoid(q[d]) * r[d]
        elif mode == 3:
            for d in range(n):
                log_a = -sigmoid(p[d]) * v[d]
                out[d] = exp(log_a) * before[d] + np.sqrt(-expm1(log_a + log_a)) * sigmoid(q[d]) * r[d]
        else:
            for d in range(n):
                open_ = (one - v[d]) * sigmoid(-p[d])
                kept = v[d] + (one - v[d]) * sigmoid(p[d])
                out[d] = kept * before[d] + open_ * q[d] * sigmoid(q[d])


@njit(**OPTIONS)
def _gated_backward_job(
    job: int,
    slabs: int,
    width: int,
    mode: int,
    x: Any,
    y: Any,
    z: Any,
    w: Any,
    initial: Any,
    keep: Any,
    flags: Any,
    slope: Any,
    h: Any,
    dh: Any,
    carried: Any,
    dx: Any,
    dy: Any,
    dz: Any,
    dw: Any,
) -> None:
    """`carried` as above; `dw` [B, D] starts at zero; `slope` is half the inverse of the square root's steepest slope."""
    has_initial, has_keep, reverse = flags[0], flags[1], flags[2]
    steps, channels = h.shape[1:]
    row, lo = job // slabs, (job % slabs) * width
    n = min(channels, lo + width) - lo
    hi = lo + n
    one = number(1, w[0])
    zeros = np.zeros(n, h.dtype)
    scratch = np.empty((5, n), h.dtype)
    g, k1, k2, k3, k4 = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    s, v, to_w = carried[row, lo:hi], w[lo:hi], dw[row, lo:hi]
    for i in range(steps - 1, -1, -1):
        t = steps - 1 - i if reverse else i
        fresh = (i == 0 and not has_initial) or (has_keep and not keep[row, t])
        p, q, r = x[row, t, lo:hi], y[row, t, lo:hi], z[row, t, lo:hi]
        to_p, to_q, to_r = dx[row, t, lo:hi], dy[row, t, lo:hi], dz[row, t, lo:hi]
        before = h[row, t + 1 if reverse else t - 1, lo:hi] if i else initial[row, lo:hi]
        if fresh:
            before = zeros
        given = dh[row, t, lo:hi]
        for d in range(n):
            g[d] = given[d] + s[d]
        if mode == 1:
            for d in range(n):
                k1[d] = sigmoid(p[d])
                k2[d] = sigmoid(-p[d])
            for d in range(n):
                to_p[d] = g[d] * (q[d] - before[d]) * k1[d] * k2[d]
            for d in range(n):
                to_q[d] = g[d] * k1[d]
                s[d] = g[d] * k2[d]
        elif mode == 2:
            for d in range(n):
                k1[d] = _share(p[d], q[d])
                k2[d] = _share(q[d], p[d])
            for d in range(n):
                k3[d] = g[d] * (before[d] - r[d]) * k1[d] * k2[d]
            for d in range(n):
                to_p[d] = k3[d] * sigmoid(-p[d])
            for d in range(n):
                to_q[d] = -k3[d] * sigmoid(-q[d])
            for d in range(n):
                to_r[d] = g[d] * k2[d]
                s[d] = g[d] * k1[d]
        elif mode == 3 and fresh:
            for d in range(n):
                k1[d] = g[d] * sigmoid(q[d])
                to_p[d] = 0
            for d in range(n):
                to_r[d] = k1[d]
                to_q[d] = k1[d] * r[d] * sigmoid(-q[d])
        elif mode == 3:
            for d in range(n):
                log_a = -sigmoid(p[d]) * v[d]
                k1[d] = exp(log_a)
                k2[d] = np.sqrt(-expm1(log_a + log_a))
            for d in range(n):
                k3[d] = g[d] * sigmoid(q[d])
            for d in range(n):
                to_r[d] = k3[d] * k2[d]
                to_q[d] = k3[d] * k2[d] * r[d] * sigmoid(-q[d])
            for d in range(n):
                k4[d] = k1[d] * (g[d] * before[d] - k1[d] * k3[d] * r[d] / max(k2[d], slope))
            for d in range(n):
                k3[d] = sigmoid(p[d]) * k4[d]
            for d in range(n):
                to_p[d] = -v[d] * k3[d] * sigmoid(-p[d])
            for d in range(n):
                to_w[d] -= k3[d]
                s[d] = k1[d] * g[d]
        else:
            for d in range(n):
                k1[d] = sigmoid(p[d])
                k2[d] = sigmoid(-p[d])
            for d in range(n):
                k3[d] = sigmoid(q[d])
                k4[d] = g[d] * k2[d] * (before[d] - q[d] * k3[d])
            for d in range(n):
                to_w[d] += k4[d]
                to_p[d] = k4[d] * (one - v[d]) * k1[d]
            for d in range(n):
                to_q[d] = g[d] * (one - v[d]) * k2[d] * k3[d] * (one + q[d] * (one - k3[d]))
            for d in range(n):
                s[d] = g[d] * (v[d] + (one - v[d]) * k1[d])
        if fresh:
            for d in range(n):
                s[d] = 0


@kernel()
def _scan_forward(jobs: int, args: Any) -> None:
    for job in prange(jobs):
        _scan_forward_job(job, *args)


@kernel()
def _scan_backward(jobs: int, args: Any) -> None:
    for job in prange(jobs):
        _scan_backward_job(job, *args)


@kernel()
def _gated_forward(jobs: int, args: Any) -> None:
    for job in prange(jobs):
        _gated_forward_job(job, *args)


@kernel()
def _gated_backward(jobs: int, args: Any) -> None:
    for job in prange(jobs):
        _gated_backward_job(job, *args)


def forward(
    mode: str, inputs: list[Tensor], weight: Tensor | None, initial: Tensor | None, keep: Tensor | None, reverse: bool
) -> Tensor:
    """h [B, T, D] of inputs [B, T, D] that are all float32, float64, or (scans) complex64 or complex128."""
    b, t, d = inputs[0].shape
    h = torch.empty((b, t, d), dtype=inputs[0].dtype)
    flags, start, kept = _edges(inputs[0], initial, keep, reverse)
    if mode in ("scan", "constant"):
        a = inputs[0] if weight is None else weight[None, None]
        args = (_array(a), _array(inputs[-1]), weight is not None, start, kept, flags, _array(h))
        _launch(_scan_forward, b, t, d, args)
    else:
        x, y, z, w = _padded(inputs, weight)
        args = (MODES[mode], x, y, z, w, start, kept, flags, _array(h))
        _launch(_gated_forward, b, t, d, args)
    return h


def backward(
    mode: str,
    inputs: list[Tensor],
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dlast: Tensor,
    reverse: bool,
    slope_limit: float,
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Gradients by the inputs, by the weight (a row for each batch element [B, D]), and by the initial state."""
    b, t, d = h.shape
    flags, start, kept = _edges(h, initial, keep, reverse)
    carried = dlast.clone(memory_format=torch.contiguous_format)
    dinputs = [torch.empty((b, t, d), dtype=h.dtype) for _ in inputs]
    dweight = None if weight is None else torch.zeros((b, d), dtype=h.dtype)
    if mode in ("scan", "constant"):
        a = inputs[0] if weight is None else weight[None, None]
        da = dinputs[0] if dweight is None else dweight[:, None]
        made = (_array(da), _array(dinputs[-1]))
        args = (_array(a), weight is not None, start, kept, flags, _array(h), _array(dh), _array(carried), *made)
        _launch(_scan_backward, b, t, d, args)
    else:
        x, y, z, w = _padded(inputs, weight)
        dx, dy, dz, dw = _padded(dinputs, torch.zeros((b, d), dtype=h.dtype) if dweight is None else dweight)
        slope = x.dtype.type(0.5 / slope_limit)
        tail = (slope, _array(h), _array(dh), _array(carried), dx, dy, dz, dw)
        args = (MODES[mode], x, y, z, w, start, kept, flags, *tail)
        _launch(_gated_backward, b, t, d, args)
    return dinputs, dweight, carried


def _launch(compiled: Kernel, b: int, t: int, d: int, args: tuple[Any, ...]) -> None:
    threads = threads_worth(b * t * d, SERIAL_BELOW)
    slabs = max(-(-threads // max(b, 1)), -(-d // WIDEST_SLAB))
    width = -(-d // (slabs * 16)) * 16
    slabs = -(-d // width)
    compiled(threads, b * slabs, (slabs, width, *args))


def _edges(x: Tensor, initial: Tensor | None, keep: Tensor | None, reverse: bool) -> tuple[Any, Any, Any]:
    """Flags, and arrays in place of what is not given: a kernel has one type for all calls."""
    flags = np.array([initial is not None, keep is not None, reverse])  # loops in parallel take no tuple in a tuple
    start = np.empty((1, 1), _array(x).dtype) if initial is None else _array(initial)
    return flags, start, np.empty((1, 1), np.bool_) if keep is None else _array(keep)


def _padded(inputs: list[Tensor], weight: Tensor | None) -> list[Any]:
    """Three inputs and a weight; the last stand in for those that a mode has not."""
    arrays = [_array(x) for x in inputs]
    arrays += [arrays[-1]] * (3 - len(arrays))
    return [*arrays, np.empty(inputs[0].shape[-1], arrays[0].dtype) if weight is None else _array(weight)]


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()
