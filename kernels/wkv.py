"""The time mixing of RWKV-4: a mean of values with weights that decay channel by channel, and a bonus for the newest.

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat.kernels import backend as backends
from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes
from clplat.kernels.backend import State, choose, state_dtype

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
    keep: Tensor | None = None,
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
        initial_state: (num, den, max), each [B, D]; None for a fresh one: 0, 0, -1e30.
        keep: [B, T], 0 where the state is fresh before the step.
        reverse: from the last step to the first.
        backend: see `clplat.kernels.backend`.

    Returns:
        y [B, T, D] in the dtype of the values, and the state after the last step.

    Raises:
        ValueError: shapes that do not fit, no time step, a back end that cannot run here.
    """
    given = {"k": (k, "B T D"), "v": (v, "B T D"), "decay": (decay, "D"), "bonus": (bonus, "D")}
    known = sizes("wkv", given)
    letters = {"num": ("B D", 0.0), "den": ("B D", 0.0), "max": ("B D", FRESH)}
    state = first_state("wkv", initial_state, v, known, letters)
    mask = keep_mask("wkv", keep, v)
    chosen, wide = choose(backend, v), state_dtype(v)
    if chosen == "reference" or (chosen == "cpu" and not backends.HAS_NUMBA):
        return _reference(k, v, decay.to(wide), bonus.to(wide), state, mask, reverse)
    if chosen == "cpu":
        inputs = (x.to(wide) for x in (k, v, decay, bonus))
        y, num, den, top, _ = _forward(*inputs, *state, mask, reverse, chosen)
        return y.to(v.dtype), (num, den, top)
    y, num, den, top, _ = _forward(k, v, decay, bonus, *state, mask, reverse, chosen)
    return y, (num, den, top)


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


def _chunks(steps: int) -> int:
    return (steps + CHUNK - 1) // CHUNK


@torch.library.custom_op("clplat::wkv", mutates_args=())
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
    if backend == "cpu":
        from clplat.kernels import wkv_cpu

        return wkv_cpu.forward(k, v, w, u, num, den, top, keep, reverse)
    from clplat.kernels import wkv_triton

    return wkv_triton.forward(k, v, w, u, num, den, top, keep, reverse)


@_forward.register_fake
def _(
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
    b, t, d = v.shape
    last = (num.new_empty(num.shape), den.new_empty(den.shape), top.new_empty(top.shape))
    return v.new_empty(v.shape), *last, num.new_empty(3, b, _chunks(t), d)


@torch.library.custom_op("clplat::wkv_backward", mutates_args=())
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
    if backend == "cpu":
        from clplat.kernels import wkv_cpu

        return wkv_cpu.backward(k, v, w, u, num, den, keep, states, dy, dnum, dden, reverse)
    from clplat.kernels import wkv_triton

    return wkv_triton.backward(k, v, w, u, num, den, keep, states, dy, dnum, dden, reverse)


@_backward.register_fake
def _(
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
    inputs = (k.new_empty(k.shape), v.new_empty(v.shape), w.new_empty(w.shape), u.new_empty(u.shape))
    return *inputs, num.new_empty(num.shape), num.new_empty(num.shape), num.new_empty(num.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, w, u, num, den, _, keep, ctx.reverse, ctx.backend = inputs
    states = output[4]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(k, v, w, u, num, den, keep, states)


def _gradient(ctx: Any, dy: Tensor, dnum: Tensor, dden: Tensor, _: Any, __: Any) -> tuple[Tensor | None, ...]:
    found = _backward(*ctx.saved_tensors, dy, dnum, dden, ctx.reverse, ctx.backend)
    return (*found, None, None, None)


_forward.register_autograd(_gradient, setup_context=_setup)
