"""Each mixer on the nonlinear cells against its formulas, in float64; the laws of all mixers are in `test_mixers.py`.

Letters: B batch, T time, D input features, H hidden, N heads, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from learners.rows import Learns, warmed
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.hyper_lstm import HyperLSTM
from clplat.learners.mixers.lem import LEM
from clplat.learners.mixers.low_rank_lstm import LowRankLSTM
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.odyssey_lstm import OdysseyLSTM
from clplat.learners.mixers.slstm import SLSTM

B, T, D, H = 3, 9, 8, 12


LAWS: dict[str, Callable[[int, int], Mixer]] = {
    "elman": Elman,
    "elman_relu": partial(Elman, nonlinearity="relu", init="orthogonal"),
    "elman_in_evaluation": lambda d, h: Elman(d, h).eval(),  # on torch's own kernel, where training takes another one
    "lstm": partial(LSTM, forget_bias=1.0),
    "gru": GRU,
    "gru_in_evaluation": lambda d, h: GRU(d, h).eval(),
    "gru_of_the_paper": partial(GRU, reset_after=False),
    "odyssey_lstm": OdysseyLSTM,
    "odyssey_lstm_np_cifg": partial(OdysseyLSTM, peepholes=False, coupled=True),
    "odyssey_lstm_full_gate_recurrence": partial(OdysseyLSTM, full_gate_recurrence=True),
    "low_rank_lstm": lambda d, h: warmed(LowRankLSTM(d, h, rank=3)),
    "slstm": lambda d, h: warmed(SLSTM(d, h)),
    "slstm_without_conv_and_norm": lambda d, h: warmed(SLSTM(d, h, heads=2, conv=0, norm=False)),
    "lem": LEM,
    "hyper_lstm": lambda d, h: warmed(HyperLSTM(d, h, size=6)),
    "hyper_lstm_without_norms": lambda d, h: warmed(HyperLSTM(d, h, size=6, embedding=3, normalize=False)),
}
LEARNS = {
    "elman": Learns(
        0.80,
        1800,
        ("learner.net.mixer.nonlinearity=relu", "learner.net.mixer.init=identity", "optimizer.lr=0.001"),
        # As torch starts it, its gradient vanishes over the blanks; relu with U = I keeps it.
        digits=0.90,
    ),
    "gru": Learns(0.65),
    "hyper_lstm": Learns(0.70),
    "lem": Learns(0.65),
    "low_rank_lstm": Learns(0.75, 360),
    "lstm": Learns(0.75, 360),
    "odyssey_lstm": Learns(0.80, 360),
    "slstm": Learns(0.45),
}


def inputs(steps: int = T, seed: int = 1) -> Tensor:
    return torch.randn(B, steps, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(make: Callable[[], Mixer]) -> Any:
    """With every weight in use, in float64."""
    torch.manual_seed(3)
    mixer = make().double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def check(mixer: Mixer, y: Tensor, last: State, x: Tensor, state: State) -> None:
    """Outputs, final state and all gradients equal those of the formulas."""
    mine, after = mixer(x, state)
    close(mine, y)
    close(after, last)
    leaves = [x, *state, *mixer.parameters()]

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        return torch.autograd.grad(
            torch.stack([(o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs]).sum(), leaves
        )

    close(gradients([mine, *after]), gradients([y, *last]))


def states(count: int) -> State:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(B, H, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


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


FORMULAS: dict[str, tuple[Callable[[], Mixer], Callable[..., tuple[Tensor, State]]]] = {
    "elman": (lambda: Elman(D, H), _elman),
    "elman_relu": (lambda: Elman(D, H, nonlinearity="relu"), _elman_relu),
    "lstm": (lambda: LSTM(D, H), _lstm),
    "gru": (lambda: GRU(D, H), _gru),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_recurrences_equal_their_formulas(name: str, training: bool) -> None:
    make, formula = FORMULAS[name]
    mixer, x = built(make).train(training), inputs().requires_grad_()
    state = first = states(2 if name == "lstm" else 1)
    outputs = []
    for t in range(T):
        y, state = formula(x[:, t], state, *mixer.parameters())
        outputs.append(y)
    check(mixer, torch.stack(outputs, 1), state, x, first)
    close(mixer(x), mixer(x, tuple(torch.zeros_like(s) for s in first)))


ODYSSEY: dict[str, dict[str, bool]] = {
    "vanilla": {},
    "NP": {"peepholes": False},
    "CIFG": {"coupled": True},
    "NIG": {"input_gate": False},
    "NFG": {"forget_gate": False},
    "NOG": {"output_gate": False},
    "NIAF": {"input_activation": False},
    "NOAF": {"output_activation": False},
    "FGR": {"full_gate_recurrence": True},
    "no_gates": {"input_gate": False, "forget_gate": False, "output_gate": False},
}


@pytest.mark.parametrize("variant", ODYSSEY)
def test_each_odyssey_variant_equals_its_formulas(variant: str) -> None:
    flags = ODYSSEY[variant]
    mixer, x = built(lambda: OdysseyLSTM(D, H, **flags)), inputs().requires_grad_()
    # Weights of the gates that a variant has, in the order i, f, z, o.
    missing = {"NIG": "i", "NFG": "f", "CIFG": "f", "NOG": "o", "no_gates": "ifo"}.get(variant, "")
    names = [g for g in "ifzo" if g not in missing]
    w = dict(zip(names, mixer.input.weight.view(len(names), H, D), strict=True))
    b = dict(zip(names, mixer.input.bias.view(len(names), H), strict=True))
    r = dict(zip(names, mixer.recurrent, strict=True))
    gated = [g for g in names if g != "z"]
    p = dict.fromkeys(gated, torch.zeros(H, dtype=torch.float64))
    if variant not in ("NP", "no_gates"):
        p = dict(zip(gated, mixer.peepholes, strict=True))
    state = first = states(5 if variant == "FGR" else 2)
    outputs = []
    for t in range(T):
        h, c = state[:2]
        z = {g: x[:, t] @ w[g].T + h @ r[g] + b[g] for g in names}
        if variant == "FGR":
            for k, g in enumerate("ifo"):
                z[g] = z[g] + sum(state[2 + j] @ mixer.full[j, k] for j in range(3))
        i = sigmoid(z["i"] + p["i"] * c) if "i" in names else torch.ones_like(c)
        f = 1 - i if variant == "CIFG" else sigmoid(z["f"] + p["f"] * c) if "f" in names else torch.ones_like(c)
        c = f * c + i * (z["z"] if variant == "NIAF" else z["z"].tanh())
        o = sigmoid(z["o"] + p["o"] * c) if "o" in names else torch.ones_like(c)
        h = o * (c if variant == "NOAF" else c.tanh())
        state = (h, c, i, f, o) if variant == "FGR" else (h, c)
        outputs.append(h)
    check(mixer, torch.stack(outputs, 1), state, x, first)


def test_a_variant_has_no_weights_it_does_not_use() -> None:
    count = {v: sum(p.numel() for p in OdysseyLSTM(D, H, **flags).parameters()) for v, flags in ODYSSEY.items()}
    gate = H * (D + H + 1)
    assert count["vanilla"] == 4 * gate + 3 * H
    assert count["NP"] == 4 * gate
    assert count["CIFG"] == count["NIG"] == count["NFG"] == count["NOG"] == 3 * gate + 2 * H
    assert count["NIAF"] == count["NOAF"] == count["vanilla"]
    assert count["FGR"] == count["vanilla"] + 9 * H * H
    assert count["no_gates"] == gate


def test_initial_values_of_the_odyssey_lstm() -> None:
    mixer = OdysseyLSTM(50, 60, forget_bias=4.0)
    assert abs(float(mixer.recurrent.detach().std()) - 0.1) < 0.005
    assert abs(float(mixer.input.weight.detach().std()) - 0.1) < 0.005
    means = mixer.input.bias.view(4, 60).mean(1)
    torch.testing.assert_close(means, torch.tensor([0.0, 4.0, 0.0, 0.0]), rtol=0, atol=0.1)


def test_gru_of_the_paper_equals_its_formulas() -> None:
    mixer, x = built(lambda: GRU(D, H, reset_after=False)), inputs().requires_grad_()
    w, u, bw, bu = mixer.rnn.parameters()
    state = first = states(1)
    outputs = []
    for t in range(T):
        (h,) = state
        wr, wz, wn = (x[:, t] @ w.T + bw + bu).chunk(3, -1)
        ur, uz, un = u.chunk(3)
        r, z = sigmoid(wr + h @ ur.T), sigmoid(wz + h @ uz.T)
        h = (1 - z) * (wn + (r * h) @ un.T).tanh() + z * h
        state = (h,)
        outputs.append(h)
    check(mixer, torch.stack(outputs, 1), state, x, first)
    other = GRU(D, H).double()
    other.load_state_dict(mixer.state_dict())  # the same weights, another function
    assert not torch.allclose(other(x)[0], mixer(x)[0])


def test_low_rank_lstm_is_an_lstm_of_its_matrices() -> None:
    mixer, x = built(lambda: LowRankLSTM(D, H, rank=2)), inputs().requires_grad_()
    first = states(2)
    lstm = LSTM(D, H).double()
    matrices = torch.cat([mixer.left[g] @ mixer.right[g] + mixer.diagonal[g].diag() for g in range(4)])
    weights = {
        "rnn.weight_ih_l0": mixer.input.weight,
        "rnn.weight_hh_l0": matrices,
        "rnn.bias_ih_l0": mixer.input.bias,
        "rnn.bias_hh_l0": torch.zeros(4 * H, dtype=torch.float64),
    }
    y, last = torch.func.functional_call(lstm, weights, (x, first))
    check(mixer, y, last, x, first)
    plain = LowRankLSTM(D, H, rank=2, diagonal=False).double()
    assert [int(torch.linalg.matrix_rank(m)) for m in plain.matrices()] == [2] * 4


def test_initial_matrices_of_a_low_rank_lstm_have_the_scale_of_an_lstms() -> None:
    std = LowRankLSTM(4, 400, rank=8).matrices().detach().std()
    assert abs(float(std) - (3 * 400) ** -0.5) < 0.1 * (3 * 400) ** -0.5


@pytest.mark.parametrize("dt", [1.0, 0.3])
def test_lem_equals_its_formulas(dt: float) -> None:
    mixer, x = built(lambda: LEM(D, H, dt)), inputs().requires_grad_()
    v, b, w = mixer.input.weight.view(4, H, D), mixer.input.bias.view(4, H), mixer.recurrent
    state = first = states(2)
    outputs = []
    for t in range(T):
        y, z = state
        x1, x2, xz, xy = (x[:, t] @ v[k].T + b[k] for k in range(4))
        g, k = dt * sigmoid(x1 + y @ w[0]), dt * sigmoid(x2 + y @ w[1])
        z = (1 - g) * z + g * (xz + y @ w[2]).tanh()
        y = (1 - k) * y + k * (xy + z @ w[3]).tanh()
        state = (y, z)
        outputs.append(y)
    check(mixer, torch.stack(outputs, 1), state, x, first)


def _slstm(mixer: Any, x: Tensor, gates: Callable[[Tensor, Tensor], Tensor], heads: int) -> Tensor:
    """The recurrence without a stabiliser, c and n as they are; gates [B, N, 4, d] of x' and x."""
    d = H // heads
    x_conv = x
    if mixer.conv is not None:
        padded = F.pad(x.transpose(1, 2), [mixer.conv.size - 1, 0])
        x_conv = F.conv1d(padded, mixer.conv.weight[:, None], mixer.conv.bias, groups=D).transpose(1, 2)
        x_conv = x_conv * sigmoid(x_conv)
    h = c = n = torch.zeros(B, heads, d, dtype=torch.float64)
    outputs = []
    for t in range(T):
        z = gates(x_conv[:, t], x[:, t]) + mixer.bias + torch.einsum("bni,ngij->bngj", h, mixer.recurrent)
        zi, zf, zu, zo = z.unbind(2)
        c = sigmoid(zf) * c + zi.exp() * zu.tanh()
        n = sigmoid(zf) * n + zi.exp()
        h = sigmoid(zo) * c / n
        outputs.append(h)
    y = torch.stack(outputs, 1)
    if mixer.norm is not None:
        apart = y - y.mean(-1, keepdim=True)
        y = mixer.norm * apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y.flatten(2)


@pytest.mark.parametrize(("heads", "conv", "norm"), [(4, 4, True), (2, 0, False), (1, 3, True)])
@pytest.mark.parametrize("headwise", [True, False])
def test_slstm_equals_its_formulas_without_a_stabiliser(heads: int, conv: int, norm: bool, headwise: bool) -> None:
    mixer = built(lambda: SLSTM(D, H, heads, conv, headwise, norm))
    x, d = inputs().requires_grad_(), H // heads

    def gates(convolved: Tensor, plain: Tensor) -> Tensor:
        rows = []
        for k in range(heads):
            for source, weight in ((convolved, mixer.early), (plain, mixer.late)):
                for gate in range(2):
                    if headwise:
                        mine = source[:, k * D // heads : (k + 1) * D // heads]
                        rows.append(mine @ weight[k][:, gate * d : (gate + 1) * d])
                    else:
                        start = (2 * k + gate) * d
                        rows.append(source @ weight[0][:, start : start + d])
        return torch.stack(rows, 1).unflatten(1, (heads, 4))

    expected = _slstm(mixer, x, gates, heads)
    y, state = mixer(x)
    close(y, expected)
    assert len(state) == (5 if conv else 4)
    leaves = [x, *mixer.parameters()]
    close(torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves))


def test_slstm_takes_large_gates() -> None:
    mixer = built(lambda: SLSTM(D, H, conv=0))
    with torch.no_grad():
        mixer.bias[:, 0] += 2000.0  # exp of it overflows
    x = inputs().requires_grad_()
    y, _ = mixer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


def test_initial_values_of_an_slstm() -> None:
    mixer = SLSTM(200, 48, heads=3, forget_bias=(5.0, -7.0), forget_power=2.0)
    assert not mixer.recurrent.any()
    expected = torch.tensor([5 - 12 * (j / 15) ** 2 for j in range(16)])
    torch.testing.assert_close(mixer.bias[:, 1], expected.expand(3, 16))
    assert not mixer.bias[:, [0, 2, 3]].any()
    assert abs(float(mixer.early.detach().std()) - (2 / (5 * 200)) ** 0.5) < 0.002


def test_what_is_not_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nonlinearity: got 'gelu', allowed are 'tanh', 'relu'"):
        Elman(D, H, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"init: got 'ones', allowed are 'torch', 'orthogonal', 'identity'"):
        Elman(D, H, init="ones")
    with pytest.raises(ValueError, match=r"size: got 0"):
        HyperLSTM(D, H, size=0)
    with pytest.raises(ValueError, match="coupled: got true with a missing gate"):
        OdysseyLSTM(D, H, coupled=True, input_gate=False)
    with pytest.raises(ValueError, match="full_gate_recurrence: got true with a missing or coupled gate"):
        OdysseyLSTM(D, H, full_gate_recurrence=True, output_gate=False)
    with pytest.raises(ValueError, match=r"init_std: got -1"):
        OdysseyLSTM(D, H, init_std=-1.0)
    with pytest.raises(ValueError, match="rank: got 0"):
        LowRankLSTM(D, H, rank=0)
    with pytest.raises(ValueError, match="dt: got 0"):
        LEM(D, H, dt=0.0)
    with pytest.raises(ValueError, match=r"heads: got 5 with.*hidden=12.*multiple of heads"):
        SLSTM(D, H, heads=5)
    with pytest.raises(ValueError, match=r"heads: got 3 with features=8.*headwise=True"):
        SLSTM(D, H, heads=3, headwise=True)
    with pytest.raises(ValueError, match="conv: got -1"):
        SLSTM(D, H, conv=-1)
    with pytest.raises(ValueError, match=r"forget_bias: got \[1.0\]"):
        SLSTM(D, H, forget_bias=[1.0])
    for make in (LSTM, GRU, Elman, LowRankLSTM):
        with pytest.raises(ValueError, match=r"weight_drop: got 1.0"):
            make(D, H, weight_drop=1.0)


RESETTABLE: dict[str, Callable[[], Mixer]] = {
    "lstm": lambda: LSTM(D, H),
    "gru": lambda: GRU(D, H),
    "elman": lambda: Elman(D, H),
    "elman_relu": lambda: Elman(D, H, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", RESETTABLE)
def test_resets_that_never_come_change_nothing(name: str) -> None:
    """The op of the resets and torch's own kernel are one function of the same weights."""
    mixer, x = built(RESETTABLE[name]), inputs().requires_grad_()
    state = states(2 if name == "lstm" else 1)
    y, last = mixer(x, state, torch.zeros(B, T, dtype=torch.bool))
    check(mixer, y, last, x, state)


def test_an_autocast_reset_path_keeps_its_dtypes() -> None:
    mixer, x = LSTM(D, H), inputs().float()
    reset = torch.zeros(B, T, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, None, reset)
    assert y.dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in state)
    torch.testing.assert_close(y.float(), mixer(x, None, reset)[0], rtol=0, atol=0.03)


@pytest.mark.parametrize("name", [*RESETTABLE, "low_rank_lstm"])
@pytest.mark.parametrize("reset", [True, False])
def test_weight_drop_is_one_mask_of_the_recurrent_weights_a_call(name: str, reset: bool) -> None:
    make: dict[str, Callable[..., Any]] = {
        "lstm": LSTM,
        "gru": GRU,
        "elman": Elman,
        "elman_relu": lambda d, h, weight_drop: Elman(d, h, "relu", weight_drop=weight_drop),
        "low_rank_lstm": LowRankLSTM,
    }
    mixer, x = built(lambda: make[name](D, H, weight_drop=0.5)), inputs().requires_grad_()
    start = torch.zeros(B, T, dtype=torch.bool) if reset else None
    plain = built(lambda: make[name](D, H, weight_drop=0.0))
    torch.manual_seed(9)
    mask = F.dropout(torch.ones_like(mixer.matrices().flatten(0, 1) if name == "low_rank_lstm" else _u(mixer)), 0.5)
    assert 0 < (mask == 0).double().mean() < 1
    torch.manual_seed(9)
    y, _ = mixer(x, None, start)
    if name == "low_rank_lstm":
        matrices = mixer.matrices().flatten(0, 1) * mask
        weights = [mixer.input.weight, matrices, mixer.input.bias, torch.zeros_like(mixer.input.bias)]
        names = [n for n, _ in LSTM(D, H).named_parameters()]
        whole, _ = torch.func.functional_call(LSTM(D, H).double(), dict(zip(names, weights, strict=True)), (x,))
        parameters = list(mixer.parameters())
    else:
        replaced = dict(mixer.named_parameters())
        replaced["rnn.weight_hh_l0"] = _u(mixer) * mask
        whole, _ = torch.func.functional_call(plain, replaced, (x, None, start))
        parameters = [_u(mixer)]
    close(y, whole)
    (first, *_), (second, *_) = (torch.autograd.grad(o.square().sum(), [*parameters]) for o in (y, whole))
    close(first, second)
    if name != "low_rank_lstm":
        assert not first[mask == 0].any()  # what is dropped does not learn
        assert torch.equal(_u(mixer), _u(plain))  # the parameter itself stays whole
    assert not torch.equal(mixer(x, None, start)[0], y)  # another call, another mask
    mixer.eval()
    plain.eval()
    close(mixer(x, None, start), plain(x, None, start))


def _u(mixer: Any) -> nn.Parameter:
    return mixer.rnn.weight_hh_l0


def test_weight_drop_with_weights_from_outside() -> None:
    """`functional_call` replaces U before it is dropped."""
    mixer, x = LSTM(D, H, weight_drop=0.5).double(), inputs()
    zeros = {n: torch.zeros_like(p) for n, p in mixer.named_parameters()}
    assert not torch.func.functional_call(mixer, zeros, (x,))[0].any()
    doubled = {n: 2 * p if "hh" in n and "weight" in n else p for n, p in mixer.named_parameters()}
    torch.manual_seed(2)
    y, _ = torch.func.functional_call(mixer, doubled, (x,))
    with torch.no_grad():
        _u(mixer).mul_(2)
    torch.manual_seed(2)
    close(y, mixer(x)[0])


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
    mixer, x = built(FORMULAS[name][0]).float(), inputs(7).float()
    rnn = mixer.get_submodule("rnn")
    mixer.eval()
    assert torch.equal(mixer(x)[0], rnn(x)[0])
    # gradients in eval mode too (the exact Fisher)
    (gradient,) = torch.autograd.grad(mixer(x)[0].sum(), [next(mixer.parameters())])
    assert gradient.abs().sum() > 0


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
    mixer, x = built(lambda: HyperLSTM(D, H, size=6)), inputs(1)
    with torch.no_grad():
        _, first = mixer(inputs(5, seed=2))
    other = (*first[:2], first[2] + 1, first[3])
    assert not torch.allclose(mixer(x, first)[0], mixer(x, other)[0])
