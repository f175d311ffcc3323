"""The running softmax mean in Triton: one program a batch row, head and block of values, tiles of time scanned at once.

Letters: B batch, T time, N heads, d width of a head's values; BT steps a tile, BD values a block.
"""

# Triton's language is not the Python that pyright reads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.triton_support import Compilation

STEPS = 32
"""BT."""
FORWARD, BACKWARD = 64, 32
"""BD of wide values; other sizes spill with one version of Triton or another."""


def forward(
    s: Tensor, v: Tensor, lse: Tensor, o: Tensor, keep: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, N, d], all log-sum-exps [B, T, N], the last of these and the last o."""
    s, v, lse, o, keep = (x.contiguous() for x in (s, v, lse, o, keep))
    (batch, steps, heads), width = s.shape, v.shape[3]
    made = torch.empty_like(v), lse.new_empty(s.shape), torch.empty_like(lse), torch.empty_like(o)
    block = _block(width, FORWARD)
    with torch.cuda.device_of(v):
        softmax_scan_forward[(batch * heads, triton.cdiv(width, block))](
            s, v, lse, o, keep, *made, steps, heads, width, reverse, STEPS, block, num_warps=_warps(block)
        )
    return made


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
    given = tuple(x.contiguous() for x in (s, v, o, keep, y, lses, last_o, dy, dlse, do))
    (batch, steps, heads), width = s.shape, v.shape[3]
    block = _block(width, BACKWARD)
    blocks = triton.cdiv(width, block)
    # Each block of values has its share of what is summed over them.
    ds, dlse0 = dlse.new_empty(blocks, *s.shape), dlse.new_empty(blocks, *dlse.shape)
    dv, do0 = v.new_empty(v.shape), do.new_empty(do.shape)
    with torch.cuda.device_of(v):
        softmax_scan_backward[(batch * heads, blocks)](
            *given, ds, dv, dlse0, do0, steps, heads, width, reverse, STEPS, block, num_warps=_warps(block)
        )
    return ds.sum(0).to(s.dtype), dv, dlse0.sum(0), do0


def compilations() -> list[Compilation]:
    """Every kernel as launched, for compilation without a GPU."""
    found = []
    for kind in ("*bf16", "*fp32"):
        states = dict.fromkeys(("lse0", "o0", "lses", "lse1", "o1"), "*fp32")
        pointers = dict.fromkeys(("s", "v", "y"), kind) | states | {"keep": "*i8"}
        for block in (8, 16, FORWARD):
            constants = {"REVERSE": False, "BT": STEPS, "BD": block}
            found.append(Compilation(softmax_scan_forward, pointers, constants, warps=_warps(block)))
        states = dict.fromkeys(("o0", "lses", "last_o", "dlse", "do", "ds", "dlse0", "do0"), "*fp32")
        pointers = dict.fromkeys(("s", "v", "y", "dy", "dv"), kind) | states | {"keep": "*i8"}
        for block in (8, 16, BACKWARD):
            constants = {"REVERSE": False, "BT": STEPS, "BD": block}
            found.append(Compilation(softmax_scan_backward, pointers, constants, warps=_warps(block)))
    return found


def _block(width: int, largest: int) -> int:
    return 8 if width <= 8 else 16 if width <= 16 else largest


def _warps(block: int) -> int:
    return 2 if block <= 16 else 4


@triton.jit
def _log_add_within(stop_l, left, stop_r, right):
    """Of neighbouring ranges of steps; a stop forgets what is to the left."""
    top = tl.maximum(left, right)
    both = top + tl.log(tl.exp(left - top) + tl.exp(right - top))
    return tl.maximum(stop_l, stop_r), tl.where(stop_r > 0, right, both)


@triton.jit
def _linear(a_l, b_l, a_r, b_r):
    return a_l * a_r, a_r * b_l + b_r


@triton.jit(do_not_specialize=["T"])
def softmax_scan_forward(
    s, v, lse0, o0, keep, y, lses, lse1, o1, T, N, D, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    i_bn = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    b, n = i_bn // N, i_bn % N
    r = tl.arange(0, BT)
    d = i_d * BD + tl.arange(0, BD)
    in_d = d < D
    lse = tl.load(lse0 + i_bn).to(tl.float32)
    o = tl.load(o0 + i_bn * D + d, mask=in_d, other=0.0).to(tl.float32)
    for start in range(0, T, BT):
        i = start + r
        ok = i < T
        row = b * T + (T - 1 - i if REVERSE else i)
        score = tl.load(s + row * N + n, mask=ok, other=float("-inf")).to(tl.float32)
        fresh = tl.load(keep + row, mask=ok, other=1).to(tl.float32) == 0
        # Two scores of -inf would have no difference.
        stop, within = tl.associative_scan((fresh.to(tl.float32), tl.maximum(score, -1e30)), 0, _log_add_within)
        top = tl.maximum(lse, within)
        after = tl.where(stop > 0, within, top + tl.log(tl.exp(lse - top) + tl.exp(within - top)))
        g = tl.exp(score - after)
        a = tl.where(fresh, 0.0, 1.0 - g)
        inside = ok[:, None] & in_d[None, :]
        at = (row * N + n)[:, None] * D + d[None, :]
        x = g[:, None] * tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        a2 = tl.broadcast_to(a[:, None], [BT, BD])
        decay, made = tl.associative_scan((a2, x), 0, _linear)
        # A state that overflowed must not reach a sequence that starts here, and 0 * inf would let it.
        made += tl.where((stop > 0)[:, None], 0.0, decay * o[None, :])
        tl.store(y + at, made.to(y.dtype.element_ty), mask=inside)
        tl.store(lses + row * N + n, after, mask=i < tl.where(i_d == 0, T, 0))
        o = tl.sum(tl.where((r == BT - 1)[:, None], made, 0.0), 0)
        lse = tl.sum(tl.where(r == BT - 1, after, 0.0), 0)
    tl.store(o1 + i_bn * D + d, o, mask=in_d)
    tl.store(lse1 + i_bn, lse)  # by every block of values, the same number


@triton.jit(do_not_specialize=["T"])
def softmax_scan_backward(
    s,
    v,
    o0,
    keep,
    y,
    lses,
    last_o,
    dy,
    dlse,
    do,
    ds,
    dv,
    dlse0,
    do0,
    T,
    N,
    D,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_bn = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    BN = tl.num_programs(0).to(tl.int64)
    b, n = i_bn // N, i_bn % N
    r = tl.arange(0, BT)
    d = i_d * BD + tl.arange(0, BD)
    in_d = d < D
    # Carried: a_{t+1} G_{t+1} and a_{t+1} H_{t+1} of the step after the tile.
    G = tl.load(do + i_bn * D + d, mask=in_d, other=0.0).to(tl.float32)
    H = tl.sum(G * tl.load(last_o + i_bn * D + d, mask=in_d, other=0.0).to(tl.float32), 0)
    H -= tl.where(i_d == 0, tl.load(dlse + i_bn).to(tl.float32), 0.0)
    for c in range(tl.cdiv(T, BT)):
        i = (tl.cdiv(T, BT) - 1 - c) * BT + r
        ok = i < T
        row = b * T + (T - 1 - i if REVERSE else i)
        score = tl.load(s + row * N + n, mask=ok, other=float("-inf")).to(tl.float32)
        g = tl.exp(score - tl.load(lses + row * N + n, mask=ok, other=0.0).to(tl.float32))
        kept = tl.load(keep + row, mask=ok, other=1).to(tl.float32) != 0
        more = (i + 1 < T) & (r < BT - 1)
        row1 = row - 1 if REVERSE else row + 1
        score1 = tl.load(s + row1 * N + n, mask=more, other=float("-inf")).to(tl.float32)
        g1 = tl.exp(score1 - tl.load(lses + row1 * N + n, mask=more, other=0.0).to(tl.float32))
        a1 = tl.where(tl.load(keep + row1, mask=more, other=1).to(tl.float32) != 0, 1.0 - g1, 0.0)
        inside = ok[:, None] & in_d[None, :]
        at = (row * N + n)[:, None] * D + d[None, :]
        up = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        out = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        val = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        decay, down = tl.associative_scan((tl.broadcast_to(a1[:, None], [BT, BD]), up), 0, _linear, reverse=True)
        down += decay * G[None, :]
        decay1, h = tl.associative_scan((a1, tl.sum(up * out, 1)), 0, _linear, reverse=True)
        h += decay1 * H
        tl.store(dv + at, (g[:, None] * down).to(dv.dtype.element_ty), mask=inside)
        part = g * (tl.sum(val * down, 1) - h)
        tl.store(ds + (i_d * BN // N * T + row) * N + n, part, mask=ok)
        a = tl.where(kept & (r == 0), 1.0 - g, 0.0)
        G = tl.sum(a[:, None] * down, 0)
        H = tl.sum(a * h, 0)
    tl.store(do0 + i_bn * D + d, G, mask=in_d)
    first = tl.load(keep + b * T + (T - 1 if REVERSE else 0)).to(tl.float32)
    along = tl.sum(G * tl.load(o0 + i_bn * D + d, mask=in_d, other=0.0).to(tl.float32), 0) - H
    tl.store(dlse0 + i_d * BN + i_bn, tl.where(first != 0, along, 0.0))
