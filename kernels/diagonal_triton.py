"""Triton kernels of `clplat.kernels.diagonal`.

A program takes BD channels of one batch element and walks tiles of BT steps with an associative scan in each. Where
there are too few channels to keep a GPU's memory busy, T is cut in chunks: a first pass leaves each chunk's product of
decays and its end from a zero state, and each program of the second pass begins by folding those before its own.

A fresh sequence is a decay of 0, and a decay of 0 forgets whatever the state was: infinity too, which 0 * h would turn
into NaN.

Steps are counted in the order of the recurrence; `at` turns the count into a place in memory for `reverse`.
"""

# Within kernels Triton's annotations say what a compiled function gets, not what one writes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.backend import interpreting
from clplat.kernels.triton_support import Compilation

MODES = {"scan": 0, "min_gru": 1, "min_lstm": 2, "rg_lru": 3, "hgrn": 4, "constant": 5}
INPUTS = {"scan": 2, "min_gru": 2, "min_lstm": 3, "rg_lru": 3, "hgrn": 2, "constant": 1}
STEPS = 8 if interpreting() else 32
"""Steps in a tile: 64 spill where the gates are fused; the interpreter pays for each number, padding too."""
NARROW, WIDE = (16, 16) if interpreting() else (32, 64)
"""Channels of a program."""
SATURATING = 12_288 * 64
"""Elements that one walk of all programs has to have on its way to keep a large GPU's memory busy (bandwidth times
latency: 3 MB, at 4 bytes an element)."""


@triton.jit
def _combine(a1, b1, a2, b2):
    return a1 * a2, tl.where(a2 == 0.0, b2, a2 * b1 + b2)


@triton.jit
def _fold(a, b, s):
    return tl.where(a == 0.0, b, a * s + b)


@triton.jit
def _share(f, i):
    # sigmoid(f) / (sigmoid(f) + sigmoid(i))
    low = tl.minimum(tl.minimum(f, i), 0.0)
    e = tl.exp(low)
    p = e + tl.exp(low - i)
    return p / (p + e + tl.exp(low - f))


@triton.jit
def _root(log_a):
    # sqrt(1 - a^2); a series near a = 1, where the difference cancels
    u = 2.0 * log_a
    p = 1.0 / 40320.0 + u * (1.0 / 362880.0)
    p = 1.0 / 5040.0 + u * p
    p = 1.0 / 720.0 + u * p
    p = 1.0 / 120.0 + u * p
    p = 1.0 / 24.0 + u * p
    p = 1.0 / 6.0 + u * p
    p = 0.5 + u * p
    p = 1.0 + u * p
    return tl.sqrt(tl.where(u > -0.5, -u * p, 1.0 - tl.exp(u)))


@triton.jit
def _decay(x, y, w, MODE: tl.constexpr):
    if MODE == 0:
        a = x
    elif MODE == 1:
        a = tl.sigmoid(-x)
    elif MODE == 2:
        a = _share(x, y)
    elif MODE == 3:
        a = tl.exp(-tl.sigmoid(x) * w)
    elif MODE == 4:
        a = w + (1.0 - w) * tl.sigmoid(x)
    else:
        a = w + tl.zeros_like(x)
    return a


@triton.jit
def _added(x, y, z, w, fresh, MODE: tl.constexpr):
    if MODE == 0:
        b = y
    elif MODE == 1:
        b = tl.sigmoid(x) * y
    elif MODE == 2:
        b = _share(y, x) * z
    elif MODE == 3:
        b = tl.where(fresh, 1.0, _root(-tl.sigmoid(x) * w)) * tl.sigmoid(y) * z
    elif MODE == 4:
        b = (1.0 - w) * tl.sigmoid(-x) * y * tl.sigmoid(y)
    else:
        b = x
    return b


@triton.jit
def _is_fresh(keep, i, at, T, HAS_INITIAL: tl.constexpr, HAS_KEEP: tl.constexpr):
    fresh = i < 0
    if not HAS_INITIAL:
        fresh = i == 0
    if HAS_KEEP:
        fresh = fresh | (tl.load(keep + at, mask=(i >= 0) & (i < T), other=1) == 0)
    return fresh[:, None]


@triton.jit
def _load_inputs(x, y, z, off, ok, INS: tl.constexpr):
    p = tl.load(x + off, mask=ok, other=0.0).to(tl.float32)
    q = p
    r = p
    if INS > 1:
        q = tl.load(y + off, mask=ok, other=0.0).to(tl.float32)
    if INS > 2:
        r = tl.load(z + off, mask=ok, other=0.0).to(tl.float32)
    return p, q, r


@triton.jit
def _tile(x, y, z, keep, v, row, i, o, T, D, MODE: tl.constexpr, INS: tl.constexpr, HAS_INITIAL: tl.constexpr,
          HAS_KEEP: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    # a and b at the steps i [BT], the identity outside 0..T-1
    at = i
    if REVERSE:
        at = T - 1 - i
    inside = (i < T)[:, None]
    ok = inside & (o < D)[None, :]
    off = (row * T + at)[:, None] * D + o[None, :]
    p, q, r = _load_inputs(x, y, z, off, ok, INS)
    fresh = _is_fresh(keep + row * T, i, at, T, HAS_INITIAL, HAS_KEEP)
    a = tl.where(inside, tl.where(fresh, 0.0, _decay(p, q, v, MODE)), 1.0)
    b = tl.where(inside, _added(p, q, r, v, fresh, MODE), 0.0)
    return a, b, off, ok


@triton.jit
def _next_decay(x, y, keep, v, row, i, o, T, D, MODE: tl.constexpr, INS: tl.constexpr, HAS_KEEP: tl.constexpr,
                REVERSE: tl.constexpr):  # fmt: skip
    # a at the steps i + 1 [BT]: what carries a gradient from there to i; 1 from the last step on
    i = i + 1
    at = i
    if REVERSE:
        at = T - 1 - i
    inside = (i < T)[:, None]
    ok = inside & (o < D)[None, :]
    off = (row * T + at)[:, None] * D + o[None, :]
    p = o[None, :].to(tl.float32)
    if MODE != 5:
        p = tl.load(x + off, mask=ok, other=0.0).to(tl.float32)
    q = p
    if MODE == 2:
        q = tl.load(y + off, mask=ok, other=0.0).to(tl.float32)
    fresh = _is_fresh(keep + row * T, i, at, T, True, HAS_KEEP)
    return tl.where(inside, tl.where(fresh, 0.0, _decay(p, q, v, MODE)), 1.0)


@triton.jit(do_not_specialize=["T", "C", "NC"])
def forward_chunks(x, y, z, w, keep, products, ends, T, D, C, NC, MODE: tl.constexpr, INS: tl.constexpr,
                   HAS_W: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_KEEP: tl.constexpr, REVERSE: tl.constexpr,
                   BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = tl.zeros([1, BD], tl.float32)
    if HAS_W:
        v += tl.load(w + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
    p = tl.full([BD], 1.0, tl.float32)
    s = tl.zeros([BD], tl.float32)
    for start in range(chunk * C, tl.minimum(chunk * C + C, T), BT):
        i = start + tl.arange(0, BT)
        a, b, _off, _ok = _tile(x, y, z, keep, v, row, i, o, T, D, MODE, INS, HAS_INITIAL, HAS_KEEP, REVERSE)
        tile_p, tile_s = tl.reduce((a, b), 0, _combine)
        s = _fold(tile_p, tile_s, s)
        p = p * tile_p
    q = (row * NC + chunk) * D + o
    tl.store(products + q, p, mask=o < D)
    tl.store(ends + q, s, mask=o < D)


@triton.jit(do_not_specialize=["T", "C", "NC"])
def forward_pass(x, y, z, w, initial, keep, products, ends, h, last, T, D, C, NC, MODE: tl.constexpr,
                 INS: tl.constexpr, HAS_W: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_KEEP: tl.constexpr,
                 REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = tl.zeros([1, BD], tl.float32)
    if HAS_W:
        v += tl.load(w + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
    s = tl.zeros([BD], tl.float32)
    if HAS_INITIAL:
        s += tl.load(initial + row * D + o, mask=o < D, other=0.0).to(tl.float32)
    for c in range(chunk):
        q = (row * NC + c) * D + o
        s = _fold(tl.load(products + q, mask=o < D, other=1.0), tl.load(ends + q, mask=o < D, other=0.0), s)
    steps = tl.arange(0, BT)
    for start in range(chunk * C, tl.minimum(chunk * C + C, T), BT):
        i = start + steps
        a, b, off, ok = _tile(x, y, z, keep, v, row, i, o, T, D, MODE, INS, HAS_INITIAL, HAS_KEEP, REVERSE)
        p, e = tl.associative_scan((a, b), 0, _combine)
        made = _fold(p, e, s[None, :])
        tl.store(h + off, made.to(h.dtype.element_ty), mask=ok)
        s = tl.sum(tl.where((steps == BT - 1)[:, None], made, 0.0), 0)
    if chunk == NC - 1:
        tl.store(last + row * D + o, s, mask=o < D)


@triton.jit(do_not_specialize=["T", "C", "NC"])
def backward_chunks(x, y, w, keep, dh, products, ends, T, D, C, NC, MODE: tl.constexpr, INS: tl.constexpr,
                    HAS_W: tl.constexpr, HAS_KEEP: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr,
                    BD: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = tl.zeros([1, BD], tl.float32)
    if HAS_W:
        v += tl.load(w + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
    p = tl.full([BD], 1.0, tl.float32)
    s = tl.zeros([BD], tl.float32)
    tiles = tl.cdiv(tl.minimum(C, T - chunk * C), BT)
    for k in range(tiles):
        i = chunk * C + (tiles - 1 - k) * BT + tl.arange(0, BT)
        a = _next_decay(x, y, keep, v, row, i, o, T, D, MODE, INS, HAS_KEEP, REVERSE)
        at = i
        if REVERSE:
            at = T - 1 - i
        off = (row * T + at)[:, None] * D + o[None, :]
        given = tl.load(dh + off, mask=(i < T)[:, None] & (o < D)[None, :], other=0.0).to(tl.float32)
        scan_p, scan_s = tl.associative_scan((a, given), 0, _combine, reverse=True)
        first = (tl.arange(0, BT) == 0)[:, None]
        tile_p = tl.sum(tl.where(first, scan_p, 0.0), 0)
        s = _fold(tile_p, tl.sum(tl.where(first, scan_s, 0.0), 0), s)
        p = p * tile_p
    q = (row * NC + chunk) * D + o
    tl.store(products + q, p, mask=o < D)
    tl.store(ends + q, s, mask=o < D)


@triton.jit(do_not_specialize=["T", "C", "NC"])
def backward_pass(x, y, z, w, initial, keep, h, dh, dlast, products, ends, dx, dy, dz, dw, dinitial, half_slope, T, D,
                  C, NC, MODE: tl.constexpr, INS: tl.constexpr, HAS_W: tl.constexpr, HAS_INITIAL: tl.constexpr,
                  HAS_KEEP: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = tl.zeros([1, BD], tl.float32)
    if HAS_W:
        v += tl.load(w + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
    s = tl.load(dlast + row * D + o, mask=o < D, other=0.0).to(tl.float32)
    for c in range(NC - 1 - chunk):
        q = (row * NC + NC - 1 - c) * D + o
        s = _fold(tl.load(products + q, mask=o < D, other=1.0), tl.load(ends + q, mask=o < D, other=0.0), s)
    to_w = tl.zeros([BD], tl.float32)
    to_initial = tl.zeros([BD], tl.float32)
    tiles = tl.cdiv(tl.minimum(C, T - chunk * C), BT)
    for k in range(tiles):
        start = chunk * C + (tiles - 1 - k) * BT
        i = start + tl.arange(0, BT)
        at = i
        if REVERSE:
            at = T - 1 - i
        inside = (i < T)[:, None]
        ok = inside & (o < D)[None, :]
        off = (row * T + at)[:, None] * D + o[None, :]
        a_next = _next_decay(x, y, keep, v, row, i, o, T, D, MODE, INS, HAS_KEEP, REVERSE)
        given = tl.load(dh + off, mask=ok, other=0.0).to(tl.float32)
        scan_p, scan_s = tl.associative_scan((a_next, given), 0, _combine, reverse=True)
        g = _fold(scan_p, scan_s, s[None, :])
        s = tl.sum(tl.where((i == start)[:, None], g, 0.0), 0)
        fresh = _is_fresh(keep + row * T, i, at, T, HAS_INITIAL, HAS_KEEP)
        back = off - D
        if REVERSE:
            back = off + D
        before = tl.load(h + back, mask=ok & (i > 0)[:, None], other=0.0).to(tl.float32)
        if HAS_INITIAL:
            zeroth = tl.load(initial + row * D + o, mask=o < D, other=0.0).to(tl.float32)
            before = tl.where((i == 0)[:, None], zeroth[None, :], before)
        before = tl.where(fresh, 0.0, before)
        p, q, r = _load_inputs(x, y, z, off, ok, INS)
        if HAS_INITIAL and chunk == 0:
            carried = tl.where((i == 0)[:, None] & (fresh == 0), _decay(p, q, v, MODE) * g, 0.0)
            to_initial += tl.sum(carried, 0)
        g = tl.where(inside, g, 0.0)
        if MODE == 0:
            to_x = g * before
            tl.store(dy + off, g.to(dy.dtype.element_ty), mask=ok)
        elif MODE == 1:
            open_ = tl.sigmoid(p)
            to_x = g * (q - before) * open_ * tl.sigmoid(-p)
            tl.store(dy + off, (g * open_).to(dy.dtype.element_ty), mask=ok)
        elif MODE == 2:
            rest = _share(q, p)
            tl.store(dz + off, (g * rest).to(dz.dtype.element_ty), mask=ok)
            both = g * (before - r) * _share(p, q) * rest
            to_x = both * tl.sigmoid(-p)
            tl.store(dy + off, (-both * tl.sigmoid(-q)).to(dy.dtype.element_ty), mask=ok)
        elif MODE == 3:
            gate = tl.sigmoid(p)
            root = _root(-gate * v)
            used = tl.where(fresh, 1.0, root)
            let_in = tl.sigmoid(q)
            tl.store(dz + off, (g * let_in * used).to(dz.dtype.element_ty), mask=ok)
            tl.store(dy + off, (g * used * r * let_in * tl.sigmoid(-q)).to(dy.dtype.element_ty), mask=ok)
            a = tl.exp(-gate * v)
            by_log = a * g * (before - a * let_in * r / tl.maximum(root, half_slope))
            by_log = tl.where(fresh, 0.0, by_log) * gate
            to_w -= tl.sum(by_log, 0)
            to_x = -v * by_log * tl.sigmoid(-p)
        elif MODE == 4:
            shut = tl.sigmoid(-p)
            swish = tl.sigmoid(q)
            by_gate = g * shut * (before - q * swish)
            to_w += tl.sum(by_gate, 0)
            to_x = by_gate * (1.0 - v) * tl.sigmoid(p)
            to_y = g * (1.0 - v) * shut * swish * (1.0 + q * tl.sigmoid(-q))
            tl.store(dy + off, to_y.to(dy.dtype.element_ty), mask=ok)
        else:
            to_x = g
            to_w += tl.sum(g * before, 0)
        tl.store(dx + off, to_x.to(dx.dtype.element_ty), mask=ok)
    if HAS_W:
        tl.store(dw + (row * NC + chunk) * D + o, to_w, mask=o < D)
    if chunk == 0:
        tl.store(dinitial + row * D + o, to_initial, mask=o < D)


@triton.jit
def _combine_complex(ar, ai, br, bi, cr, ci, dr, di):
    gone = (cr == 0.0) & (ci == 0.0)
    real = tl.where(gone, dr, cr * br - ci * bi + dr)
    imag = tl.where(gone, di, cr * bi + ci * br + di)
    return ar * cr - ai * ci, ar * ci + ai * cr, real, imag


@triton.jit
def _fold_complex(ar, ai, br, bi, sr, si):
    gone = (ar == 0.0) & (ai == 0.0)
    return tl.where(gone, br, ar * sr - ai * si + br), tl.where(gone, bi, ar * si + ai * sr + bi)


@triton.jit
def _load_complex(x, off, ok):
    return tl.load(x + 2 * off, mask=ok, other=0.0), tl.load(x + 2 * off + 1, mask=ok, other=0.0)


@triton.jit
def _store_complex(x, off, ok, real, imag):
    tl.store(x + 2 * off, real, mask=ok)
    tl.store(x + 2 * off + 1, imag, mask=ok)


@triton.jit
def _complex_decay(a, row, i, at, o, T, D, CONSTANT: tl.constexpr):
    inside = (i < T)[:, None]
    if CONSTANT:
        real, imag = _load_complex(a, o[None, :], (o < D)[None, :])
    else:
        real, imag = _load_complex(a, (row * T + at)[:, None] * D + o[None, :], inside & (o < D)[None, :])
    return tl.where(inside, real, 1.0), tl.where(inside, imag, 0.0)


@triton.jit(do_not_specialize=["T"])
def complex_forward(a, b, initial, keep, h, last, T, D, CONSTANT: tl.constexpr, HAS_INITIAL: tl.constexpr,
                    HAS_KEEP: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    sr = tl.zeros([BD], tl.float32)
    si = tl.zeros([BD], tl.float32)
    if HAS_INITIAL:
        sr, si = _load_complex(initial, row * D + o, o < D)
    steps = tl.arange(0, BT)
    for start in range(0, T, BT):
        i = start + steps
        at = i
        if REVERSE:
            at = T - 1 - i
        ok = (i < T)[:, None] & (o < D)[None, :]
        off = (row * T + at)[:, None] * D + o[None, :]
        ar, ai = _complex_decay(a, row, i, at, o, T, D, CONSTANT)
        br, bi = _load_complex(b, off, ok)
        fresh = _is_fresh(keep + row * T, i, at, T, HAS_INITIAL, HAS_KEEP)
        ar, ai = tl.where(fresh, 0.0, ar), tl.where(fresh, 0.0, ai)
        pr, pi, er, ei = tl.associative_scan((ar, ai, br, bi), 0, _combine_complex)
        hr, hi = _fold_complex(pr, pi, er, ei, sr[None, :], si[None, :])
        _store_complex(h, off, ok, hr, hi)
        end = (steps == BT - 1)[:, None]
        sr, si = tl.sum(tl.where(end, hr, 0.0), 0), tl.sum(tl.where(end, hi, 0.0), 0)
    _store_complex(last, row * D + o, o < D, sr, si)


@triton.jit(do_not_specialize=["T"])
def complex_backward(a, initial, keep, h, dh, dlast, da, db, dinitial, T, D, CONSTANT: tl.constexpr,
                     HAS_INITIAL: tl.constexpr, HAS_KEEP: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr,
                     BD: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    sr, si = _load_complex(dlast, row * D + o, o < D)
    wr = tl.zeros([BD], tl.float32)
    wi = tl.zeros([BD], tl.float32)
    tiles = tl.cdiv(T, BT)
    for k in range(tiles):
        start = (tiles - 1 - k) * BT
        i = start + tl.arange(0, BT)
        at, then, back = i, i + 1, i - 1
        if REVERSE:
            at, then, back = T - 1 - i, T - 2 - i, T - i
        ok = (i < T)[:, None] & (o < D)[None, :]
        off = (row * T + at)[:, None] * D + o[None, :]
        ar, ai = _complex_decay(a, row, i + 1, then, o, T, D, CONSTANT)
        forgotten = _is_fresh(keep + row * T, i + 1, then, T, True, HAS_KEEP)
        ar, ai = tl.where(forgotten, 0.0, ar), tl.where(forgotten, 0.0, -ai)
        gr, gi = _load_complex(dh, off, ok)
        pr, pi, er, ei = tl.associative_scan((ar, ai, gr, gi), 0, _combine_complex, reverse=True)
        gr, gi = _fold_complex(pr, pi, er, ei, sr[None, :], si[None, :])
        first = (i == start)[:, None]
        sr, si = tl.sum(tl.where(first, gr, 0.0), 0), tl.sum(tl.where(first, gi, 0.0), 0)
        _store_complex(db, off, ok, gr, gi)
        hr, hi = _load_complex(h, (row * T + back)[:, None] * D + o[None, :], ok & (i > 0)[:, None])
        if HAS_INITIAL:
            zr, zi = _load_complex(initial, row * D + o, o < D)
            hr = tl.where((i == 0)[:, None], zr[None, :], hr)
            hi = tl.where((i == 0)[:, None], zi[None, :], hi)
        fresh = _is_fresh(keep + row * T, i, at, T, HAS_INITIAL, HAS_KEEP) | (i >= T)[:, None]
        hr, hi = tl.where(fresh, 0.0, hr), tl.where(fresh, 0.0, hi)
        to_r, to_i = gr * hr + gi * hi, gi * hr - gr * hi
        if CONSTANT:
            wr += tl.sum(to_r, 0)
            wi += tl.sum(to_i, 0)
        else:
            _store_complex(da, off, ok, to_r, to_i)
    if CONSTANT:
        _store_complex(da, row * D + o, o < D, wr, wi)
    if HAS_INITIAL:
        zeroth = tl.arange(0, 1)
        place = zeroth
        if REVERSE:
            place = T - 1 - zeroth
        ar, ai = _complex_decay(a, row, zeroth, place, o, T, D, CONSTANT)
        fresh = _is_fresh(keep + row * T, zeroth, place, T, True, HAS_KEEP)
        ar, ai = tl.where(fresh, 0.0, ar), tl.where(fresh, 0.0, -ai)
        gr, gi = sr[None, :], si[None, :]
        _store_complex(dinitial, row * D + o, o < D, tl.sum(ar * gr - ai * gi, 0), tl.sum(ar * gi + ai * gr, 0))


def forward(
    mode: str, inputs: list[Tensor], weight: Tensor | None, initial: Tensor | None, keep: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] in the inputs' dtype, and the final state [B, D] in float32 (complex64)."""
    b, t, d = inputs[0].shape
    inputs = [x.contiguous() for x in inputs]
    first = inputs[0]
    h = torch.empty_like(first)
    flags: dict[str, Any] = {"HAS_INITIAL": initial is not None, "HAS_KEEP": keep is not None, "REVERSE": reverse}
    kept = first if keep is None else keep.contiguous().view(torch.uint8)
    start = first if initial is None else initial.contiguous()
    with torch.cuda.device_of(first):
        if first.is_complex():
            last = first.new_empty(b, d)
            a = first if weight is None else weight.contiguous()
            grid = (triton.cdiv(d, COMPLEX["BD"]), b)
            arrays = [torch.view_as_real(x) for x in (a, inputs[-1])]
            start, kept, made = (torch.view_as_real(x) if x.is_complex() else x for x in (start, kept, h))
            _on(complex_forward, grid)(
                *arrays, start, kept, made, torch.view_as_real(last), t, d, CONSTANT=weight is not None, **flags,
                **COMPLEX, num_warps=4, num_stages=1,
            )  # fmt: skip
            return h, last
        last = torch.empty((b, d), dtype=torch.float32, device=first.device)
        count, length = chunks(b, t, d)
        products, ends = (last.new_empty(b, count, d) for _ in range(2))
        shared: dict[str, Any] = {"MODE": MODES[mode], "INS": INPUTS[mode], "HAS_W": weight is not None}
        shared |= {"BT": STEPS, "BD": _channels(d, mode, first.element_size()), "num_warps": WARPS, "num_stages": 1}
        grid = (triton.cdiv(d, shared["BD"]), count, b)
        x, y, z = (inputs + inputs[-1:] * 2)[:3]
        w = first if weight is None else weight.contiguous()
        if count > 1:
            _on(forward_chunks, grid)(x, y, z, w, kept, products, ends, t, d, length, count, **shared, **flags)
        _on(forward_pass, grid)(
            x, y, z, w, start, kept, products, ends, h, last, t, d, length, count, **shared, **flags
        )  # fmt: skip
    return h, last


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
) -> list[Tensor]:
    """Gradients by the inputs, by the weight if there is one (a row for each batch element), and by the initial state."""
    b, t, d = h.shape
    inputs = [x.contiguous() for x in inputs]
    first, dh, dlast = inputs[0], dh.contiguous(), dlast.contiguous()
    flags: dict[str, Any] = {"HAS_INITIAL": initial is not None, "HAS_KEEP": keep is not None, "REVERSE": reverse}
    kept = first if keep is None else keep.contiguous().view(torch.uint8)
    start = first if initial is None else initial.contiguous()
    found = [torch.empty_like(x) for x in inputs]
    dinitial = torch.zeros_like(dlast)
    with torch.cuda.device_of(first):
        if first.is_complex():
            a = first if weight is None else weight.contiguous()
            dw = dlast.new_empty(b, d)
            arrays = (a, start, kept, h, dh, dlast, found[0] if weight is None else dw, found[-1], dinitial)
            _on(complex_backward, (triton.cdiv(d, COMPLEX["BD"]), b))(
                *(torch.view_as_real(x) if x.is_complex() else x for x in arrays), t, d, CONSTANT=weight is not None,
                **flags, **COMPLEX, num_warps=4, num_stages=1,
            )  # fmt: skip
            return [*found, *([] if weight is None else [dw]), dinitial]
        count, length = chunks(b, t, d)
        products, ends, dw = (dlast.new_empty(b, count, d) for _ in range(3))
        shared: dict[str, Any] = {"MODE": MODES[mode], "INS": INPUTS[mode], "HAS_W": weight is not None}
        shared |= {
            "BT": STEPS,
            "BD": _channels(d, mode, first.element_size(), True),
            "num_warps": WARPS,
            "num_stages": 1,
        }
        grid = (triton.cdiv(d, shared["BD"]), count, b)
        x, y, z = (inputs + inputs[-1:] * 2)[:3]
        dx, dy, dz = (found + found[-1:] * 2)[:3]
        w = first if weight is None else weight.contiguous()
        if count > 1:
            without = {k: v for k, v in flags.items() if k != "HAS_INITIAL"}
            _on(backward_chunks, grid)(x, y, w, kept, dh, products, ends, t, d, length, count, **shared, **without)
        _on(backward_pass, grid)(
            x, y, z, w, start, kept, h, dh, dlast, products, ends, dx, dy, dz, dw, dinitial, 0.5 / slope_limit, t, d,
            length, count, **shared, **flags,
        )  # fmt: skip
    return [*found, *([] if weight is None else [dw.sum(1)]), dinitial]


WARPS = 4
COMPLEX: dict[str, Any] = {"BT": STEPS, "BD": NARROW}


def _on(kernel: Any, grid: tuple[int, ...]) -> Any:
    """The kernel's launcher; `Any` since type checkers see the function that it is made of."""
    return kernel[grid]


def _channels(d: int, mode: str, size: int, backward: bool = False) -> int:
    """Channels of a program: a cache line of numbers of `size` bytes, less where gradients of gates spill."""
    return NARROW if d <= 32 or size > 2 or (backward and mode not in ("scan", "constant")) else WIDE


def chunks(b: int, t: int, d: int) -> tuple[int, int]:
    """How many chunks T is cut in, and how many steps each has: one where B * D alone keeps the memory busy."""
    wanted = SATURATING // max(1, b * d * STEPS)
    count = max(1, min(wanted, t // (2 * STEPS)))
    length = triton.cdiv(triton.cdiv(t, count), STEPS) * STEPS
    return triton.cdiv(t, length), length


def compilations() -> list[Compilation]:
    """Every kernel in every mode, as launched; those of chunks read as the others do, so one dtype stands for both."""
    found = []
    for kind, kernels in (
        ("fp32", (forward_pass, backward_pass)),
        ("bf16", (forward_pass, backward_pass, forward_chunks, backward_chunks)),
    ):
        pointers = dict.fromkeys(("x", "y", "z", "h", "dh", "dx", "dy", "dz"), f"*{kind}") | {"keep": "*u8"}
        pointers |= dict.fromkeys(("w", "initial", "last", "dlast", "products", "ends", "dw", "dinitial"), "*fp32")
        for mode, number in MODES.items():
            constants = {"MODE": number, "INS": INPUTS[mode], "HAS_W": mode in ("rg_lru", "hgrn", "constant")}
            constants |= {"HAS_INITIAL": True, "HAS_KEEP": True, "REVERSE": False, "BT": STEPS}
            for kernel in kernels:
                names = set(kernel.arg_names)
                constants["BD"] = _channels(
                    64, mode, 4 if kind == "fp32" else 2, kernel in (backward_pass, backward_chunks)
                )
                found.append(
                    Compilation(
                        kernel,
                        {k: v for k, v in pointers.items() if k in names},
                        {k: v for k, v in constants.items() if k in names},
                        warps=WARPS,
                        scalars={"half_slope": "fp32"} if "half_slope" in names else {},
                    )
                )
    planes = dict.fromkeys(("a", "b", "initial", "h", "last", "dh", "dlast", "da", "db", "dinitial"), "*fp32")
    for kernel in (complex_forward, complex_backward):
        pointers = {k: v for k, v in (planes | {"keep": "*u8"}).items() if k in kernel.arg_names}
        for constant in (False, True):
            constants = {"CONSTANT": constant, "HAS_INITIAL": True, "HAS_KEEP": True, "REVERSE": False, **COMPLEX}
            # Real and imaginary parts alternate in memory: each plane is read with a stride of 2.
            found.append(Compilation(kernel, pointers, constants, warps=4, vector=False))
    return found
