"""Mixers with a matrix memory, each against its formulas written as a loop over time, and what they were made for.

The loops here share nothing with the mixers but the weights: no kernel, no normalisation or convolution of theirs.

Letters: B batch, T time, D input features, H hidden, N heads, K key and V value features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from learners.rows import Learns, warmed
from torch import Tensor, nn

from clplat.learners.mixers.gated_deltanet import GatedDeltaNet
from clplat.learners.mixers.gla import GLA
from clplat.learners.mixers.hgrn2 import HGRN2
from clplat.learners.mixers.lightnet import LightNet, running_logsumexp
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.mixers.mlstm import MLSTM
from clplat.learners.mixers.norms import HeadNorm, unit
from clplat.learners.mixers.retnet import RetNet
from clplat.learners.mixers.rwkv6 import RWKV6
from clplat.learners.mixers.titans import Titans

B, T, D, H = 2, 9, 6, 16
double = torch.float64

LAWS: dict[str, Callable[[int, int], Mixer]] = {
    "retnet": RetNet,
    "mlstm": lambda d, h: warmed(MLSTM(d, h)),
    "rwkv6": lambda d, h: warmed(RWKV6(d, h, mix_rank=3, decay_rank=5)),
    "hgrn2": HGRN2,
    "hgrn2_bound": partial(HGRN2, lower_bound=0.7),
    "gla": partial(GLA, gate_rank=3, temperature=2.0),
    "lightnet": partial(LightNet, gate_rank=5),
    "gated_deltanet": GatedDeltaNet,
    "deltanet": partial(GatedDeltaNet, expansion=1, decay=False, output_gate=False, negative=True),
    "titans": Titans,
}
LEARNS = {
    "deltanet": Learns(0.80),
    "gated_deltanet": Learns(0.80),
    "gla": Learns(0.45),
    "hgrn2": Learns(0.40),
    "lightnet": Learns(0.35),
    "mlstm": Learns(0.85),
    "retnet": Learns(0.35),
    "rwkv6": Learns(0.70),
    "titans": Learns(0.75),
}


def built(make: Callable[[], Mixer]) -> Any:
    """With every weight in use, in float64; made here, so that its weights follow from the seed."""
    torch.manual_seed(5)
    mixer = make().double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def inputs(steps: int = T) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(B, steps, D, dtype=double, requires_grad=True)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def standard(x: Tensor, eps: float) -> Tensor:
    """Mean 0 and variance 1 over the last dimension."""
    apart = x - x.mean(-1, keepdim=True)
    return apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt()


def scaled(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Mean square 1 over the last dimension, times the weight of the norm."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def heads(x: Tensor, n: int) -> list[Tensor]:
    """The parts [B, ..., H / n] of n heads."""
    return list(x.chunk(n, -1))


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[:, :, None] * v[:, None, :]


def read(s: Tensor, q: Tensor) -> Tensor:
    return (s.transpose(1, 2) @ q[..., None]).squeeze(-1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """For every t the sum over j of w_j x_{t-j}, the last column of the weight being that of j = 0."""
    rows = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for j in range(min(weight.shape[1], t + 1)):
            y = y + weight[:, -1 - j] * x[:, t - j]
        rows.append(y)
    return rows


def _retnet(m: RetNet, x: Tensor) -> Tensor:
    """The parallel form, equations 5 and 8, with products of complex numbers for the rotations."""
    q, k, v, g = (x @ m.project.weight.T).split(m.sizes, -1)
    n = m.heads
    o = []
    for h, (q_h, k_h, v_h) in enumerate(zip(heads(q, n), heads(k, n), heads(v, n), strict=True)):
        half = q_h.shape[-1] // 2
        frequency = 10_000.0 ** (-torch.arange(half, dtype=double) / half)
        time = torch.arange(x.shape[1], dtype=double)
        turn = torch.polar(torch.ones(len(time), half, dtype=double), time[:, None] * frequency)
        complex_q = torch.complex(q_h[..., :half], q_h[..., half:]) * turn
        complex_k = torch.complex(k_h[..., :half], k_h[..., half:]) * turn
        scores = (complex_q[:, :, None] * complex_k[:, None].conj()).real.sum(-1) / (2 * half) ** 0.5
        apart = time[:, None] - time
        decay = torch.where(apart >= 0, (1 - 2.0 ** (-5 - h)) ** apart, 0)
        o.append(standard((scores * decay) @ v_h, 1e-5))
    return (swish(g) * torch.cat(o, -1)) @ m.out.weight.T


def _mlstm(m: MLSTM, x: Tensor) -> Tensor:
    """Section 2.3 as written, without the stabiliser."""
    u, z = (x @ m.up.weight.T).chunk(2, -1)
    c = [swish(y) for y in convolved(u, m.conv.weight, m.conv.bias)]
    n, width = m.heads, u.shape[-1] // m.heads
    wq, wk, wv = (torch.block_diag(*w) for w in (m.queries, m.keys, m.values))
    memory = [torch.zeros(B, width, width, dtype=double) for _ in range(n)]
    total = [torch.zeros(B, width, dtype=double) for _ in range(n)]
    rows = []
    for t in range(x.shape[1]):
        q, k, v = c[t] @ wq.T, c[t] @ wk.T, u[:, t] @ wv.T
        i, f = (torch.cat([q, k, v], -1) @ m.gates.weight.T + m.gates.bias).chunk(2, -1)
        found = []
        for h, (q_h, k_h, v_h) in enumerate(zip(heads(q, n), heads(k, n), heads(v, n), strict=True)):
            k_h = k_h / width**0.5
            enter, forget = i[:, h, None].exp(), sigmoid(f[:, h, None])
            memory[h] = forget[..., None] * memory[h] + enter[..., None] * outer(k_h, v_h)
            total[h] = forget * total[h] + enter * k_h
            weight = (total[h] * q_h).sum(-1, keepdim=True).abs().clamp(min=1)
            found.append(standard(read(memory[h], q_h) / weight, 1e-5))
        assert m.norm.weight is not None
        mixed = torch.cat(found, -1) * m.norm.weight.flatten() + m.skip * c[t]
        rows.append((swish(z[:, t]) * mixed) @ m.down.weight.T)
    return torch.stack(rows, 1)


def _rwkv6(m: RWKV6, x: Tensor) -> Tensor:
    n, rank = m.heads, m.mix_up.shape[1]
    s = [torch.zeros(B, H // n, H // n, dtype=double) for _ in range(n)]
    rows, previous = [], torch.zeros_like(x[:, 0])
    for x_t in x.unbind(1):
        apart = previous - x_t
        low = (x_t + apart * m.mix) @ m.mix_down
        mixed = []
        for j in range(5):
            more = low[:, j * rank : (j + 1) * rank].tanh() @ m.mix_up[j]
            mixed.append(x_t + apart * (m.mixes[j] + more))
        w = (-(m.decay + (mixed[0] @ m.decay_down).tanh() @ m.decay_up).exp()).exp()
        k, v, r = mixed[1] @ m.key.weight.T, mixed[2] @ m.value.weight.T, mixed[3] @ m.receptance.weight.T
        found = []
        for h, (r_h, w_h, k_h, v_h) in enumerate(zip(heads(r, n), heads(w, n), heads(k, n), heads(v, n), strict=True)):
            new = outer(k_h, v_h)
            found.append(standard(read(s[h] + m.bonus[h][:, None] * new, r_h), 64e-5))
            s[h] = w_h[..., None] * s[h] + new
        assert m.norm.weight is not None and m.norm.bias is not None
        y = torch.cat(found, -1) * m.norm.weight.flatten() + m.norm.bias.flatten()
        rows.append((swish(mixed[4] @ m.gate.weight.T) * y) @ m.out.weight.T)
        previous = x_t
    return torch.stack(rows, 1)


def _hgrn2(m: HGRN2, x: Tensor) -> Tensor:
    n, b = m.heads, m.lower_bound
    s = [torch.zeros(B, H // n, H // n, dtype=double) for _ in range(n)]
    rows = []
    for x_t in x.unbind(1):
        q, f, i = (x_t @ m.project.weight.T).chunk(3, -1)
        f = b + (1 - b) * sigmoid(f)
        found = []
        for h, (q_h, f_h, i_h) in enumerate(zip(heads(swish(q), n), heads(f, n), heads(i, n), strict=True)):
            s[h] = f_h[..., None] * s[h] + outer(1 - f_h, i_h)
            found.append(read(s[h], q_h))
        rows.append(scaled(torch.cat(found, -1), m.norm) @ m.out.weight.T)
    return torch.stack(rows, 1)


def _gla(m: GLA, x: Tensor) -> Tensor:
    n, tau = m.heads, m.temperature
    first, second = m.decay[0], m.decay[1]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    s = [torch.zeros(B, H // n // 2, H // n, dtype=double) for _ in range(n)]
    rows = []
    for x_t in x.unbind(1):
        q, k, v = (x_t @ m.project.weight.T).split([H // 2, H // 2, H], -1)
        a = sigmoid(x_t @ first.weight.T @ second.weight.T + second.bias) ** (1 / tau)
        found = []
        for h, (q_h, k_h, v_h, a_h) in enumerate(zip(heads(q, n), heads(k, n), heads(v, n), heads(a, n), strict=True)):
            s[h] = a_h[..., None] * s[h] + outer(k_h, v_h)
            o = read(s[h], q_h) / q_h.shape[-1] ** 0.5
            found.append(standard(o, 1e-5) * m.norm.weight + m.norm.bias)
        r = swish(x_t @ m.gate.weight.T + m.gate.bias)
        rows.append((r * torch.cat(found, -1)) @ m.out.weight.T)
    return torch.stack(rows, 1)


def _lightnet(m: LightNet, x: Tensor) -> Tensor:
    """Not as a recurrence: a softmax over the past for every key feature."""
    q, k, v = (x @ m.project.weight.T).chunk(3, -1)
    first, second = m.gate[0], m.gate[1]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    rows = []
    for t in range(x.shape[1]):
        weights = k[:, : t + 1].softmax(1)
        found = []
        for q_h, w_h, v_h in zip(
            heads(swish(q[:, t]), m.heads), heads(weights, m.heads), heads(v, m.heads), strict=True
        ):
            found.append(torch.einsum("bk,bsk,bsv->bv", q_h, w_h, v_h[:, : t + 1]))
        g = swish(x[:, t] @ first.weight.T @ second.weight.T)
        rows.append((g * scaled(torch.cat(found, -1), m.norm)) @ m.out.weight.T)
    return torch.stack(rows, 1)


def _delta(m: GatedDeltaNet, x: Tensor) -> Tensor:
    n, (width, _, values) = m.heads, m.sizes
    s = [torch.zeros(B, width // n, values // n, dtype=double) for _ in range(n)]
    rows = []
    for x_t, seen in zip(x.unbind(1), convolved(x @ m.project.weight.T, m.conv.weight), strict=True):
        q, k, v = swish(seen).split(m.sizes, -1)
        beta = m.largest * sigmoid(x_t @ m.beta.weight.T)
        found = []
        for h, (q_h, k_h, v_h) in enumerate(zip(heads(q, n), heads(k, n), heads(v, n), strict=True)):
            q_h, k_h = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q_h, k_h))
            b = beta[:, h, None, None]
            s[h] = s[h] - b * outer(k_h, k_h) @ s[h]
            if m.alpha is not None:
                dt = (1 + (x_t @ m.alpha.weight[h] + m.rate_bias[h]).exp()).log()
                s[h] = (-m.rate[h].exp() * dt).exp()[:, None, None] * s[h]
            s[h] = s[h] + b * outer(k_h, v_h)
            found.append(scaled(read(s[h], q_h) / (width // n) ** 0.5, m.norm))
        y = torch.cat(found, -1)
        rows.append((y if m.gate is None else swish(x_t @ m.gate.weight.T) * y) @ m.out.weight.T)
    return torch.stack(rows, 1)


def _titans(m: Titans, x: Tensor) -> Tensor:
    """The gradient of |M^T k - v|^2 / 2 by autograd, not by its formula."""
    n = m.heads
    memory = [torch.zeros(B, H // n, H // n, dtype=double, requires_grad=True) for _ in range(n)]
    momentum: list[Tensor] = [torch.zeros(B, H // n, H // n, dtype=double) for _ in range(n)]
    rows = []
    for x_t, seen in zip(x.unbind(1), convolved(x @ m.project.weight.T, m.conv.weight), strict=True):
        q, k, v = swish(seen).chunk(3, -1)
        alpha, eta, theta = sigmoid(x_t @ m.rates.weight.T + m.rates.bias).chunk(3, -1)
        found = []
        for h, (q_h, k_h, v_h) in enumerate(zip(heads(q, n), heads(k, n), heads(v, n), strict=True)):
            q_h, k_h = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q_h, k_h))
            error = read(memory[h], k_h) - v_h
            (slope,) = torch.autograd.grad(error.square().sum() / 2, memory[h], create_graph=True)
            momentum[h] = eta[:, h, None, None] * momentum[h] - theta[:, h, None, None] * slope
            memory[h] = (1 - alpha[:, h, None, None]) * memory[h] + momentum[h]
            found.append(scaled(read(memory[h], q_h), m.norm))
        rows.append((swish(x_t @ m.gate.weight.T) * torch.cat(found, -1)) @ m.out.weight.T)
    return torch.stack(rows, 1)


ORACLES: dict[str, tuple[Callable[[], Mixer], Callable[..., Tensor]]] = {
    "retnet": (lambda: RetNet(D, H, heads=2), _retnet),
    "mlstm": (lambda: MLSTM(D, H, heads=2), _mlstm),
    "rwkv6": (lambda: RWKV6(D, H, heads=2, mix_rank=3, decay_rank=4, place=0.5), _rwkv6),
    "hgrn2": (lambda: HGRN2(D, H, heads=2), _hgrn2),
    "hgrn2_bound": (lambda: HGRN2(D, H, heads=2, lower_bound=0.4), _hgrn2),
    "gla": (lambda: GLA(D, H, heads=2, gate_rank=3, temperature=4.0), _gla),
    "lightnet": (lambda: LightNet(D, H, heads=2, gate_rank=3), _lightnet),
    "gated_deltanet": (lambda: GatedDeltaNet(D, H, heads=2), _delta),
    "deltanet": (
        lambda: GatedDeltaNet(D, H, heads=2, expansion=1, decay=False, output_gate=False, negative=True),
        _delta,
    ),
    "titans": (lambda: Titans(D, H, heads=2), _titans),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_its_formulas(name: str) -> None:
    make, formula = ORACLES[name]
    mixer, x = built(make), inputs()
    y, _ = mixer(x)
    expected = formula(mixer, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn(y.shape, dtype=double, generator=torch.Generator().manual_seed(1))
    leaves = [x, *mixer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ORACLES)
def test_half_precision_stays_close(name: str) -> None:
    """bfloat16 inputs and weights within autocast: outputs near those of float32, states in single precision."""
    mixer = built(ORACLES[name][0]).float()
    x = inputs().detach().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        again, _ = mixer(x, state)
    with torch.no_grad():
        expected, _ = mixer(x)
    assert torch.isfinite(again).all()
    assert state is not None and state[0].dtype == torch.float32
    assert (y.float() - expected).norm() / expected.norm() < 0.05


def test_a_retention_goes_on_for_ever() -> None:
    """Ten thousand steps later the same inputs give the same outputs, to the last digits: there is no position."""
    mixer, x = built(lambda: RetNet(D, H, heads=2)), inputs().detach()
    with torch.no_grad():
        _, state = mixer(torch.randn(B, 2_000, D, dtype=double, generator=torch.Generator().manual_seed(2)))
        for _ in range(3):
            _, state = mixer(x.new_zeros(B, 2_000, D), state)
        late, _ = mixer(x, state)
        fresh, _ = mixer(x)
    torch.testing.assert_close(late, fresh, rtol=0, atol=1e-12)


def test_retention_rates_are_exact() -> None:
    for mixer in (RetNet(D, H, heads=8), RetNet(D, H, heads=8).double()):
        assert mixer.gamma.tolist() == [1 - 2.0 ** (-5 - h) for h in range(8)]
    assert "gamma" not in RetNet(D, H).state_dict()


def test_the_running_logsumexp_is_that_of_each_stretch() -> None:
    torch.manual_seed(0)
    x, before = 5 * torch.randn(2, 21, 3, dtype=double), torch.randn(2, 3, dtype=double)
    reset = torch.zeros(2, 21, dtype=torch.bool)
    reset[0, [4, 5, 13]] = True
    reset[1, 0] = True
    z = running_logsumexp(x, before, reset)
    for b in range(2):
        for t in range(21):
            starts = [s for s in range(t + 1) if reset[b, s]]
            terms = x[b, starts[-1] : t + 1] if starts else torch.cat([before[b : b + 1], x[b, : t + 1]])
            torch.testing.assert_close(z[b, t], terms.logsumexp(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [300.0, -300.0])
def test_lightnet_with_huge_keys_is_finite(scale: float) -> None:
    mixer, x = LightNet(D, H), inputs().detach().float()
    with torch.no_grad():
        mixer.project.weight[H : 2 * H] *= scale
    x.requires_grad_()
    y, state = mixer(x)
    again, _ = mixer(x, state)
    (gradient,) = torch.autograd.grad(y.sum() + again.sum(), x)
    assert torch.isfinite(again).all()
    assert torch.isfinite(gradient).all()


def test_the_delta_rule_replaces_what_it_held_for_a_key() -> None:
    """A value written again for a key takes the place of the first; linear attention would return their sum."""
    torch.manual_seed(0)
    m = GatedDeltaNet(D, 4, heads=1, expansion=1, conv=1, decay=False, output_gate=False).double()
    with torch.no_grad():
        m.project.weight[:8] = 0
        m.project.weight[:8, 0] = 1.0  # queries and keys: those of one direction, whatever the value
        m.beta.weight.zero_()
        m.beta.weight[0, 0] = 50.0  # beta is 1
        m.conv.weight.fill_(1.0)
        m.out.weight.copy_(torch.eye(4))
    x = torch.randn(1, 3, D, dtype=double)
    x[..., 0] = 1.0
    with torch.no_grad():
        _, (s, _) = m(x)
        _, (alone, _) = m(x[:, 2:])
    torch.testing.assert_close(s, alone, rtol=1e-4, atol=1e-6)


def test_initialisation() -> None:
    torch.manual_seed(0)
    m = MLSTM(D, H, heads=4, input_bias=-10.0)
    torch.testing.assert_close(m.gates.bias[4:], torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert (m.gates.bias[:4] + 10).abs().max() < 0.5
    assert not m.gates.weight.any()
    deltas = GatedDeltaNet(D, 64, heads=64)
    dt = torch.nn.functional.softplus(deltas.rate_bias)
    assert 1e-3 - 1e-6 <= dt.min() < 3e-3 < 3e-2 < dt.max() <= 0.1 + 1e-6
    assert 8 < deltas.rate.exp().max() <= 16
    t = Titans(D, H, heads=2)
    assert t.rates.bias.tolist() == [-4.0, -4.0, 0.0, 0.0, 0.0, 0.0]
    r = RWKV6(D, H, heads=2)
    assert r.decay[0] == -6 and r.decay[-1] == -1
    # At the start the token shift and the decay are those of the step alone, whatever the input.
    assert not r.mix_down.any() and not r.decay_down.any()
    torch.testing.assert_close(r.mixes[0, [0, -1]], torch.tensor([1.0, 1 / 6]))
    g = RetNet(1024, 1024)
    assert g.project.weight[:1024].abs().max() <= 2**-2.5 * (6 / 2048) ** 0.5


def test_norms() -> None:
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(B, T, 4, 5, dtype=double)
    norm = HeadNorm(4, 5).double()
    expected = torch.nn.functional.group_norm(x.flatten(0, 1).flatten(1), 4).view_as(x)
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(B, T, 4, dtype=double), rtol=1e-6, atol=0)
    zero = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(unit(zero).sum(), zero)
    assert torch.isfinite(gradient).all() and not unit(zero).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetNet(D, 12, heads=4), r"heads: got 4 with hidden=12; hidden must be a multiple of 2 \* heads"),
        (lambda: RetNet(D, H, expansion=0), "expansion: got 0"),
        (lambda: MLSTM(D, H, heads=5), r"heads: got 5 with expansion \* hidden=32"),
        (lambda: MLSTM(D, H, block=5), "block: got 5"),
        (lambda: MLSTM(D, H, conv=0), "conv: got 0"),
        (lambda: RWKV6(D, H, heads=3), "heads: got 3 with hidden=16"),
        (lambda: RWKV6(D, H, place=1.0), "place: got 1.0"),
        (lambda: RWKV6(D, H, mix_rank=0), "mix_rank: got 0"),
        (lambda: HGRN2(D, H, heads=0), "heads: got 0"),
        (lambda: HGRN2(D, H, lower_bound=1.0), "lower_bound: got 1.0"),
        (lambda: GLA(D, H, heads=16), "heads: got 16 with hidden=16"),
        (lambda: GLA(D, H, temperature=0.0), "temperature: got 0.0"),
        (lambda: LightNet(D, H, gate_rank=0), "gate_rank: got 0"),
        (lambda: GatedDeltaNet(D, H, heads=3), "heads: got 3 with hidden=16"),
        (lambda: GatedDeltaNet(D, H, expansion=0), "expansion: got 0"),
        (lambda: Titans(D, H, heads=3), "heads: got 3 with hidden=16"),
        (lambda: Titans(D, H, conv=0), "conv: got 0"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Mixer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_retnet_keeps_its_decays_in_half_precision() -> None:
    """bfloat16 would round the last four of eight to 1: heads that never forget."""
    gamma = RetNet(8, 64, heads=8).bfloat16().gamma
    assert gamma.dtype == torch.float32
    assert gamma.tolist() == [1 - 2.0 ** -(5 + n) for n in range(8)]
