"""The time mixing of RWKV-4: a mean of values with weights that decay channel by channel, and a bonus for the newest.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`.

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes, widened
from clplat.kernels.backend import State, choose_compiled, state_dtype
from clplat.kernels.custom_op import register

FRESH = -1e30
"""The fresh scale: finite, so that no difference of two of them is NaN, and below every key."""
CHUNK = 32
"""Steps between two states that are kept for the backward pass, which computes those in between once more."""


def wkv(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Means of the values with decaying weights, "RWKV" (Peng et al. 2023, arXiv 2305.13048, section 3.1.2).

    With w the decay and u the bonus, in every channel

        y_t = (N_{t-1} + exp(u + k_t) v_t) / (D_{t-1} + exp(u + k_t))
        N_t = exp(-w) N_{t-1} + exp(k_t) v_t        D_t = exp(-w) D_{t-1} + exp(k_t)

    computed as N = num exp(max) and D = den exp(max) without any exponent above 0, as in the paper's appendix on
    numerical stability. The state means N and D only: whatever reads it must not depend on how they are split into
    num, den and max, and a gradient that reaches max is not read (it is then that of num and den). The gradients of
    the initial num, den and max are exact.

    Args:
        k: keys [B, T, D].
        v: values [B, T, D].
        decay: w [D]; at least 0 for weights that do not grow.
        bonus: u [D].
        initial_state: (num, den, max), each [B, D]; fresh is 0, 0, -1e30.

    Returns:
        y [B, T, D] in the dtype of the values, and the state after the last step.
    """
    given = {"k": (k, "B T D"), "v": (v, "B T D"), "decay": (decay, "D"), "bonus": (bonus, "D")}
    known = sizes("wkv", given)
    letters = {"num": ("B D", 0.0), "den": ("B D", 0.0), "max": ("B D", FRESH)}
    state = first_state("wkv", initial_state, v, known, letters)
    keep = keep_mask("wkv", reset, v)
    chosen = choose_compiled(backend, v)
    if chosen == "reference":
        wide = state_dtype(v)
        return _reference(k, v, decay.to(wide), bonus.to(wide), state, keep, reverse)
    y, num, den, top, _ = _scan(*widened(chosen, v, k, v, decay, bonus), *state, keep, reverse, chosen)
    return y.to(v.dtype), (num, den, top)


def _reference(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State, keep: Tensor, reverse: bool
) -> tuple[Tensor, State]:
    """The definition, in the dtype of the state."""
    num, den, top = state
    rows = []
    time = (flipped(x, reverse).unbind(1) for x in (k.to(num.dtype), v.to(num.dtype), keep[..., None] != 0))
    for k_t, v_t, keep_t in zip(*time, strict=True):
        num, den = torch.where(keep_t, num, 0), torch.where(keep_t, den, 0)
        top = torch.where(keep_t, top, FRESH)
        # Nothing depends on the scale, so it takes no part in the gradient.
        scale = torch.maximum(top, u + k_t).detach()
        old, new = torch.exp(top - scale), torch.exp(u + k_t - scale)
        rows.append((old * num + new * v_t) / (old * den + new))
        scale = torch.maximum(top - w, k_t).detach()
        old, new = torch.exp(top - w - scale), torch.exp(k_t - scale)
        num, den, top = old * num + new * v_t, old * den + new, scale
    return flipped(torch.stack(rows, 1), reverse).to(v.dtype), (num, den, top)


def _code(backend: str) -> ModuleType:
    if backend == "cpu":
        from clplat.kernels import wkv_cpu as code
    else:
        from clplat.kernels import wkv_triton as code
    return code


def _forward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    num: Tensor,
    den: Tensor,
    top: Tensor,
    keep: Tensor,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and the states before every chunk [3, B, chunks, D]."""
    return _code(backend).forward(k, v, w, u, num, den, top, keep, reverse)


def _like(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, num: Tensor, den: Tensor, top: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    b, t, d = v.shape
    return v, num, den, top, num.new_empty(3, b, (t + CHUNK - 1) // CHUNK, d)


def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u, and the initial num, den and max.

    With n, d, m the state before a step, n', d', m' after it, and

        e1 = exp(m - q)         e2 = exp(u + k - q)     q = max(m, u + k)       A = e1 n + e2 v,  E = e1 d + e2
        f1 = exp(m - w - m')    f2 = exp(k - m')        y = A / E               dA = dy / E,      dE = -y dA

    the gradients P of n and Q of d go back as P = f1 P' + e1 dA and Q = f1 Q' + e1 dE, and

        dv = e2 dA + f2 P'                      dk = e2 (v dA + dE) + f2 (v P' + Q')
        du = sum e2 (v dA + dE)                 dw = -sum f1 (n P' + d Q')              dmax = num P + den Q
    """
    return _code(backend).backward(k, v, w, u, num, den, keep, states, dy, dnum, dden, reverse)


_scan = register(
    "wkv",
    _forward,
    _backward,
    like=_like,
    gradients_like=lambda k, v, w, u, num, *_: (k, v, w, u, num, num, num),
    saved=lambda k, v, w, u, num, den, top, keep, reverse, backend, *out: (k, v, w, u, num, den, keep, out[-1]),
    options=2,
    read=(0, 1, 2),
)
