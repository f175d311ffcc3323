"""Nonlinear recurrent cells with head-wise (block-diagonal) recurrent weights: LSTM, GRU, Elman, sLSTM, LEM.

The products W x + b are made outside, one matrix product for all steps; here run the steps that need one another. With
N heads of width d, head n of step t sees its own h_{t-1} only: `z = x + h R`, one [d, d] matrix a gate and head. N = 1
is the ordinary dense cell.

Every function returns (y, final state): y [B, T, N, d] in the dtype of the gates, the state a tuple of [B, N, d] in
float32 (float64 for float64 gates), its first tensor being what y holds at the last step. Two products of the same
row are never mixed over b, so rows are independent.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`. Triton runs heads of at most 128
(bf16 and fp16 `recurrent`), with fp32 `recurrent` 64 (gru, elman) or 32 (lstm, slstm, lem); larger ones run as the
reference does, on the device. Widths that are no multiple of 16 are padded, which costs copies.

Letters: B batch, T time, N heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels.arguments import first_state, kept, sizes
from clplat.kernels.backend import State, choose_compiled, state_dtype
from clplat.kernels.custom_op import register

FRESH_SCALE = -1e30
"""sLSTM's log scale m of a sequence with no past: finite, and its exponential is 0 in float32 and in float64."""


def lstm(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    peepholes: Tensor | None = None,
    coupled: bool = False,
    input_gate: bool = True,
    forget_gate: bool = True,
    output_gate: bool = True,
    input_activation: bool = True,
    output_activation: bool = True,
    full_gate_recurrence: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000) and the variants of Greff et al. 2017.

        i = sigmoid(x_i + h R_i + p_i c)      f = sigmoid(x_f + h R_f + p_f c)      u = tanh(x_u + h R_u)
        c' = f c + i u                        o = sigmoid(x_o + h R_o + p_o c')     h' = o tanh(c')

    Greff, Srivastava, Koutnik, Steunebrink & Schmidhuber, "LSTM: A Search Space Odyssey", 2017, arXiv 1503.04069,
    section II and the variants of section III (NIG, NFG, NOG, NIAF, NOAF, NP, CIFG, FGR).

    Args:
        gates: [B, T, N, 4, d], x of i, f, u, o. What a variant has no use for is ignored, and its gradient is 0.
        recurrent: [N, 4, d, d], R as [in, out].
        initial_state: (h, c), each [B, N, d]; fresh is 0. With full_gate_recurrence (h, c, i, f, o): the gates of the
            last step belong to the state.
        peepholes: [3, N, d], p of i, f, o; None leaves them out (NP).
        coupled: f = 1 - i (CIFG).
        input_gate: False sets i = 1 (NIG).
        forget_gate: False sets f = 1 (NFG).
        output_gate: False sets o = 1 (NOG).
        input_activation: False drops the tanh of u (NIAF).
        output_activation: False drops the tanh of c' (NOAF).
        full_gate_recurrence: [N, 3, 3, d, d], [from, to, in, out] among i, f, o: adds the gates of the last step to
            the arguments of all three (FGR). Runs as the reference does on every back end but Triton, which refuses it.

    Returns:
        h [B, T, N, d] and the final state.
    """
    if coupled and not (input_gate and forget_gate):
        raise ValueError("lstm: coupled=True needs input_gate=True and forget_gate=True: one is made of the other.")
    names = {"h": 0.0, "c": 0.0} | ({} if full_gate_recurrence is None else {"i": 0.0, "f": 0.0, "o": 0.0})
    more = {"peepholes": (peepholes, "3 N d"), "full_gate_recurrence": (full_gate_recurrence, "N 3 3 d d")}
    state, keep = _checked("lstm", gates, recurrent, 4, initial_state, names, reset, more)
    flags = (coupled, input_gate, forget_gate, output_gate, input_activation, output_activation)
    if full_gate_recurrence is not None and backend == "triton":
        raise ValueError("lstm: full_gate_recurrence has no Triton kernel: leave backend out, or give 'reference'.")
    chosen = _chosen("lstm", backend, gates, recurrent)
    if full_gate_recurrence is not None or chosen == "reference":
        dtype = state_dtype(gates)
        step = partial(_lstm_step, flags=flags, peepholes=_to(peepholes, dtype), full=_to(full_gate_recurrence, dtype))
        return _loop(step, gates, recurrent, state, names, keep, reverse)
    options = [float(flag) for flag in flags]
    extra = None if peepholes is None else peepholes.transpose(0, 1)
    return _run("lstm", gates, recurrent, extra, state, keep, options, reverse, chosen)


def _lstm_step(
    x: Tensor,
    state: State,
    product: Callable[..., Tensor],
    *,
    flags: tuple[bool, ...],
    peepholes: Tensor | None,
    full: Tensor | None,
) -> State:
    coupled, input_gate, forget_gate, output_gate, input_activation, output_activation = flags
    h, c = state[:2]
    xi, xf, xu, xo = (x + product(h)).unbind(2)
    if full is not None:
        xi, xf, xo = (
            a + torch.einsum("sbnd,nsde->bne", torch.stack(state[2:]), full[:, :, k])
            for k, a in enumerate((xi, xf, xo))
        )
    if peepholes is not None:
        xi, xf = xi + peepholes[0] * c, xf + peepholes[1] * c
    one = torch.ones_like(c)
    i = torch.sigmoid(xi) if input_gate else one
    f = 1 - i if coupled else torch.sigmoid(xf) if forget_gate else one
    u = torch.tanh(xu) if input_activation else xu
    c = f * c + i * u
    o = torch.sigmoid(xo if peepholes is None else xo + peepholes[2] * c) if output_gate else one
    h = o * (torch.tanh(c) if output_activation else c)
    return (h, c) if full is None else (h, c, i, f, o)


def gru(
    gates: Tensor,
    recurrent: Tensor,
    bias_n: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """GRU: h' = (1 - z) n + z h with r = sigmoid(x_r + h R_r), z = sigmoid(x_z + h R_z), and

        n = tanh(x_n + r (h R_n + b_n))      reset_after=True, the form of cuDNN and of `torch.nn.GRU`
        n = tanh(x_n + (r h) R_n + b_n)      reset_after=False, the paper's

    Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk & Bengio, "Learning Phrase Representations using RNN
    Encoder-Decoder", 2014, arXiv 1406.1078, equations 5 to 8.

    Args:
        gates: [B, T, N, 3, d], x of r, z, n.
        recurrent: [N, 3, d, d], R as [in, out].
        bias_n: [N, d].
        initial_state: (h,), [B, N, d]; fresh is 0.
        reset_after: whether r acts after the product with R_n.

    Returns:
        h [B, T, N, d] and (h,).
    """
    names, more = {"h": 0.0}, {"bias_n": (bias_n, "N d")}
    state, keep = _checked("gru", gates, recurrent, 3, initial_state, names, reset, more)
    chosen = _chosen("gru", backend, gates, recurrent)
    if chosen == "reference":
        step = partial(_gru_step, bias_n=bias_n.to(state_dtype(gates)), reset_after=reset_after)
        return _loop(step, gates, recurrent, state, names, keep, reverse)
    return _run("gru", gates, recurrent, bias_n[:, None], state, keep, [float(reset_after)], reverse, chosen)


def _gru_step(x: Tensor, state: State, product: Callable[..., Tensor], *, bias_n: Tensor, reset_after: bool) -> State:
    (h,) = state
    xr, xz, xn = x.unbind(2)
    if reset_after:
        hr, hz, hn = product(h).unbind(2)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * (hn + bias_n))
    else:
        hr, hz = product(h, 0, 2).unbind(2)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + product(r * h, 2, 3)[:, :, 0] + bias_n)
    return ((1 - z) * n + z * h,)


def elman(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    relu: bool = False,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Elman's simple recurrent network: h' = tanh(x + h R), or relu(x + h R).

    Elman, "Finding Structure in Time", Cognitive Science 14, 1990; there the squashing function is the logistic one,
    here tanh as in `torch.nn.RNN`.

    Args:
        gates: [B, T, N, d], x.
        recurrent: [N, d, d], R as [in, out].
        initial_state: (h,), [B, N, d]; fresh is 0.
        relu: relu in place of tanh.

    Returns:
        h [B, T, N, d] and (h,).
    """
    sizes("elman", {"gates": (gates, "B T N d"), "recurrent": (recurrent, "N d d")})
    gates, recurrent, names = gates.unsqueeze(3), recurrent.unsqueeze(1), {"h": 0.0}
    state, keep = _checked("elman", gates, recurrent, 1, initial_state, names, reset)
    chosen = _chosen("elman", backend, gates, recurrent)
    if chosen == "reference":
        return _loop(partial(_elman_step, relu=relu), gates, recurrent, state, names, keep, reverse)
    return _run("elman", gates, recurrent, None, state, keep, [float(relu)], reverse, chosen)


def _elman_step(x: Tensor, state: State, product: Callable[..., Tensor], *, relu: bool) -> State:
    z = (x + product(state[0]))[:, :, 0]
    return (torch.relu(z) if relu else torch.tanh(z),)


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """sLSTM: exponential input gate, normaliser n, and the log scale m that keeps both finite.

        z = x + h R          l = log sigmoid(z_f)       m' = max(l + m, z_i)
        i = exp(z_i - m')    f = exp(l + m - m')        u = tanh(z_u)         o = sigmoid(z_o)
        c' = f c + i u       n' = f n + i               h' = o c' / n'

    Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter & Hochreiter, "xLSTM: Extended Long
    Short-Term Memory", 2024, arXiv 2405.04517, equations 8 to 18, with the sigmoid forget gate. h does not depend on the
    scale m; gradients are exact for every use of the final state all the same.

    Args:
        gates: [B, T, N, 4, d], x of i, f, u, o.
        recurrent: [N, 4, d, d], R as [in, out].
        initial_state: (h, c, n, m), each [B, N, d]; fresh is h = c = n = 0 and m = -1e30.

    Returns:
        h [B, T, N, d] and (h, c, n, m).
    """
    names = {"h": 0.0, "c": 0.0, "n": 0.0, "m": FRESH_SCALE}
    state, keep = _checked("slstm", gates, recurrent, 4, initial_state, names, reset)
    chosen = _chosen("slstm", backend, gates, recurrent)
    if chosen == "reference":
        return _loop(_slstm_step, gates, recurrent, state, names, keep, reverse)
    return _run("slstm", gates, recurrent, None, state, keep, [FRESH_SCALE], reverse, chosen)


def _slstm_step(x: Tensor, state: State, product: Callable[..., Tensor]) -> State:
    h, c, n, m = state
    zi, zf, zu, zo = (x + product(h)).unbind(2)
    kept = torch.nn.functional.logsigmoid(zf) + m
    m = torch.maximum(kept, zi)
    i, f = torch.exp(zi - m), torch.exp(kept - m)
    c = f * c + i * torch.tanh(zu)
    n = f * n + i
    return torch.sigmoid(zo) * (c / n), c, n, m


def lem(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    dt: float = 1.0,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Long Expressive Memory: two learned time steps, and a second product on what the first stage has just made.

        g = dt sigmoid(x_1 + y R_1)      z' = (1 - g) z + g tanh(x_z + y R_z)
        k = dt sigmoid(x_2 + y R_2)      y' = (1 - k) y + k tanh(x_y + z' R_y)

    Rusch, Mishra, Erichson & Mahoney, "Long Expressive Memory for Sequence Modeling", 2022, arXiv 2110.04744,
    equation 3.

    Args:
        gates: [B, T, N, 4, d], x of 1, 2, z, y.
        recurrent: [N, 4, d, d], R of 1, 2, z, y as [in, out]; the first three act on y, the last on z'.
        initial_state: (y, z), each [B, N, d]; fresh is 0.
        dt: the largest time step, > 0; above 1 the cell no longer takes means.

    Returns:
        y [B, T, N, d] and (y, z).
    """
    if not dt > 0:
        raise ValueError(f"lem: dt={dt} is given, > 0 is allowed; the paper's default is 1.")
    names = {"y": 0.0, "z": 0.0}
    state, keep = _checked("lem", gates, recurrent, 4, initial_state, names, reset)
    chosen = _chosen("lem", backend, gates, recurrent)
    if chosen == "reference":
        return _loop(partial(_lem_step, dt=dt), gates, recurrent, state, names, keep, reverse)
    return _run("lem", gates, recurrent, None, state, keep, [dt], reverse, chosen)


def _lem_step(x: Tensor, state: State, product: Callable[..., Tensor], *, dt: float) -> State:
    y, z = state
    x1, x2, xz, xy = x.unbind(2)
    h1, h2, hz = product(y, 0, 3).unbind(2)
    g, k = dt * torch.sigmoid(x1 + h1), dt * torch.sigmoid(x2 + h2)
    z = (1 - g) * z + g * torch.tanh(xz + hz)
    y = (1 - k) * y + k * torch.tanh(xy + product(z, 3, 4)[:, :, 0])
    return y, z


def _loop(
    step: Callable[[Tensor, State, Callable[..., Tensor]], State],
    gates: Tensor,
    recurrent: Tensor,
    state: State,
    fresh: Mapping[str, float],
    keep: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, State]:
    """The reference: one call of `step(x_t, state, product)` a time step, differentiated by autograd."""
    with torch.autocast(gates.device.type, enabled=False):
        dtype = state_dtype(gates)
        n, g, d, _ = recurrent.shape
        # [N, d, G d]: one product of matrices a step, for all gates.
        weights = recurrent.to(dtype).transpose(1, 2).reshape(n, d, g * d)

        def product(h: Tensor, first: int = 0, last: int = g) -> Tensor:
            made = torch.bmm(h.transpose(0, 1), weights[..., first * d : last * d])
            return made.view(n, -1, last - first, d).transpose(0, 1)

        # Taken apart at once: the backward of x[:, t] writes zeros of the size of x at every step.
        steps = gates.to(dtype).unbind(1)
        kept = None if keep is None else keep[..., None, None].unbind(1)
        outputs: list[Tensor] = []
        for t in reversed(range(len(steps))) if reverse else range(len(steps)):
            if kept is not None:
                # Chosen, not multiplied by 0: a state that overflowed must not reach the sequence that starts here.
                state = tuple(torch.where(kept[t], s, f) for s, f in zip(state, fresh.values(), strict=True))
            state = step(steps[t], state, product)
            outputs.append(state[0])
        if reverse:
            outputs.reverse()
        return torch.stack(outputs, 1).to(gates.dtype), state


def _checked(
    op: str,
    gates: Tensor,
    recurrent: Tensor,
    count: int,
    state: State | None,
    fresh: Mapping[str, float],
    reset: Tensor | None,
    more: Mapping[str, tuple[Tensor | None, str]] | None = None,
) -> tuple[State, Tensor | None]:
    """The initial state in the state's dtype, and where it is kept, after all shapes were found to fit."""
    given = {"gates": (gates, f"B T N {count} d"), "recurrent": (recurrent, f"N {count} d d"), **(more or {})}
    known = sizes(op, given)
    if 0 in gates.shape:
        raise ValueError(f"{op}: gates has shape {list(gates.shape)}, no size may be 0.")
    letters = {name: ("B N d", value) for name, value in fresh.items()}
    return first_state(op, state, gates, known, letters), kept(op, reset, gates)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _chosen(op: str, backend: str | None, gates: Tensor, recurrent: Tensor) -> str:
    """What runs: `backend.choose`, or the reference where a head is too wide for Triton, or there is no numba."""
    chosen = choose_compiled(backend, gates)
    if chosen == "triton":
        d = gates.shape[-1]
        limit = widest(op, recurrent.dtype)
        if d <= limit:
            return chosen
        if backend == "triton":
            raise ValueError(
                f"{op}: heads of width {d} with {recurrent.dtype} recurrent weights, at most {limit} is allowed by "
                "backend='triton': use more heads, or bfloat16 weights up to 128, or leave backend out."
            )
        return "reference"
    return chosen


def widest(cell: str, dtype: torch.dtype) -> int:
    """The widest head that Triton runs, by the dtype of the recurrent weights: wider ones would spill registers."""
    if dtype in (torch.bfloat16, torch.float16):
        return 128
    return 64 if cell in ("gru", "elman") else 32


_SAVED = {"lstm": 5, "gru": 4, "elman": 0, "slstm": 7, "lem": 5}
"""Numbers a step, head and channel that the backward pass reads: activations of the gates, then inner states."""


def _run(
    cell: str,
    gates: Tensor,
    recurrent: Tensor,
    extra: Tensor | None,
    state: State,
    keep: Tensor | None,
    options: list[float],
    reverse: bool,
    path: str,
) -> tuple[Tensor, State]:
    """The custom op, on tensors of the dtypes that its kernels have."""
    dtype = state_dtype(gates)
    given, extra, stacked = gates, _to(extra, dtype), torch.stack(state)
    if path == "cpu":
        given, recurrent = gates.to(dtype), recurrent.to(dtype)
    d = gates.shape[-1]
    missing = -d % 16 if path == "triton" else 0
    if missing:
        # Channels whose inputs, weights and state are 0: every cell keeps them finite, and no other channel sees them.
        given, stacked, recurrent = (F.pad(x, (0, missing)) for x in (given, stacked, recurrent))
        recurrent = F.pad(recurrent, (0, 0, 0, missing))
        extra = None if extra is None else F.pad(extra, (0, missing))
    y, last, _ = _cell(given, recurrent, extra, stacked, keep, cell, options, reverse, path == "triton")
    if missing:
        y, last = y[..., :d], last[..., :d]
    return y.to(gates.dtype), last.unbind(0)


def _code(on_triton: bool) -> ModuleType:
    if on_triton:
        from clplat.kernels import cells_triton as code
    else:
        from clplat.kernels import cells_cpu as code
    return code


def _forward(
    gates: Tensor,
    recurrent: Tensor,
    extra: Tensor | None,
    state: Tensor,
    keep: Tensor | None,
    cell: str,
    options: list[float],
    reverse: bool,
    on_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, N, d], the final state [S, B, N, d], and what backward needs [B, T, N, A, d]."""
    forward = _code(on_triton).forward
    return forward(gates, recurrent, extra, state, keep, cell, options, reverse, _SAVED[cell])


def _like(
    gates: Tensor, recurrent: Tensor, extra: Tensor | None, state: Tensor, keep: Any, cell: str, *_: Any
) -> tuple[Tensor, ...]:
    b, t, n, d = (gates.shape[i] for i in (0, 1, 2, 4))
    return gates.new_empty(b, t, n, d), state, state.new_empty(b, t, n, _SAVED[cell], d)


def _backward(
    y: Tensor,
    saved: Tensor,
    last: Tensor,
    recurrent: Tensor,
    extra: Tensor | None,
    state: Tensor,
    keep: Tensor | None,
    dy: Tensor,
    dlast: Tensor,
    cell: str,
    options: list[float],
    reverse: bool,
    on_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent, extra (empty where there is none) and the initial state."""
    backward = _code(on_triton).backward
    dgates, dstate = backward(dy, dlast, y, saved, last, recurrent, extra, state, keep, cell, options, reverse)
    with torch.autocast(y.device.type, enabled=False):
        h = _before(y, state[0], keep, reverse)
        if cell == "gru":
            after = options[0] != 0
            dn = dgates[:, :, :, 2]
            if after:
                dn = dn * saved[:, :, :, 0].to(dn.dtype)
                inner = torch.cat([dgates[:, :, :, :2], dn.unsqueeze(3)], 3)
                drecurrent = _weight_gradient(h, inner)
            else:
                own = saved[:, :, :, 3].to(h.dtype)
                drecurrent = torch.cat(
                    [_weight_gradient(h, dgates[:, :, :, :2]), _weight_gradient(own, dgates[:, :, :, 2:])], 1
                )
            dextra = dn.sum((0, 1), dtype=state.dtype).unsqueeze(1)
        elif cell == "lem":
            z = saved[:, :, :, 4].to(h.dtype)
            drecurrent = torch.cat(
                [_weight_gradient(h, dgates[:, :, :, :3]), _weight_gradient(z, dgates[:, :, :, 3:])], 1
            )
            dextra = y.new_empty(0)
        else:
            drecurrent = _weight_gradient(h, dgates)
            dextra = y.new_empty(0)
            if extra is not None:
                c = saved[:, :, :, 4]
                before = _before(c, state[1], keep, reverse)
                pairs = ((0, before), (1, before), (3, c))
                dextra = torch.stack([(dgates[:, :, :, k] * x).sum((0, 1)) for k, x in pairs], 1).to(state.dtype)
    return dgates, drecurrent.to(recurrent.dtype), dextra, dstate


def _gradients_like(
    y: Tensor, saved: Any, last: Any, recurrent: Tensor, extra: Tensor | None, state: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    b, t, n, d = y.shape
    return y.new_empty(b, t, n, recurrent.shape[1], d), recurrent, extra, state


def _before(x: Tensor, initial: Tensor, keep: Tensor | None, reverse: bool) -> Tensor:
    """x [B, T, N, d] one step earlier, the initial state first, 0 where a fresh sequence starts."""
    first = initial.unsqueeze(1).to(x.dtype)
    shifted = torch.cat([x[:, 1:], first] if reverse else [first, x[:, :-1]], 1)
    return shifted if keep is None else torch.where(keep[..., None, None], shifted, torch.zeros_like(first))


def _weight_gradient(h: Tensor, dz: Tensor) -> Tensor:
    """[N, G, d, d], the sum over b and t of h dz^T: one product of matrices a head."""
    b, t, n, g, d = dz.shape
    left = h.reshape(b * t, n, d).permute(1, 2, 0)
    right = dz.reshape(b * t, n, g * d).transpose(0, 1)
    return torch.bmm(left, right).view(n, d, g, d).transpose(1, 2).contiguous()


_cell = register(
    "cell",
    _forward,
    _backward,
    like=_like,
    gradients_like=_gradients_like,
    saved=lambda gates, recurrent, extra, state, keep, cell, options, reverse, on_triton, y, last, saved: (
        (y, saved, last, recurrent, extra, state, keep)
    ),
    options=4,
)
