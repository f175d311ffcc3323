"""Recurrences that correct a matrix memory: the (gated) delta rule, and the linear memory of Titans with momentum.

The memory S maps keys to values; a step first asks it for k_t, then writes the error. Both run in chunks: within one,
the corrections of all steps solve one unit triangular system (the WY form of a product of Householder matrices), and
the state goes from chunk to chunk. The chunked form is made of torch's batched products and triangular solves. The
delta rule has Triton kernels too, for keys of at most 128 features; wider ones, and Titans, run the chunked form in
torch on CUDA devices as well.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`; `chunk` is C of the chunked form, a
power of two. The Triton kernels have their own.

Letters: B batch, T time, N heads, K key width, V value width, C steps a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clplat.kernels.arguments import first_state, kept
from clplat.kernels.backend import State, choose, without_autocast
from clplat.kernels.custom_op import register
from clplat.kernels.matrix_state import (
    check_sizes,
    chunk_size,
    from_chunks,
    in_chunks,
    masked_gate,
    spans,
    until,
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None = None,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    chunk: int = 32,
) -> tuple[Tensor, State]:
    """S_t = exp(gate_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = S_t^T q_t.

    The delta rule without a gate (Yang, Wang, Zhang, Shen & Kim, "Parallelizing Linear Transformers with the Delta Rule
    over Sequence Length", 2024, arXiv:2406.06484, section 3) and the gated one (Yang, Kautz & Hatamizadeh, "Gated Delta
    Networks: Improving Mamba2 with Delta Rule", 2024, arXiv:2412.06464, section 3); S here is the transpose of theirs.

    Args:
        q: [B, T, N, K] queries; any scale is the caller's.
        k: [B, T, N, K] keys, which the caller normalises to length 1: the state grows without bound where
            beta * |k|^2 > 2.
        v: [B, T, N, V] values.
        beta: [B, T, N] how much of the error is corrected, usually in 0..1 (0..2 allows negative eigenvalues).
        gate: [B, T, N] logarithm of the decay, at most 0 (-inf forgets everything), or None.
        initial_state: (S [B, N, K, V],); fresh is 0.

    Returns:
        o [B, T, N, V] in v's dtype, and (S [B, N, K, V],).
    """
    known = check_sizes("delta_rule", q, k, v, chunk, beta=(beta, "B T N"), gate=(gate, "B T N"))
    (s,) = first_state("delta_rule", initial_state, q, known, {"S": ("B N K V", 0.0)})
    keep = kept("delta_rule", reset, q)
    chosen = choose(backend, q)
    if reverse:
        q, k, v, beta = (x.flip(1) for x in (q, k, v, beta))
        gate, keep = (None if x is None else x.flip(1) for x in (gate, keep))
    if chosen == "reference":
        o, s = _delta_reference(q, k, v, beta, gate, s, keep)
    else:
        decay = masked_gate(None if gate is None else gate[..., None], keep, q)
        o, s = _delta(q, k, v, beta, decay, s, chunk, chosen)
    return (o.flip(1) if reverse else o), (s,)


def _delta_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, s: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: a loop over time."""
    kind, found = v.dtype, []
    q, k, v, beta = (x.to(s.dtype) for x in (q, k, v, beta))
    for t in range(q.shape[1]):
        if keep is not None:
            s = torch.where(keep[:, t, None, None, None], s, 0.0)
        if gate is not None:
            s = gate[:, t, :, None, None].to(s.dtype).exp() * s
        error = v[:, t] - (k[:, t, :, :, None] * s).sum(2)
        s = s + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[:, :, None]
        found.append((q[:, t, :, :, None] * s).sum(2))
    return torch.stack(found, 1).to(kind), s


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    chunk: int = 32,
) -> tuple[Tensor, State]:
    """A linear memory M learnt at test time, with momentum S and forgetting: the linear case of Titans.

        S_t = eta_t S_{t-1} - theta_t k_t (M_{t-1}^T k_t - v_t)^T
        M_t = (1 - alpha_t) M_{t-1} + S_t,              o_t = M_t^T q_t

    from Behrouz, Zhong & Mirrokni, "Titans: Learning to Memorize at Test Time" (2024, arXiv:2501.00663, section 3.1), for
    a memory that is one matrix. The gradient is that of |M^T k - v|^2 / 2, taken at M_{t-1} for every step: the
    recurrence as written. The paper's loss has no factor 1/2, so its theta is half of this one. Its parallel training
    takes the gradients of a whole chunk at the memory of the chunk's start instead; that is another recurrence, whose
    result depends on where chunks begin (so it cannot be cut, resumed or run step by step), and is not offered.

    Args:
        q: [B, T, N, K] queries.
        k: [B, T, N, K] keys, which the caller normalises.
        v: [B, T, N, V] values.
        alpha: [B, T, N] in 0..1, the part of the memory that is forgotten.
        eta: [B, T, N] in 0..1, the decay of the momentum.
        theta: [B, T, N] at least 0, the step size.
        initial_state: (M, S), both [B, N, K, V]; fresh is 0.

    Returns:
        o [B, T, N, V] in v's dtype, and (M, S).
    """
    rates = {"alpha": (alpha, "B T N"), "eta": (eta, "B T N"), "theta": (theta, "B T N")}
    known = check_sizes("titans", q, k, v, chunk, **rates)
    m, s = first_state("titans", initial_state, q, known, {"M": ("B N K V", 0.0), "S": ("B N K V", 0.0)})
    keep = kept("titans", reset, q)
    chosen = choose(backend, q)
    if reverse:
        q, k, v, alpha, eta, theta = (x.flip(1) for x in (q, k, v, alpha, eta, theta))
        keep = None if keep is None else keep.flip(1)
    if chosen == "reference":
        o, m, s = _titans_reference(q, k, v, alpha, eta, theta, m, s, keep)
    else:
        o, m, s = _titans_run(q, k, v, alpha, eta, theta, m, s, keep, chunk)
    return (o.flip(1) if reverse else o), (m, s)


@without_autocast
def _titans_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    m: Tensor,
    s: Tensor,
    keep: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """By `clplat::corrected`, whose coefficients are made here, of alpha and eta only, and differentiated by autograd."""
    size = chunk_size(q.shape[1], chunk)
    kept = q.new_ones((q.shape[0], q.shape[1], 1, 1), dtype=m.dtype)
    kept = kept if keep is None else kept * keep[:, :, None, None].to(m.dtype)

    def logarithm(decay: Tensor) -> Tensor:
        # The least summand keeps the gradient of a decay of 0 finite and right; the error it makes is below rounding.
        found = torch.where(kept.bool(), (decay.to(m.dtype)[..., None] + 1e-30).log(), -torch.inf)
        return in_chunks(found, size, m.dtype)

    log_a, log_e = logarithm(1 - alpha.to(m.dtype)), logarithm(eta)
    forget, momentum = spans(log_a), spans(log_e)
    from_m, from_s = log_a.cumsum(-2).exp(), log_e.cumsum(-2).exp()
    steps = in_chunks(torch.ones_like(kept[:1]), size, m.dtype)  # the padding's momentum must not move the memory
    out = forget @ (momentum * steps)
    enter = torch.stack([from_m, forget @ (from_s * steps)], 3)[..., 0]  # of M and S at the start in M_t: [..., 2, C]
    kept = in_chunks(kept, size, m.dtype)
    before = torch.zeros_like(enter[..., :1])
    before[..., 0, :] = 1.0
    # the memory that step t asks is the one after step t - 1
    read = functional.pad(out[..., :-1, :], (0, 0, 1, 0)) * kept
    ask = torch.cat([before, enter[..., :-1]], -1) * kept[..., None, :, 0]
    write = torch.stack([out[..., -1, :], momentum[..., -1, :]], -2)
    last, none = enter[..., -1], torch.zeros_like(from_s[..., -1, :])
    move = torch.stack([last, torch.cat([none, from_s[..., -1, :]], -1)], -2)
    o, both = _corrected(q, k, v, theta, out, read, enter, ask, write, move, torch.stack([m, s], 2), size)
    return o, both[:, :, 0], both[:, :, 1]


def _titans_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    m: Tensor,
    s: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: a loop over time."""
    kind, found = v.dtype, []
    q, k, v, alpha, eta, theta = (x.to(m.dtype) for x in (q, k, v, alpha, eta, theta))
    for t in range(q.shape[1]):
        if keep is not None:
            kept = keep[:, t, None, None, None]
            m, s = torch.where(kept, m, 0.0), torch.where(kept, s, 0.0)
        error = (k[:, t, :, :, None] * m).sum(2) - v[:, t]
        gradient = k[:, t, :, :, None] * error[:, :, None]
        s = eta[:, t, :, None, None] * s - theta[:, t, :, None, None] * gradient
        m = (1 - alpha[:, t, :, None, None]) * m + s
        found.append((q[:, t, :, :, None] * m).sum(2))
    return torch.stack(found, 1).to(kind), m, s


@dataclass(frozen=True)
class _Weights:
    """Decays within chunks of C steps, for P states that feed one another (1: delta rule, 2: Titans).

    Attributes:
        out: [..., C, C], of the correction of step j in the memory after step i >= j.
        read: [..., C, C], likewise in the memory that step i > j asks.
        enter: [..., P, C], of each state at the chunk's start in the memory after step i.
        ask: [..., P, C], likewise in the memory that step i asks.
        write: [..., P, C], of the correction of step j in each state at the chunk's end.
        move: [..., P, P], of each state (last index) at the chunk's start in each at its end.
    """

    out: Tensor
    read: Tensor
    enter: Tensor
    ask: Tensor
    write: Tensor
    move: Tensor


class _Corrected:
    """What forward and backward share: corrections U and the states at the start of every chunk.

    Corrections solve (I + L) U = beta (V - sum over states p of ask_p K S_p), L_ij = beta_i read_ij k_i.k_j, j < i.

    Attributes:
        system: I + L [B, N, NC, C, C].
        queries, keys, writes: [B, N, NC, C, P K], q by enter, k by ask, k by write, one block for each state.
        inverse: (I + L)^-1 of beta keys.
        u: [B, N, NC, C, V].
        states: [B, N, NC + 1, P K, V].
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, w: _Weights, s: Tensor) -> None:
        self.q, self.k, self.v, self.beta, self.w = q, k, v, beta, w
        self.pairs = k @ k.mT
        self.system = (beta * w.read * self.pairs).tril(-1) + torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
        self.queries, self.keys, self.writes = (_spread(*x) for x in ((q, w.enter), (k, w.ask), (k, w.write)))
        right = torch.cat([beta * v, beta * self.keys], -1)
        solved = torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)
        own, self.inverse = solved.split([v.shape[-1], self.keys.shape[-1]], -1)
        states, corrections = [s], []
        for n in range(q.shape[2]):
            now = states[-1]
            u = own[:, :, n] - _reached(self.inverse[:, :, n] @ now, self.inverse[:, :, n])
            corrections.append(u)
            states.append(_moved(w.move[:, :, n], now) + self.writes[:, :, n].mT @ u)
        self.u, self.states = torch.stack(corrections, 2), torch.stack(states, 2)


def _spread(x: Tensor, weight: Tensor) -> Tensor:
    """[..., C, P K]: x [..., C, K] times each of weight [..., P, C]."""
    return torch.cat([x * one[..., None] for one in weight.unbind(-2)], -1)


def _reached(x: Tensor, weight: Tensor) -> Tensor:
    """x, and 0 in rows whose weights of the state before the chunk are all 0: an overflowed state does not outlive a
    reset. (A correction can depend on that state although the memory after its step does not.)"""
    return torch.where((weight == 0).all(-1, keepdim=True), 0.0, x)


def _moved(move: Tensor, states: Tensor) -> Tensor:
    """[..., P K, V]: states of all P mixed by move [..., P, P]; a weight of 0 forgets an overflowed state too."""
    parts = states.unflatten(-2, (move.shape[-1], -1))[..., None, :, :, :]
    weight = move[..., None, None]
    return torch.where(weight == 0, 0.0, weight * parts).sum(-3).flatten(-3, -2)


@without_autocast
def _corrected_forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, w: _Weights, s: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, N, NC, C, V] and the states [B, N, P K, V] after the last chunk; all inputs in chunks."""
    c = _Corrected(q, k, v, beta, w, s)
    o = _reached(c.queries @ c.states[:, :, :-1], w.enter.mT) + ((q @ k.mT) * w.out) @ c.u
    return o, c.states[:, :, -1]


@without_autocast
def _corrected_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, w: _Weights, s: Tensor, do: Tensor, ds: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], _Weights, Tensor]:
    """Gradients of q, k, v and beta, of all weights, and of the states at the start."""
    c = _Corrected(q, k, v, beta, w, s)
    count = w.move.shape[-1]
    own, new = ((q @ k.mT) * w.out).mT @ do, c.queries.mT @ do
    found, corrections = [ds], []
    for n in reversed(range(q.shape[2])):
        du = own[:, :, n] + c.writes[:, :, n] @ found[-1]
        corrections.append(du)
        found.append(_moved(w.move[:, :, n].mT, found[-1]) + new[:, :, n] - c.inverse[:, :, n].mT @ du)
    after = torch.stack(found[-2::-1], 2)
    du = torch.stack(corrections[::-1], 2)
    right = torch.linalg.solve_triangular(c.system.mT, du, upper=True, unitriangular=True)
    before = c.states[:, :, :-1]

    dqueries, dkeys = _reached(do @ before.mT, w.enter.mT), -beta * _reached(right @ before.mT, w.ask.mT)
    dwrites = c.u @ after.mT
    outer, inner = do @ c.u.mT, -(right @ c.u.mT).tril(-1)
    dout, dpairs = outer * w.out, inner * beta * w.read
    blocks = [x.unflatten(-1, (count, -1)).transpose(-2, -3) for x in (dqueries, dkeys, dwrites)]  # [..., P, C, K]
    dq = dout @ k + (blocks[0] * w.enter[..., None]).sum(-3)
    dk = dout.mT @ q + (dpairs + dpairs.mT) @ k
    dk = dk + (blocks[1] * w.ask[..., None] + blocks[2] * w.write[..., None]).sum(-3)
    error = v - _reached(c.keys @ before, w.ask.mT)
    dbeta = (right * error).sum(-1, keepdim=True) + (inner * w.read * c.pairs).sum(-1, keepdim=True)
    moves = after.unflatten(-2, (count, -1)).flatten(-2) @ before.unflatten(-2, (count, -1)).flatten(-2).mT
    weights = _Weights(
        out=outer * (q @ k.mT),
        read=inner * beta * c.pairs,
        enter=(blocks[0] * q[..., None, :, :]).sum(-1),
        ask=(blocks[1] * k[..., None, :, :]).sum(-1),
        write=(blocks[2] * k[..., None, :, :]).sum(-1),
        move=torch.where(w.move == 0, 0.0, moves),  # past a reset an overflowed state has no gradient, not 0 * inf
    )
    return (dq, dk, beta * right, dbeta), weights, found[-1]


def _corrected_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    out: Tensor,
    read: Tensor,
    enter: Tensor,
    ask: Tensor,
    write: Tensor,
    move: Tensor,
    s: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    w = _Weights(out, read, enter, ask, write, move)
    o, last = _corrected_forward(*_steps_in_chunks(q, k, v, beta, chunk, s.dtype), w, s.flatten(2, 3))
    return from_chunks(o, v), last.reshape(s.shape).clone()


def _corrected_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    out: Tensor,
    read: Tensor,
    enter: Tensor,
    ask: Tensor,
    write: Tensor,
    move: Tensor,
    s: Tensor,
    do: Tensor,
    ds: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = _Weights(out, read, enter, ask, write, move)
    chunks = _steps_in_chunks(q, k, v, beta, chunk, s.dtype)
    given, gw, first = _corrected_backward(*chunks, w, s.flatten(2, 3), in_chunks(do, chunk, s.dtype), ds.flatten(2, 3))
    dq, dk, dv, dbeta = given
    weights = zip((gw.out, gw.read, gw.enter, gw.ask, gw.write, gw.move), w.__dict__.values(), strict=True)
    dout, dread, denter, dask, dwrite, dmove = (g.sum_to_size(x.shape).contiguous() for g, x in weights)
    return (
        from_chunks(dq, q),
        from_chunks(dk, k),
        from_chunks(dv, v),
        from_chunks(dbeta, beta[..., None])[..., 0].contiguous(),
        dout,
        dread,
        denter,
        dask,
        dwrite,
        dmove,
        first.reshape(s.shape).clone(),
    )


_corrected = register(
    "corrected",
    _corrected_op,
    _corrected_gradients,
    like=lambda *args: (args[2], args[10]),  # v and s
    gradients_like=lambda *args: args[:11],
    saved=lambda *args: args[:11],
    options=1,
)


def _steps_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta = (in_chunks(x, size, dtype) for x in (q, k, v, beta[..., None]))
    return q, k, v, beta


def _delta_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, s: Tensor, chunk: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from clplat.kernels import delta_triton

        if q.shape[3] <= delta_triton.WIDEST:
            return delta_triton.forward(q, k, v, beta, gate, s)
    size = chunk_size(q.shape[1], chunk)
    o, last = _corrected_forward(*_steps_in_chunks(q, k, v, beta, size, s.dtype), _decays(gate, size, s.dtype), s)
    return from_chunks(o, v), last.clone()


def _delta_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    s: Tensor,
    do: Tensor,
    ds: Tensor,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from clplat.kernels import delta_triton

        if q.shape[3] <= delta_triton.WIDEST:
            return delta_triton.backward(q, k, v, beta, gate, s, do, ds)
    size = chunk_size(q.shape[1], chunk)
    w = _decays(gate, size, s.dtype)
    chunks = _steps_in_chunks(q, k, v, beta, size, s.dtype)
    (dq, dk, dv, dbeta), gw, first = _corrected_backward(*chunks, w, s, in_chunks(do, size, s.dtype), ds)
    return (
        from_chunks(dq, q),
        from_chunks(dk, k),
        from_chunks(dv, v),
        from_chunks(dbeta, beta[..., None])[..., 0].contiguous(),
        from_chunks(_decay_gradient(w, gw), gate),
        first.clone(),
    )


_delta = register(
    "delta_rule",
    _delta_op,
    _delta_gradients,
    like=lambda q, k, v, beta, gate, s, *_: (v, s),
    gradients_like=lambda *args: args[:6],
    saved=lambda *args: args[:6],
    options=2,
)


def _decays(gate: Tensor, size: int, dtype: torch.dtype) -> _Weights:
    """The weights of one state with one gate [1 or B, T, 1 or N, 1]: step i asks the memory that its gate has decayed."""
    gate = in_chunks(gate, size, dtype)
    out, start = spans(gate), gate.cumsum(-2).exp().mT
    return _Weights(out, out, start, start, out[..., -1:, :], start[..., -1:])


def _decay_gradient(w: _Weights, g: _Weights) -> Tensor:
    """Gradient [B, N, NC, C, 1] of the gates: that of every span of steps, summed over the spans a gate lies in.

    All spans end at or after the gate's step and begin before it: one sum over ends, one over beginnings, no difference.
    """
    spanned = w.out * (g.out + g.read)
    spanned[..., -1:, :] += w.write * g.write
    begun = w.enter * (g.enter + g.ask)
    begun[..., -1:] += w.move * g.move
    return until(spanned).tril(-1).sum(-1, keepdim=True) + until(begun.mT)
