"""Recurrences whose state is a matrix that decays and takes in outer products: linear attention in all its forms.

    S_t = diag(exp(gate_t)) S_{t-1} + k_t v_t^T,        o_t = S_t^T q_t

`matrix_state` covers linear attention without decay, with one decay a head (RetNet), one a step and head (Mamba-2,
gated retention), one a step, head and key feature (GLA, HGRN2, RWKV-6); `mlstm` adds xLSTM's exponential input gate and
normaliser. Rules that also erase (delta rule, Titans) are in `clplat.kernels.delta`.

`initial_state`, `reset`, `reverse`, `backend` and errors: see `clplat.kernels.backend`. Queries, keys and values have
whatever scale the caller gives them. `chunk` is C of the "cpu" back end, a power of two; the Triton kernels have their
own.

Letters: B batch, T time, N heads, K key width, V value width, C steps a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clplat.kernels.arguments import first_state, kept, sizes
from clplat.kernels.backend import State, choose, state_dtype, without_autocast
from clplat.kernels.custom_op import register

EMPTY = -1e30
"""Log scale of an mLSTM state that holds nothing: finite, so that no difference of two of them is NaN."""


def matrix_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """S_t = diag(exp(gate_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, for every batch row and head.

    The chunked form of Yang, Wang, Shen, Panda & Kim, "Gated Linear Attention Transformers with Hardware-Efficient
    Training" (2023, arXiv:2312.06635, section 4): matrix products within chunks of C steps, a state from chunk to chunk.
    Decays enter as products over spans of time that are summed in log space without a difference of two sums, so
    that no exponent is positive and a gate of -60, or -inf, is as exact as one of -0.01.

    Args:
        q: [B, T, N, K] queries; any scale (such as K ** -0.5) is the caller's.
        k: [B, T, N, K] keys.
        v: [B, T, N, V] values.
        gate: logarithm of the decay, at most 0 (-inf forgets everything): None (no decay), [N] (one a head), [B, T, N]
            (one a step and head) or [B, T, N, K] (one a step, head and key feature).
        initial_state: (S [B, N, K, V],); fresh is 0.
        bonus: u [N, K]; outputs then read S_{t-1} + diag(u) k_t v_t^T, not S_t (Peng et al., "Eagle and Finch: RWKV with
            Matrix-Valued States and Dynamic Recurrence", 2024, arXiv:2404.05892, section 4). None reads S_t.

    Returns:
        o [B, T, N, V] in v's dtype, and (S [B, N, K, V],).
    """
    letters = {1: "N", 3: "B T N"}.get(0 if gate is None else gate.ndim, "B T N K")
    known = check_sizes("matrix_state", q, k, v, chunk, gate=(gate, letters), bonus=(bonus, "N K"))
    (s,) = first_state("matrix_state", initial_state, q, known, {"S": ("B N K V", 0.0)})
    keep = kept("matrix_state", reset, q)
    if gate is not None:
        gate = gate[None, None].expand(1, *q.shape[1:3])[..., None] if gate.ndim == 1 else gate
        gate = gate[..., None] if gate.ndim == 3 else gate
    chosen = choose(backend, q)
    if reverse:
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
        gate = None if gate is None else gate.flip(1)
        keep = None if keep is None else keep.flip(1)
    if chosen == "reference":
        o, s = _reference(q, k, v, gate, s, keep, bonus)
    else:
        o, s = _run(q, k, v, gate, s, keep, bonus, chunk, chosen)
    return (o.flip(1) if reverse else o), (s,)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, s: Tensor, keep: Tensor | None, bonus: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: a loop over time; gate [1 or B, T, N, 1 or K]."""
    kind, found = v.dtype, []
    q, k, v = (x.to(s.dtype) for x in (q, k, v))
    for t in range(q.shape[1]):
        if keep is not None:
            s = torch.where(keep[:, t, None, None, None], s, 0.0)
        new = k[:, t, :, :, None] * v[:, t, :, None]
        past = s
        s = (s if gate is None else gate[:, t, :, :, None].to(s.dtype).exp() * s) + new
        read = s if bonus is None else past + bonus.to(s.dtype)[..., None] * new
        found.append((q[:, t, :, :, None] * read).sum(2))
    return torch.stack(found, 1).to(kind), s


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    s: Tensor,
    keep: Tensor | None,
    bonus: Tensor | None,
    chunk: int,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    """The custom op: no gate is a gate of 0, a reset is a gate of -inf, and a bonus reads with the next step's query."""
    gate = masked_gate(gate, keep, q)
    if bonus is None:
        return _op(q, k, v, gate, s, chunk, chosen)
    following = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], 1)
    past, last = _op(following, k, v, gate, s, chunk, chosen)
    # A state that is forgotten at once takes no part: 0 times an infinite one would be the gradient of q.
    read = s if keep is None else torch.where(keep[:, 0, None, None, None], s, 0.0)
    first = (q[:, :1, :, :, None].to(s.dtype) * read[:, None]).sum(3)
    past = torch.cat([first.to(v.dtype), past[:, :-1]], 1)
    if keep is not None:
        past = torch.where(keep[:, :, None, None], past, 0.0)
    now = (q.to(s.dtype) * bonus.to(s.dtype) * k.to(s.dtype)).sum(-1, keepdim=True)
    return (past + now * v).to(v.dtype), last


def masked_gate(gate: Tensor | None, keep: Tensor | None, q: Tensor) -> Tensor:
    """One gate for all cases, [1 or B, T, 1 or N, 1 or K]: 0 where there is none, -inf where keep says 0."""
    if gate is None:
        gate = q.new_zeros((1, q.shape[1], 1, 1), dtype=state_dtype(q))
    return gate if keep is None else torch.where(keep[:, :, None, None], gate, -torch.inf)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor, chunk: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from clplat.kernels import matrix_state_triton

        return matrix_state_triton.forward(q, k, v, gate, s)
    return _chunked_forward(q, k, v, gate, s, chunk)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor, do: Tensor, ds: Tensor, chunk: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from clplat.kernels import matrix_state_triton

        return matrix_state_triton.backward(q, k, v, gate, s, do, ds)
    return _chunked_backward(q, k, v, gate, s, do, ds, chunk)


_op = register(
    "matrix_state",
    _forward,
    _backward,
    like=lambda q, k, v, gate, s, *_: (v, s),
    gradients_like=lambda q, k, v, gate, s, *_: (q, k, v, gate, s),
    saved=lambda q, k, v, gate, s, *_: (q, k, v, gate, s),
    options=2,
)


def in_chunks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, N, T / C, C, X] of x [B, T, N, X], with zeros after the last step."""
    x = x.to(dtype).transpose(1, 2)
    missing = -x.shape[2] % size
    x = functional.pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(*x.shape[:2], -1, size, x.shape[3]).contiguous()


def from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `in_chunks`: [B, T, N, X] with the length and dtype of `like`, summed to its shape."""
    x = x.flatten(2, 3)[:, :, : like.shape[1]].transpose(1, 2)
    return x.sum_to_size(like.shape).to(like.dtype).contiguous()


def chunk_size(steps: int, chunk: int) -> int:
    """The chunk asked for, or the least power of two that holds a shorter sequence."""
    return min(chunk, 1 << (steps - 1).bit_length())


def spans(gate: Tensor) -> Tensor:
    """W [..., C, C] with W_ij = exp(gate_{j+1} + ... + gate_i) for j <= i and 0 above, for gate [..., C, 1].

    Each sum starts from nothing: a difference of two running sums would lose what a decay of -60 leaves of its digits.
    """
    c = gate.shape[-2]
    below = torch.ones(c, c, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(below, gate, 0.0).cumsum(-2).exp().tril()


def _levels(gate: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Decays of a vector gate [..., C, K] as products of two factors, neither above 1.

    The pairs (i, j), j < i, of a chunk are the right and left halves of blocks of 2, 4, ... C steps: the decay from j
    to i is that from j to the end of its half times that from there to i. Sums are built up from halves to blocks.

    Returns:
        for each size of half: decays of the left halves to their end, of the right halves from their start, both
        [..., C / (2 size), size, K]; the decays [..., C, K] from the chunk's start to i, and from j to the chunk's end.
    """
    start, end, found = gate, torch.zeros_like(gate), []
    size = 1
    while size < gate.shape[-2]:
        start, end = halves(start, size), halves(end, size)
        left, right = end[..., 0, :, :], start[..., 1, :, :]
        found.append((left.exp(), right.exp()))
        whole = start[..., -1:, :]
        start = torch.stack([start[..., 0, :, :], right + whole[..., 0, :, :]], -3).flatten(-4, -2)
        end = torch.stack([left + whole[..., 1, :, :], end[..., 1, :, :]], -3).flatten(-4, -2)
        size *= 2
    return found, start.exp(), end.exp()


def halves(x: Tensor, size: int) -> Tensor:
    """View [..., C / (2 size), 2, size, X] of x [..., C, X]."""
    return x.unflatten(-2, (-1, 2, size))


def carried(state: Tensor, decay: Tensor) -> Tensor:
    """decay * state, and 0 where the decay is 0: a state that has overflowed does not outlive a reset."""
    return torch.where(decay == 0, 0.0, decay * state)


class _Chunks:
    """What forward and backward share: inputs in chunks, decays, and the state at the start of every chunk.

    Attributes:
        q, k, v: [B, N, NC, C, K or V].
        spans: [1 or B, 1 or N, NC, C, C] of a scalar gate, None of a vector gate.
        levels: see `_levels`; empty of a scalar gate.
        start: [1 or B, 1 or N, NC, C, 1 or K], decay from the chunk's start to each step, that step included.
        end: likewise, decay from after each step to the chunk's end.
        states: [B, N, NC + 1, K, V], at the start of each chunk and after the last.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor, chunk: int) -> None:
        size = chunk_size(q.shape[1], chunk)
        self.q, self.k, self.v = (in_chunks(x, size, s.dtype) for x in (q, k, v))
        gate = in_chunks(gate, size, s.dtype)
        self.spans: Tensor | None = None
        self.levels: list[tuple[Tensor, Tensor]] = []
        if gate.shape[-1] == 1:
            self.spans = spans(gate)
            self.start, self.end = gate.cumsum(-2).exp(), self.spans[..., -1, :, None]
        else:
            self.levels, self.start, self.end = _levels(gate)
        self.whole = self.start[..., -1, :, None]
        new = (self.k * self.end).mT @ self.v
        found = [s]
        for n, one in enumerate(new.unbind(2)):
            found.append(carried(found[-1], self.whole[:, :, n]) + one)
        self.states = torch.stack(found, 2)

    def reached(self, x: Tensor) -> Tensor:
        """x [B, N, NC, C, X], and 0 in rows that nothing from before the chunk reaches."""
        return torch.where(self.start.amax(-1, keepdim=True) == 0, 0.0, x)


@without_autocast
def _chunked_forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    c = _Chunks(q, k, v, gate, s, chunk)
    o = c.reached((c.q * c.start) @ c.states[:, :, :-1])
    if c.spans is not None:
        o += ((c.q @ c.k.mT) * c.spans) @ c.v
    else:
        o += (c.q * c.k).sum(-1, keepdim=True) * c.v
        for left, right in c.levels:
            size = left.shape[-2]
            queries, keys = halves(c.q, size)[..., 1, :, :] * right, halves(c.k, size)[..., 0, :, :] * left
            halves(o, size)[..., 1, :, :] += (queries @ keys.mT) @ halves(c.v, size)[..., 0, :, :]
    return from_chunks(o, v), c.states[:, :, -1].clone()


@without_autocast
def _chunked_backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor, do: Tensor, ds: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate and the initial state; what the forward pass made is made again, not saved.

    The gradient of a gate is the sum of those of all spans of steps it lies in. It is summed as such: the shorter
    identity that takes k dk from q dq, summed over time, leaves rounding errors of the size of the terms that cancel.
    """
    c = _Chunks(q, k, v, gate, s, chunk)
    g = in_chunks(do, c.q.shape[3], s.dtype)
    new = (c.q * c.start).mT @ g
    found = [ds]
    for n in reversed(range(new.shape[2])):
        found.append(c.whole[:, :, n] * found[-1] + new[:, :, n])
    after = torch.stack(found[-2::-1], 2)  # the gradient of the state after each chunk
    before = c.states[:, :, :-1]

    dq = c.reached(c.start * (g @ before.mT))
    dk = c.end * (c.v @ after.mT)
    dv = (c.k * c.end) @ after
    begun, ended = c.q * dq, c.k * dk  # gradients of spans from the chunk's start, and to its end
    through = carried(before, c.whole).mul_(after).sum(-1)[..., None, :]
    if c.spans is not None:
        pairs = (c.q @ c.k.mT) * c.spans
        outer = g @ c.v.mT
        inner = outer * c.spans
        dq += inner @ c.k
        dk += inner.mT @ c.q
        dv += pairs.mT @ g
        dgate = until(begun.sum(-1, keepdim=True)) + since(ended.sum(-1, keepdim=True)) + through.sum(-1, keepdim=True)
        dgate += until(outer.mul_(pairs)).tril_(-1).sum(-1, keepdim=True)
    else:
        inner = (g * c.v).sum(-1, keepdim=True)
        dv += (c.q * c.k).sum(-1, keepdim=True) * g
        dq += inner * c.k
        dk += inner * c.q
        dgate = until(begun) + since(ended) + through
        for left, right in c.levels:
            size = left.shape[-2]
            queries, keys = halves(c.q, size)[..., 1, :, :] * right, halves(c.k, size)[..., 0, :, :] * left
            late, early = halves(g, size)[..., 1, :, :], halves(c.v, size)[..., 0, :, :]
            inner = late @ early.mT
            by_queries, by_keys = inner @ keys, inner.mT @ queries
            halves(dq, size)[..., 1, :, :] += right * by_queries
            halves(dk, size)[..., 0, :, :] += left * by_keys
            halves(dv, size)[..., 0, :, :] += (queries @ keys.mT).mT @ late
            halves(dgate, size)[..., 1, :, :] += until(queries * by_queries)
            halves(dgate, size)[..., 0, :, :] += since(keys * by_keys)
    return (
        from_chunks(dq, q),
        from_chunks(dk, k),
        from_chunks(dv, v),
        from_chunks(dgate, gate),
        found[-1].clone(),
    )


def until(x: Tensor) -> Tensor:
    """Sums over steps i >= t of x [..., C, X]."""
    return x.flip(-2).cumsum(-2).flip(-2)


def since(x: Tensor) -> Tensor:
    """Sums over steps j < t of x [..., C, X]."""
    return functional.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """The matrix memory of xLSTM, stabilised: exponential input gate, sigmoid forget gate, normalised outputs.

        C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  h_t = C_t^T q_t / max(|n_t . q_t|, 1)

    with i = exp(input_gate) and f = sigmoid(forget_gate): Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024,
    arXiv:2405.04517), section 2.3. C and n are kept divided by exp(m_t), m_t = max(log f_t + m_{t-1}, input_gate_t), so
    that nothing overflows; the denominator is then max(|n . q|, exp(-m)).

    C and n share one recurrence of `matrix_state`: n is one more value column, of ones. Outputs do not depend on m, so
    gradients take it for a constant, which is exact for the outputs and for any use of the final state that depends on
    C exp(m) and n exp(m) only, as a further call of this function does.

    Args:
        q: [B, T, N, K] queries.
        k: [B, T, N, K] keys; the paper's scale K ** -0.5 is the caller's.
        v: [B, T, N, V] values.
        input_gate: [B, T, N], before the exponential.
        forget_gate: [B, T, N], before the sigmoid.
        initial_state: (C [B, N, K, V], n [B, N, K], m [B, N]); fresh is (0, 0, `EMPTY`).

    Returns:
        h [B, T, N, V] in v's dtype, and (C, n, m).
    """
    gates = {"input_gate": (input_gate, "B T N"), "forget_gate": (forget_gate, "B T N")}
    known = check_sizes("mlstm", q, k, v, chunk, **gates)
    letters = {"C": ("B N K V", 0.0), "n": ("B N K", 0.0), "m": ("B N", EMPTY)}
    state, keep = first_state("mlstm", initial_state, q, known, letters), kept("mlstm", reset, q)
    chosen = choose(backend, q)
    if reverse:
        q, k, v, input_gate, forget_gate = (x.flip(1) for x in (q, k, v, input_gate, forget_gate))
        keep = None if keep is None else keep.flip(1)
    if chosen == "reference":
        h, state = _mlstm_reference(q, k, v, input_gate, forget_gate, state, keep)
    else:
        h, state = _mlstm_run(q, k, v, input_gate, forget_gate, state, keep, chunk, chosen)
    return (h.flip(1) if reverse else h), state


def _mlstm_run(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, keep: Tensor | None, chunk: int, chosen: str
) -> tuple[Tensor, State]:
    """By `matrix_state` with gates log f_t + m_{t-1} - m_t, keys exp(i_t - m_t) k_t and one more value, 1."""
    kind = v.dtype
    c, n, m0 = state
    q, k, v, i, f = (x.to(c.dtype) for x in (q, k, v, i, f))
    log_f = functional.logsigmoid(f)
    if keep is not None:
        log_f = torch.where(keep[..., None], log_f, -torch.inf)
        m0 = torch.where(keep[:, :1], m0, EMPTY)  # one that overflowed would make NaN of -inf + inf
    with torch.no_grad():
        m = _stabiliser(log_f, i, m0)
    gate = log_f + torch.cat([m0[:, None], m[:, :-1]], 1) - m
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    both = torch.cat([c, n[..., None]], -1)
    keys = (i - m).exp()[..., None] * k
    o, both = _op(q, keys, values, gate[..., None], both, chunk, chosen)
    weight = torch.maximum(o[..., -1:].abs(), _floor(m)[..., None])
    return (o[..., :-1] / weight).to(kind), (both[..., :-1], both[..., -1], m[:, -1])


def _stabiliser(log_f: Tensor, i: Tensor, m0: Tensor) -> Tensor:
    """m_t = max(log_f_t + m_{t-1}, i_t) for all t, by doubling spans: log_f [B, T, N], m0 [B, N] -> [B, T, N].

    Sums of log_f grow with the span and are never subtracted from one another.
    """
    m = torch.cat([torch.maximum(log_f[:, :1] + m0[:, None], i[:, :1]), i[:, 1:]], 1)
    total, reach = log_f, 1
    while reach < m.shape[1]:
        m = torch.cat([m[:, :reach], torch.maximum(total[:, reach:] + m[:, :-reach], m[:, reach:])], 1)
        total = torch.cat([total[:, :reach], total[:, reach:] + total[:, :-reach]], 1)
        reach *= 2
    return m


def _mlstm_reference(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, keep: Tensor | None
) -> tuple[Tensor, State]:
    """The definition: a loop over time, differentiated through the stabiliser too."""
    c, n, m = state
    kind, found = v.dtype, []
    q, k, v, i, f = (x.to(c.dtype) for x in (q, k, v, i, f))
    for t in range(q.shape[1]):
        if keep is not None:
            kept = keep[:, t, None]
            c, n = torch.where(kept[..., None, None], c, 0.0), torch.where(kept[..., None], n, 0.0)
            m = torch.where(kept, m, EMPTY)
        forget = functional.logsigmoid(f[:, t]) + m
        m = torch.maximum(forget, i[:, t])
        forget, enter = (forget - m).exp(), (i[:, t] - m).exp()
        c = forget[..., None, None] * c + enter[..., None, None] * (k[:, t, :, :, None] * v[:, t, :, None])
        n = forget[..., None] * n + enter[..., None] * k[:, t]
        weight = torch.maximum((n * q[:, t]).sum(-1).abs(), _floor(m))
        found.append((q[:, t, :, :, None] * c).sum(2) / weight[..., None])
    return torch.stack(found, 1).to(kind), (c, n, m)


def _floor(m: Tensor) -> Tensor:
    """exp(-m), never 0: a query of zeros gives 0 / floor, not 0 / 0."""
    return (-m.clamp(max=80.0)).exp()


def check_sizes(
    op: str, q: Tensor, k: Tensor, v: Tensor, chunk: int, **more: tuple[Tensor | None, str]
) -> dict[str, int]:
    """The size of each letter, of queries, keys, values and whatever else there is.

    Raises:
        ValueError: what does not fit, or a chunk that is no power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"{op}: chunk={chunk}, it must be a power of two, such as 64.")
    return sizes(op, {"q": (q, "B T N K"), "k": (k, "B T N K"), "v": (v, "B T N V"), **more})
