"""Mamba's selective scan in Triton: one program a batch row and block of channels, all states of which are registers.

The kernels walk step by step and load the next step's inputs, which no state has a part in, before they compute the
present one. The backward pass computes the states of a chunk once more from the one kept before it, into a buffer of
one chunk's states, which the program reads back in reverse. Sums over channels, as the gradients of b and c are, are
written by block and added up by torch: no atomics, so that results do not depend on the order of programs.

Letters: B batch, T time, D channels, S states a channel; BD channels a program, BS is S rounded up to a power of 2.
"""

# Triton's language is not the Python that pyright reads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.selective import CHUNK
from clplat.kernels.triton_support import Compilation

NUMBERS = 256
"""States that one warp holds going forward: BS * BD; many programs hide one another's latency. Going backward, with
four numbers a state and their products in registers, two warps share them: with one the compiler spills."""


def forward(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, skip: Tensor, h: Tensor, keep: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the last state [B, D, S], and the states before every chunk [B, chunks, S, D]."""
    # Channels last, and so next to one another, in every array of states.
    given = _contiguous(x, dt, b, c, a.t(), skip, h.transpose(1, 2), keep)
    (batch, steps, width), size = x.shape, a.shape[1]
    y, last = x.new_empty(x.shape), h.new_empty(batch, size, width)
    states = h.new_empty(batch, triton.cdiv(steps, CHUNK), size, width)
    block, padded, warps = _block(size)
    with torch.cuda.device_of(x):
        selective_scan_forward[(triton.cdiv(width, block), batch)](
            *given, y, last, states, steps, width, size, reverse, CHUNK, block, padded, num_warps=warps
        )
    return y, last.transpose(1, 2).contiguous(), states


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
    given = _contiguous(x, dt, b, c, a.t(), skip, keep, states, dy, dh.transpose(1, 2))
    (batch, steps, width), size = x.shape, a.shape[1]
    block, padded, warps = _block(size)
    blocks = triton.cdiv(width, block)
    scratch = dh.new_empty(batch, min(steps, CHUNK), size, width)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    db, dc = dh.new_empty(blocks, batch, steps, size), dh.new_empty(blocks, batch, steps, size)
    da, dskip, dh0 = dh.new_empty(batch, size, width), dh.new_empty(batch, width), dh.new_empty(batch, size, width)
    made = (scratch, dx, ddt, db, dc, da, dskip, dh0)
    with torch.cuda.device_of(x):
        selective_scan_backward[(blocks, batch)](
            *given, *made, steps, width, size, reverse, CHUNK, block, padded, num_warps=2 * warps
        )
    sums = db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype), da.sum(0).t().contiguous().to(a.dtype)
    return dx, ddt, *sums, dskip.sum(0).to(skip.dtype), dh0.transpose(1, 2).contiguous()


def compilations() -> list[Compilation]:
    """Every kernel as launched, for compilation without a GPU."""
    found = []
    for kind in ("*bf16", "*fp32"):
        for size in (16, 64):
            block, padded, warps = _block(size)
            constants = {"REVERSE": False, "CHUNK": CHUNK, "BD": block, "BS": padded}
            states = dict.fromkeys(("a", "skip", "h0", "h1", "states"), "*fp32") | {"keep": "*i8"}
            data = dict.fromkeys(("x", "dt", "b", "c", "y"), kind)
            found.append(Compilation(selective_scan_forward, data | states, constants, warps))
            names = ("a", "skip", "states", "dh", "scratch", "db", "dc", "da", "dskip", "dh0")
            states = dict.fromkeys(names, "*fp32") | {"keep": "*i8"}
            data = dict.fromkeys(("x", "dt", "b", "c", "dy", "dx", "ddt"), kind)
            found.append(Compilation(selective_scan_backward, data | states, constants, 2 * warps))
    return found


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _block(size: int) -> tuple[int, int, int]:
    """BD, BS and warps of the forward pass."""
    padded = triton.next_power_of_2(size)
    return max(1, min(64, NUMBERS // padded)), padded, max(1, min(8, padded // NUMBERS))


@triton.jit
def _row(i, T, i_b, REVERSE: tl.constexpr):
    """Where step i lies in [B, T]; the first or last step for what is outside, so that it can be loaded in advance."""
    i = tl.maximum(tl.minimum(i, T - 1), 0)
    return i_b * T + (T - 1 - i if REVERSE else i)


@triton.jit(do_not_specialize=["T"])
def selective_scan_forward(
    x,
    dt,
    b,
    c,
    a,
    skip,
    h0,
    keep,
    y,
    h1,
    states,
    T,
    D,
    S,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    s = tl.arange(0, BS)
    in_d, in_s = d < D, s < S
    at = s[:, None] * D + d[None, :]
    inside = in_s[:, None] & in_d[None, :]
    rate = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(skip + d, mask=in_d, other=0.0).to(tl.float32)
    h = tl.load(h0 + i_b * S * D + at, mask=inside, other=0.0).to(tl.float32)
    row = _row(0, T, i_b, REVERSE)
    next_x = tl.load(x + row * D + d, mask=in_d, other=0.0)
    next_dt = tl.load(dt + row * D + d, mask=in_d, other=0.0)
    next_b = tl.load(b + row * S + s, mask=in_s, other=0.0)
    next_c = tl.load(c + row * S + s, mask=in_s, other=0.0)
    next_keep = tl.load(keep + row)
    chunks = tl.cdiv(T, CHUNK)
    for k in range(chunks):
        tl.store(states + (i_b * chunks + k) * S * D + at, h, mask=inside)
        for i in range(k * CHUNK, tl.minimum(T, (k + 1) * CHUNK)):
            x_t, dt_t = next_x.to(tl.float32), next_dt.to(tl.float32)
            b_t, c_t = next_b.to(tl.float32), next_c.to(tl.float32)
            kept = next_keep.to(tl.float32) != 0
            row = _row(i + 1, T, i_b, REVERSE)
            next_x = tl.load(x + row * D + d, mask=in_d, other=0.0)
            next_dt = tl.load(dt + row * D + d, mask=in_d, other=0.0)
            next_b = tl.load(b + row * S + s, mask=in_s, other=0.0)
            next_c = tl.load(c + row * S + s, mask=in_s, other=0.0)
            next_keep = tl.load(keep + row)
            h = tl.exp(dt_t[None, :] * rate) * tl.where(kept, h, 0.0) + (dt_t * x_t)[None, :] * b_t[:, None]
            out = tl.sum(h * c_t[:, None], 0) + through * x_t
            tl.store(y + _row(i, T, i_b, REVERSE) * D + d, out.to(y.dtype.element_ty), mask=in_d)
    tl.store(h1 + i_b * S * D + at, h, mask=inside)


@triton.jit(do_not_specialize=["T"])
def selective_scan_backward(
    x,
    dt,
    b,
    c,
    a,
    skip,
    keep,
    states,
    dy,
    dh,
    scratch,
    dx,
    ddt,
    db,
    dc,
    da,
    dskip,
    dh0,
    T,
    D,
    S,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    s = tl.arange(0, BS)
    in_d, in_s = d < D, s < S
    at = s[:, None] * D + d[None, :]
    inside = in_s[:, None] & in_d[None, :]
    rate = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(skip + d, mask=in_d, other=0.0).to(tl.float32)
    # A_{t+1} g_{t+1}
    back = tl.load(dh + i_b * S * D + at, mask=inside, other=0.0).to(tl.float32)
    rate_sum = tl.zeros([BS, BD], tl.float32)
    skip_sum = tl.zeros([BD], tl.float32)
    held = tl.minimum(T, CHUNK)
    part = tl.program_id(0) * B * T * S + s
    chunks = tl.cdiv(T, CHUNK)
    for done in range(chunks):
        k = chunks - 1 - done
        start = k * CHUNK
        count = tl.minimum(T - start, CHUNK)
        h = tl.load(states + (i_b * chunks + k) * S * D + at, mask=inside, other=0.0).to(tl.float32)
        row = _row(start, T, i_b, REVERSE)
        next_x = tl.load(x + row * D + d, mask=in_d, other=0.0)
        next_dt = tl.load(dt + row * D + d, mask=in_d, other=0.0)
        next_b = tl.load(b + row * S + s, mask=in_s, other=0.0)
        next_keep = tl.load(keep + row)
        for j in range(count):
            x_t, dt_t, b_t = next_x.to(tl.float32), next_dt.to(tl.float32), next_b.to(tl.float32)
            kept = next_keep.to(tl.float32) != 0
            row = _row(start + j + 1, T, i_b, REVERSE)
            next_x = tl.load(x + row * D + d, mask=in_d, other=0.0)
            next_dt = tl.load(dt + row * D + d, mask=in_d, other=0.0)
            next_b = tl.load(b + row * S + s, mask=in_s, other=0.0)
            next_keep = tl.load(keep + row)
            h = tl.where(kept, h, 0.0)
            tl.store(scratch + (i_b * held + j) * S * D + at, h, mask=inside)
            h = tl.exp(dt_t[None, :] * rate) * h + (dt_t * x_t)[None, :] * b_t[:, None]
        # A thread may read what another one of its program wrote.
        tl.debug_barrier()
        row = _row(start + count - 1, T, i_b, REVERSE)
        next_past = tl.load(scratch + (i_b * held + count - 1) * S * D + at, mask=inside, other=0.0)
        next_x = tl.load(x + row * D + d, mask=in_d, other=0.0)
        next_dt = tl.load(dt + row * D + d, mask=in_d, other=0.0)
        next_up = tl.load(dy + row * D + d, mask=in_d, other=0.0)
        next_b = tl.load(b + row * S + s, mask=in_s, other=0.0)
        next_c = tl.load(c + row * S + s, mask=in_s, other=0.0)
        next_keep = tl.load(keep + row)
        for gone in range(count):
            j = count - 1 - gone
            past, kept = next_past, next_keep.to(tl.float32) != 0
            x_t, dt_t, up = next_x.to(tl.float32), next_dt.to(tl.float32), next_up.to(tl.float32)
            b_t, c_t = next_b.to(tl.float32), next_c.to(tl.float32)
            row = _row(start + j - 1, T, i_b, REVERSE)
            before = i_b * held + tl.maximum(j - 1, 0)
            next_past = tl.load(scratch + before * S * D + at, mask=inside, other=0.0)
            next_x = tl.load(x + row * D + d, mask=in_d, other=0.0)
            next_dt = tl.load(dt + row * D + d, mask=in_d, other=0.0)
            next_up = tl.load(dy + row * D + d, mask=in_d, other=0.0)
            next_b = tl.load(b + row * S + s, mask=in_s, other=0.0)
            next_c = tl.load(c + row * S + s, mask=in_s, other=0.0)
            next_keep = tl.load(keep + row)
            row = _row(start + j, T, i_b, REVERSE)
            decay = tl.exp(dt_t[None, :] * rate)
            g = back + up[None, :] * c_t[:, None]
            faded = decay * past
            now = faded + (dt_t * x_t)[None, :] * b_t[:, None]
            tl.store(db + part + row * S, tl.sum(g * (dt_t * x_t)[None, :], 1), mask=in_s)
            tl.store(dc + part + row * S, tl.sum(up[None, :] * now, 1), mask=in_s)
            left = g * faded
            into = tl.sum(g * b_t[:, None], 0)
            by_step = x_t * into + tl.sum(left * rate, 0)
            tl.store(dx + row * D + d, (dt_t * into + through * up).to(dx.dtype.element_ty), mask=in_d)
            tl.store(ddt + row * D + d, by_step.to(ddt.dtype.element_ty), mask=in_d)
            rate_sum += left * dt_t[None, :]
            skip_sum += up * x_t
            back = tl.where(kept, g * decay, 0.0)
        # The next chunk's states take the place of these.
        tl.debug_barrier()
    tl.store(da + i_b * S * D + at, rate_sum, mask=inside)
    tl.store(dskip + i_b * D + d, skip_sum, mask=in_d)
    tl.store(dh0 + i_b * S * D + at, back, mask=inside)
