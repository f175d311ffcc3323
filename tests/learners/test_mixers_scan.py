"""Aaren, RWKV-4, Mamba and the block-diagonal linear RNN against their formulas, without a recurrence where there is one.

Letters: B batch, T time, D input features, H hidden, N heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from learners.rows import Learns, warmed
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.aaren import Aaren
from clplat.learners.mixers.block_lrnn import BlockLRNN
from clplat.learners.mixers.mamba import Mamba
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.mixers.rwkv4 import RWKV4

B, T, D, H = 2, 9, 5, 8

LAWS: dict[str, Callable[[int, int], Mixer]] = {
    "aaren": Aaren,
    "rwkv4": lambda d, h: warmed(RWKV4(d, h)),
    "rwkv4_deep": lambda d, h: warmed(RWKV4(d, h, depth=0.5, zero=False)),
    "mamba": Mamba,
    "mamba_small": partial(Mamba, states=3, expand=1, conv=2, rank=2),
    "block_lrnn": BlockLRNN,
    "block_lrnn_plain": partial(BlockLRNN, block=3, norm=1.0, centred=False),
}
LEARNS = {
    "aaren": Learns(0.60, 360),
    # Blocks of 4 x 4 forget less than those of 8 x 8, and cost less.
    "block_lrnn": Learns(
        0.85, 480, ("++learner.net.hidden=32", "learner.net.mixer.block=4", "optimizer.lr=0.006"), digits=0.90
    ),
    "mamba": Learns(0.65),
    "rwkv4": Learns(0.65),
}


def drawn(mixer: Mixer) -> tuple[Mixer, Tensor]:
    """In float64, with every weight moved off its initial value, and an input that takes gradients."""
    torch.manual_seed(3)
    mixer = mixer.double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer, torch.randn(B, T, D, dtype=torch.float64).requires_grad_()


def assert_equal(mixer: Mixer, x: Tensor, expected: Tensor) -> None:
    """Outputs and all gradients."""
    y, _ = mixer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    actual, wanted = (torch.autograd.grad((o * weight).sum(), leaves) for o in (y, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


def test_aaren_is_attention_of_one_query_over_every_prefix() -> None:
    mixer, x = drawn(Aaren(D, H, heads=2))
    w = dict(mixer.named_parameters())
    q = w["query.weight"] @ w["token"]
    k, v = (x @ w["project.weight"].T).chunk(2, -1)
    rows = []
    for t in range(T):
        heads = []
        for n in range(2):
            part = slice(4 * n, 4 * n + 4)
            p = torch.softmax(k[:, : t + 1, part] @ q[part] / 2, 1)
            heads.append((p[..., None] * v[:, : t + 1, part]).sum(1))
        rows.append(torch.cat(heads, -1) @ w["out.weight"].T)
    assert_equal(mixer, x, torch.stack(rows, 1))


def test_rwkv4_is_its_sum_over_the_past() -> None:
    mixer, x = drawn(RWKV4(D, H))
    w = dict(mixer.named_parameters())
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    r, k, v = (
        (w[f"mix_{m}"] * x + (1 - w[f"mix_{m}"]) * before) @ w[f"{name}.weight"].T
        for m, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    rows = []
    for t in range(T):
        age = torch.arange(t - 1, -1, -1, dtype=torch.float64)
        past = torch.exp(k[:, :t] - age[:, None] * w["decay"].exp())
        now = torch.exp(w["bonus"] + k[:, t])
        rows.append(((past * v[:, :t]).sum(1) + now * v[:, t]) / (past.sum(1) + now))
    assert_equal(mixer, x, (torch.sigmoid(r) * torch.stack(rows, 1)) @ w["out.weight"].T)


def test_rwkv4_starts_as_its_paper_says() -> None:
    mixer = RWKV4(D, H)
    assert mixer(torch.randn(B, T, D))[0].abs().max() == 0
    assert mixer.decay[0].item() == -5 and mixer.decay[-1].item() == 3
    assert mixer.bonus[:3].tolist() == pytest.approx([math.log(0.3), math.log(0.3) + 0.5, math.log(0.3) - 0.5])
    assert RWKV4(D, H, depth=1.0).mix_v.tolist() == pytest.approx([1.3] * D)
    assert RWKV4(D, H, zero=False)(torch.randn(B, T, D))[0].abs().max() > 0


def test_mamba_is_its_sum_over_the_past() -> None:
    mixer, x = drawn(Mamba(D, H, states=3, rank=2))
    assert isinstance(mixer, Mamba)
    w = dict(mixer.named_parameters())
    u, z = (x @ w["project.weight"].T).chunk(2, -1)
    padded = F.pad(u.transpose(1, 2), (3, 0))
    u = F.silu(F.conv1d(padded, w["conv.weight"][:, None], w["conv.bias"], groups=2 * H)).transpose(1, 2)
    r, b, c = (u @ w["select.weight"].T).split([2, 3, 3], -1)
    dt = torch.log1p(torch.exp(r @ w["step_size.weight"].T + w["step_size.bias"]))
    elapsed = dt.cumsum(1)
    rows = []
    for t in range(T):
        between = (elapsed[:, t : t + 1] - elapsed[:, : t + 1])[..., None] * -w["log_rate"].exp()
        h = (torch.exp(between) * (dt * u)[:, : t + 1, :, None] * b[:, : t + 1, None]).sum(1)
        rows.append((h * c[:, t, None]).sum(-1) + w["skip"] * u[:, t])
    assert_equal(mixer, x, (torch.stack(rows, 1) * F.silu(z)) @ w["out.weight"].T)


def test_mamba_starts_with_steps_in_their_range() -> None:
    torch.manual_seed(0)
    mixer = Mamba(D, 400, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(mixer.step_size.bias)
    assert 0.0019 < dt.min() < 0.0025 and 0.04 < dt.max() < 0.0501
    assert mixer.rank == 25
    torch.testing.assert_close(mixer.log_rate.exp()[7], torch.arange(1, 17).float())


@pytest.mark.parametrize(("norm", "centred"), [(1.2, True), (2.0, False)])
def test_a_block_lrnn_is_a_dense_linear_rnn(norm: float, centred: bool) -> None:
    mixer, x = drawn(BlockLRNN(D, H, block=4, norm=norm, centred=centred))
    assert isinstance(mixer, BlockLRNN)
    made = mixer.transition(x).view(B, T, 2, 4, 4)
    values = mixer.value(x)
    h, rows = torch.zeros(B, H, dtype=torch.float64), []
    for t in range(T):
        dense = []
        for row in made[:, t]:
            blocks = []
            for one in row:
                one = one - one.sum(0) / 4 if centred else one
                blocks.append(one / (one.abs() ** norm).sum(0).max() ** (1 / norm))
            dense.append(torch.block_diag(*blocks))
        h = torch.einsum("bij,bj->bi", torch.stack(dense), h) + values[:, t]
        rows.append(h)
    assert_equal(mixer, x, torch.stack(rows, 1))


def test_bad_options_are_refused() -> None:
    for make, message in (
        (lambda: Aaren(D, H, heads=3), "heads: got 3 with hidden=8"),
        (lambda: Aaren(D, H, query_std=-1.0), "query_std: got -1.0"),
        (lambda: RWKV4(D, H, depth=2.0), "depth: got 2.0"),
        (lambda: Mamba(D, H, conv=0), "conv: got 0"),
        (lambda: Mamba(D, H, dt_min=0.2), "dt_min: got 0.2"),
        (lambda: BlockLRNN(D, H, block=3), "block: got 3 with hidden=8"),
        (lambda: BlockLRNN(D, H, block=1), "block: got 1"),
        (lambda: BlockLRNN(D, H, norm=0.5), "norm: got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_all_are_modules_without_a_state() -> None:
    for mixer in (Aaren(D, H), RWKV4(D, H), Mamba(D, H), BlockLRNN(D, H)):
        assert isinstance(mixer, nn.Module) and not list(mixer.buffers())
