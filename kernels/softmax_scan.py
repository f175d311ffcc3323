"""The running softmax mean: attention of one query a head as a recurrence, with its state in and out.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`.

Letters: B batch, T time, N heads, d width of a head's values.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from clplat.kernels.arguments import first_state, flipped, keep_mask, sizes, widened
from clplat.kernels.backend import State, choose_compiled
from clplat.kernels.custom_op import register

FRESH = -1e30
"""The fresh log-sum-exp: finite, so that no difference of two of them is NaN, and below every score."""


def softmax_scan(
    scores: Tensor,
    values: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
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
        initial_state: (l [B, N], o [B, N, d]); fresh is l = -1e30, o = 0.

    Returns:
        o [B, T, N, d] in the dtype of the values, and the state after the last step.
    """
    known = sizes("softmax_scan", {"scores": (scores, "B T N"), "values": (values, "B T N d")})
    letters = {"the log-sum-exp": ("B N", FRESH), "the mean": ("B N d", 0.0)}
    lse, o = first_state("softmax_scan", initial_state, values, known, letters)
    keep = keep_mask("softmax_scan", reset, values)
    chosen = choose_compiled(backend, values)
    if chosen == "reference":
        return _reference(scores, values, lse, o, keep, reverse)
    y, _, *last = _scan(*widened(chosen, values, scores, values), lse, o, keep, reverse, chosen)
    return y.to(values.dtype), tuple(last)


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


def _code(backend: str) -> ModuleType:
    if backend == "cpu":
        from clplat.kernels import softmax_scan_cpu as code
    else:
        from clplat.kernels import softmax_scan_triton as code
    return code


def _forward(
    s: Tensor, v: Tensor, lse: Tensor, o: Tensor, keep: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, all l [B, T, N] (for the backward pass only), the last l and the last o."""
    return _code(backend).forward(s, v, lse, o, keep, reverse)


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
    return _code(backend).backward(s, v, lse, o, keep, y, lses, last_o, dy, dlse, do, reverse)


_scan = register(
    "softmax_scan",
    _forward,
    _backward,
    like=lambda s, v, lse, o, *_: (v, lse.new_empty(s.shape), lse, o),
    gradients_like=lambda s, v, lse, o, *_: (s, v, lse, o),
    saved=lambda s, v, lse, o, keep, reverse, backend, y, lses, last, last_o: (s, v, lse, o, keep, y, lses, last_o),
    options=2,
    read=(0, 2, 3),
)
