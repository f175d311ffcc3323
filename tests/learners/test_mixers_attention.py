"""Attention and sliding-window attention against a naive softmax; the laws of all mixers are in `test_mixers.py`.

Letters: B batch, T time, D input features, H hidden, N heads, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from learners.rows import Learns
from torch import Tensor

from clplat.learners.mixers.attention import Attention, rotate
from clplat.learners.mixers.local_attention import LocalAttention
from clplat.learners.mixers.mixer import Mixer

B, D, H = 3, 7, 16

LAWS: dict[str, Callable[[int, int], Mixer]] = {
    "attention": Attention,
    "local_attention": partial(LocalAttention, window=5),
    "local_attention_wide": partial(LocalAttention, window=16, key_heads=2),
}
AHEAD: dict[str, Callable[[int, int], Mixer]] = {"attention_both_ways": partial(Attention, causal=False)}
LEARNS = {"transformer": Learns(0.40), "local_attention": Learns(0.40)}


def inputs(steps: int, seed: int = 1, width: int = D) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, steps, width, dtype=torch.float64)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("steps", [1, 20])
def test_attention_equals_a_naive_softmax(causal: bool, steps: int) -> None:
    torch.manual_seed(7)
    heads, width, time = 4, H // 4, torch.arange(steps)
    mixer, x = Attention(D, H, heads, causal).double(), inputs(steps).requires_grad_()
    q, k, v = (x @ mixer.project.weight.T).chunk(3, -1)
    joined = []
    for n in range(heads):
        part = slice(n * width, (n + 1) * width)
        scores = _turned(q[..., part], time) @ _turned(k[..., part], time).mT / width**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(steps, steps).triu(1).bool(), -torch.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        joined.append(weights @ v[..., part])
    expected = torch.cat(joined, -1) @ mixer.out.weight.T
    y, _ = mixer(x)
    close(y, expected)
    same_gradients(mixer, x, y, expected)


def same_gradients(mixer: Mixer, x: Tensor, y: Tensor, expected: Tensor) -> None:
    leaves, scale = [x, *mixer.parameters()], inputs(x.shape[1], 3, y.shape[-1])
    close(torch.autograd.grad((y * scale).sum(), leaves), torch.autograd.grad((expected * scale).sum(), leaves))


def _turned(x: Tensor, position: Tensor) -> Tensor:
    """Rotary positions as products of complex numbers."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
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


@pytest.mark.parametrize(("window", "key_heads"), [(1, 1), (5, 1), (5, 4), (16, 2), (100, 1)])
@pytest.mark.parametrize("steps", [1, 7, 33])
def test_local_attention_equals_a_naive_softmax_over_its_window(steps: int, window: int, key_heads: int) -> None:
    torch.manual_seed(7)
    heads, width = 4, H // 4
    mixer = LocalAttention(D, H, heads, window, key_heads).double()
    x, time = inputs(steps).requires_grad_(), torch.arange(steps)
    age = time[:, None] - time
    q = (x @ mixer.queries.weight.T).split(width, -1)
    k, v = (x @ mixer.keys_values.weight.T).chunk(2, -1)
    joined = []
    for n in range(heads):
        part = slice(n * key_heads // heads * width, (n * key_heads // heads + 1) * width)
        scores = _turned(q[n], time) @ _turned(k[..., part], time).mT / width**0.5
        weights = scores.exp() * ((age >= 0) & (age < window))
        joined.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
    expected = torch.cat(joined, -1) @ mixer.out.weight.T
    y, state = mixer(x)
    close(y, expected)
    same_gradients(mixer, x, y, expected)
    assert state[0].shape == (B, min(steps, window - 1), key_heads, width)
    assert state[2].tolist() == [min(steps, window - 1)] * B


def test_local_attention_does_not_depend_on_where_its_positions_count_from() -> None:
    """A long sequence step by step, in which positions start from 0 in every call."""
    torch.manual_seed(7)
    mixer, x = LocalAttention(D, 8, heads=2, window=4).double(), inputs(40)
    state, rows = None, []
    for start, size in ((0, 3), (3, 1), (4, 1), (5, 20), (25, 15)):
        y, state = mixer(x[:, start : start + size], state)
        rows.append(y)
    close(torch.cat(rows, 1), mixer(x)[0])


def test_options_that_do_not_exist_are_refused() -> None:
    for match, make in {
        r"heads: got 3 with hidden=16": lambda: Attention(D, H, heads=3),
        r"heads: got 0": lambda: Attention(D, H, heads=0),
        r"heads: got 4 with hidden=12": lambda: LocalAttention(D, 12, heads=4),
        r"key_heads: got 3 with heads=2": lambda: LocalAttention(D, H, heads=2, key_heads=3),
        r"window: got 0": lambda: LocalAttention(D, H, heads=2, window=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
