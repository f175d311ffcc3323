"""Triton kernels of the delta rule in `clplat.kernels.delta`: chunks of steps, and a state in float32 between them.

With the corrections u_t = beta_t (v_t - exp(gate_t) S_{t-1}^T k_t) as values, the delta rule is the recurrence of
`clplat.kernels.matrix_state`, and its outputs are made by that kernel. The corrections of a chunk solve a triangular
system, (I + L) u = beta (v - decayed k S), L_ij = beta_i exp(gate_{j+1} + ... + gate_i) k_i.k_j for j < i.

Four kernels of its own: `inverses` (a program a chunk) makes (I + L)^-1 by forward substitution in float32;
`corrections` (one a head and tile of V, in order of time) makes u and the state at the start of every chunk; backward,
both run again, `gradient_corrections` runs against time and makes the gradients of u, v and the states, and `gradients`
(one a chunk and tile of K) takes what is left. No state's tile is split over K, which limits K to `WIDEST`.

Letters: B batch, T time, N heads, K key width, V value width, BT steps a chunk, BK and BV widths of tiles.
"""

# A kernel's tensors stand for constants while it compiles, which pyright cannot see:
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.matrix_state_triton import (
    from_start,
    launch,
    load_tile,
    outputs,
    spans,
    spans_t,
    to_chunk_end,
)
from clplat.kernels.triton_support import Compilation, dot_dtype

STEPS = 16
"""Steps a chunk: no Triton release miscompiles products of this size for Hopper, and more do not fit in registers."""
WIDEST = 128
"""The greatest K: registers hold all K rows of a program's columns of the state, and what is multiplied by them."""
TILE = 32
"""Width of the tiles of K and V where all chunks run side by side."""


@triton.jit(do_not_specialize=["T"])
def inverses(
    q, k, beta, gate, found, pairs, T, N, K, gb, gt, gn,
    PAIRS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(I + L)^-1 of every chunk: found [B N, chunks, BT, BT].

    If PAIRS, also pairs, of the same shape: k_j.q_i decayed from step j to i, with rows j and columns i >= j.
    """
    chunks = (T + BT - 1) // BT
    row, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    j, i = r[:, None], r[None, :]
    t = (c * BT + r).to(tl.int64)
    at = (b * T + t) * N + n
    # Rows j and columns i: a row of L is then a column, which multiplies the rows of the inverse as it is.
    system, products = tl.full([BT, BT], 0.0, tl.float32), tl.full([BT, BT], 0.0, tl.float32)
    for first in range(0, K, BK):
        ok = first + tl.arange(0, BK)
        ks = load_tile(k, at[:, None], K, ok[None, :], (t < T)[:, None] & (ok < K)[None, :])
        mkt = (t < T)[None, :] & (ok < K)[:, None]
        kt = load_tile(k, at[None, :], K, ok[:, None], mkt)
        system += tl.dot(ks.to(DOT), kt.to(DOT), input_precision="ieee")
        if PAIRS:
            qt = load_tile(q, at[None, :], K, ok[:, None], mkt)
            products += tl.dot(ks.to(DOT), qt.to(DOT), input_precision="ieee")
    g = tl.load(gate + b * gb + t * gt + n * gn, mask=t < T, other=0.0).to(tl.float32)
    share = tl.load(beta + at, mask=t < T, other=0.0).to(tl.float32)
    decay = spans_t(g, BT)
    system = tl.where(j < i, system * decay * share[None, :], 0.0)
    inverse = tl.where(i == j, 1.0, 0.0)
    for step in range(1, BT):
        weights = tl.sum(tl.where(i == step, system, 0.0), 1)
        inverse -= tl.where(j == step, tl.sum(weights[:, None] * inverse, 0)[None, :], 0.0)
    to = ((row * chunks + c) * BT + j) * BT + i
    tl.store(found + to, inverse)
    if PAIRS:
        tl.store(pairs + to, products * decay)


@triton.jit(do_not_specialize=["T"])
def corrections(
    k, v, beta, gate, inverse, s0, u, found, T, N, K, V, gb, gt, gn,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """u [B, T, N, V], and the state at the start of every chunk and after the last: found [B N, chunks + 1, K, V]."""
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    i, j = r[:, None], r[None, :]
    ok, ov = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    tile, inside = ok[:, None] * V + ov[None, :], (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(s0 + row * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    chunks = (T + BT - 1) // BT
    to = found + row * (chunks + 1) * K * V + tile
    for c in range(chunks):
        tl.store(to, s, mask=inside)
        to += K * V
        t = (c * BT + r).to(tl.int64)
        at = (b * T + t) * N + n
        ks = load_tile(k, at[:, None], K, ok[None, :], (t < T)[:, None] & (ok < K)[None, :])
        kt = load_tile(k, at[None, :], K, ok[:, None], (t < T)[None, :] & (ok < K)[:, None])
        mv = (t < T)[:, None] & (ov < V)[None, :]
        vs = load_tile(v, at[:, None], V, ov[None, :], mv)
        share = tl.load(beta + at, mask=t < T, other=0.0).to(tl.float32)
        g = tl.load(gate + b * gb + t * gt + n * gn, mask=t < T, other=0.0).to(tl.float32)
        solve = tl.load(inverse + ((row * chunks + c) * BT + i) * BT + j)
        start, whole = from_start(g, BT)[:, None], tl.exp(tl.sum(g, 0))
        asked = tl.dot(ks.to(DOT), s.to(DOT), input_precision="ieee")
        error = share[:, None] * (vs - tl.where(start == 0.0, 0.0, start * asked))
        us = tl.dot(solve, error, input_precision="ieee")
        tl.store(u + at[:, None] * V + ov[None, :], us, mask=mv)
        new = tl.dot((kt * to_chunk_end(g, BT)[None, :]).to(DOT), us.to(DOT), input_precision="ieee")
        s = tl.where(whole == 0.0, 0.0, whole * s) + new
    tl.store(to, s, mask=inside)


@triton.jit(do_not_specialize=["T"])
def gradient_corrections(
    q, k, beta, gate, inverse, pairs, do, ds, solved, dv, found, ds0, T, N, K, V, gb, gt, gn,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of the right side of each chunk's system, solved [B, T, N, V], and dv [B, T, N, V] by it.

    Also that of the state after every chunk, found [B N, chunks, K, V], and of the initial one.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    r = tl.arange(0, BT)
    j, i = r[:, None], r[None, :]
    ok, ov = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    tile, inside = ok[:, None] * V + ov[None, :], (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(ds + row * K * V + tile, mask=inside, other=0.0).to(tl.float32)
    chunks = (T + BT - 1) // BT
    to = found + (row * chunks + chunks - 1) * K * V + tile
    for step in range(chunks):
        tl.store(to, s, mask=inside)
        to -= K * V
        c = chunks - 1 - step
        t = (c * BT + r).to(tl.int64)
        at = (b * T + t) * N + n
        mkt = (t < T)[None, :] & (ok < K)[:, None]
        ks = load_tile(k, at[:, None], K, ok[None, :], (t < T)[:, None] & (ok < K)[None, :])
        qt = load_tile(q, at[None, :], K, ok[:, None], mkt)
        mv = (t < T)[:, None] & (ov < V)[None, :]
        os = load_tile(do, at[:, None], V, ov[None, :], mv).to(DOT)
        share = tl.load(beta + at, mask=t < T, other=0.0).to(tl.float32)
        g = tl.load(gate + b * gb + t * gt + n * gn, mask=t < T, other=0.0).to(tl.float32)
        corner = (row * chunks + c) * BT * BT
        solve_t, pair = tl.load(inverse + corner + i * BT + j), tl.load(pairs + corner + j * BT + i)
        start, whole = from_start(g, BT)[None, :], tl.exp(tl.sum(g, 0))
        du = tl.dot(pair.to(DOT), os, input_precision="ieee")
        du += tl.dot((ks * to_chunk_end(g, BT)[:, None]).to(DOT), s.to(DOT), input_precision="ieee")
        right = tl.dot(solve_t, du, input_precision="ieee")
        tl.store(solved + at[:, None] * V + ov[None, :], right, mask=mv)
        tl.store(dv + at[:, None] * V + ov[None, :], (share[:, None] * right).to(dv.dtype.element_ty), mask=mv)
        s = whole * s + tl.dot((qt * start).to(DOT), os, input_precision="ieee")
        kt = load_tile(k, at[None, :], K, ok[:, None], mkt)
        s -= tl.dot((kt * (start * share[None, :])).to(DOT), right.to(DOT), input_precision="ieee")
    tl.store(ds0 + row * K * V + tile, s, mask=inside)


@triton.jit(do_not_specialize=["T"])
def gradients(
    q, k, beta, gate, u, do, solved, before, after, dq, dk, dbeta, dgate, T, B, N, K, V, gb, gt, gn,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq and dk [B, T, N, K], and dgate [blocks of K, B, T, N] to be summed, likewise what solved . v exceeds dbeta by.

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
    mk, mkt = (t < T)[:, None] & (ok < K)[None, :], (t < T)[None, :] & (ok < K)[:, None]
    # of the outputs q S and of what the keys ask, k S: within the chunk, in both orientations, and from its start
    inner, inner_t = tl.full([BT, BT], 0.0, tl.float32), tl.full([BT, BT], 0.0, tl.float32)
    asked, asked_t = tl.full([BT, BT], 0.0, tl.float32), tl.full([BT, BT], 0.0, tl.float32)
    by_past, by_asked = tl.full([BT, BK], 0.0, tl.float32), tl.full([BT, BK], 0.0, tl.float32)
    by_later, through = tl.full([BT, BK], 0.0, tl.float32), tl.full([BK], 0.0, tl.float32)
    for first in range(0, V, BV):
        ov = first + tl.arange(0, BV)
        mv, mvt = (t < T)[:, None] & (ov < V)[None, :], (t < T)[None, :] & (ov < V)[:, None]
        tile, inside = ok[None, :] * V + ov[:, None], (ok < K)[None, :] & (ov < V)[:, None]
        s = tl.load(before + (row * (chunks + 1) + c) * K * V + tile, mask=inside, other=0.0)
        ds = tl.load(after + (row * chunks + c) * K * V + tile, mask=inside, other=0.0)
        through += tl.sum(s * ds, 0)
        us, ut = load_tile(u, at[:, None], V, ov[None, :], mv), load_tile(u, at[None, :], V, ov[:, None], mvt)
        os, ot = load_tile(do, at[:, None], V, ov[None, :], mv), load_tile(do, at[None, :], V, ov[:, None], mvt)
        inner += tl.dot(os.to(DOT), ut.to(DOT), input_precision="ieee")
        inner_t += tl.dot(us.to(DOT), ot.to(DOT), input_precision="ieee")
        by_past += tl.dot(os.to(DOT), s.to(DOT), input_precision="ieee")
        by_later += tl.dot(us.to(DOT), ds.to(DOT), input_precision="ieee")
        rs, rt = load_tile(solved, at[:, None], V, ov[None, :], mv), load_tile(solved, at[None, :], V, ov[:, None], mvt)
        asked += tl.dot(rs.to(DOT), ut.to(DOT), input_precision="ieee")
        asked_t += tl.dot(us.to(DOT), rt.to(DOT), input_precision="ieee")
        by_asked += tl.dot(rs.to(DOT), s.to(DOT), input_precision="ieee")
    qs, ks = load_tile(q, at[:, None], K, ok[None, :], mk), load_tile(k, at[:, None], K, ok[None, :], mk)
    kt = load_tile(k, at[None, :], K, ok[:, None], mkt)
    g = tl.load(gate + b * gb + t * gt + n * gn, mask=t < T, other=0.0).to(tl.float32)
    share = tl.load(beta + at, mask=t < T, other=0.0).to(tl.float32)
    start, whole = from_start(g, BT)[:, None], tl.exp(tl.sum(g, 0))
    decay, decay_t = spans(g, BT), spans_t(g, BT)
    inner, inner_t = inner * decay, inner_t * decay_t
    asked, asked_t = tl.where(i > j, asked * decay, 0.0), tl.where(j > i, asked_t * decay_t, 0.0) * share[None, :]

    found_q, found_k = tl.where(start == 0.0, 0.0, start * by_past), to_chunk_end(g, BT)[:, None] * by_later
    late = tl.where(start == 0.0, 0.0, start * by_asked)
    begun = tl.sum(qs * found_q, 1) - share * tl.sum(ks * late, 1)
    slope = tl.sum(tl.where(j >= i, begun[None, :], 0.0), 1)
    slope += tl.sum(tl.where(j < i, tl.sum(ks * found_k, 1)[None, :], 0.0), 1)
    slope += tl.where(whole == 0.0, 0.0, whole * tl.sum(through, 0))
    products = asked * tl.dot(ks.to(DOT), kt.to(DOT), input_precision="ieee")
    pairs = inner * tl.dot(qs.to(DOT), kt.to(DOT), input_precision="ieee") - share[:, None] * products
    sums = tl.dot(tl.where(j >= i, 1.0, 0.0), pairs, input_precision="ieee")
    slope += tl.sum(tl.where(j < i, sums, 0.0), 1)
    part = tl.program_id(1) * (B * T * N).to(tl.int64) + at
    tl.store(dgate + part, slope, mask=t < T)
    tl.store(dbeta + part, tl.sum(ks * late, 1) + tl.sum(products, 1), mask=t < T)

    found_q += tl.dot(inner.to(DOT), ks.to(DOT), input_precision="ieee")
    found_k += tl.dot(inner_t.to(DOT), qs.to(DOT), input_precision="ieee") - share[:, None] * late
    found_k -= tl.dot((asked * share[:, None] + asked_t).to(DOT), ks.to(DOT), input_precision="ieee")
    tl.store(dq + at[:, None] * K + ok[None, :], found_q.to(dq.dtype.element_ty), mask=mk)
    tl.store(dk + at[:, None] * K + ok[None, :], found_k.to(dk.dtype.element_ty), mask=mk)


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, T, N, V] and the final state, for gate [1 or B, T, 1 or N, 1] and K of at most `WIDEST`."""
    q, k, v, beta, gate, s = _ready(q, k, v, beta, gate, s)
    inverse = _inverses(q, k, beta, gate, s, None)
    u, found = _corrections(k, v, beta, gate, s, inverse)
    o = torch.empty_like(v)
    grid = (q.shape[0] * q.shape[2] * (found.shape[2] - 1), triton.cdiv(v.shape[3], TILE))
    levels = {"VECTOR": False, "LEVELS": 0}  # of vector gates only
    launch(outputs, grid, q, k, u, gate, found, o, *_sizes(q, v, gate), **levels, **_across(q, TILE))
    return o, found[:, :, -1].clone()


def backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, s: Tensor, do: Tensor, ds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, gate and the initial state; what the forward pass made is made again, not saved."""
    shape, kind = gate.shape, gate.dtype
    q, k, v, beta, gate, s = _ready(q, k, v, beta, gate, s)
    do, ds = do.contiguous(), ds.contiguous()
    sizes, across = _sizes(q, v, gate), _across(q, _narrow(q.dtype))
    rows, chunks = q.shape[0] * q.shape[2], triton.cdiv(q.shape[1], STEPS)
    pairs = s.new_empty((*s.shape[:2], chunks, STEPS, STEPS))
    inverse = _inverses(q, k, beta, gate, s, pairs)
    u, before = _corrections(k, v, beta, gate, s, inverse)
    after, ds0 = before.new_empty((*s.shape[:2], chunks, *s.shape[2:])), torch.empty_like(s)
    solved, dv = torch.empty_like(u), torch.empty_like(v)
    along = _along(k)
    grid = (rows, triton.cdiv(v.shape[3], along["BV"]))
    made = (solved, dv, after, ds0)
    launch(gradient_corrections, grid, q, k, beta, gate, inverse, pairs, do, ds, *made, *sizes, **along)
    tiles = triton.cdiv(q.shape[3], across["BK"])
    dq, dk, dbeta = torch.empty_like(q), torch.empty_like(k), s.new_empty((tiles, *beta.shape))
    dgate = torch.empty_like(dbeta)
    given, made = (q, k, beta, gate, u, do, solved, before, after), (dq, dk, dbeta, dgate)
    launch(gradients, (rows * chunks, tiles), *given, *made, sizes[0], q.shape[0], *sizes[1:], **across)
    dbeta = ((solved * v).sum(-1) - dbeta.sum(0)).to(beta.dtype)
    return dq, dk, dv, dbeta, dgate.sum(0)[..., None].sum_to_size(shape).to(kind).contiguous(), ds0


def _inverses(q: Tensor, k: Tensor, beta: Tensor, gate: Tensor, s: Tensor, pairs: Tensor | None) -> Tensor:
    """[B, N, chunks, BT, BT] float32; fills pairs, where they are wanted."""
    rows, chunks = s.shape[0] * s.shape[1], triton.cdiv(k.shape[1], STEPS)
    found = s.new_empty((*s.shape[:2], chunks, STEPS, STEPS))
    sizes, options = _sizes(k, k, gate), _across(k, TILE)
    del options["BV"]
    given = (q, k, beta, gate, found, found if pairs is None else pairs)
    launch(inverses, (rows * chunks,), *given, *sizes[:3], *sizes[4:], PAIRS=pairs is not None, **options)
    return found


def _corrections(k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, s: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Corrections [B, T, N, V] and states [B, N, chunks + 1, K, V], float32."""
    u, found = s.new_empty(v.shape), s.new_empty((*s.shape[:2], inverse.shape[2] + 1, *s.shape[2:]))
    along = _along(k)
    grid = (s.shape[0] * s.shape[1], triton.cdiv(v.shape[3], along["BV"]))
    launch(corrections, grid, k, v, beta, gate, inverse, s, u, found, *_sizes(k, v, gate), **along)
    return u, found


def _ready(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous tensors; the gate keeps its broadcast dimensions, as strides of 0."""
    gate = gate.contiguous().expand(*q.shape[:3], 1)
    return q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous(), gate, s.contiguous()


def _sizes(q: Tensor, v: Tensor, gate: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[2], q.shape[3], v.shape[3], *gate.stride()[:3])


def _narrow(dtype: torch.dtype) -> int:
    """Width of the tiles of `gradients`, which accumulates more than other kernels."""
    return 16 if dtype == torch.float32 else TILE


def _across(q: Tensor, width: int) -> dict[str, Any]:
    """Options of the kernels that take all chunks side by side."""
    return {"BT": STEPS, "BK": width, "BV": width, "DOT": dot_dtype(q.dtype), "num_warps": 4, "num_stages": 1}


def _along(k: Tensor) -> dict[str, Any]:
    """Options of the kernels that go from chunk to chunk, with all of K in one tile."""
    wide = max(16, triton.next_power_of_2(k.shape[3]))
    warps = 4 if wide < 64 else 8
    return {"BT": STEPS, "BK": wide, "BV": 16, "DOT": dot_dtype(k.dtype), "num_warps": warps, "num_stages": 1}


def compilations() -> list[Compilation]:
    """All kernels as launched, those along time for narrow and the widest keys."""
    found = []
    wide = {"s0", "u", "found", "pairs", "inverse", "solved", "before", "after", "ds", "ds0", "dbeta", "dgate", "gate"}
    for kind, dtype, dot in (("*bf16", torch.bfloat16, tl.bfloat16), ("*fp32", torch.float32, tl.float32)):
        narrow = {"BT": STEPS, "BK": _narrow(dtype), "BV": _narrow(dtype), "DOT": dot}
        across = {"BT": STEPS, "BK": TILE, "BV": TILE, "DOT": dot}
        shapes: list[tuple[Any, dict[str, Any], int]] = [(gradients, narrow, 4)]
        shapes += [(outputs, {"VECTOR": False, **across, "LEVELS": 0}, 4)]
        shapes += [(inverses, {"PAIRS": x, "BT": STEPS, "BK": TILE, "DOT": dot}, 4) for x in (False, True)]
        for width in (32, WIDEST):
            options = _along(torch.empty(1, 1, 1, width, dtype=dtype, device="meta"))
            constants = {**across, "BK": options["BK"], "BV": options["BV"]}
            shapes += [(kernel, constants, options["num_warps"]) for kernel in (corrections, gradient_corrections)]
        for kernel, constants, warps in shapes:
            names = [n for n in kernel.arg_names if n not in {*constants, *"TBNKV", "gb", "gt", "gn"}]
            pointers = {n: "*fp32" if n in wide or (kernel is outputs and n == "v") else kind for n in names}
            found.append(Compilation(kernel, pointers, constants, warps))
    return found
