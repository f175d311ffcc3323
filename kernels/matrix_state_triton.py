"""Triton kernels of `clplat.kernels.matrix_state`: chunks of steps, and the state from chunk to chunk in float32.

Four kernels: `states` (one program a head and tile of the state, in order of time) writes the state at the start of
every chunk, `outputs` (one a chunk) reads it; backward, `states` runs again, `gradient_states` against time, and
`gradients_v` and `gradients_qk` take all chunks side by side.

A decay between two steps is the exponential of a sum of gates that starts from nothing: a difference of two running
sums would lose what a strong decay leaves of its digits, and no exponent is positive. For a scalar gate the sums are
one matrix of steps by steps; a vector gate has halves of blocks of 2, 4, 8 and 16 steps, where the decay from the left
half to the right one is the product of that to the middle and that from there.

Products that are needed in both orientations are computed twice: transposing the result of a product is miscompiled
for Hopper by Triton 3.4 to 3.7. For the same reason operands are loaded in the orientation that they are used in.
"""

# A kernel's constants choose its branches and tensors stand for constants while it compiles, which pyright cannot see:
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.triton_support import Compilation, dot_dtype

STEPS, VECTOR_STEPS = 32, 16
"""Steps a chunk, for scalar and vector gates: no Triton release miscompiles products of these sizes for Hopper, and
more steps of a vector gate do not fit in registers."""
WIDEST = 32
"""Width of a tile at most."""
LEAST: tl.constexpr = tl.constexpr(-1e4)
"""Gates are no less within products by masks, where -inf times 0 would be NaN: exp(-1e4) is 0 just as well."""


@triton.jit
def _level(i, t, size):
    """Whether steps i and t lie in one half block of `size` steps."""
    return (i // size) == (t // size)


@triton.jit
def _crossing(i, j, size):
    """Whether i lies in the right half of a block of 2 * size steps and j in its left one."""
    return ((i // (2 * size)) == (j // (2 * size))) & ((i // size) % 2 == 1) & ((j // size) % 2 == 0)


@triton.jit
def _since_start(g, size, BT: tl.constexpr):
    """exp of the gates [BT, BK] from the start of each step's half block up to it."""
    i, t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    mask = tl.where(_level(i, t, size) & (t <= i), 1.0, 0.0)
    return tl.exp(tl.dot(mask, g, input_precision="ieee"))


@triton.jit
def _to_end(g, size, BT: tl.constexpr):
    """exp of the gates [BT, BK] after each step up to the end of its half block."""
    i, t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    mask = tl.where(_level(i, t, size) & (t > i), 1.0, 0.0)
    return tl.exp(tl.dot(mask, g, input_precision="ieee"))


@triton.jit
def _since_start_t(g, size, BT: tl.constexpr):
    """`_since_start` of gates [BK, BT], in that orientation."""
    t, i = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    mask = tl.where(_level(i, t, size) & (t <= i), 1.0, 0.0)
    return tl.exp(tl.dot(g, mask, input_precision="ieee"))


@triton.jit
def _to_end_t(g, size, BT: tl.constexpr):
    """`_to_end` of gates [BK, BT], in that orientation."""
    t, i = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    mask = tl.where(_level(i, t, size) & (t > i), 1.0, 0.0)
    return tl.exp(tl.dot(g, mask, input_precision="ieee"))


@triton.jit
def from_start(g, BT: tl.constexpr):
    """exp of scalar gates [BT] from the chunk's start up to each step."""
    i, t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.exp(tl.sum(tl.where(t <= i, g[None, :], 0.0), 1))


@triton.jit
def to_chunk_end(g, BT: tl.constexpr):
    """exp of scalar gates [BT] after each step up to the chunk's end."""
    j, t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.exp(tl.sum(tl.where(t > j, g[None, :], 0.0), 1))


@triton.jit
def spans(g, BT: tl.constexpr):
    """W [BT, BT], W_ij = exp(g_{j+1} + ... + g_i) for j <= i and 0 above, of scalar gates [BT]."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    parts = tl.where(i > j, tl.maximum(g, LEAST)[:, None], 0.0)
    return tl.where(i >= j, tl.exp(tl.dot(tl.where(i >= j, 1.0, 0.0), parts, input_precision="ieee")), 0.0)


@triton.jit
def spans_t(g, BT: tl.constexpr):
    """`spans` with rows j and columns i."""
    j, i = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    parts = tl.where(i > j, tl.maximum(g, LEAST)[None, :], 0.0)
    return tl.where(i >= j, tl.exp(tl.dot(parts, tl.where(i >= j, 1.0, 0.0), input_precision="ieee")), 0.0)


@triton.jit
def load_tile(base, rows, row_stride, columns, m):
    """float32 tile [rows, columns] of contiguous columns, 0 outside of the mask."""
    return tl.load(base + rows * row_stride + columns, mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def states(
    k, v, gate, s0, found, T, N, K, V, gb, gt, gn,
    VECTOR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The state at the start of every chunk and after the last: found [B N, chunks + 1, K, V]."""
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    ok, ov = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    tile, inside = ok[:, None] * V + ov[None, :], (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(s0 + row * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    chunks = (T + BT - 1) // BT
    to = found + row * (chunks + 1) * K * V + tile
    for c in range(chunks):
        tl.store(to, s, mask=inside)
        to += K * V
        t = (c * BT + r).to(tl.int64)
        at = (b * T + t) * N + n
        kt = tl.load(k + at[None, :] * K + ok[:, None], mask=(t < T)[None, :] & (ok < K)[:, None], other=0.0)
        vs = load_tile(v, at[:, None], V, ov[None, :], (t < T)[:, None] & (ov < V)[None, :])
        pg = gate + b * gb + t * gt + n * gn
        if VECTOR:
            inside_t = (t < T)[None, :] & (ok < K)[:, None]
            g = tl.maximum(tl.load(pg[None, :] + ok[:, None], mask=inside_t, other=0.0).to(tl.float32), LEAST)
            end = _to_end_t(g, BT, BT)
            whole = tl.exp(tl.sum(g, 1))[:, None]
        else:
            g = tl.load(pg, mask=t < T, other=0.0).to(tl.float32)
            end = to_chunk_end(g, BT)[None, :]
            whole = tl.exp(tl.sum(g, 0))
        new = tl.dot((kt.to(tl.float32) * end).to(DOT), vs.to(DOT), input_precision="ieee")
        s = tl.where(whole == 0.0, 0.0, whole * s) + new
    tl.store(to, s, mask=inside)


@triton.jit(do_not_specialize=["T"])
def outputs(
    q, k, v, gate, found, o, T, N, K, V, gb, gt, gn,
    VECTOR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """o [B, T, N, V] from the states at the starts of chunks."""
    chunks = (T + BT - 1) // BT
    row, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    i, j = r[:, None], r[None, :]
    t = (c * BT + r).to(tl.int64)
    at = (b * T + t) * N + n
    ov = tl.program_id(1) * BV + tl.arange(0, BV)
    pg = gate + b * gb + t * gt + n * gn
    past, pairs = tl.full([BT, BV], 0.0, tl.float32), tl.full([BT, BT], 0.0, tl.float32)
    reached = tl.full([BT], 0.0, tl.float32)
    if not VECTOR:
        scalar = tl.load(pg, mask=t < T, other=0.0).to(tl.float32)
        begin = from_start(scalar, BT)
        reached = begin
    for first in range(0, K, BK):
        ok = first + tl.arange(0, BK)
        mk = (t < T)[:, None] & (ok < K)[None, :]
        mkt = (t < T)[None, :] & (ok < K)[:, None]
        qs = load_tile(q, at[:, None], K, ok[None, :], mk)
        kt = tl.load(k + at[None, :] * K + ok[:, None], mask=mkt, other=0.0).to(tl.float32)
        s = tl.load(
            found + (row * (chunks + 1) + c) * K * V + ok[:, None] * V + ov[None, :],
            mask=(ok < K)[:, None] & (ov < V)[None, :],
            other=0.0,
        )
        if VECTOR:
            g = tl.maximum(tl.load(pg[:, None] + ok[None, :], mask=mk, other=0.0).to(tl.float32), LEAST)
            h = tl.maximum(tl.load(pg[None, :] + ok[:, None], mask=mkt, other=0.0).to(tl.float32), LEAST)
            start = _since_start(g, BT, BT)
            reached = tl.maximum(reached, tl.max(tl.where((ok < K)[None, :], start, 0.0), 1))
            pairs += tl.where(i == j, tl.dot(qs.to(DOT), kt.to(DOT), input_precision="ieee"), 0.0)
            for level in range(LEVELS):
                queries = (qs * _since_start(g, 1 << level, BT)).to(DOT)
                keys = (kt * _to_end_t(h, 1 << level, BT)).to(DOT)
                pairs += tl.where(_crossing(i, j, 1 << level), tl.dot(queries, keys, input_precision="ieee"), 0.0)
        else:
            start = begin[:, None]
            pairs += tl.dot(qs.to(DOT), kt.to(DOT), input_precision="ieee")
        past += tl.dot((qs * start).to(DOT), s.to(DOT), input_precision="ieee")
    if not VECTOR:
        pairs *= spans(scalar, BT)
    past = tl.where((reached == 0.0)[:, None], 0.0, past)
    mv = (t < T)[:, None] & (ov < V)[None, :]
    vs = load_tile(v, at[:, None], V, ov[None, :], mv)
    past += tl.dot(pairs.to(DOT), vs.to(DOT), input_precision="ieee")
    tl.store(o + at[:, None] * V + ov[None, :], past.to(o.dtype.element_ty), mask=mv)


@triton.jit(do_not_specialize=["T"])
def gradient_states(
    q, gate, do, ds, found, ds0, T, N, K, V, gb, gt, gn,
    VECTOR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after every chunk, found [B N, chunks, K, V], and of the initial one."""
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    ok, ov = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    tile, inside = ok[:, None] * V + ov[None, :], (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(ds + row * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    chunks = (T + BT - 1) // BT
    to = found + (row * chunks + chunks - 1) * K * V + tile
    for step in range(chunks):
        tl.store(to, s, mask=inside)
        to -= K * V
        t = ((chunks - 1 - step) * BT + r).to(tl.int64)
        at = (b * T + t) * N + n
        mkt = (t < T)[None, :] & (ok < K)[:, None]
        qt = tl.load(q + at[None, :] * K + ok[:, None], mask=mkt, other=0.0).to(tl.float32)
        os = load_tile(do, at[:, None], V, ov[None, :], (t < T)[:, None] & (ov < V)[None, :])
        pg = gate + b * gb + t * gt + n * gn
        if VECTOR:
            g = tl.maximum(tl.load(pg[None, :] + ok[:, None], mask=mkt, other=0.0).to(tl.float32), LEAST)
            start = _since_start_t(g, BT, BT)
            whole = tl.exp(tl.sum(g, 1))[:, None]
        else:
            g = tl.load(pg, mask=t < T, other=0.0).to(tl.float32)
            start = from_start(g, BT)[None, :]
            whole = tl.exp(tl.sum(g, 0))
        s = whole * s + tl.dot((qt * start).to(DOT), os.to(DOT), input_precision="ieee")
    tl.store(ds0 + row * K * V + tile, s, mask=inside)


@triton.jit(do_not_specialize=["T"])
def gradients_v(
    q, k, gate, do, after, dv, T, N, K, V, gb, gt, gn,
    VECTOR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dv [B, T, N, V] from the gradients of the states after chunks."""
    chunks = (T + BT - 1) // BT
    row, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    j, i = r[:, None], r[None, :]
    t = (c * BT + r).to(tl.int64)
    at = (b * T + t) * N + n
    ov = tl.program_id(1) * BV + tl.arange(0, BV)
    pg = gate + b * gb + t * gt + n * gn
    found, pairs = tl.full([BT, BV], 0.0, tl.float32), tl.full([BT, BT], 0.0, tl.float32)
    if not VECTOR:
        scalar = tl.load(pg, mask=t < T, other=0.0).to(tl.float32)
        final = to_chunk_end(scalar, BT)
    for first in range(0, K, BK):
        ok = first + tl.arange(0, BK)
        mk = (t < T)[:, None] & (ok < K)[None, :]
        mkt = (t < T)[None, :] & (ok < K)[:, None]
        ks = load_tile(k, at[:, None], K, ok[None, :], mk)
        qt = tl.load(q + at[None, :] * K + ok[:, None], mask=mkt, other=0.0).to(tl.float32)
        s = tl.load(
            after + (row * chunks + c) * K * V + ok[:, None] * V + ov[None, :],
            mask=(ok < K)[:, None] & (ov < V)[None, :],
            other=0.0,
        )
        if VECTOR:
            g = tl.maximum(tl.load(pg[:, None] + ok[None, :], mask=mk, other=0.0).to(tl.float32), LEAST)
            h = tl.maximum(tl.load(pg[None, :] + ok[:, None], mask=mkt, other=0.0).to(tl.float32), LEAST)
            end = _to_end(g, BT, BT)
            pairs += tl.where(i == j, tl.dot(ks.to(DOT), qt.to(DOT), input_precision="ieee"), 0.0)
            for level in range(LEVELS):
                keys = (ks * _to_end(g, 1 << level, BT)).to(DOT)
                queries = (qt * _since_start_t(h, 1 << level, BT)).to(DOT)
                pairs += tl.where(_crossing(i, j, 1 << level), tl.dot(keys, queries, input_precision="ieee"), 0.0)
        else:
            end = final[:, None]
            pairs += tl.dot(ks.to(DOT), qt.to(DOT), input_precision="ieee")
        found += tl.dot((ks * end).to(DOT), s.to(DOT), input_precision="ieee")
    if not VECTOR:
        pairs *= spans_t(scalar, BT)
    mv = (t < T)[:, None] & (ov < V)[None, :]
    os = load_tile(do, at[:, None], V, ov[None, :], mv)
    found += tl.dot(pairs.to(DOT), os.to(DOT), input_precision="ieee")
    tl.store(dv + at[:, None] * V + ov[None, :], found.to(dv.dtype.element_ty), mask=mv)


@triton.jit(do_not_specialize=["T"])
def gradients_qk(
    q, k, v, gate, do, before, after, dq, dk, dgate, T, B, N, K, V, gb, gt, gn,
    VECTOR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dq and dk [B, T, N, K], and dgate: [B, T, N, K] float32, or of a scalar gate [blocks of K, B, T, N] to be summed.

    A gate's gradient is the sum of those of all spans of steps that it lies in, with no difference of sums.
    """
    chunks = (T + BT - 1) // BT
    row, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    i, j = r[:, None], r[None, :]
    t = (c * BT + r).to(tl.int64)
    at = (b * T + t) * N + n
    ok = tl.program_id(1) * BK + tl.arange(0, BK)
    mk = (t < T)[:, None] & (ok < K)[None, :]
    mkt = (t < T)[None, :] & (ok < K)[:, None]
    inner, inner_t = tl.full([BT, BT], 0.0, tl.float32), tl.full([BT, BT], 0.0, tl.float32)
    by_past, by_later = tl.full([BT, BK], 0.0, tl.float32), tl.full([BT, BK], 0.0, tl.float32)
    through = tl.full([BK], 0.0, tl.float32)
    for first in range(0, V, BV):
        ov = first + tl.arange(0, BV)
        mv, mvt = (t < T)[:, None] & (ov < V)[None, :], (t < T)[None, :] & (ov < V)[:, None]
        os, vs = (
            load_tile(do, at[:, None], V, ov[None, :], mv).to(DOT),
            load_tile(v, at[:, None], V, ov[None, :], mv).to(DOT),
        )
        ot = tl.load(do + at[None, :] * V + ov[:, None], mask=mvt, other=0.0).to(tl.float32).to(DOT)
        vt = tl.load(v + at[None, :] * V + ov[:, None], mask=mvt, other=0.0).to(tl.float32).to(DOT)
        tile, inside = ok[None, :] * V + ov[:, None], (ok < K)[None, :] & (ov < V)[:, None]
        s = tl.load(before + (row * (chunks + 1) + c) * K * V + tile, mask=inside, other=0.0)
        ds = tl.load(after + (row * chunks + c) * K * V + tile, mask=inside, other=0.0)
        inner += tl.dot(os, vt, input_precision="ieee")
        inner_t += tl.dot(vs, ot, input_precision="ieee")
        by_past += tl.dot(os, s.to(DOT), input_precision="ieee")
        by_later += tl.dot(vs, ds.to(DOT), input_precision="ieee")
        through += tl.sum(s * ds, 0)
    qs, ks = load_tile(q, at[:, None], K, ok[None, :], mk), load_tile(k, at[:, None], K, ok[None, :], mk)
    pg = gate + b * gb + t * gt + n * gn
    if VECTOR:
        g = tl.maximum(tl.load(pg[:, None] + ok[None, :], mask=mk, other=0.0).to(tl.float32), LEAST)
        start, end = _since_start(g, BT, BT), _to_end(g, BT, BT)
        whole = tl.exp(tl.sum(g, 0))
        through = tl.where(whole == 0.0, 0.0, whole * through)
        found_q, found_k = tl.where(start == 0.0, 0.0, start * by_past), end * by_later
        slope = tl.dot(tl.where(j >= i, 1.0, 0.0), qs * found_q, input_precision="ieee") + through[None, :]
        slope += tl.dot(tl.where(j < i, 1.0, 0.0), ks * found_k, input_precision="ieee")
        same = tl.sum(tl.where(i == j, inner, 0.0), 1)[:, None]
        found_q += same * ks
        found_k += same * qs
        for level in range(LEVELS):
            right, left = _since_start(g, 1 << level, BT), _to_end(g, 1 << level, BT)
            pair, pair_t = _crossing(i, j, 1 << level), _crossing(j, i, 1 << level)
            queries, keys = qs * right, ks * left
            x = tl.dot(tl.where(pair, inner, 0.0).to(DOT), keys.to(DOT), input_precision="ieee")
            y = tl.dot(tl.where(pair_t, inner_t, 0.0).to(DOT), queries.to(DOT), input_precision="ieee")
            found_q += right * x
            found_k += left * y
            near = _level(i, j, 1 << level)
            slope += tl.dot(tl.where(near & (j >= i), 1.0, 0.0), queries * x, input_precision="ieee")
            slope += tl.dot(tl.where(near & (j < i), 1.0, 0.0), keys * y, input_precision="ieee")
        tl.store(dgate + at[:, None] * K + ok[None, :], slope, mask=mk)
    else:
        g = tl.load(pg, mask=t < T, other=0.0).to(tl.float32)
        start, end = from_start(g, BT)[:, None], to_chunk_end(g, BT)[:, None]
        whole = tl.exp(tl.sum(g, 0))
        found_q, found_k = tl.where(start == 0.0, 0.0, start * by_past), end * by_later
        slope = tl.sum(tl.where(j >= i, tl.sum(qs * found_q, 1)[None, :], 0.0), 1)
        slope += tl.where(whole == 0.0, 0.0, whole * tl.sum(through, 0))
        slope += tl.sum(tl.where(j < i, tl.sum(ks * found_k, 1)[None, :], 0.0), 1)
        inner *= spans(g, BT)
        inner_t *= spans_t(g, BT)
        kt = tl.load(k + at[None, :] * K + ok[:, None], mask=mkt, other=0.0).to(tl.float32)
        pairs = inner * tl.dot(qs.to(DOT), kt.to(DOT), input_precision="ieee")
        sums = tl.dot(tl.where(j >= i, 1.0, 0.0), pairs, input_precision="ieee")
        slope += tl.sum(tl.where(j < i, sums, 0.0), 1)
        found_q += tl.dot(inner.to(DOT), ks.to(DOT), input_precision="ieee")
        found_k += tl.dot(inner_t.to(DOT), qs.to(DOT), input_precision="ieee")
        tl.store(dgate + tl.program_id(1) * (B * T * N).to(tl.int64) + at, slope, mask=t < T)
    tl.store(dq + at[:, None] * K + ok[None, :], found_q.to(dq.dtype.element_ty), mask=mk)
    tl.store(dk + at[:, None] * K + ok[None, :], found_k.to(dk.dtype.element_ty), mask=mk)


def steps(gate: Tensor) -> int:
    """Steps a chunk for gates [..., 1 or K]."""
    return VECTOR_STEPS if gate.shape[3] > 1 else STEPS


def block(width: int) -> int:
    """Width of a tile over `width` features; twice the widest does not fit in registers where rows are not aligned."""
    return max(16, min(WIDEST, triton.next_power_of_2(width)))


def forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, T, N, V] and the final state, for gate [1 or B, T, 1 or N, 1 or K]."""
    q, k, v, gate, s = _ready(q, k, v, gate, s)
    found = _states(k, v, gate, s)
    o = torch.empty_like(v)
    grid = (q.shape[0] * q.shape[2] * (found.shape[2] - 1), triton.cdiv(v.shape[3], block(v.shape[3])))
    launch(outputs, grid, q, k, v, gate, found, o, *_sizes(q, v, gate), **_leveled(q, v, gate))
    return o, found[:, :, -1].clone()


def backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor, do: Tensor, ds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate and the initial state."""
    shape, kind = gate.shape, gate.dtype
    q, k, v, gate, s = _ready(q, k, v, gate, s)
    do, ds = do.contiguous(), ds.contiguous()
    vector = gate.shape[-1] > 1
    before = _states(k, v, gate, s)
    rows, chunks = q.shape[0] * q.shape[2], before.shape[2] - 1
    after = before.new_empty((q.shape[0], q.shape[2], chunks, *s.shape[2:]))
    ds0 = torch.empty_like(s)
    across_k, across_v = (
        triton.cdiv(q.shape[3], block(q.shape[3])),
        triton.cdiv(v.shape[3], block(v.shape[3])),
    )
    sizes, options = _sizes(q, v, gate), _options(q, v, gate)
    launch(gradient_states, (rows, across_k, across_v), q, gate, do, ds, after, ds0, *sizes, **options)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launch(gradients_v, (rows * chunks, across_v), q, k, gate, do, after, dv, *sizes, **_leveled(q, v, gate))
    dgate = s.new_empty(q.shape if vector else (across_k, *q.shape[:3]))
    launch(
        gradients_qk,
        (rows * chunks, across_k),
        q,
        k,
        v,
        gate,
        do,
        before,
        after,
        dq,
        dk,
        dgate,
        sizes[0],
        q.shape[0],
        *sizes[1:],
        **_for_gradients(q, v, gate),
    )
    dgate = dgate if vector else dgate.sum(0)[..., None]
    return dq, dk, dv, dgate.sum_to_size(shape).to(kind).contiguous(), ds0


def _ready(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous tensors; the gate keeps its broadcast dimensions, as strides of 0."""
    gate = gate.contiguous().expand(*q.shape[:3], gate.shape[3])
    return q.contiguous(), k.contiguous(), v.contiguous(), gate, s.contiguous()


def _sizes(q: Tensor, v: Tensor, gate: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[2], q.shape[3], v.shape[3], *gate.stride()[:3])


def _options(q: Tensor, v: Tensor, gate: Tensor) -> dict[str, Any]:
    return {
        "VECTOR": gate.shape[3] > 1,
        "BT": steps(gate),
        "BK": block(q.shape[3]),
        "BV": block(v.shape[3]),
        "DOT": dot_dtype(q.dtype),
        "num_warps": 4,
        "num_stages": 1,
    }


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Starts a kernel; untyped, since constants are passed as plain values and declared as `tl.constexpr`."""
    kernel[grid](*arguments, **options)


def _leveled(q: Tensor, v: Tensor, gate: Tensor) -> dict[str, Any]:
    """Options of the kernels that pair steps: with the number of sizes of half blocks in a chunk."""
    return {**_options(q, v, gate), "LEVELS": steps(gate).bit_length() - 1}


def _for_gradients(q: Tensor, v: Tensor, gate: Tensor) -> dict[str, Any]:
    """Options of `gradients_qk`, which accumulates more than the registers of four warps hold."""
    options = {**_leveled(q, v, gate), "num_warps": 8}
    return options if options["VECTOR"] else {**options, "BV": 16}


def _states(k: Tensor, v: Tensor, gate: Tensor, s: Tensor) -> Tensor:
    """[B, N, chunks + 1, K, V]."""
    chunks = triton.cdiv(k.shape[1], steps(gate))
    found = s.new_empty((s.shape[0], s.shape[1], chunks + 1, *s.shape[2:]))
    grid = (
        s.shape[0] * s.shape[1],
        triton.cdiv(k.shape[3], block(k.shape[3])),
        triton.cdiv(v.shape[3], block(v.shape[3])),
    )
    launch(states, grid, k, v, gate, s, found, *_sizes(k, v, gate), **_options(k, v, gate))
    return found


def compilations() -> list[Compilation]:
    """All kernels, for scalar and vector gates, as launched for the widest tiles."""
    found = []
    for kind, dot in (("*bf16", tl.bfloat16), ("*fp32", tl.float32)):
        for vector in (False, True):
            constants = {
                "VECTOR": vector,
                "BT": VECTOR_STEPS if vector else STEPS,
                "BK": WIDEST,
                "BV": WIDEST,
                "DOT": dot,
            }
            for kernel in (states, outputs, gradient_states, gradients_v, gradients_qk):
                names = [n for n in kernel.arg_names if n not in {*constants, *"TBNKV", "gb", "gt", "gn", "LEVELS"}]
                wide = {"s0", "found", "before", "after", "ds", "ds0", "dgate", "gate"}
                pointers = {n: "*fp32" if n in wide else kind for n in names}
                levels = {"LEVELS": 4 if vector else 5} if "LEVELS" in kernel.arg_names else {}
                narrow = {"BV": 16} if kernel is gradients_qk and not vector else {}
                warps = 8 if kernel is gradients_qk else 4
                found.append(Compilation(kernel, pointers, constants | levels | narrow, warps))
    return found
