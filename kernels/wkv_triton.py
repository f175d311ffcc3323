"""RWKV-4's time mixing in Triton: one program a batch row and block of channels, tiles of time scanned at once.

Letters: B batch, T time, D channels; BT steps a tile, BD channels a block.
"""

# Triton's language is not the Python that pyright reads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.triton_support import Compilation
from clplat.kernels.wkv import CHUNK

FORWARD, BACKWARD = (8, 4), (16, 2)
"""BD and warps. A tile is one chunk of the states that are kept; larger ones spill with one version of Triton or another."""


def forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, num: Tensor, den: Tensor, top: Tensor, keep: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, D], the last state, and the states before every chunk [3, B, chunks, D]."""
    given = tuple(x.contiguous() for x in (k, v, w, u, num, den, top, keep))
    batch, steps, width = v.shape
    y, *last = v.new_empty(v.shape), *(x.new_empty(x.shape) for x in (num, den, top))
    states = num.new_empty(3, batch, triton.cdiv(steps, CHUNK), width)
    with torch.cuda.device_of(v):
        wkv_forward[(triton.cdiv(width, FORWARD[0]), batch)](
            *given, y, *last, states, steps, width, reverse, CHUNK, FORWARD[0], num_warps=FORWARD[1]
        )
    return y, last[0], last[1], last[2], states


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
    given = tuple(x.contiguous() for x in (k, v, w, u, num, den, keep, states, dy, dnum, dden))
    batch, steps, width = v.shape
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dw, du = num.new_empty(batch, width), num.new_empty(batch, width)
    first = torch.empty_like(given[4]), torch.empty_like(given[4]), torch.empty_like(given[4])
    with torch.cuda.device_of(v):
        wkv_backward[(triton.cdiv(width, BACKWARD[0]), batch)](
            *given, dk, dv, dw, du, *first, steps, width, reverse, CHUNK, BACKWARD[0], num_warps=BACKWARD[1]
        )
    return dk, dv, dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), *first


def compilations() -> list[Compilation]:
    """Every kernel as launched, for compilation without a GPU."""
    found, common = [], {"REVERSE": False, "BT": CHUNK}
    for kind in ("*bf16", "*fp32"):
        states = dict.fromkeys(("w", "u", "num0", "den0", "top0", "num1", "den1", "top1", "states"), "*fp32")
        data = dict.fromkeys(("k", "v", "y"), kind) | {"keep": "*i8"}
        found.append(Compilation(wkv_forward, data | states, common | {"BD": FORWARD[0]}, warps=FORWARD[1]))
        names = ("w", "u", "num0", "den0", "states", "dnum", "dden", "dw", "du", "dnum0", "dden0", "dtop0")
        data = dict.fromkeys(("k", "v", "dy", "dk", "dv"), kind) | {"keep": "*i8"}
        found.append(
            Compilation(
                wkv_backward, data | dict.fromkeys(names, "*fp32"), common | {"BD": BACKWARD[0]}, warps=BACKWARD[1]
            )
        )
    return found


@triton.jit
def _join(w_l, m_l, n_l, d_l, w_r, m_r, n_r, d_r):
    """Two neighbouring ranges of steps: log decay over the range, and its own scale, numerator and denominator."""
    left = m_l + w_r
    m = tl.maximum(left, m_r)
    e_l, e_r = tl.exp(left - m), tl.exp(m_r - m)
    return w_l + w_r, m, n_l * e_l + n_r * e_r, d_l * e_l + d_r * e_r


@triton.jit
def _linear2(a_l, b_l, c_l, a_r, b_r, c_r):
    return a_l * a_r, a_r * b_l + b_r, a_r * c_l + c_r


@triton.jit(do_not_specialize=["T"])
def wkv_forward(
    k,
    v,
    w,
    u,
    num0,
    den0,
    top0,
    keep,
    y,
    num1,
    den1,
    top1,
    states,
    T,
    D,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1).to(tl.int64)
    r = tl.arange(0, BT)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    in_d = d < D
    decay = tl.load(w + d, mask=in_d, other=0.0).to(tl.float32)
    bonus = tl.load(u + d, mask=in_d, other=0.0).to(tl.float32)
    num = tl.load(num0 + i_b * D + d, mask=in_d, other=0.0).to(tl.float32)
    den = tl.load(den0 + i_b * D + d, mask=in_d, other=1.0).to(tl.float32)
    top = tl.load(top0 + i_b * D + d, mask=in_d, other=0.0).to(tl.float32)
    chunks = tl.cdiv(T, BT)
    for c in range(chunks):
        at_s = (i_b * chunks + c) * D + d
        tl.store(states + at_s, num, mask=in_d)
        tl.store(states + B * chunks * D + at_s, den, mask=in_d)
        tl.store(states + 2 * B * chunks * D + at_s, top, mask=in_d)
        i = c * BT + r
        row = i_b * T + (T - 1 - i if REVERSE else i)
        before = row + 1 if REVERSE else row - 1
        # The state before each step is that of the tile's start, joined with the tile's steps before.
        inside = (i < T)[:, None] & in_d[None, :]
        earlier = ((i <= T) & (r > 0))[:, None] & in_d[None, :]
        k1 = tl.load(k + before[:, None] * D + d[None, :], mask=earlier, other=0.0).to(tl.float32)
        v1 = tl.load(v + before[:, None] * D + d[None, :], mask=earlier, other=0.0).to(tl.float32)
        kept1 = tl.load(keep + before, mask=(i <= T) & (r > 0), other=1).to(tl.float32) != 0
        fresh = tl.load(keep + row, mask=i < T, other=1).to(tl.float32) == 0
        is_first = (r == 0)[:, None]
        x_w = tl.where(kept1[:, None], tl.broadcast_to(-decay[None, :], [BT, BD]), -1e30)
        x_w = tl.where(is_first, 0.0, x_w)
        x_m = tl.where(is_first, top[None, :], k1)
        x_n = tl.where(is_first, num[None, :], v1)
        x_d = tl.where(is_first, den[None, :], 1.0)
        # What a fresh start wipes out must not take part even when it is inf.
        gone = is_first & (fresh & (r == 0))[:, None]
        x_m, x_n, x_d = tl.where(gone, -1e30, x_m), tl.where(gone, 0.0, x_n), tl.where(gone, 0.0, x_d)
        _, m, n, e = tl.associative_scan((x_w, x_m, x_n, x_d), 0, _join)
        m = tl.where(fresh[:, None], -1e30, m)
        n = tl.where(fresh[:, None], 0.0, n)
        e = tl.where(fresh[:, None], 0.0, e)
        k0 = tl.load(k + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        v0 = tl.load(v + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        own = bonus[None, :] + k0
        q = tl.maximum(m, own)
        old, new = tl.exp(m - q), tl.exp(own - q)
        out = (old * n + new * v0) / (old * e + new)
        tl.store(y + row[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=inside)
        # The state after the tile's last step.
        faded = m - decay[None, :]
        q = tl.maximum(faded, k0)
        old, new = tl.exp(faded - q), tl.exp(k0 - q)
        last = (i == tl.minimum(T, (c + 1) * BT) - 1)[:, None]
        num = tl.sum(tl.where(last, old * n + new * v0, 0.0), 0)
        den = tl.sum(tl.where(last, old * e + new, 0.0), 0)
        top = tl.sum(tl.where(last, q, 0.0), 0)
    tl.store(num1 + i_b * D + d, num, mask=in_d)
    tl.store(den1 + i_b * D + d, den, mask=in_d)
    tl.store(top1 + i_b * D + d, top, mask=in_d)


@triton.jit(do_not_specialize=["T"])
def wkv_backward(
    k,
    v,
    w,
    u,
    num0,
    den0,
    keep,
    states,
    dy,
    dnum,
    dden,
    dk,
    dv,
    dw,
    du,
    dnum0,
    dden0,
    dtop0,
    T,
    D,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1).to(tl.int64)
    r = tl.arange(0, BT)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    in_d = d < D
    decay = tl.load(w + d, mask=in_d, other=0.0).to(tl.float32)
    bonus = tl.load(u + d, mask=in_d, other=0.0).to(tl.float32)
    # Gradients of the state after the tile's last step.
    p_end = tl.load(dnum + i_b * D + d, mask=in_d, other=0.0).to(tl.float32)
    q_end = tl.load(dden + i_b * D + d, mask=in_d, other=0.0).to(tl.float32)
    w_sum = tl.zeros([BD], tl.float32)
    u_sum = tl.zeros([BD], tl.float32)
    chunks = tl.cdiv(T, BT)
    for back in range(chunks):
        c = chunks - 1 - back
        at_s = (i_b * chunks + c) * D + d
        num = tl.load(states + at_s, mask=in_d, other=0.0)
        den = tl.load(states + B * chunks * D + at_s, mask=in_d, other=1.0)
        top = tl.load(states + 2 * B * chunks * D + at_s, mask=in_d, other=0.0)
        i = c * BT + r
        row = i_b * T + (T - 1 - i if REVERSE else i)
        before = row + 1 if REVERSE else row - 1
        after = row - 1 if REVERSE else row + 1
        inside = (i < T)[:, None] & in_d[None, :]
        earlier = ((i <= T) & (r > 0))[:, None] & in_d[None, :]
        later = ((i + 1 < T) & (r < BT - 1))[:, None] & in_d[None, :]
        k1 = tl.load(k + before[:, None] * D + d[None, :], mask=earlier, other=0.0).to(tl.float32)
        v1 = tl.load(v + before[:, None] * D + d[None, :], mask=earlier, other=0.0).to(tl.float32)
        kept1 = tl.load(keep + before, mask=(i <= T) & (r > 0), other=1).to(tl.float32) != 0
        fresh = tl.load(keep + row, mask=i < T, other=1).to(tl.float32) == 0
        is_first = (r == 0)[:, None]
        x_w = tl.where(kept1[:, None], tl.broadcast_to(-decay[None, :], [BT, BD]), -1e30)
        x_w = tl.where(is_first, 0.0, x_w)
        x_m = tl.where(is_first, top[None, :], k1)
        x_n = tl.where(is_first, num[None, :], v1)
        x_d = tl.where(is_first, den[None, :], 1.0)
        gone = is_first & (fresh & (r == 0))[:, None]
        x_m, x_n, x_d = tl.where(gone, -1e30, x_m), tl.where(gone, 0.0, x_n), tl.where(gone, 0.0, x_d)
        _, m, n, e = tl.associative_scan((x_w, x_m, x_n, x_d), 0, _join)
        m = tl.where(fresh[:, None], -1e30, m)
        n = tl.where(fresh[:, None], 0.0, n)
        e = tl.where(fresh[:, None], 0.0, e)
        k0 = tl.load(k + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        v0 = tl.load(v + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(dy + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        own = bonus[None, :] + k0
        q = tl.maximum(m, own)
        e1, e2 = tl.exp(m - q), tl.exp(own - q)
        below = e1 * e + e2
        da = up / below
        de = -da * (e1 * n + e2 * v0) / below
        faded = m - decay[None, :]
        q = tl.maximum(faded, k0)
        f1, f2 = tl.exp(faded - q), tl.exp(k0 - q)
        # What the next step takes from the state after this one, for the scan backwards.
        m2, n2, d2 = q, f1 * n + f2 * v0, f1 * e + f2
        k2 = tl.load(k + after[:, None] * D + d[None, :], mask=later, other=0.0).to(tl.float32)
        v2 = tl.load(v + after[:, None] * D + d[None, :], mask=later, other=0.0).to(tl.float32)
        up2 = tl.load(dy + after[:, None] * D + d[None, :], mask=later, other=0.0).to(tl.float32)
        kept2 = tl.load(keep + after, mask=(i + 1 < T) & (r < BT - 1), other=1).to(tl.float32) != 0
        q = tl.maximum(m2, bonus[None, :] + k2)
        g1, g2 = tl.exp(m2 - q), tl.exp(bonus[None, :] + k2 - q)
        da2 = up2 / (g1 * d2 + g2)
        de2 = -da2 * (g1 * n2 + g2 * v2) / (g1 * d2 + g2)
        q = tl.maximum(m2 - decay[None, :], k2)
        h1 = tl.exp(m2 - decay[None, :] - q)
        passes = later & kept2[:, None]
        x_a = tl.where(later, tl.where(passes, h1, 0.0), 1.0)
        x_p = tl.where(passes, g1 * da2, 0.0)
        x_q = tl.where(passes, g1 * de2, 0.0)
        a_t, p, s = tl.associative_scan((x_a, x_p, x_q), 0, _linear2, reverse=True)
        p += a_t * p_end[None, :]
        s += a_t * q_end[None, :]
        mine = e2 * (v0 * da + de)
        u_sum += tl.sum(tl.where(inside, mine, 0.0), 0)
        w_sum -= tl.sum(tl.where(inside, f1 * (n * p + e * s), 0.0), 0)
        at = row[:, None] * D + d[None, :]
        tl.store(dv + at, (e2 * da + f2 * p).to(dv.dtype.element_ty), mask=inside)
        tl.store(dk + at, (mine + f2 * (v0 * p + s)).to(dk.dtype.element_ty), mask=inside)
        start = is_first & (~fresh)[:, None]
        p_end = tl.sum(tl.where(start, f1 * p + e1 * da, 0.0), 0)
        q_end = tl.sum(tl.where(start, f1 * s + e1 * de, 0.0), 0)
    tl.store(dw + i_b * D + d, w_sum, mask=in_d)
    tl.store(du + i_b * D + d, u_sum, mask=in_d)
    tl.store(dnum0 + i_b * D + d, p_end, mask=in_d)
    tl.store(dden0 + i_b * D + d, q_end, mask=in_d)
    kept = tl.load(keep + i_b * T + (T - 1 if REVERSE else 0)).to(tl.float32) != 0
    num = tl.load(num0 + i_b * D + d, mask=in_d, other=0.0).to(tl.float32)
    den = tl.load(den0 + i_b * D + d, mask=in_d, other=0.0).to(tl.float32)
    tl.store(dtop0 + i_b * D + d, tl.where(kept, num * p_end + den * q_end, 0.0), mask=in_d)
