"""The running softmax mean: attention of one query a head as a recurrence, with its state in and out.

Letters: B batch, T time, N heads, d width of a head's values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat.kernels import backend as backends
from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes
from clplat.kernels.backend import State, choose, state_dtype

FRESH = -1e30
"""The fresh log-sum-exp: finite, so that no difference of two of them is NaN, and below every score."""


def softmax_scan(
    scores: Tensor,
    values: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The softmax-weighted mean of all values so far, o_t = sum_{s<=t} exp(score_s) v_s / sum_{s<=t} exp(score_s).

    Attention as a recurrence ("Attention as an RNN", Feng et al. 2024, arXiv 2405.13956, section 3.1), here in
    terms of l_t = log sum_{s<=t} exp(score_s) in place of the paper's maximum, numerator and denominator:

        l_t = logaddexp(l_{t-1}, score_t)
        o_t = exp(l_{t-1} - l_t) o_{t-1} + exp(score_t - l_t) v_t

    No exponent is above 0. A score of -inf leaves its step out; the mean of nothing is 0.

    Args:
        scores: [B, T, N], any size; -inf for a step that does not count.
        values: [B, T, N, d], finite.
        initial_state: (l [B, N], o [B, N, d]), None for a fresh one: l = -1e30, o = 0.
        keep: [B, T], 0 where the state is fresh before the step.
        reverse: from the last step to the first.
        backend: see `clplat.kernels.backend`.

    Returns:
        o [B, T, N, d] in the dtype of the values, and the state after the last step.

    Raises:
        ValueError: shapes that do not fit, no time step, a back end that cannot run here.
    """
    known = sizes("softmax_scan", {"scores": (scores, "B T N"), "values": (values, "B T N d")})
    letters = {"the log-sum-exp": ("B N", FRESH), "the mean": ("B N d", 0.0)}
    lse, o = first_state("softmax_scan", initial_state, values, known, letters)
    mask = keep_mask("softmax_scan", keep, values)
    chosen = choose(backend, values)
    if chosen == "reference" or (chosen == "cpu" and not backends.HAS_NUMBA):
        return _reference(scores, values, lse, o, mask, reverse)
    if chosen == "cpu":
        wide = state_dtype(values)
        y, _, *last = _forward(scores.to(wide), values.to(wide), lse, o, mask, reverse, chosen)
        return y.to(values.dtype), tuple(last)
    y, _, *last = _forward(scores, values, lse, o, mask, reverse, chosen)
    return y, tuple(last)


def _reference(s: Tensor, v: Tensor, lse: Tensor, o: Tensor, keep: Tensor, reverse: bool) -> tuple[Tensor, State]:
    """The definition, in the dtype of the state."""
    rows = []
    time = (flipped(x, reverse).unbind(1) for x in (s.to(lse.dtype), v.to(lse.dtype), keep != 0))
    for s_t, v_t, keep_t in zip(*time, strict=True):
        before = torch.where(keep_t[:, None], lse, FRESH)
        lse = torch.logaddexp(before, s_t)
        o = torch.where(keep_t[:, None, None], o, 0)
        o = torch.exp(before - lse)[..., None] * o + torch.exp(s_t - lse)[..., None] * v_t
        rows.append(o)
    return flipped(torch.stack(rows, 1), reverse).to(v.dtype), (lse, o)


@torch.library.custom_op("clplat::softmax_scan", mutates_args=())
def _forward(
    s: Tensor, v: Tensor, lse: Tensor, o: Tensor, keep: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, all l [B, T, N] (for the backward pass only), the last l and the last o."""
    if backend == "cpu":
        from clplat.kernels import softmax_scan_cpu

        return softmax_scan_cpu.forward(s, v, lse, o, keep, reverse)
    from clplat.kernels import softmax_scan_triton

    return softmax_scan_triton.forward(s, v, lse, o, keep, reverse)


@_forward.register_fake
def _(
    s: Tensor, v: Tensor, lse: Tensor, o: Tensor, keep: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), lse.new_empty(s.shape), lse.new_empty(lse.shape), o.new_empty(o.shape)


@torch.library.custom_op("clplat::softmax_scan_backward", mutates_args=())
def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, values and the initial state.

    With a_t = exp(l_{t-1} - l_t), g_t = exp(score_t - l_t), G the gradient that reaches o_t from all later steps, and
    H_t that of -l_t, without what cancels:

        G_t = dy_t + a_{t+1} G_{t+1}        H_t = dy_t . o_t + a_{t+1} H_{t+1}
        dv_t = g_t G_t                      dscore_t = g_t (v_t . G_t - H_t)
    """
    if backend == "cpu":
        from clplat.kernels import softmax_scan_cpu

        return softmax_scan_cpu.backward(s, v, lse, o, keep, y, lses, last_o, dy, dlse, do, reverse)
    from clplat.kernels import softmax_scan_triton

    return softmax_scan_triton.backward(s, v, lse, o, keep, y, lses, last_o, dy, dlse, do, reverse)


@_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), v.new_empty(v.shape), dlse.new_empty(dlse.shape), do.new_empty(do.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    s, v, lse, o, keep, ctx.reverse, ctx.backend = inputs
    y, lses, _, last_o = output
    ctx.mark_non_differentiable(lses)
    ctx.save_for_backward(s, v, lse, o, keep, y, lses, last_o)


def _gradient(ctx: Any, dy: Tensor, _: Any, dlse: Tensor, do: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(*ctx.saved_tensors, dy, dlse, do, ctx.reverse, ctx.backend)
    return (*found, None, None, None)


_forward.register_autograd(_gradient, setup_context=_setup)
