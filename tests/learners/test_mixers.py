"""The laws of mixers, once for all of them, and each mixer against its formulas.

Letters: B batch, T time, D input features, H hidden, N heads, d features a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clplat.learners.mixers.aaren import Aaren
from clplat.learners.mixers.attention import Attention, rotate
from clplat.learners.mixers.block_lrnn import BlockLRNN
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gate_loop import GateLoop
from clplat.learners.mixers.gated_deltanet import GatedDeltaNet
from clplat.learners.mixers.gla import GLA
from clplat.learners.mixers.griffin import RGLRU
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.hgrn import HGRN, LowerBounds
from clplat.learners.mixers.hgrn2 import HGRN2
from clplat.learners.mixers.hyper_lstm import HyperLSTM
from clplat.learners.mixers.lem import LEM
from clplat.learners.mixers.lightnet import LightNet
from clplat.learners.mixers.local_attention import LocalAttention
from clplat.learners.mixers.low_rank_lstm import LowRankLSTM
from clplat.learners.mixers.lru import LRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.mixers.mamba import Mamba
from clplat.learners.mixers.min_gru import MinGRU
from clplat.learners.mixers.min_lstm import MinLSTM
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.mlstm import MLSTM
from clplat.learners.mixers.odyssey_lstm import OdysseyLSTM
from clplat.learners.mixers.retnet import RetNet
from clplat.learners.mixers.rwkv4 import RWKV4
from clplat.learners.mixers.rwkv6 import RWKV6
from clplat.learners.mixers.s4d import S4D
from clplat.learners.mixers.slstm import SLSTM
from clplat.learners.mixers.titans import Titans
from clplat.weights import functional

B, D, H = 3, 11, 40

# Every causal mixer obeys every law below: a new one needs one line here.
CAUSAL: dict[str, Callable[[int, int], Mixer]] = {
    "aaren": Aaren,
    "rwkv4": lambda d, h: warmed(RWKV4(d, h)),
    "rwkv4_deep": lambda d, h: warmed(RWKV4(d, h, depth=0.5, zero=False)),
    "mamba": Mamba,
    "mamba_small": lambda d, h: Mamba(d, h, states=3, expand=1, conv=2, rank=2),
    "block_lrnn": BlockLRNN,
    "block_lrnn_plain": lambda d, h: BlockLRNN(d, h, block=5, norm=1.0, centred=False),
    "elman": Elman,
    "elman_relu": lambda d, h: Elman(d, h, nonlinearity="relu", init="orthogonal"),
    "lstm": LSTM,
    "lstm_forget_bias": lambda d, h: LSTM(d, h, forget_bias=1.0),
    "gru": GRU,
    "gru_in_evaluation": lambda d, h: _evaluating(GRU(d, h)),
    "elman_in_evaluation": lambda d, h: _evaluating(Elman(d, h)),
    "gru_of_the_paper": lambda d, h: GRU(d, h, reset_after=False),
    "odyssey_lstm": OdysseyLSTM,
    "odyssey_lstm_np_cifg": lambda d, h: OdysseyLSTM(d, h, peepholes=False, coupled=True),
    "odyssey_lstm_full_gate_recurrence": lambda d, h: OdysseyLSTM(d, h, full_gate_recurrence=True),
    "low_rank_lstm": lambda d, h: warmed(LowRankLSTM(d, h, rank=3)),
    "slstm": lambda d, h: warmed(SLSTM(d, h)),
    "slstm_without_conv_and_norm": lambda d, h: warmed(SLSTM(d, h, heads=2, conv=0, norm=False)),
    "lem": LEM,
    "lem_long_steps": lambda d, h: LEM(d, h, dt=1.5),
    "attention": Attention,
    "hyper_lstm": lambda d, h: warmed(HyperLSTM(d, h, size=6)),
    "hyper_lstm_without_norms": lambda d, h: warmed(HyperLSTM(d, h, size=6, embedding=3, normalize=False)),
    "retnet": RetNet,
    "mlstm": lambda d, h: warmed(MLSTM(d, h)),
    "rwkv6": lambda d, h: warmed(RWKV6(d, h, mix_rank=3, decay_rank=5)),
    "hgrn2": HGRN2,
    "hgrn2_bound": lambda d, h: HGRN2(d, h, lower_bound=0.7),
    "gla": lambda d, h: GLA(d, h, gate_rank=3, temperature=2.0),
    "lightnet": lambda d, h: LightNet(d, h, gate_rank=5),
    "gated_deltanet": GatedDeltaNet,
    "deltanet": lambda d, h: GatedDeltaNet(d, h, expansion=1, decay=False, output_gate=False, negative=True),
    "titans": Titans,
    "min_gru": MinGRU,
    "min_gru_positive": lambda d, h: MinGRU(d, h, positive=True),
    "min_lstm": lambda d, h: MinLSTM(d, h, forget_bias=1.0),
    "min_lstm_positive": lambda d, h: MinLSTM(d, h, positive=True),
    "rg_lru": lambda d, h: warmed(RGLRU(d, h, blocks=4)),
    "rg_lru_without_conv": lambda d, h: RGLRU(d, h, recurrent=9, blocks=3, size=1),
    "local_attention": lambda d, h: LocalAttention(d, h, window=5),
    "local_attention_wide": lambda d, h: LocalAttention(d, h, window=16, key_heads=2),
    "gate_loop": GateLoop,
    "gate_loop_real": lambda d, h: GateLoop(d, h, phase=False, gate=False),
    "hgrn": lambda d, h: warmed(HGRN(d, h, LowerBounds(3, h), layer=2)),
    "hgrn_real": lambda d, h: warmed(HGRN(d, h, LowerBounds(3, h), layer=1, phase=False)),
    "lru": lambda d, h: LRU(d, h, states=17, r_min=0.8, r_max=0.99),
    "lru_linear": lambda d, h: LRU(d, h, max_phase=0.3, glu=False),
    "s4d": lambda d, h: S4D(d, h, states=3),
    "s4d_bilinear": lambda d, h: S4D(d, h, states=2, init="inv", discretisation="bilinear", glu=False),
    "s4d_real": lambda d, h: warmed(S4D(d, h, states=4, init="real")),
}


def _evaluating(mixer: Mixer) -> Mixer:
    """On torch's own kernel, where training takes another one."""
    mixer.eval()
    return mixer


def warmed(mixer: Mixer) -> Mixer:
    """With every weight in use: some are zero at initialisation."""
    torch.manual_seed(8)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


each_mixer = pytest.mark.parametrize("name", CAUSAL)
each_length = pytest.mark.parametrize("steps", [1, 7, 63])


def build(name: str) -> Mixer:
    torch.manual_seed(7)
    return CAUSAL[name](D, H).double()


def inputs(steps: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, steps, D, dtype=torch.float64)


def memory(mixer: Mixer) -> State:
    """A state that some earlier steps left, as leaves that take gradients."""
    with torch.no_grad():
        _, state = mixer(inputs(5, seed=2))
    assert state is not None
    return tuple(s.clone().requires_grad_(s.is_floating_point()) for s in state)


def gradients(mixer: Mixer, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of an uneven sum of the outputs with respect to the leaves and to every weight."""
    torch.manual_seed(3)
    terms = [(o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs if o.is_floating_point()]
    total = torch.stack(terms).sum()
    return list(torch.autograd.grad(total, [*leaves, *mixer.parameters()]))


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@each_length
@each_mixer
def test_parallel_equals_step_by_step(name: str, steps: int) -> None:
    mixer, x = build(name), inputs(steps).requires_grad_()
    first = memory(mixer)
    state: State | None = first
    y, last = mixer(x, first)
    stepped: list[Tensor] = []
    for t in range(steps):
        y_t, state = mixer.step(x[:, t], state)
        stepped.append(y_t)
    close(torch.stack(stepped, 1), y)
    close(state, last)
    leaves = [x, *(s for s in first if s.requires_grad)]
    assert state is not None
    close(
        gradients(mixer, [torch.stack(stepped, 1), *state], leaves),
        gradients(mixer, [y, *last], leaves),
    )


@each_length
@each_mixer
def test_a_fresh_sequence_starts_without_a_state(name: str, steps: int) -> None:
    mixer, x = build(name), inputs(steps)
    y, last = mixer(x)
    stepped, state = [], None
    for t in range(steps):
        y_t, state = mixer.step(x[:, t], state)
        stepped.append(y_t)
    close(torch.stack(stepped, 1), y)
    close(state, last)


@pytest.mark.parametrize(("steps", "cut"), [(7, 1), (7, 4), (63, 62), (63, 20)])
@each_mixer
def test_a_sequence_cut_in_two_equals_the_whole(name: str, steps: int, cut: int) -> None:
    mixer, x = build(name), inputs(steps).requires_grad_()
    first = memory(mixer)
    leaves = [x, *(s for s in first if s.requires_grad)]
    whole, whole_last = mixer(x, first)
    early, between = mixer(x[:, :cut], first)
    late, last = mixer(x[:, cut:], between)
    halves = torch.cat([early, late], 1)
    close(halves, whole)
    close(last, whole_last)
    close(gradients(mixer, [halves, *last], leaves), gradients(mixer, [whole, *whole_last], leaves))


@pytest.mark.parametrize("with_state", [True, False])
@each_length
@each_mixer
def test_reset_starts_a_fresh_sequence(name: str, steps: int, with_state: bool) -> None:
    mixer, x, more = build(name), inputs(steps).requires_grad_(), inputs(4, seed=5)
    state = memory(mixer) if with_state else None
    reset = torch.rand(B, steps, generator=torch.Generator().manual_seed(4)) < 0.2
    reset[0] = False
    reset[1, 0] = True
    reset[2, -1] = True
    y, last = mixer(x, state, reset)
    after, _ = mixer(more, last)  # what the state remembers shows in what follows

    rows, rows_after = [], []
    for b in range(B):
        starts = sorted({0, *reset[b].nonzero().flatten().tolist()})
        pieces = []
        kept: State | None = None
        for start, end in itertools.pairwise([*starts, steps]):
            kept = None if state is None or reset[b, start] else tuple(s[b : b + 1] for s in state)
            piece, kept = mixer(x[b : b + 1, start:end], kept)
            pieces.append(piece)
        rows.append(torch.cat(pieces, 1))
        rows_after.append(mixer(more[b : b + 1], kept)[0])
    close(y, torch.cat(rows))
    close(after, torch.cat(rows_after))
    leaves = [x, *(s for s in state or () if s.requires_grad)]
    close(
        gradients(mixer, [y, after], leaves),
        gradients(mixer, [torch.cat(rows), torch.cat(rows_after)], leaves),
    )


# Not attention: infinite values times a probability of 0 are NaN in every softmax.
@pytest.mark.parametrize("name", [n for n in CAUSAL if "attention" not in n])
def test_reset_forgets_a_state_that_overflowed(name: str) -> None:
    mixer, x = build(name), inputs(1)
    state = tuple(torch.full_like(s, torch.inf) for s in memory(mixer))
    close(mixer(x, state, torch.ones(B, 1, dtype=torch.bool))[0], mixer(x)[0])


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(("steps", "t"), [(7, 0), (7, 3), (63, 61)])
@each_mixer
def test_nothing_depends_on_what_comes_later(name: str, steps: int, t: int, reset: bool) -> None:
    mixer, x = build(name), inputs(steps).requires_grad_()
    starts = torch.zeros(B, steps, dtype=torch.bool) if reset else None
    y, _ = mixer(x, None, starts)
    (gradient,) = torch.autograd.grad(y[:, : t + 1].square().sum(), x)
    assert gradient[:, t].abs().min() > 0
    assert gradient[:, t + 1 :].abs().max() == 0
    other = torch.cat([x[:, : t + 1], 100 * inputs(steps - t - 1, seed=9)], 1)
    close(mixer(other, None, starts)[0][:, : t + 1], y[:, : t + 1])


def padded(steps: int) -> tuple[Tensor, Tensor]:
    """x with garbage after each row's length."""
    lengths = torch.tensor([steps, max(1, steps // 2), 1])
    x = inputs(steps)
    x[torch.arange(steps) >= lengths[:, None]] = 1e3
    return x, lengths


@each_length
@pytest.mark.parametrize("name", [*CAUSAL, "bidirectional"])
def test_padding_changes_nothing(name: str, steps: int) -> None:
    mixer = build(name) if name in CAUSAL else Attention(D, H, causal=False).double()
    x, lengths = padded(steps)
    x.requires_grad_()
    y, _ = mixer(x, lengths=lengths)
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        close(y[b : b + 1, :length], mixer(x[b : b + 1, :length])[0])
        total = total + y[b, :length].square().sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert not gradient[torch.arange(steps) >= lengths[:, None]].any()


@each_mixer
def test_state_is_never_kept_in_the_module(name: str) -> None:
    mixer, x = build(name), inputs(7)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    first = mixer(x)[0]
    assert torch.equal(mixer(x)[0], first)
    close(dict(mixer.state_dict()), before)


@each_mixer
def test_state_holds_one_entry_a_row(name: str) -> None:
    mixer, x = build(name), inputs(7)
    _, state = mixer(x)
    assert state is not None
    assert all(s.shape[0] == B for s in state)
    rows = torch.tensor([2, 0])
    picked, _ = mixer(x[rows], tuple(s[rows] for s in state))
    close(picked, mixer(x, state)[0][rows])


@each_mixer
def test_memory_of_a_step_is_constant(name: str) -> None:
    mixer, state = build(name), None
    x, sizes = inputs(18), []
    for x_t in x.unbind(1):
        _, state = mixer.step(x_t, state)
        assert state is not None
        sizes.append(sum(s.numel() for s in state))
    assert (sizes[-1] == sizes[-2]) == (name != "attention")  # attention remembers every step, and says so
    assert (sizes[0] == sizes[-1]) == ("attention" not in name)  # that of a window remembers what there is of it


@each_mixer
def test_width_is_that_of_the_outputs(name: str) -> None:
    mixer = build(name)
    assert mixer.causal
    assert mixer(inputs(2))[0].shape == (B, 2, mixer.width)


def _lstm(x: Tensor, state: State, w: Tensor, u: Tensor, bw: Tensor, bu: Tensor) -> tuple[Tensor, State]:
    h, c = state
    i, f, g, o = (x @ w.T + bw + h @ u.T + bu).chunk(4, -1)
    c = c / (1 + (-f).exp()) + g.tanh() / (1 + (-i).exp())
    h = c.tanh() / (1 + (-o).exp())
    return h, (h, c)


def _gru(x: Tensor, state: State, w: Tensor, u: Tensor, bw: Tensor, bu: Tensor) -> tuple[Tensor, State]:
    (h,) = state
    (ri, zi, ni), (rh, zh, nh) = (x @ w.T + bw).chunk(3, -1), (h @ u.T + bu).chunk(3, -1)
    r, z = 1 / (1 + (-ri - rh).exp()), 1 / (1 + (-zi - zh).exp())
    h = (1 - z) * (ni + r * nh).tanh() + z * h
    return h, (h,)


def _elman(x: Tensor, state: State, w: Tensor, u: Tensor, bw: Tensor, bu: Tensor) -> tuple[Tensor, State]:
    h = (x @ w.T + bw + state[0] @ u.T + bu).tanh()
    return h, (h,)


def _elman_relu(x: Tensor, state: State, w: Tensor, u: Tensor, bw: Tensor, bu: Tensor) -> tuple[Tensor, State]:
    h = (x @ w.T + bw + state[0] @ u.T + bu).clamp(min=0)
    return h, (h,)


FORMULAS = {"elman": _elman, "elman_relu": _elman_relu, "lstm": _lstm, "lstm_forget_bias": _lstm, "gru": _gru}
FORMULAS |= {"gru_in_evaluation": _gru, "elman_in_evaluation": _elman}


@each_length
@pytest.mark.parametrize("name", FORMULAS)
def test_recurrences_equal_their_formulas(name: str, steps: int) -> None:
    mixer, x = build(name), inputs(steps).requires_grad_()
    weights = list(mixer.parameters())
    state = first = memory(mixer)
    rows = []
    for t in range(steps):
        row, state = FORMULAS[name](x[:, t], state, *weights)
        rows.append(row)
    y, last = mixer(x, first)
    close(y, torch.stack(rows, 1))
    close(last, state)
    leaves = [x, *first]
    close(gradients(mixer, [y, *last], leaves), gradients(mixer, [torch.stack(rows, 1), *state], leaves))
    zeros = tuple(torch.zeros_like(s) for s in first)
    close(mixer(x), mixer(x, zeros))


@pytest.mark.parametrize("causal", [True, False])
@each_length
def test_attention_equals_a_naive_softmax(causal: bool, steps: int) -> None:
    torch.manual_seed(7)
    heads, width = 4, H // 4
    mixer, x = Attention(D, H, heads, causal).double(), inputs(steps).requires_grad_()
    q, k, v = (x @ mixer.project.weight.T).chunk(3, -1)
    joined = []
    for n in range(heads):
        part = slice(n * width, (n + 1) * width)
        rotated_q = torch.stack([_turned(q[:, t, part], t) for t in range(steps)], 1)
        rotated_k = torch.stack([_turned(k[:, t, part], t) for t in range(steps)], 1)
        scores = torch.einsum("btd,bsd->bts", rotated_q, rotated_k) / width**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(steps, steps).triu(1).bool(), -torch.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        joined.append(weights @ v[..., part])
    expected = torch.cat(joined, -1) @ mixer.out.weight.T
    y, _ = mixer(x)
    close(y, expected)
    close(gradients(mixer, [y], [x]), gradients(mixer, [expected], [x]))


def _turned(x: Tensor, position: int) -> Tensor:
    """Rotary positions as products of complex numbers."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def test_rotary_products_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 10, dtype=torch.float64)

    def score(p: int, s: int) -> Tensor:
        return (rotate(q, torch.tensor([p])) * rotate(k, torch.tensor([s]))).sum()

    torch.testing.assert_close(score(5, 2), score(1005, 1002), rtol=1e-9, atol=1e-9)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3
    close(rotate(q, torch.tensor([0])), q)
    close(rotate(q, torch.tensor([63])).norm(), q.norm())


def test_rotary_angles_keep_their_digits_in_half_precision() -> None:
    x = torch.ones(1, 2)
    turned = rotate(x.bfloat16(), torch.tensor([1001]))
    torch.testing.assert_close(turned.float(), rotate(x, torch.tensor([1001])), rtol=2e-2, atol=2e-2)


def test_bidirectional_attention_is_declared_and_refuses_what_it_cannot_do() -> None:
    mixer, x = Attention(D, H, causal=False).double(), inputs(7)
    assert not mixer.causal
    y, state = mixer(x)
    assert state is None
    assert (mixer(x.index_fill(1, torch.tensor(6), 5.0))[0] - y)[:, 0].abs().max() > 1e-6  # it does look ahead
    with pytest.raises(ValueError, match=r"neither state nor reset.*causal: true"):
        mixer(x, reset=torch.zeros(B, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="neither state nor reset"):
        mixer(x, memory(build("attention")))
    with pytest.raises(ValueError, match="step by step"):
        mixer.step(x[:, 0])


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'gelu'.*'tanh' and 'relu'"):
        Elman(D, H, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"init: got 'ones', allowed are 'torch', 'orthogonal' and 'identity'"):
        Elman(D, H, init="ones")
    with pytest.raises(ValueError, match=r"hidden=40 and heads=3"):
        Attention(D, H, heads=3)
    with pytest.raises(ValueError, match=r"heads=0"):
        Attention(D, H, heads=0)


def test_initialisation_options() -> None:
    torch.manual_seed(7)
    plain = list(LSTM(D, H).parameters())
    torch.manual_seed(7)
    biased = list(LSTM(D, H, forget_bias=1.5).parameters())
    torch.manual_seed(7)
    for a, b in zip(plain, torch.nn.LSTM(D, H).parameters(), strict=True):
        assert torch.equal(a, b)
    differences = [b - a for a, b in zip(plain, biased, strict=True)]
    assert [bool(d.any()) for d in differences] == [False, False, True, False]
    expected = torch.zeros(4, H)
    expected[1] = 1.5  # the forget gate's
    torch.testing.assert_close(differences[2].view(4, H), expected)
    _, u, _, _ = Elman(D, H, init="orthogonal").double().parameters()
    torch.testing.assert_close(u @ u.T, torch.eye(H, dtype=torch.float64), rtol=0, atol=1e-5)


def test_an_elman_net_begun_as_the_identity_hands_its_state_on() -> None:
    h = torch.rand(2, 8)
    y, _ = Elman(4, 8, "relu", init="identity")(torch.zeros(2, 56, 4), (h,))
    torch.testing.assert_close(y, h[:, None].expand(2, 56, 8))


@pytest.mark.parametrize("name", ["elman", "lstm", "gru"])
def test_fused_path_equals_torch_module_bit_for_bit(name: str) -> None:
    mixer, x = build(name).float(), inputs(7).float()
    rnn = mixer.get_submodule("rnn")
    mixer.eval()
    assert torch.equal(mixer(x)[0], rnn(x)[0])
    # gradients in eval mode too (the exact Fisher)
    (gradient,) = torch.autograd.grad(mixer(x)[0].sum(), [next(mixer.parameters())])
    assert gradient.abs().sum() > 0


@each_mixer
def test_bf16_mixed_precision(name: str) -> None:
    """What `trainer.precision=bf16-mixed` does: near the full precision, and the state may be used outside of it."""
    mixer, x, late = build(name).float(), inputs(9).bfloat16(), inputs(4, seed=2).float()
    whole, _ = mixer(torch.cat([x.float(), late], 1))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)  # in bfloat16, as the layer before gives it
        slopes = torch.autograd.grad(y.float().square().sum(), list(mixer.parameters()), retain_graph=True)
    y_late, _ = mixer(late, state)
    assert all(g.isfinite().all() for g in slopes)
    for found, right in ((y, whole[:, :9]), (y_late, whole[:, 9:])):
        assert (found - right).norm() < 0.05 * right.norm()  # bf16 rounds to 0.4 %, and errors add up over layers


@each_mixer
def test_gradients_of_single_rows_side_by_side(name: str) -> None:
    """`torch.func` differentiates every mixer, as the exact Fisher of its nets needs it."""
    mixer, x = build(name), inputs(5)
    weights = {n: p.detach() for n, p in mixer.named_parameters()}
    torch.manual_seed(3)
    wanted = torch.randn_like(mixer(x)[0])

    def score(weights: dict[str, Tensor], row: Tensor, wanted: Tensor) -> Tensor:
        return (functional.call(mixer, weights, row[None])[0][0] * wanted).sum()

    found = torch.func.vmap(torch.func.grad(score), (None, 0, 0))(weights, x, wanted)
    for b in range(B):
        right = torch.autograd.grad((mixer(x[b : b + 1])[0][0] * wanted[b]).sum(), list(mixer.parameters()))
        close([found[n][b] for n in weights], list(right))


# Not those of positive states: their candidates are 1/2 where all weights are 0.
@pytest.mark.parametrize("name", [n for n in CAUSAL if "positive" not in n])
def test_functional_call_replaces_weights(name: str) -> None:
    mixer, x = build(name), inputs(7)
    zeros = {k: torch.zeros_like(p) for k, p in mixer.named_parameters()}
    assert mixer(x)[0].abs().max() > 0
    y, _ = torch.func.functional_call(mixer, zeros, (x,))
    assert y.abs().max() == 0


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_hyper_lstm_begins_as_a_normalised_lstm(scale: float) -> None:
    """At initialisation every alpha is 0.1 and every beta 0, whatever the input: an LSTM with layer normalisation of
    0.1 (W x + U h + b). (The normalisation takes out most of the factor, and its epsilon leaves a difference.)"""
    torch.manual_seed(0)
    mixer = HyperLSTM(D, H).double()
    with torch.no_grad():
        mixer.input.bias.normal_()
        mixer.scales.fill_(0.1 / 4)  # it was made in single precision
    x = scale * inputs(9)
    h = c = torch.zeros(B, H, dtype=torch.float64)
    outputs = []
    for t in range(9):
        pre = 0.1 * (x[:, t] @ mixer.input.weight.T + h @ mixer.recurrent.weight.T) + mixer.input.bias
        gates = []
        for gate in pre.split(H, -1):
            apart = gate - gate.mean(-1, keepdim=True)
            gates.append(apart / (apart.square().mean(-1, keepdim=True) + 1e-3).sqrt())
        i, j, f, o = gates
        c = (f + 1).sigmoid() * c + i.sigmoid() * j.tanh()
        apart = c - c.mean(-1, keepdim=True)
        h = o.sigmoid() * (apart / (apart.square().mean(-1, keepdim=True) + 1e-3).sqrt()).tanh()
        outputs.append(h)
    close(mixer(x)[0], torch.stack(outputs, 1))


def test_the_small_lstm_rescales_the_large_one() -> None:
    """Once trained, the same input and state of the large LSTM give another output with another small state."""
    mixer, x = build("hyper_lstm"), inputs(1)
    first = memory(mixer)
    other = (*first[:2], first[2] + 1, first[3])
    assert not torch.allclose(mixer(x, first)[0], mixer(x, other)[0])
    with pytest.raises(ValueError, match="size=0"):
        HyperLSTM(D, H, size=0)
