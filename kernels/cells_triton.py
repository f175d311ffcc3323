"""Triton kernels of `clplat.kernels.cells`: a program is one head and 16 rows of the batch, and runs all their steps.

The recurrent weights of the head are loaded once and stay; the gates of the next step are loaded before the products
of this one, since they do not depend on them. Gradients of the weights are one product of matrices after the loop, not
here. State and arithmetic are float32, products have the dtype of the recurrent weights (float32 in three tf32 parts).

Widths are multiples of 16 (the caller pads them) and pointers multiples of 16 bytes (the launchers copy what is
not): loads one by one would need more registers than there are.
"""

# Names bound under `if` on constants, launches by subscript and constants' types are beyond pyright in Triton's language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.cells import widest
from clplat.kernels.triton_support import Compilation, dot_dtype, softplus

CELLS = {"lstm": 0, "gru": 1, "elman": 2, "slstm": 3, "lem": 4}
GATES = {"lstm": 4, "gru": 3, "elman": 1, "slstm": 4, "lem": 4}
STATES = {"lstm": 2, "gru": 1, "elman": 1, "slstm": 4, "lem": 2}
ROWS = 16
"""Rows of the batch in a program: the least that a matrix instruction takes."""


@triton.jit
def tanh(x):
    """tanh, relatively exact for small x too: what the cell hands on may be small at every step."""
    q = x * x
    p = -5.70498872745e-3 * q + 2.06390887954e-2
    p = p * q - 5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * q * p, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _weights(recurrent, n, g, D, od, G: tl.constexpr, BACK: tl.constexpr, DOT: tl.constexpr):
    """One gate's [in, out] weights of a head, or their transpose, read as such."""
    base = recurrent + (n * G + g) * D * D
    inside = (od < D)[:, None] & (od < D)[None, :]
    if BACK:
        w = tl.load(base + od[None, :] * D + od[:, None], mask=inside, other=0.0)
    else:
        w = tl.load(base + od[:, None] * D + od[None, :], mask=inside, other=0.0)
    return w.to(tl.float32).to(DOT)


@triton.jit
def _product(a, w, DOT: tl.constexpr):
    return tl.dot(a.to(DOT), w, input_precision="tf32x3")


@triton.jit(do_not_specialize=["T", "B", "N"])
def cell_forward(
    gates,
    recurrent,
    extra,
    state,
    keep,
    y,
    saved,
    last,
    dt,
    T,
    B,
    N,
    D,
    CELL: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    DP: tl.constexpr,
    BB: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    O4: tl.constexpr,
    O5: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
):
    """y, last and saved of one head and BB rows; O0.. are the options of the cell, in the order of its custom op."""
    n = tl.program_id(0)
    ob = tl.program_id(1) * BB + tl.arange(0, BB)
    od = tl.arange(0, DP)
    inside = (ob < B)[:, None] & (od < D)[None, :]
    b64 = ob.to(tl.int64)
    first = (b64 * N + n)[:, None] * D + od[None, :]
    size = B.to(tl.int64) * N * D
    w0 = _weights(recurrent, n, 0, D, od, G, False, DOT)
    if G >= 3:
        w1 = _weights(recurrent, n, 1, D, od, G, False, DOT)
        w2 = _weights(recurrent, n, 2, D, od, G, False, DOT)
    if G == 4:
        w3 = _weights(recurrent, n, 3, D, od, G, False, DOT)
    if E > 0:
        e0 = tl.load(extra + (n * E) * D + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
    if E > 1:
        e1 = tl.load(extra + (n * E + 1) * D + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
        e2 = tl.load(extra + (n * E + 2) * D + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
    h = tl.load(state + first, mask=inside, other=0.0).to(tl.float32)
    if CELL == 0 or CELL == 3 or CELL == 4:
        c = tl.load(state + size + first, mask=inside, other=0.0).to(tl.float32)
    if CELL == 3:
        norm = tl.load(state + 2 * size + first, mask=inside, other=1.0).to(tl.float32)
        m = tl.load(state + 3 * size + first, mask=inside, other=0.0).to(tl.float32)

    row = b64 * T
    if REVERSE:
        row += T - 1
    pg = gates + ((row * N + n) * (G * D))[:, None] + od[None, :]
    x0 = tl.load(pg, mask=inside, other=0.0).to(tl.float32)
    if G >= 3:
        x1 = tl.load(pg + D, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(pg + 2 * D, mask=inside, other=0.0).to(tl.float32)
    if G == 4:
        x3 = tl.load(pg + 3 * D, mask=inside, other=0.0).to(tl.float32)
    for s in range(T):
        # The last step reads itself once more, which is cheaper than a mask.
        ahead = tl.where(s + 1 < T, 1, 0)
        if REVERSE:
            ahead = -ahead
        pg = gates + (((row + ahead) * N + n) * (G * D))[:, None] + od[None, :]
        v0 = tl.load(pg, mask=inside, other=0.0).to(tl.float32)
        if G >= 3:
            v1 = tl.load(pg + D, mask=inside, other=0.0).to(tl.float32)
            v2 = tl.load(pg + 2 * D, mask=inside, other=0.0).to(tl.float32)
        if G == 4:
            v3 = tl.load(pg + 3 * D, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            kept = (tl.load(keep + row, mask=ob < B, other=1) != 0)[:, None]
            h = tl.where(kept, h, 0.0)
            if CELL == 0 or CELL == 3 or CELL == 4:
                c = tl.where(kept, c, 0.0)
            if CELL == 3:
                norm = tl.where(kept, norm, 0.0)
                m = tl.where(kept, m, O0)
        ps = saved + ((row * N + n) * (A * D))[:, None] + od[None, :]
        if CELL == 0:  # options: coupled, input, forget and output gate, activation of input and output
            x0 += _product(h, w0, DOT)
            x1 += _product(h, w1, DOT)
            x2 += _product(h, w2, DOT)
            x3 += _product(h, w3, DOT)
            if E > 0:
                x0 += e0 * c
                x1 += e1 * c
            i = tl.sigmoid(x0)
            if O1 == 0:
                i = tl.full([BB, DP], 1.0, tl.float32)
            f = tl.sigmoid(x1)
            if O2 == 0:
                f = tl.full([BB, DP], 1.0, tl.float32)
            if O0 == 1:
                f = 1.0 - i
            u = x2
            if O4 == 1:
                u = tanh(x2)
            c = f * c + i * u
            if E > 0:
                x3 += e2 * c
            o = tl.sigmoid(x3)
            if O3 == 0:
                o = tl.full([BB, DP], 1.0, tl.float32)
            h = o * tanh(c) if O5 == 1 else o * c
            tl.store(ps, i, mask=inside)
            tl.store(ps + D, f, mask=inside)
            tl.store(ps + 2 * D, u, mask=inside)
            tl.store(ps + 3 * D, o, mask=inside)
            tl.store(ps + 4 * D, c, mask=inside)
        if CELL == 1:  # options: reset after the product
            r = tl.sigmoid(x0 + _product(h, w0, DOT))
            z = tl.sigmoid(x1 + _product(h, w1, DOT))
            if O0 == 1:
                q = _product(h, w2, DOT) + e0
                a = tanh(x2 + r * q)
            else:
                q = r * h
                a = tanh(x2 + _product(q, w2, DOT) + e0)
            h = (1.0 - z) * a + z * h
            tl.store(ps, r, mask=inside)
            tl.store(ps + D, z, mask=inside)
            tl.store(ps + 2 * D, a, mask=inside)
            tl.store(ps + 3 * D, q, mask=inside)
        if CELL == 2:  # options: relu
            x0 += _product(h, w0, DOT)
            h = tl.where(x0 < 0.0, 0.0, x0) if O0 == 1 else tanh(x0)
        if CELL == 3:  # options: the scale of a fresh state
            x0 += _product(h, w0, DOT)
            x1 += _product(h, w1, DOT)
            x2 += _product(h, w2, DOT)
            x3 += _product(h, w3, DOT)
            held = m - softplus(-x1)
            m = tl.maximum(held, x0)
            i = tl.exp(x0 - m)
            f = tl.exp(held - m)
            u = tanh(x2)
            o = tl.sigmoid(x3)
            c = f * c + i * u
            norm = f * norm + i
            h = o * (c / norm)
            tl.store(ps, i, mask=inside)
            tl.store(ps + D, f, mask=inside)
            tl.store(ps + 2 * D, u, mask=inside)
            tl.store(ps + 3 * D, o, mask=inside)
            tl.store(ps + 4 * D, c, mask=inside)
            tl.store(ps + 5 * D, norm, mask=inside)
            tl.store(ps + 6 * D, tl.sigmoid(-x1), mask=inside)
        if CELL == 4:
            g = dt * tl.sigmoid(x0 + _product(h, w0, DOT))
            k = dt * tl.sigmoid(x1 + _product(h, w1, DOT))
            a = tanh(x2 + _product(h, w2, DOT))
            c = (1.0 - g) * c + g * a
            q = tanh(x3 + _product(c, w3, DOT))
            h = (1.0 - k) * h + k * q
            tl.store(ps, g, mask=inside)
            tl.store(ps + D, k, mask=inside)
            tl.store(ps + 2 * D, a, mask=inside)
            tl.store(ps + 3 * D, q, mask=inside)
            tl.store(ps + 4 * D, c, mask=inside)
        py = y + ((row * N + n) * D)[:, None] + od[None, :]
        tl.store(py, h.to(y.dtype.element_ty), mask=inside)
        row += ahead
        x0 = v0
        if G >= 3:
            x1 = v1
            x2 = v2
        if G == 4:
            x3 = v3
    tl.store(last + first, h, mask=inside)
    if CELL == 0 or CELL == 3 or CELL == 4:
        tl.store(last + size + first, c, mask=inside)
    if CELL == 3:
        tl.store(last + 2 * size + first, norm, mask=inside)
        tl.store(last + 3 * size + first, m, mask=inside)


@triton.jit(do_not_specialize=["T", "B", "N"])
def cell_backward(
    dy,
    dlast,
    y,
    saved,
    last,
    recurrent,
    extra,
    state,
    keep,
    dgates,
    dstate,
    dt,
    T,
    B,
    N,
    D,
    CELL: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    DP: tl.constexpr,
    BB: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    O4: tl.constexpr,
    O5: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradients of the gates and of the initial state; arguments as in the forward kernel."""
    n = tl.program_id(0)
    ob = tl.program_id(1) * BB + tl.arange(0, BB)
    od = tl.arange(0, DP)
    inside = (ob < B)[:, None] & (od < D)[None, :]
    b64 = ob.to(tl.int64)
    first = (b64 * N + n)[:, None] * D + od[None, :]
    size = B.to(tl.int64) * N * D
    w0 = _weights(recurrent, n, 0, D, od, G, True, DOT)
    if G >= 3:
        w1 = _weights(recurrent, n, 1, D, od, G, True, DOT)
        w2 = _weights(recurrent, n, 2, D, od, G, True, DOT)
    if G == 4:
        w3 = _weights(recurrent, n, 3, D, od, G, True, DOT)
    if E > 1:
        e0 = tl.load(extra + (n * E) * D + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
        e1 = tl.load(extra + (n * E + 1) * D + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
        e2 = tl.load(extra + (n * E + 2) * D + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
    dh = tl.load(dlast + first, mask=inside, other=0.0).to(tl.float32)
    if CELL == 0 or CELL == 3 or CELL == 4:
        dc = tl.load(dlast + size + first, mask=inside, other=0.0).to(tl.float32)
    if CELL == 3:
        dn = tl.load(dlast + 2 * size + first, mask=inside, other=0.0).to(tl.float32)
        # What the loss gains by the scale alone: 0 unless a use of the final state depends on the scale.
        beyond = tl.load(dlast + 3 * size + first, mask=inside, other=0.0).to(tl.float32)
        beyond -= dc * tl.load(last + size + first, mask=inside, other=0.0).to(tl.float32)
        beyond -= dn * tl.load(last + 2 * size + first, mask=inside, other=0.0).to(tl.float32)

    row = b64 * T
    back = -1
    if REVERSE:
        back = 1
    else:
        row += T - 1
    for s in range(T):
        dh += tl.load(dy + ((row * N + n) * D)[:, None] + od[None, :], mask=inside, other=0.0).to(tl.float32)
        ps = saved + ((row * N + n) * (A * D))[:, None] + od[None, :]
        # One step earlier: of what was saved, or the initial state.
        earlier = row + back * tl.where(s + 1 < T, 1, 0)
        at_first = (ob * 0 + s) == T - 1
        later = inside & (at_first == 0)[:, None]
        initial = inside & at_first[:, None]
        pp = saved + ((earlier * N + n) * (A * D))[:, None] + od[None, :]
        pz = dgates + ((row * N + n) * (G * D))[:, None] + od[None, :]
        if KEEP:
            kept = (tl.load(keep + row, mask=ob < B, other=1) != 0)[:, None]
            later = later & kept
            initial = initial & kept
        if CELL == 1 or CELL == 4:
            hp = tl.load(y + ((earlier * N + n) * D)[:, None] + od[None, :], mask=later, other=0.0).to(tl.float32)
            hp += tl.load(state + first, mask=initial, other=0.0).to(tl.float32)
        if CELL == 0 or CELL == 3 or CELL == 4:
            cp = tl.load(pp + 4 * D, mask=later, other=0.0)
            cp += tl.load(state + size + first, mask=initial, other=0.0).to(tl.float32)
        if CELL == 0:
            i = tl.load(ps, mask=inside, other=0.0)
            f = tl.load(ps + D, mask=inside, other=0.0)
            u = tl.load(ps + 2 * D, mask=inside, other=0.0)
            o = tl.load(ps + 3 * D, mask=inside, other=0.0)
            c = tl.load(ps + 4 * D, mask=inside, other=0.0)
            if O5 == 1:
                c = tanh(c)
                dc += dh * o * (1.0 - c * c)
            else:
                dc += dh * o
            z3 = dh * c * o * (1.0 - o)
            if E > 1:
                dc += e2 * z3
            z1 = dc * cp * f * (1.0 - f)
            z0 = dc * u * i * (1.0 - i)
            if O0 == 1:
                z0 = dc * (u - cp) * i * (1.0 - i)
                z1 = tl.zeros([BB, DP], tl.float32)
            z2 = dc * i
            if O4 == 1:
                z2 = dc * i * (1.0 - u * u)
            dc = dc * f
            if E > 1:
                dc += e0 * z0 + e1 * z1
        if CELL == 1:
            r = tl.load(ps, mask=inside, other=0.0)
            z = tl.load(ps + D, mask=inside, other=0.0)
            a = tl.load(ps + 2 * D, mask=inside, other=0.0)
            z2 = dh * (1.0 - z) * (1.0 - a * a)
            z1 = dh * (hp - a) * z * (1.0 - z)
            dh = dh * z
            if O0 == 1:
                q = tl.load(ps + 3 * D, mask=inside, other=0.0)
                z0 = z2 * q * r * (1.0 - r)
                dh += _product(z2 * r, w2, DOT)
            else:
                ds = _product(z2, w2, DOT)
                z0 = ds * hp * r * (1.0 - r)
                dh += ds * r
            dh += _product(z0, w0, DOT) + _product(z1, w1, DOT)
        if CELL == 2:
            h = tl.load(y + ((row * N + n) * D)[:, None] + od[None, :], mask=inside, other=0.0).to(tl.float32)
            z0 = tl.where(h > 0.0, dh, 0.0) if O0 == 1 else dh * (1.0 - h * h)
            dh = _product(z0, w0, DOT)
        if CELL == 3:
            np = tl.load(pp + 5 * D, mask=later, other=0.0)
            np += tl.load(state + 2 * size + first, mask=initial, other=0.0).to(tl.float32)
            i = tl.load(ps, mask=inside, other=0.0)
            f = tl.load(ps + D, mask=inside, other=0.0)
            u = tl.load(ps + 2 * D, mask=inside, other=0.0)
            o = tl.load(ps + 3 * D, mask=inside, other=0.0)
            c = tl.load(ps + 4 * D, mask=inside, other=0.0)
            norm = tl.load(ps + 5 * D, mask=inside, other=1.0)
            away = tl.load(ps + 6 * D, mask=inside, other=0.0)
            mean = c / norm
            z3 = dh * mean * o * (1.0 - o)
            dc += dh * o / norm
            dn -= dh * o * mean / norm
            # The larger of two arguments made the scale: i < 1 where it was the kept one.
            z0 = i * (dc * u + dn) + tl.where(i < 1.0, 0.0, beyond)
            beyond = tl.where(i < 1.0, beyond, 0.0)
            z1 = ((dc * cp + dn * np) * f + beyond) * away
            z2 = dc * i * (1.0 - u * u)
            dc = dc * f
            dn = dn * f
        if CELL == 0 or CELL == 3:
            dh = _product(z0, w0, DOT) + _product(z1, w1, DOT) + _product(z2, w2, DOT) + _product(z3, w3, DOT)
        if CELL == 4:
            g = tl.load(ps, mask=inside, other=0.0)
            k = tl.load(ps + D, mask=inside, other=0.0)
            a = tl.load(ps + 2 * D, mask=inside, other=0.0)
            q = tl.load(ps + 3 * D, mask=inside, other=0.0)
            z3 = dh * k * (1.0 - q * q)
            z1 = dh * (q - hp) * k * (1.0 - k / dt)
            dh = dh * (1.0 - k)
            dc += _product(z3, w3, DOT)
            z2 = dc * g * (1.0 - a * a)
            z0 = dc * (a - cp) * g * (1.0 - g / dt)
            dc = dc * (1.0 - g)
            dh += _product(z0, w0, DOT) + _product(z1, w1, DOT) + _product(z2, w2, DOT)
        tl.store(pz, z0.to(dgates.dtype.element_ty), mask=inside)
        if G >= 3:
            tl.store(pz + D, z1.to(dgates.dtype.element_ty), mask=inside)
            tl.store(pz + 2 * D, z2.to(dgates.dtype.element_ty), mask=inside)
        if G == 4:
            tl.store(pz + 3 * D, z3.to(dgates.dtype.element_ty), mask=inside)
        if KEEP:
            dh = tl.where(kept, dh, 0.0)
            if CELL == 0 or CELL == 3 or CELL == 4:
                dc = tl.where(kept, dc, 0.0)
            if CELL == 3:
                dn = tl.where(kept, dn, 0.0)
                beyond = tl.where(kept, beyond, 0.0)
        row += back
    tl.store(dstate + first, dh, mask=inside)
    if CELL == 0 or CELL == 3 or CELL == 4:
        tl.store(dstate + size + first, dc, mask=inside)
    if CELL == 3:
        tl.store(dstate + 2 * size + first, dn, mask=inside)
        beyond += dc * tl.load(state + size + first, mask=inside, other=0.0).to(tl.float32)
        beyond += dn * tl.load(state + 2 * size + first, mask=inside, other=0.0).to(tl.float32)
        tl.store(dstate + 3 * size + first, beyond, mask=inside)


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
    """y in the dtype of the gates, the final state, and what the backward pass needs, both in float32."""
    b, t, n, _g, d = gates.shape
    gates, recurrent, state = _aligned(gates), _aligned(recurrent), _aligned(state)
    y, last, saved = gates.new_empty(b, t, n, d), torch.empty_like(state), state.new_empty(b, t, n, slots, d)
    cell_forward[(n, triton.cdiv(b, ROWS))](
        gates,
        recurrent,
        state if extra is None else _aligned(extra),
        state,
        state if keep is None else _aligned(keep).view(torch.uint8),
        y,
        saved,
        last,
        _step_of(cell, options),
        t,
        b,
        n,
        d,
        **_constants(cell, options, extra, keep, reverse, recurrent.dtype, slots, d),
        num_warps=_warps(d),
        num_stages=1,
    )
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
    """Gradients of the gates, in the dtype of y, and of the initial state."""
    b, t, n, d = y.shape
    y, saved, last, recurrent, state = (_aligned(x) for x in (y, saved, last, recurrent, state))
    dgates, dstate = y.new_empty(b, t, n, GATES[cell], d), torch.empty_like(state)
    cell_backward[(n, triton.cdiv(b, ROWS))](
        _aligned(dy),
        _aligned(dlast),
        y,
        saved,
        last,
        recurrent,
        state if extra is None else _aligned(extra),
        state,
        state if keep is None else _aligned(keep).view(torch.uint8),
        dgates,
        dstate,
        _step_of(cell, options),
        t,
        b,
        n,
        d,
        **_constants(cell, options, extra, keep, reverse, recurrent.dtype, saved.shape[3], d),
        num_warps=_warps(d),
        num_stages=1,
    )
    return dgates, dstate


def _aligned(x: Tensor) -> Tensor:
    """x in one piece, at an address that is a multiple of 16."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _step_of(cell: str, options: list[float]) -> float:
    """LEM's largest time step: an argument, not a constant, so that another value is no new compilation."""
    return options[0] if cell == "lem" else 1.0


def _constants(
    cell: str,
    options: list[float],
    extra: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
    slots: int,
    d: int,
) -> dict[str, object]:
    flags = [0.0] if cell == "lem" else options
    whole = [x if cell == "slstm" else int(x) for x in flags]
    return {
        "CELL": CELLS[cell],
        "G": GATES[cell],
        "A": slots,
        "E": 0 if extra is None else extra.shape[1],
        "DP": max(16, triton.next_power_of_2(d)),
        "BB": ROWS,
        **{f"O{k}": value for k, value in enumerate(whole + [0] * (6 - len(whole)))},
        "KEEP": keep is not None,
        "REVERSE": reverse,
        "DOT": dot_dtype(dtype),
    }


def _warps(d: int) -> int:
    """8 where 4 would spill."""
    return 4 if d <= 32 else 8


def compilations() -> list[Compilation]:
    """Every cell with resets, at the widest head of each number of warps; GRU in both forms, LSTM with peepholes too."""
    found: list[Compilation] = []
    options = {"lstm": [0.0, 1, 1, 1, 1, 1], "gru": [1.0], "elman": [0.0], "slstm": [-1e30], "lem": [1.0]}
    slots = {"lstm": 5, "gru": 4, "elman": 0, "slstm": 7, "lem": 5}
    keep = torch.empty(0)
    for cell, kinds in options.items():
        variants = [(kinds, 1 if cell == "gru" else 0)]
        variants += {"lstm": [(kinds, 3)], "gru": [([0.0], 1)]}.get(cell, [])
        # Under autocast the gates are bfloat16 and the weights float32.
        sizes = [("bf16", torch.bfloat16, 32), ("bf16", torch.bfloat16, 128), ("fp32", torch.float32, 32)]
        sizes += [(name, torch.float32, widest(cell, torch.float32)) for name in ("bf16", "fp32")]
        cases = [(*variant, *size) for variant in variants for size in dict.fromkeys(sizes)]
        for variant, parts, name, dtype, d in cases:
            extra = torch.empty(0, parts, 0) if parts else None
            constants = _constants(cell, variant, extra, keep, False, dtype, slots[cell], d)
            constants["DOT"] = {torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
            single = dict.fromkeys(("extra", "state", "saved", "last"), "*fp32")
            weights = {torch.bfloat16: "*bf16"}.get(dtype, "*fp32")
            pointers = {"gates": f"*{name}", "recurrent": weights, "keep": "*u8", "y": f"*{name}", **single}
            back = {"dy": f"*{name}", "dlast": "*fp32", "dgates": f"*{name}", "dstate": "*fp32", **pointers}
            del back["gates"]
            for kernel, given in ((cell_forward, pointers), (cell_backward, back)):
                found.append(
                    Compilation(kernel, given, constants, _warps(d), scalars={"dt": "fp32"}, aligned_only=True)
                )
    return found
