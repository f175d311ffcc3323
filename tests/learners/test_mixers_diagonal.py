"""Mixers on diagonal recurrences against their papers' formulas, one step and one complex number at a time.

The laws that they share with all mixers are in test_mixers.py. Letters: B batch, T time, D input features, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from learners.rows import Learns, warmed
from torch import Tensor, nn

from clplat.learners.mixers.bidirectional import Bidirectional
from clplat.learners.mixers.gate_loop import GateLoop
from clplat.learners.mixers.griffin import RGLRU
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.hgrn import HGRN, LowerBounds
from clplat.learners.mixers.lru import LRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.mixers.min_gru import MinGRU, positive
from clplat.learners.mixers.min_lstm import MinLSTM
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.s4d import S4D
from clplat.learners.nets.gated import gated, hgrn
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Net
from clplat.learners.nets.residual import GatedDense, ResidualBlock
from clplat.streams.experience import Batch
from clplat.streams.inputs import Inputs

B, D, H = 3, 7, 12

LAWS: dict[str, Callable[[int, int], Mixer]] = {
    "min_gru": MinGRU,
    "min_gru_positive": partial(MinGRU, positive=True),
    "min_lstm": partial(MinLSTM, forget_bias=1.0),
    "min_lstm_positive": partial(MinLSTM, positive=True),
    "rg_lru": lambda d, h: warmed(RGLRU(d, h, blocks=4)),
    "rg_lru_without_conv": partial(RGLRU, recurrent=9, blocks=3, size=1),
    "gate_loop": GateLoop,
    "gate_loop_real": partial(GateLoop, phase=False, gate=False),
    "hgrn": lambda d, h: warmed(HGRN(d, h, LowerBounds(3, h), layer=2)),
    "hgrn_real": lambda d, h: warmed(HGRN(d, h, LowerBounds(3, h), layer=1, phase=False)),
    "lru": partial(LRU, states=17, r_min=0.8, r_max=0.99),
    "lru_linear": partial(LRU, max_phase=0.3, glu=False),
    "s4d": partial(S4D, states=3),
    "s4d_bilinear": partial(S4D, states=2, init="inv", discretisation="bilinear", glu=False),
    "s4d_real": lambda d, h: warmed(S4D(d, h, states=4, init="real")),
}
AHEAD: dict[str, Callable[[int, int], Mixer]] = {"bidirectional": partial(Bidirectional, mixer=LSTM)}
LEARNS = {
    "bidirectional": Learns(0.80, 360),
    "gate_loop": Learns(0.50, 360),
    "griffin": Learns(0.85),
    "hawk": Learns(0.50),
    "hgrn": Learns(0.55),
    "lru": Learns(0.45, 360),
    "min_gru": Learns(0.45, 360),
    "min_lstm": Learns(0.45),
    "s4d": Learns(0.50),
}


def close(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def inputs(steps: int, seed: int = 1, width: int = D) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, steps, width, dtype=torch.float64)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def affine(layer: Any, x: Tensor) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def number(pairs: Tensor) -> Tensor:
    """Complex numbers from pairs [..., 2]."""
    return pairs[..., 0] + 1j * pairs[..., 1]


def pairs(z: Tensor) -> Tensor:
    return torch.stack([z.real, z.imag], -1)


def _min_gru(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    gate, candidate = affine(m.project, x).chunk(2, -1)
    if m.positive:
        candidate = (candidate + 0.5) * (candidate >= 0) + sigmoid(candidate) * (candidate < 0)
    z = sigmoid(gate)
    h = (1 - z) * state[0] + z * candidate
    return h, (h,)


def _min_lstm(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    forget, admit, candidate = affine(m.project, x).chunk(3, -1)
    if m.positive:
        candidate = (candidate + 0.5) * (candidate >= 0) + sigmoid(candidate) * (candidate < 0)
    f, i = sigmoid(forget), sigmoid(admit)
    h = f / (f + i) * state[0] + i / (f + i) * candidate
    return h, (h,)


def _rg_lru(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    h, seen = state
    window = torch.cat([seen, affine(m.enter, x)[:, None]], 1)
    u = (window * m.conv.weight.T).sum(1) + m.conv.bias
    part = m.gates.shape[1]
    w_a, w_x = (torch.block_diag(*m.gates[:, :, k * part : (k + 1) * part]) for k in (0, 1))
    b_a, b_x = (m.gate_biases[:, k * part : (k + 1) * part].flatten() for k in (0, 1))
    a = sigmoid(-m.decay) ** (8 * sigmoid(u @ w_a + b_a))
    h = a * h + (1 - a**2).sqrt() * sigmoid(u @ w_x + b_x) * u
    return affine(m.leave, gelu(affine(m.gate, x)) * h), (h, window[:, 1:])


def _gate_loop(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    q, k, v = affine(m.project, x).chunk(3, -1)
    decay = affine(m.decay, x)
    if m.phase:
        h = sigmoid(decay[:, :H]) * torch.exp(1j * decay[:, H:]) * number(state[0]) + k * v
        y, last = (q * h).real, pairs(h)
    else:
        last = sigmoid(decay) * state[0] + k * v
        y = q * last
    return affine(m.out, y if m.gate is None else silu(affine(m.gate, x)) * y), (last,)


def _hgrn(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    p = m.bounds.logits.exp() / m.bounds.logits.exp().sum(0)
    bound = p.cumsum(0)[m.layer] - p[0]
    f = bound + (1 - bound) * sigmoid(affine(m.forget, x))
    c = silu(affine(m.input, x))
    if m.theta is None:
        h = f * state[0] + (1 - f) * c
        y, last = h, h
    else:
        z = f * torch.exp(1j * m.theta) * number(state[0]) + (1 - f) * (c[:, :H] + 1j * c[:, H:])
        y, last = torch.cat([z.real, z.imag], -1), pairs(z)
    apart = y - y.mean(-1, keepdim=True)
    y = apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight + m.norm.bias
    return affine(m.out, y * silu(affine(m.gate, x))), (last,)


def _glu(m: Any, y: Tensor) -> Tensor:
    if m.mix is None:
        return y
    value, gate = affine(m.mix, gelu(y)).chunk(2, -1)
    return value * sigmoid(gate)


def _lru(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    u = x if m.enter is None else affine(m.enter, x)
    decay = torch.exp(-torch.exp(m.nu) + 1j * torch.exp(m.theta))
    b = m.b[:, 0] + 1j * m.b[:, 1]
    h = decay * number(state[0]) + torch.exp(m.log_gamma) * ((u + 0j) @ b.T)
    y = (h @ number(m.c).T).real + m.skip * u
    return _glu(m, y), (pairs(h),)


def _s4d(m: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
    u = x if m.enter is None else affine(m.enter, x)
    a_continuous = -torch.exp(m.log_decay) + 1j * m.frequency
    dt = torch.exp(m.log_dt)[:, None]
    if m.discretisation == "zoh":
        a = torch.exp(dt * a_continuous)
        b = (a - 1) / a_continuous
    else:
        a = (1 + dt / 2 * a_continuous) / (1 - dt / 2 * a_continuous)
        b = dt / (1 - dt / 2 * a_continuous)
    s = a * number(state[0]).unflatten(-1, a.shape) + b * u[..., None]
    y = 2 * (number(m.c) * s).sum(-1).real + m.skip * u
    return _glu(m, y), (pairs(s).flatten(1, 2),)


Formula = Callable[[Any, Tensor, State], tuple[Tensor, State]]
FORMULAS: dict[str, tuple[Callable[[], Mixer], Formula]] = {
    "min_gru": (lambda: MinGRU(D, H), _min_gru),
    "min_gru_positive": (lambda: MinGRU(D, H, positive=True), _min_gru),
    "min_lstm": (lambda: MinLSTM(D, H, forget_bias=2.0), _min_lstm),
    "min_lstm_positive": (lambda: MinLSTM(D, H, positive=True), _min_lstm),
    "rg_lru": (lambda: RGLRU(D, H, blocks=4), _rg_lru),
    "rg_lru_one_block": (lambda: RGLRU(D, H, recurrent=5, blocks=1, size=2), _rg_lru),
    "gate_loop": (lambda: GateLoop(D, H), _gate_loop),
    "gate_loop_plain": (lambda: GateLoop(D, H, gate=False), _gate_loop),
    "gate_loop_real": (lambda: GateLoop(D, H, phase=False), _gate_loop),
    "hgrn": (lambda: HGRN(D, H, LowerBounds(4, H), layer=2), _hgrn),
    "hgrn_first_layer": (lambda: HGRN(D, H, LowerBounds(4, H), layer=0), _hgrn),
    "hgrn_real": (lambda: HGRN(D, H, LowerBounds(4, H), layer=3, phase=False), _hgrn),
    "lru": (lambda: LRU(D, H, states=5), _lru),
    "lru_square": (lambda: LRU(D, D, r_min=0.5, r_max=0.9, max_phase=1.0, glu=False), _lru),
    "s4d": (lambda: S4D(D, H, states=3), _s4d),
    "s4d_square": (lambda: S4D(D, D, states=2, init="inv", glu=False), _s4d),
    "s4d_real": (lambda: S4D(D, H, states=3, init="real"), _s4d),
    "s4d_bilinear": (lambda: S4D(D, H, states=2, discretisation="bilinear", dt_max=0.5), _s4d),
}


def build(name: str) -> Mixer:
    """With weights moved from where they start, so that none is zero or equal to another by chance."""
    torch.manual_seed(7)
    mixer = FORMULAS[name][0]().double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize("steps", [1, 35])
@pytest.mark.parametrize("name", FORMULAS)
def test_mixers_equal_their_formulas(name: str, steps: int) -> None:
    mixer, formula = build(name), FORMULAS[name][1]
    x = inputs(steps).requires_grad_()
    with torch.no_grad():
        _, first = mixer(inputs(3, seed=2))
    assert first is not None
    first = tuple(s.clone().requires_grad_() for s in first)
    state, rows = first, []
    for t in range(steps):
        row, state = formula(mixer, x[:, t], state)
        rows.append(row)
    y, last = mixer(x, first)
    expected = torch.stack(rows, 1)
    close(y, expected)
    close(last, state)
    leaves, scale = [x, *first, *mixer.parameters()], inputs(steps, 3, y.shape[-1])

    def gradients(y: Tensor, last: State) -> tuple[Tensor, ...]:
        total = (y * scale).sum() + torch.stack([(s * (0.1 + s.detach())).sum() for s in last]).sum()
        return torch.autograd.grad(total, leaves)

    close(gradients(y, last), gradients(expected, state), 1e-9)


@pytest.mark.parametrize("name", [n for n in FORMULAS if "rg_lru" not in n])
def test_a_fresh_state_is_zero(name: str) -> None:
    mixer, x = build(name), inputs(5)
    y, last = mixer(x)
    zeros = tuple(torch.zeros_like(s) for s in last or ())
    close(mixer(x, zeros), (y, last))


def test_the_first_step_of_an_rg_lru_enters_whole() -> None:
    """Without the factor sqrt(1 - a^2), which is for what adds to a decayed state."""
    mixer, x = build("rg_lru"), inputs(1)
    y, state = mixer(x)
    assert state is not None and isinstance(mixer, RGLRU)
    assert mixer.conv.bias is not None
    u = affine(mixer.enter, x[:, 0]) * mixer.conv.weight[:, -1] + mixer.conv.bias
    part = mixer.gates.shape[1]
    gate = u @ torch.block_diag(*mixer.gates[:, :, part:]) + mixer.gate_biases[:, part:].flatten()
    close(state[0], sigmoid(gate) * u)
    close(y[:, 0], affine(mixer.leave, gelu(affine(mixer.gate, x[:, 0])) * state[0]))
    zeros = tuple(torch.zeros_like(s) for s in state)
    assert (mixer(x, zeros)[0] - y).abs().max() > 1e-3


@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_keeps_a_single_precision_state(name: str) -> None:
    mixer, x = build(name).float(), inputs(9).float()
    exact, exact_last = mixer(x)
    assert exact_last is not None
    with torch.autocast("cpu", torch.bfloat16):
        y, last = mixer(x)
    assert last is not None
    assert last[0].dtype == torch.float32
    assert (y - exact).norm() < 0.05 * exact.norm()
    mixer = mixer.bfloat16()
    y, last = mixer(x.bfloat16())
    assert last is not None
    assert y.dtype == torch.bfloat16 and last[0].dtype == torch.float32
    assert (y.float() - exact).norm() < 0.1 * exact.norm()
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())
    mixer(x.bfloat16(), last)


def test_positive_is_continuous_increasing_and_above_zero() -> None:
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    y = positive(x)
    assert y.min() > 0
    assert y.diff().min() > 0
    assert y.diff().max() < 0.0101
    close(positive(torch.tensor([0.0, 2.0, -1.0])), torch.tensor([0.5, 2.5, 1 / (1 + math.e)]), 1e-6)


def test_forget_bias_of_a_min_lstm() -> None:
    torch.manual_seed(0)
    plain = MinLSTM(D, H).project
    torch.manual_seed(0)
    biased = MinLSTM(D, H, forget_bias=1.5).project
    close(biased.bias - plain.bias, torch.tensor([1.5, 0.0, 0.0]).repeat_interleave(H), 1e-6)
    close(biased.weight, plain.weight)


def test_rg_lru_starts_with_decays_of_the_paper() -> None:
    torch.manual_seed(0)
    mixer = RGLRU(64, 6000, blocks=1000)
    assert mixer.decay.shape == (8000,)
    decay = torch.exp(-8 * nn.functional.softplus(mixer.decay.double()))
    assert 0.9 <= decay.min() < 0.901 and 0.998 < decay.max() <= 0.9991
    close(
        decay.quantile(torch.tensor([0.25, 0.5, 0.75]).double()), torch.tensor([0.9248, 0.9495, 0.9743]).double(), 3e-3
    )
    assert RGLRU(8, 8).decay.shape == (16,)
    assert not mixer.gate_biases.any()


def test_lru_starts_on_the_ring_with_states_of_the_size_of_inputs() -> None:
    torch.manual_seed(0)
    mixer = LRU(64, 64, states=4000, r_min=0.6, r_max=0.95, max_phase=1.0, glu=False)
    modulus, phase = torch.exp(-mixer.nu.exp()), mixer.theta.exp()
    assert 0.599 < modulus.min() < 0.61 and 0.945 < modulus.max() < 0.951
    # Uniform by area: |lambda|^2 is uniform.
    close(modulus.square().mean(), torch.tensor((0.6**2 + 0.95**2) / 2), 1e-2)
    close(modulus.square().var().sqrt(), torch.tensor((0.95**2 - 0.6**2) / 12**0.5), 1e-2)
    assert phase.max() <= 1
    close(phase.mean(), torch.tensor(0.5), 3e-2)
    _, state = mixer(torch.randn(8, 150, 64))
    assert state is not None
    close(state[0].square().sum(-1).mean(), torch.tensor(1.0), 5e-2)
    assert LRU(D, H).nu.isfinite().all() and LRU(D, H).log_gamma.isfinite().all()


def test_s4d_starts_as_in_the_paper() -> None:
    torch.manual_seed(0)
    n = torch.arange(4)
    lin, inv, real = (S4D(500, 500, states=4, init=init) for init in ("lin", "inv", "real"))
    close(-lin.log_decay.exp()[3], torch.full((4,), -0.5), 1e-6)
    close(lin.frequency[3], math.pi * n, 1e-6)
    close(inv.frequency[0], 8 / math.pi * (8 / (2 * n + 1) - 1), 1e-6)
    close(real.log_decay.exp()[0], n + 1.0, 1e-6)
    assert not real.frequency.any()
    dt = lin.log_dt.exp()
    assert 0.00099 < dt.min() < 0.0012 and 0.09 < dt.max() < 0.1001
    close(lin.log_dt.mean().exp(), torch.tensor(0.01), 2e-3)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_s4d_samples_its_differential_equation(discretisation: str) -> None:
    """s' = A s + u from 0 with an input of 1 for one step: exactly (zoh), or by the trapezoidal rule (bilinear)."""
    torch.manual_seed(0)
    mixer = S4D(2, 2, states=3, discretisation=discretisation, dt_min=0.3, dt_max=0.3).double()
    a, dt = -mixer.log_decay.exp() + 1j * mixer.frequency, 0.3
    _, first = mixer(torch.ones(1, 1, 2, dtype=torch.float64))
    _, second = mixer(torch.ones(1, 1, 2, dtype=torch.float64), first)
    assert first is not None and second is not None
    s, later = (number(v[0]).view(2, 3) for v in (first[0], second[0]))
    if discretisation == "zoh":
        steps = 20_000
        middles = (torch.arange(steps, dtype=torch.float64) + 0.5) * dt / steps
        close(s, torch.exp(a[..., None] * middles).mean(-1) * dt, 1e-6)
        close(later, torch.exp(a * dt) * s + s, 1e-6)
    else:
        close(s / dt, a * s / 2 + 1, 1e-6)
        close((later - s) / dt, a * (s + later) / 2 + 1, 1e-6)


@pytest.mark.parametrize("steps", [1, 31, 32, 33, 64, 100])
def test_s4d_by_chunks_equals_its_recurrence(steps: int) -> None:
    mixer, x = build("s4d"), inputs(steps).requires_grad_()
    _, state = mixer(inputs(3, seed=2))
    assert state is not None
    first = tuple(s.detach().requires_grad_() for s in state)
    never = torch.zeros(B, steps, dtype=torch.bool)
    leaves, scale = [x, *first, *mixer.parameters()], inputs(steps, 3, H)
    found = []
    for reset in (None, never):
        y, last = mixer(x, first, reset)
        assert last is not None
        found.append((y, last, torch.autograd.grad((y * scale).sum() + last[0].square().sum(), leaves)))
    close(found[0], found[1])


def test_s4d_stays_bounded_over_long_sequences_in_single_precision() -> None:
    torch.manual_seed(0)
    mixer, x = S4D(4, 4, states=8, glu=False), torch.randn(1, 3000, 4)
    close(mixer(x)[0].double(), mixer.double()(x.double())[0], 1e-3)


def test_lower_bounds_grow_from_layer_to_layer() -> None:
    torch.manual_seed(0)
    bounds = LowerBounds(4, H)
    for k in range(4):
        close(bounds(k), torch.full((H,), k / 4), 1e-6)
    nn.init.normal_(bounds.logits)
    values = torch.stack([bounds(k) for k in range(4)])
    assert not values[0].any()
    assert values.diff(dim=0).min() > 0
    assert values.max() < 1
    alone = HGRN(D, H)  # without bounds: that of a first layer
    other = HGRN(D, H, bounds, layer=0)
    other.load_state_dict({**alone.state_dict(), "bounds.logits": bounds.logits})
    x = inputs(5).float()
    close(alone(x), other(x))


def test_options_that_do_not_exist_are_refused() -> None:
    for match, make in {
        r"blocks: got 4 with recurrent=10": lambda: RGLRU(D, H, recurrent=10, blocks=4),
        r"blocks: got 0": lambda: RGLRU(D, H, blocks=0),
        r"fastest: got 0.9 with slowest=0.5": lambda: RGLRU(D, H, slowest=0.5),
        r"layers: got 0": lambda: LowerBounds(0, H),
        r"layer: got 2.*2 layers": lambda: HGRN(D, H, LowerBounds(2, H), layer=2),
        r"hidden=12.*width 5": lambda: HGRN(D, H, LowerBounds(2, 5)),
        r"^states: got 0": lambda: LRU(D, H, states=0),
        r"r_min: got 0.9 with r_max=0.9": lambda: LRU(D, H, r_min=0.9, r_max=0.9),
        r"max_phase: got 0": lambda: LRU(D, H, max_phase=0),
        r"init: got 'legs', allowed are 'lin', 'inv', 'real'": lambda: S4D(D, H, init="legs"),
        r"discretisation: got 'euler'": lambda: S4D(D, H, discretisation="euler"),
        r"states: got 0, it": lambda: S4D(D, H, states=0),
        r"dt_min: got 1 with dt_max=0.1": lambda: S4D(D, H, dt_min=1),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()


HALVES: dict[str, Callable[[int, int], Mixer]] = {
    "lstm": LSTM,
    "gru": GRU,
    "min_gru": MinGRU,
    "rg_lru": lambda d, h: RGLRU(d, h, blocks=4),
}


@pytest.mark.parametrize("name", HALVES)
def test_bidirectional_equals_a_mixer_from_each_end(name: str) -> None:
    torch.manual_seed(7)
    mixer, lengths = Bidirectional(D, H, HALVES[name]).double(), torch.tensor([9, 4, 1])
    assert not mixer.causal and mixer.width == 2 * H
    x = inputs(9)
    padding = torch.arange(9) >= lengths[:, None]
    x[padding] = 1e3
    x.requires_grad_()
    y, state = mixer(x, lengths=lengths)
    assert state is None and y.shape == (B, 9, 2 * H)
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        row = x[b : b + 1, :length]
        expected = torch.cat([mixer.ahead(row)[0], mixer.back(row.flip(1))[0].flip(1)], -1)
        close(y[b : b + 1, :length], expected)
        close(mixer(row)[0], expected)
        total = total + y[b, :length].square().sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert not gradient[padding].any()
    assert gradient[~padding].abs().min() > 0
    (ahead,) = torch.autograd.grad(mixer(x, lengths=lengths)[0][0, 0].sum(), x)
    assert ahead[0, 8].abs().max() > 0  # the last step shows in the first output


def test_bidirectional_refuses_a_mixer_that_looks_ahead() -> None:
    with pytest.raises(ValueError, match="Bidirectional, which looks ahead"):
        Bidirectional(D, H, lambda d, h: Bidirectional(d, h, LSTM))


def test_bidirectional_sums_the_penalties_of_its_halves() -> None:
    class Penalised(LSTM):
        def penalties(self) -> Mapping[str, Tensor]:
            return {"size": self.rnn.all_weights[0][0].square().sum()}

    mixer = Bidirectional(D, H, Penalised)
    halves = [half.penalties()["size"] for half in (mixer.ahead, mixer.back) if isinstance(half, Penalised)]
    close(dict(mixer.penalties()), {"size": halves[0] + halves[1]})
    assert not Bidirectional(D, H, LSTM).penalties()


def batch(x: Tensor) -> Batch:
    return Batch(x=x, y=torch.zeros(len(x), dtype=torch.long), index=torch.arange(len(x)))


def net(mixers: list[Callable[[int, int], Mixer]], **options: Any) -> Net:
    return gated(Inputs(features=D), lambda width: Head(width, 3), mixers=mixers, hidden=8, **options)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_gated_block_equals_its_formula(activation: str) -> None:
    torch.manual_seed(7)
    block = net([lambda d, h: MinGRU(d, h)], layers=1, activation=activation).double().blocks[0]
    assert isinstance(block, ResidualBlock) and isinstance(block.dense, GatedDense) and block.norm_dense is not None
    x = inputs(5, width=8)

    def norm(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + torch.finfo(v.dtype).eps).sqrt() * weight

    mixed = x + block.mixer(norm(x, block.norm_mixer.get_parameter("weight")))[0]
    inner = norm(mixed, block.norm_dense.get_parameter("weight"))
    first, second = block.dense.expand.weight.chunk(2)
    bias, other = block.dense.expand.bias.chunk(2)
    gate = {"gelu": gelu, "silu": silu}[activation](inner @ first.T + bias)
    expected = mixed + (gate * (inner @ second.T + other)) @ block.dense.contract.weight.T + block.dense.contract.bias
    close(block(x)[0], expected)
    with pytest.raises(ValueError, match="add the time axis"):
        block(x[:, 0])


def test_a_gated_net_takes_its_mixers_in_turn() -> None:
    made = net([lambda d, h: MinGRU(d, h), lambda d, h: MinLSTM(d, h), LSTM], layers=5)
    kinds = [type(b.mixer) for b in made.blocks if isinstance(b, ResidualBlock)]
    assert kinds == [MinGRU, MinLSTM, LSTM, MinGRU, MinLSTM]
    output = made(batch(inputs(4).float()))
    assert output.logits.shape == (B, 3)
    assert len(output.state) == 6
    for match, options in {
        "^layers: got 0": {"layers": 0},
        "^expansion: got 0": {"expansion": 0},
        "dropout: got 1.0": {"dropout": 1.0},
        "activation: got 'relu'": {"activation": "relu"},
        "norm: got 'batch'": {"norm": "batch"},
    }.items():
        with pytest.raises(ValueError, match=match):
            net([LSTM], **options)
    with pytest.raises(ValueError, match=r"^mixers: got none"):
        net([])


def test_layers_of_hgrn_share_their_bounds() -> None:
    torch.manual_seed(0)
    made = hgrn(Inputs(features=D), lambda width: Head(width, 3), hidden=8, layers=3)
    mixers = [b.mixer for b in made.blocks if isinstance(b, ResidualBlock)]
    assert [m.layer for m in mixers if isinstance(m, HGRN)] == [0, 1, 2]
    assert len({id(m.get_parameter("bounds.logits")) for m in mixers}) == 1
    assert sum("bounds" in name for name, _ in made.named_parameters()) == 1
    made(batch(inputs(4).float())).logits.square().sum().backward()
    gradient = mixers[0].get_parameter("bounds.logits").grad
    assert gradient is not None and gradient.abs().min() > 0
    other = hgrn(Inputs(features=D), lambda width: Head(width, 3), hidden=8, layers=3)
    other.load_state_dict(made.state_dict())
    x = batch(inputs(4).float())
    close(other(x).logits, made(x).logits)
    with pytest.raises(ValueError, match="layers: got 0"):
        hgrn(Inputs(features=D), lambda width: Head(width, 3), layers=0)


def test_s4d_recurrence_stays_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    mixer, x = S4D(8, 8, glu=False), torch.randn(2, 70, 8)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(x)
    torch.testing.assert_close(found, expected)


def test_s4d_bilinear_where_a_is_zero() -> None:
    """dt (n + 1) / 2 = 1: the state lasts one step, and the logarithm of its decay is -inf."""
    torch.manual_seed(0)
    mixer = S4D(4, 4, states=8, init="real", discretisation="bilinear", dt_min=0.25, dt_max=0.25)
    x = torch.randn(2, 9, 4)
    y, _ = mixer(x)
    torch.testing.assert_close(y, mixer(x, None, torch.zeros(2, 9, dtype=torch.bool))[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(mixer.parameters())))
