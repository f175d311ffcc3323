"""The diagonal linear recurrence h_t = a_t * h_{t-1} + b_t, channel by channel, with and without fused gates.

| function | a_t | b_t | from |
|---|---|---|---|
| `scan` | a | b | any linear recurrence |
| `constant_scan` | decay, one a channel | b | LRU, S4D, exponential averages |
| `min_gru` | 1 - z, z = sigmoid(gate) | z * candidate | Feng et al. 2024, section 3.1 |
| `min_lstm` | f' = f / (f + i) | (1 - f') * candidate | Feng et al. 2024, section 3.2 |
| `rg_lru` | exp(-c * sigmoid(recurrence) * softplus(decay)) | sqrt(1 - a^2) * sigmoid(input) * x | De et al. 2024, section 2.4 |
| `hgrn` | f = lb + (1 - lb) * sigmoid(forget) | (1 - f) * silu(candidate) | Qin et al. 2023, section 3.2 |

All return (h [B, T, D], (h_T [B, D],)). `initial_state` is (h_0 [B, D],), zero where it is None; for `reset`, `reverse`,
`backend` and errors see `clplat.kernels.backend`.

h has the inputs' common dtype. The state is float32 at least (complex64 for complex inputs), and so is every product and
sum in between: a decay near 1 has no place in half precision (bfloat16 has nothing between 0.996 and 1), so hand over
pre-activations in half precision, or decays in float32. Gradients reach every tensor, the initial state too, and come
from the final state as well; the gradient by a complex tensor follows torch's convention (that of the conjugate).
Only inputs and h are saved for the backward pass. There is no second derivative but by the reference back end.

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels import backend as backends
from clplat.kernels.arguments import first_state, kept, sizes
from clplat.kernels.backend import State
from clplat.kernels.custom_op import register

SQRT_SLOPE_LIMIT = 1000.0
"""Bound of the derivative of RG-LRU's square root, infinite where a = 1; De et al. leave it to their code."""


def scan(
    a: Tensor,
    b: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """h_t = a_t * h_{t-1} + b_t, real or complex.

    Args:
        a: decays [B, T, D], any values; |a| <= 1 keeps h bounded.
        b: inputs [B, T, D]; both are real or both complex.
    """
    return _run("scan", {"a": a, "b": b}, None, initial_state, reset, reverse, backend)


def constant_scan(
    b: Tensor,
    decay: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """h_t = decay * h_{t-1} + b_t: `scan` with the same decay at all steps, without its traffic.

    Args:
        b: inputs [B, T, D], real or complex.
        decay: [D], real, or complex where b is.
    """
    if decay.is_complex() and not b.is_complex():
        raise ValueError(f"constant_scan: decay is {decay.dtype} but b is {b.dtype}: give b as complex numbers too.")
    return _run("constant", {"b": b}, ("decay", decay), initial_state, reset, reverse, backend)


def min_gru(
    gate: Tensor,
    candidate: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The minimal GRU: z_t = sigmoid(gate_t), h_t = (1 - z_t) * h_{t-1} + z_t * candidate_t.

    Leo Feng et al., "Were RNNs All We Needed?", 2024 (arXiv 2410.01201), section 3.1. This is their form in linear
    space, for candidates of any sign; the form in log space of their appendix is this one with a positive candidate.

    Args:
        gate: pre-activation of z [B, T, D].
        candidate: [B, T, D].
    """
    inputs = {"gate": gate, "candidate": candidate}
    return _run("min_gru", inputs, None, initial_state, reset, reverse, backend)


def min_lstm(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The minimal LSTM: f' = f / (f + i), h_t = f' * h_{t-1} + (1 - f') * candidate_t, f and i sigmoids.

    Leo Feng et al., "Were RNNs All We Needed?", 2024 (arXiv 2410.01201), section 3.2, with the gates normalised to sum
    to one. f' is computed as (1 + e^-i) / ((1 + e^-i) + (1 + e^-f)), scaled against overflow, which equals
    sigmoid(softplus(-input) - softplus(-forget)).

    Args:
        forget: pre-activation of f [B, T, D].
        input: pre-activation of i [B, T, D].
        candidate: [B, T, D].
    """
    inputs = {"forget": forget, "input": input, "candidate": candidate}
    return _run("min_lstm", inputs, None, initial_state, reset, reverse, backend)


def rg_lru(
    recurrence: Tensor,
    input: Tensor,
    x: Tensor,
    decay: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    c: float = 8.0,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The real-gated linear recurrent unit of Griffin.

    log a_t = -c * sigmoid(recurrence_t) * softplus(decay)
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * sigmoid(input_t) * x_t

    Soham De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    2024 (arXiv 2402.19427), equations 1 to 4 and appendix A. `decay` is minus their Lambda: they write
    a = sigmoid(Lambda), so that log a = -softplus(-Lambda). 1 - a^2 is computed as -expm1(2 log a), which does not
    cancel near a = 1.

    Two details are not in the paper; they follow the authors' published code. The derivative of the square root is
    bounded by `SQRT_SLOPE_LIMIT`. The first step of a fresh sequence (a reset, or the first step of all without an
    initial state) has no square root: nothing decays there, and h = sigmoid(input) * x. An initial state of zeros is
    therefore not the same as none.

    Args:
        recurrence: pre-activation of the recurrence gate [B, T, D].
        input: pre-activation of the input gate [B, T, D].
        x: [B, T, D].
        decay: [D], the larger the faster a channel forgets.
        c: how sharply the gate acts, above 0; 8 in the paper.
    """
    if not c > 0:
        raise ValueError(f"rg_lru: got c={c}, allowed are numbers above 0 (8 in the paper).")
    inputs = {"recurrence": recurrence, "input": input, "x": x}
    wide = decay.to(backends.state_dtype(recurrence)) if decay.is_floating_point() else decay
    return _run("rg_lru", inputs, ("decay", c * F.softplus(wide)), initial_state, reset, reverse, backend)


def hgrn(
    forget: Tensor,
    candidate: Tensor,
    lower_bound: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The hierarchically gated recurrence: f_t = lb + (1 - lb) * sigmoid(forget_t), h_t = f_t * h + (1 - f_t) * silu(c_t).

    Zhen Qin, Songlin Yang, Yiran Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023
    (arXiv 2311.04823), section 3.2, with real numbers. Their complex form has magnitudes f_t and a phase a channel:
    `scan` with a = f_t * exp(i theta).

    Args:
        forget: pre-activation of the forget gate [B, T, D].
        candidate: pre-activation of the input c_t [B, T, D].
        lower_bound: lb [D], in 0..1: what each channel keeps at least, larger in upper layers.
    """
    inputs = {"forget": forget, "candidate": candidate}
    return _run("hgrn", inputs, ("lower_bound", lower_bound), initial_state, reset, reverse, backend)


def _run(
    mode: str,
    named: dict[str, Tensor],
    weight: tuple[str, Tensor] | None,
    initial_state: State | None,
    reset: Tensor | None,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, State]:
    """Check the arguments, bring them to common dtypes, and call the back end."""
    name = {"constant": "constant_scan"}.get(mode, mode)
    given = {key: (x, "B T D") for key, x in named.items()}
    if weight is not None:
        given[weight[0]] = (weight[1], "D")
    known = sizes(name, given, allow_complex=mode in ("scan", "constant"))
    if len({x.is_complex() for x in named.values()}) > 1:
        kinds = ", ".join(f"{key} is {x.dtype}" for key, x in named.items())
        raise ValueError(f"{name}: {kinds}: make both real or both complex.")
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in named.values()))
    inputs = tuple(x.to(dtype) for x in named.values())
    if initial_state is not None and any(s.is_complex() for s in initial_state) and not dtype.is_complex:
        raise ValueError(f"{name}: initial_state is {initial_state[0].dtype} but the inputs are {dtype}: match them.")
    wide = torch.promote_types(dtype, backends.state_dtype(inputs[0]))
    w = None if weight is None else weight[1].to(wide)
    initial: Tensor | None = None
    if initial_state is not None:  # a fresh state is more than zeros: RG-LRU's first step has no square root
        (initial,) = first_state(name, initial_state, inputs[0], known, {"h": ("B D", 0.0)})
    keep = kept(name, reset, inputs[0])
    chosen = backends.choose(backend, inputs[0])
    if chosen == "triton" and backends.state_dtype(inputs[0]) == torch.float64:
        raise ValueError(f"backend='triton' got {dtype}: it computes in float32. Leave backend out, or convert.")
    if chosen == "reference":
        h, last = _reference(mode, inputs, w, initial, keep, reverse)
    elif chosen == "cpu" and not backends.HAS_NUMBA:
        a, b = _coefficients(mode, inputs, w, _fresh(inputs[0], initial, keep, reverse))
        h, last = _diagonal(a, b, None, None, initial, keep, "scan", reverse, "torch")
        h = h.to(dtype)
    else:
        first, second, third = (*inputs, None, None)[:3]
        h, last = _diagonal(first, second, third, w, initial, keep, mode, reverse, chosen)
    return h, (last,)


def _coefficients(mode: str, inputs: tuple[Tensor, ...], w: Tensor | None, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """a and b [B, T, D] in the state's dtype; `fresh` [B, T] marks first steps. Differentiable."""
    wide = torch.promote_types(inputs[0].dtype, backends.state_dtype(inputs[0]))
    inputs = tuple(x.to(wide) for x in inputs)
    if mode == "scan":
        return inputs[0], inputs[1]
    if mode == "constant":
        assert w is not None
        return w.expand_as(inputs[0]), inputs[0]
    if mode == "min_gru":
        gate, candidate = inputs
        return torch.sigmoid(-gate), torch.sigmoid(gate) * candidate
    if mode == "min_lstm":
        forget, input, candidate = inputs
        u = F.softplus(-input) - F.softplus(-forget)
        return torch.sigmoid(u), torch.sigmoid(-u) * candidate
    assert w is not None
    if mode == "rg_lru":
        recurrence, input, x = inputs
        log_a = -torch.sigmoid(recurrence) * w
        root = torch.where(fresh[..., None], 1.0, _bounded_sqrt(-torch.expm1(2 * log_a)))
        return torch.exp(log_a), root * torch.sigmoid(input) * x
    forget, candidate = inputs
    return w + (1 - w) * torch.sigmoid(forget), (1 - w) * torch.sigmoid(-forget) * F.silu(candidate)


def _bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x), with a derivative of at most `SQRT_SLOPE_LIMIT`."""
    least = 0.25 / SQRT_SLOPE_LIMIT**2
    fixed = x.detach()
    return torch.where(x > least, x.clamp(min=least).sqrt(), fixed.sqrt() + (x - fixed) * SQRT_SLOPE_LIMIT)


def _fresh(x: Tensor, initial: Tensor | None, keep: Tensor | None, reverse: bool) -> Tensor:
    """Which steps [B, T] start a sequence."""
    fresh = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else ~keep
    if initial is None:
        first = torch.arange(x.shape[1], device=x.device) == (x.shape[1] - 1 if reverse else 0)
        fresh = fresh | first
    return fresh


def _reference(
    mode: str,
    inputs: tuple[Tensor, ...],
    w: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: a loop over time, differentiated by autograd."""
    a, b = _coefficients(mode, inputs, w, _fresh(inputs[0], initial, keep, reverse))
    state = torch.zeros_like(b[:, 0]) if initial is None else initial
    times = range(b.shape[1])
    rows, decays, added = [], a.unbind(1), b.unbind(1)
    for t in reversed(times) if reverse else times:
        if keep is not None:
            state = torch.where(keep[:, t, None], state, 0)
        state = decays[t] * state + added[t]
        rows.append(state)
    return torch.stack(rows[::-1] if reverse else rows, 1).to(inputs[0].dtype), state


def _forward(
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    mode: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """All h and the last one, of the inputs that the mode has."""
    inputs = [x for x in (first, second, third) if x is not None]
    dtype, wide = _dtypes(first)
    if backend == "triton":
        from clplat.kernels import diagonal_triton

        return diagonal_triton.forward(mode, inputs, weight, initial, keep, reverse)
    inputs = [x.to(wide) for x in inputs]
    if backend == "cpu":
        from clplat.kernels import diagonal_cpu

        h = diagonal_cpu.forward(mode, inputs, weight, initial, keep, reverse)
    else:
        h = _torch_forward(inputs[0], inputs[1], initial, keep, reverse)
    last = h[:, 0 if reverse else -1].clone()
    return h.to(dtype), last


def _backward(
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dlast: Tensor,
    mode: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs and the weight, empty for those that are not there, and of the initial state."""
    inputs = [x for x in (first, second, third) if x is not None]
    dh, dlast = dh.contiguous(), dlast.contiguous()
    dtype, wide = _dtypes(first)
    dweight = None
    if backend == "triton":
        from clplat.kernels import diagonal_triton

        found = diagonal_triton.backward(mode, inputs, weight, initial, keep, h, dh, dlast, reverse, SQRT_SLOPE_LIMIT)
        dweight, dinitial = (found[-2] if weight is not None else None), found[-1]
    else:
        inputs, h, dh = [x.to(wide) for x in inputs], h.to(wide), dh.to(wide)
        if backend == "cpu":
            from clplat.kernels import diagonal_cpu

            found, dweight, dinitial = diagonal_cpu.backward(
                mode, inputs, weight, initial, keep, h, dh, dlast, reverse, SQRT_SLOPE_LIMIT
            )
        else:
            found, dinitial = _torch_backward(inputs[0], initial, keep, h, dh, dlast, reverse)
        found = [x.to(dtype) for x in found]
    absent = [first.new_empty(0) for _ in range(3)]
    one, two, three = (*found[: len(inputs)], *absent[len(inputs) :])
    return one, two, three, absent[0] if dweight is None else dweight.sum(0), dinitial


_diagonal = register(
    "diagonal",
    _forward,
    _backward,
    like=lambda first, *_: (first, first.new_empty(first[:, 0].shape, dtype=_dtypes(first)[1])),
    gradients_like=lambda first, second, third, weight, initial, keep, h, dh, dlast, *_: (
        (first, second, third, weight, dlast)
    ),
    saved=lambda first, second, third, weight, initial, keep, mode, reverse, backend, h, last: (
        (first, second, third, weight, initial, keep, h)
    ),
    options=3,
)


def _dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of inputs and h, and of the state."""
    return x.dtype, torch.promote_types(x.dtype, backends.state_dtype(x))


def _torch_forward(a: Tensor, b: Tensor, initial: Tensor | None, keep: Tensor | None, reverse: bool) -> Tensor:
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    state = torch.zeros_like(b[:, 0]) if initial is None else initial
    times = range(b.shape[1])
    for t in reversed(times) if reverse else times:
        if keep is not None:
            state = torch.where(keep[:, t, None], state, 0)
        torch.addcmul(b[:, t], a[:, t], state, out=h[:, t])
        state = h[:, t]
    return h


def _torch_backward(
    a: Tensor,
    initial: Tensor | None,
    keep: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dlast: Tensor,
    reverse: bool,
) -> tuple[list[Tensor], Tensor]:
    db = torch.empty_like(h)
    carried = dlast
    times = range(h.shape[1])
    for t in times if reverse else reversed(times):
        torch.add(dh[:, t], carried, out=db[:, t])
        carried = a[:, t].conj() * db[:, t]
        if keep is not None:
            carried = torch.where(keep[:, t, None], carried, 0)
    start = torch.zeros_like(h[:, :1]) if initial is None else initial[:, None]
    before = torch.cat([h[:, 1:], start] if reverse else [start, h[:, :-1]], 1)
    if keep is not None:
        before = torch.where(keep[..., None], before, 0)
    return [db * before.conj(), db], carried.clone()
