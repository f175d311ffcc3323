"""The diagonal linear recurrence h_t = a_t * h_{t-1} + b_t, channel by channel, with and without fused gates.

| function | a_t | b_t | from |
|---|---|---|---|
| `scan` | a | b | any linear recurrence |
| `constant_scan` | decay, one a channel | b | LRU, S4D, exponential averages |
| `min_gru` | 1 - z, z = sigmoid(gate) | z * candidate | Feng et al. 2024, section 3.1 |
| `min_lstm` | f' = f / (f + i) | (1 - f') * candidate | Feng et al. 2024, section 3.2 |
| `rg_lru` | exp(-c * sigmoid(recurrence) * softplus(decay)) | sqrt(1 - a^2) * sigmoid(input) * x | De et al. 2024, section 2.4 |
| `hgrn` | f = lb + (1 - lb) * sigmoid(forget) | (1 - f) * silu(candidate) | Qin et al. 2023, section 3.2 |

All return (h [B, T, D], (h_T [B, D],)) and take, besides their inputs,

- `initial_state`: a tuple of one tensor [B, D], or None for a fresh start, whose state is zero;
- `keep` [B, T], bool or 0/1: where it is 0 a fresh sequence starts, and what was before that step is forgotten;
- `reverse`: from the last step to the first; equal to flipping time in inputs, keep and outputs;
- `backend`: see `clplat.kernels.backend`; None chooses by device and dtype.

h has the inputs' common dtype. The state is float32 at least (complex64 for complex inputs), and so is every product and
sum in between: a decay near 1 has no place in half precision (bfloat16 has nothing between 0.996 and 1), so hand over
pre-activations in half precision, or decays in float32. Gradients reach every tensor, the initial state too, and come
from the final state as well; the gradient by a complex tensor follows torch's convention (that of the conjugate).
Only inputs and h are saved for the backward pass. There is no second derivative but by the reference back end.

The functions raise ValueError for shapes, dtypes and back ends that do not fit.

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels import backend as backends
from clplat.kernels.backend import State

SQRT_SLOPE_LIMIT = 1000.0
"""Bound of the derivative of RG-LRU's square root, infinite where a = 1; De et al. leave it to their code."""


def scan(
    a: Tensor,
    b: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """h_t = a_t * h_{t-1} + b_t, real or complex.

    Args:
        a: decays [B, T, D], any values; |a| <= 1 keeps h bounded.
        b: inputs [B, T, D]; both are real or both complex.
        initial_state: (h_0 [B, D],) or None.
        keep: [B, T], 0 where a fresh sequence starts, or None.
        reverse: from the last step to the first.
        backend: "reference", "cpu", "triton" or None.

    Raises:
        ValueError: shapes, dtypes or back ends that do not fit.
    """
    return _run("scan", {"a": a, "b": b}, None, initial_state, keep, reverse, backend)


def constant_scan(
    b: Tensor,
    decay: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """h_t = decay * h_{t-1} + b_t: `scan` with the same decay at all steps, without its traffic.

    Args:
        b: inputs [B, T, D], real or complex.
        decay: [D], real, or complex where b is.
        initial_state: (h_0 [B, D],) or None.
        keep: [B, T], 0 where a fresh sequence starts, or None.
        reverse: from the last step to the first.
        backend: "reference", "cpu", "triton" or None.

    Raises:
        ValueError: shapes, dtypes or back ends that do not fit.
    """
    if decay.is_complex() and not b.is_complex():
        raise ValueError(f"constant_scan: decay is {decay.dtype} but b is {b.dtype}: give b as complex numbers too.")
    return _run("constant", {"b": b}, ("decay", decay), initial_state, keep, reverse, backend)


def min_gru(
    gate: Tensor,
    candidate: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
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
        initial_state: (h_0 [B, D],) or None.
        keep: [B, T], 0 where a fresh sequence starts, or None.
        reverse: from the last step to the first.
        backend: "reference", "cpu", "triton" or None.

    Raises:
        ValueError: shapes, dtypes or back ends that do not fit.
    """
    inputs = {"gate": gate, "candidate": candidate}
    return _run("min_gru", inputs, None, initial_state, keep, reverse, backend)


def min_lstm(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
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
        initial_state: (h_0 [B, D],) or None.
        keep: [B, T], 0 where a fresh sequence starts, or None.
        reverse: from the last step to the first.
        backend: "reference", "cpu", "triton" or None.

    Raises:
        ValueError: shapes, dtypes or back ends that do not fit.
    """
    inputs = {"forget": forget, "input": input, "candidate": candidate}
    return _run("min_lstm", inputs, None, initial_state, keep, reverse, backend)


def rg_lru(
    recurrence: Tensor,
    input: Tensor,
    x: Tensor,
    decay: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
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
    bounded by `SQRT_SLOPE_LIMIT`. The first step of a fresh sequence (keep = 0, or the first step of all without an
    initial state) has no square root: nothing decays there, and h = sigmoid(input) * x. An initial state of zeros is
    therefore not the same as none.

    Args:
        recurrence: pre-activation of the recurrence gate [B, T, D].
        input: pre-activation of the input gate [B, T, D].
        x: [B, T, D].
        decay: [D], the larger the faster a channel forgets.
        initial_state: (h_0 [B, D],) or None.
        keep: [B, T], 0 where a fresh sequence starts, or None.
        c: how sharply the gate acts, above 0; 8 in the paper.
        reverse: from the last step to the first.
        backend: "reference", "cpu", "triton" or None.

    Raises:
        ValueError: shapes, dtypes or back ends that do not fit, or c not above 0.
    """
    if not c > 0:
        raise ValueError(f"rg_lru: got c={c}, allowed are numbers above 0 (8 in the paper).")
    inputs = {"recurrence": recurrence, "input": input, "x": x}
    wide = decay.to(backends.state_dtype(recurrence)) if decay.is_floating_point() else decay
    return _run("rg_lru", inputs, ("decay", c * F.softplus(wide)), initial_state, keep, reverse, backend)


def hgrn(
    forget: Tensor,
    candidate: Tensor,
    lower_bound: Tensor,
    initial_state: State | None = None,
    keep: Tensor | None = None,
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
        initial_state: (h_0 [B, D],) or None.
        keep: [B, T], 0 where a fresh sequence starts, or None.
        reverse: from the last step to the first.
        backend: "reference", "cpu", "triton" or None.

    Raises:
        ValueError: shapes, dtypes or back ends that do not fit.
    """
    inputs = {"forget": forget, "candidate": candidate}
    return _run("hgrn", inputs, ("lower_bound", lower_bound), initial_state, keep, reverse, backend)


def _run(
    mode: str,
    named: dict[str, Tensor],
    weight: tuple[str, Tensor] | None,
    initial_state: State | None,
    keep: Tensor | None,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, State]:
    """Check the arguments, bring them to common dtypes, and call the back end."""
    _check(mode, named, weight, initial_state, keep)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in named.values()))
    inputs = tuple(x.to(dtype) for x in named.values())
    wide = torch.promote_types(dtype, backends.state_dtype(inputs[0]))
    w = None if weight is None else weight[1].to(wide)
    initial = None if initial_state is None else initial_state[0].to(wide)
    kept = None if keep is None else keep != 0
    chosen = backends.choose(backend, inputs[0])
    if chosen == "triton" and backends.state_dtype(inputs[0]) == torch.float64:
        raise ValueError(f"backend='triton' got {dtype}: it computes in float32. Leave backend out, or convert.")
    if chosen == "reference":
        h, last = _reference(mode, inputs, w, initial, kept, reverse)
    elif chosen == "cpu" and not backends.HAS_NUMBA:
        a, b = _coefficients(mode, inputs, w, _fresh(inputs[0], initial, kept, reverse))
        h, last = torch.ops.clplat.diagonal("scan", [a, b], None, initial, kept, reverse, "torch")
        h = h.to(dtype)
    else:
        h, last = torch.ops.clplat.diagonal(mode, list(inputs), w, initial, kept, reverse, chosen)
    return h, (last,)


def _check(
    mode: str,
    named: dict[str, Tensor],
    weight: tuple[str, Tensor] | None,
    initial_state: State | None,
    keep: Tensor | None,
) -> None:
    name = {"constant": "constant_scan"}.get(mode, mode)
    first, x = next(iter(named.items()))
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"{name}: {first} has shape {list(x.shape)}, allowed is [B, T, D] with T at least 1.")
    b, t, d = x.shape
    for key, other in named.items():
        if other.shape != x.shape:
            raise ValueError(
                f"{name}: {key} has shape {list(other.shape)}, allowed is {list(x.shape)}, that of {first}: expand it."
            )
        if not (other.is_floating_point() or other.is_complex()):
            raise ValueError(f"{name}: {key} is {other.dtype}, allowed are floating-point numbers: convert it.")
        if other.is_complex() and mode not in ("scan", "constant"):
            raise ValueError(f"{name}: {key} is {other.dtype}, allowed are real numbers: use scan for complex ones.")
        if other.is_complex() != x.is_complex():
            raise ValueError(
                f"{name}: {first} is {x.dtype} but {key} is {other.dtype}: make both real or both complex."
            )
    if weight is not None and tuple(weight[1].shape) != (d,):
        raise ValueError(f"{name}: {weight[0]} has shape {list(weight[1].shape)}, allowed is [D] = [{d}].")
    if initial_state is not None:
        if len(initial_state) != 1 or tuple(initial_state[0].shape) != (b, d):
            shapes = [list(s.shape) for s in initial_state]
            raise ValueError(f"{name}: initial_state has shapes {shapes}, allowed is one tensor [B, D] = [{b}, {d}].")
        if initial_state[0].is_complex() and not x.is_complex():
            raise ValueError(f"{name}: initial_state is {initial_state[0].dtype} but {first} is {x.dtype}: match them.")
    if keep is not None and tuple(keep.shape) != (b, t):
        raise ValueError(f"{name}: keep has shape {list(keep.shape)}, allowed is [B, T] = [{b}, {t}].")


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
    mode: str,
    inputs: list[Tensor],
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype, wide = _dtypes(inputs)
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


def _forward_fake(
    mode: str,
    inputs: list[Tensor],
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, t, d = inputs[0].shape
    return inputs[0].new_empty(b, t, d), inputs[0].new_empty(b, d, dtype=_dtypes(inputs)[1])


def _backward(
    mode: str,
    inputs: list[Tensor],
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dlast: Tensor,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients by the inputs, by the weight if there is one (a row for each batch element), and by the initial state."""
    if backend == "triton":
        from clplat.kernels import diagonal_triton

        return diagonal_triton.backward(mode, inputs, weight, initial, keep, h, dh, dlast, reverse, SQRT_SLOPE_LIMIT)
    dtype, wide = _dtypes(inputs)
    inputs, h, dh = [x.to(wide) for x in inputs], h.to(wide), dh.to(wide)
    if backend == "cpu":
        from clplat.kernels import diagonal_cpu

        found, dweight, dinitial = diagonal_cpu.backward(
            mode, inputs, weight, initial, keep, h, dh, dlast, reverse, SQRT_SLOPE_LIMIT
        )
    else:
        found, dinitial = _torch_backward(inputs[0], initial, keep, h, dh, dlast, reverse)
        dweight = None
    return [*(x.to(dtype) for x in found), *([] if dweight is None else [dweight]), dinitial]


def _backward_fake(
    mode: str,
    inputs: list[Tensor],
    weight: Tensor | None,
    initial: Tensor | None,
    keep: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dlast: Tensor,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    shape, rows = h.shape, dlast.shape
    weights = [] if weight is None else [dlast.new_empty(rows)]
    return [*(x.new_empty(shape) for x in inputs), *weights, dlast.new_empty(rows)]


def _dtypes(inputs: list[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """Of inputs and h, and of the state."""
    dtype = inputs[0].dtype
    return dtype, torch.promote_types(dtype, backends.state_dtype(inputs[0]))


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mode, values, weight, initial, keep, reverse, backend = inputs
    ctx.save_for_backward(*values, weight, initial, keep, output[0])
    ctx.chosen = mode, reverse, backend


def _differentiate(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Any, ...]:
    *values, weight, initial, keep, h = ctx.saved_tensors
    mode, reverse, backend = ctx.chosen
    found = torch.ops.clplat.diagonal_backward(
        mode, values, weight, initial, keep, h, dh.contiguous(), dlast.contiguous(), reverse, backend
    )
    n = len(values)
    dweight = None if weight is None else found[n].sum(0)
    return None, found[:n], dweight, None if initial is None else found[-1], None, None, None


_ARGUMENTS = "str mode, Tensor[] inputs, Tensor? weight, Tensor? initial, Tensor? keep"
_forward_op = torch.library.custom_op(
    "clplat::diagonal",
    _forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool reverse, str backend) -> (Tensor, Tensor)",
)
_forward_op.register_fake(_forward_fake)
_forward_op.register_autograd(_differentiate, setup_context=_save)
_backward_op = torch.library.custom_op(
    "clplat::diagonal_backward",
    _backward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor h, Tensor dh, Tensor dlast, bool reverse, str backend) -> Tensor[]",
)
_backward_op.register_fake(_backward_fake)
