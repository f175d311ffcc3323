"""The recurrence with a block-diagonal transition in Triton: one program a batch row and group of blocks.

The states of the group stay in registers; the inputs of the next step, which no state has a part in, are loaded before
the present step is computed.

Letters: B batch, T time, N blocks, b rows and columns of a block; BN blocks a program, BB b rounded up to a power of 2.
"""

# Triton's language is not the Python that pyright reads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.triton_support import Compilation

NUMBERS = 1024
"""Of transitions that a program holds of one step: BN * BB * BB."""


def forward(a: Tensor, u: Tensor, h: Tensor, keep: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """All h [B, T, N, b] and the last one."""
    a, u, h, keep = (x.contiguous() for x in (a, u, h, keep))
    batch, steps, blocks, size = u.shape
    y, last = torch.empty_like(u), torch.empty_like(h)
    group, padded = _group(size)
    with torch.cuda.device_of(u):
        block_scan_forward[(triton.cdiv(blocks, group), batch)](
            a, u, h, keep, y, last, steps, blocks, size, reverse, group, padded, num_warps=4
        )
    return y, last


def backward(
    a: Tensor, h: Tensor, keep: Tensor, y: Tensor, dy: Tensor, dh: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, u and the first h."""
    a, h, keep, y, dy, dh = (x.contiguous() for x in (a, h, keep, y, dy, dh))
    batch, steps, blocks, size = y.shape
    da, du, dh0 = torch.empty_like(a), torch.empty_like(y), torch.empty_like(dh)
    group, padded = _group(size)
    with torch.cuda.device_of(y):
        block_scan_backward[(triton.cdiv(blocks, group), batch)](
            a, h, keep, y, dy, dh, da, du, dh0, steps, blocks, size, reverse, group, padded, num_warps=4
        )
    return da, du, dh0


def compilations() -> list[Compilation]:
    """Every kernel as launched, for compilation without a GPU."""
    found = []
    for kind in ("*bf16", "*fp32"):
        for size in (4, 8):
            group, padded = _group(size)
            constants = {"REVERSE": False, "BN": group, "BB": padded}
            # Blocks of any size are masked number by number, which vectorised loads do not allow.
            states = {"h0": "*fp32", "keep": "*i8", "h1": "*fp32"}
            data = dict.fromkeys(("a", "u", "y"), kind)
            found.append(Compilation(block_scan_forward, data | states, constants, vector=False))
            states = {"h0": "*fp32", "keep": "*i8", "dh": "*fp32", "dh0": "*fp32"}
            data = dict.fromkeys(("a", "y", "dy", "da", "du"), kind)
            found.append(Compilation(block_scan_backward, data | states, constants, vector=False))
    return found


def _group(size: int) -> tuple[int, int]:
    padded = triton.next_power_of_2(size)
    return min(64, NUMBERS // padded**2), padded


@triton.jit(do_not_specialize=["T"])
def block_scan_forward(a, u, h0, keep, y, h1, T, N, b, REVERSE: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr):
    i_b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, BB)
    in_h = (n < N)[:, None] & (r < b)[None, :]
    in_a = in_h[:, :, None] & (r < b)[None, None, :]
    at_h = n[:, None] * b + r[None, :]
    at_a = at_h[:, :, None] * b + r[None, None, :]
    h = tl.load(h0 + i_b * N * b + at_h, mask=in_h, other=0.0).to(tl.float32)
    row = i_b * T + (T - 1 if REVERSE else 0)
    next_a = tl.load(a + row * N * b * b + at_a, mask=in_a, other=0.0)
    next_u = tl.load(u + row * N * b + at_h, mask=in_h, other=0.0)
    for i in range(T):
        row = i_b * T + (T - 1 - i if REVERSE else i)
        a_t, u_t = next_a.to(tl.float32), next_u.to(tl.float32)
        following = row - 1 if REVERSE else row + 1
        more = tl.where(i + 1 < T, N, 0)
        inside = in_h & (n < more)[:, None]
        next_a = tl.load(a + following * N * b * b + at_a, mask=in_a & (n < more)[:, None, None], other=0.0)
        next_u = tl.load(u + following * N * b + at_h, mask=inside, other=0.0)
        h = tl.where(tl.load(keep + row).to(tl.float32) != 0, h, 0.0)
        h = tl.sum(a_t * h[:, None, :], 2) + u_t
        tl.store(y + row * N * b + at_h, h.to(y.dtype.element_ty), mask=in_h)
    tl.store(h1 + i_b * N * b + at_h, h, mask=in_h)


@triton.jit(do_not_specialize=["T"])
def block_scan_backward(
    a, h0, keep, y, dy, dh, da, du, dh0, T, N, b, REVERSE: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr
):
    i_b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, BB)
    in_h = (n < N)[:, None] & (r < b)[None, :]
    in_a = in_h[:, :, None] & (r < b)[None, None, :]
    at_h = n[:, None] * b + r[None, :]
    at_a = at_h[:, :, None] * b + r[None, None, :]
    first = tl.load(h0 + i_b * N * b + at_h, mask=in_h, other=0.0).to(tl.float32)
    back = tl.load(dh + i_b * N * b + at_h, mask=in_h, other=0.0).to(tl.float32)
    for c in range(T):
        i = T - 1 - c
        row = i_b * T + (c if REVERSE else i)
        before = row + 1 if REVERSE else row - 1
        kept = tl.load(keep + row).to(tl.float32) != 0
        a_t = tl.load(a + row * N * b * b + at_a, mask=in_a, other=0.0).to(tl.float32)
        g = back + tl.load(dy + row * N * b + at_h, mask=in_h, other=0.0).to(tl.float32)
        inside = in_h & (n < tl.where(i > 0, N, 0))[:, None]
        past = tl.load(y + before * N * b + at_h, mask=inside, other=0.0).to(tl.float32)
        past = tl.where(kept, tl.where(i > 0, past, first), 0.0)
        tl.store(du + row * N * b + at_h, g.to(du.dtype.element_ty), mask=in_h)
        tl.store(da + row * N * b * b + at_a, (g[:, :, None] * past[:, None, :]).to(da.dtype.element_ty), mask=in_a)
        back = tl.where(kept, tl.sum(a_t * g[:, :, None], 1), 0.0)
    tl.store(dh0 + i_b * N * b + at_h, back, mask=in_h)
