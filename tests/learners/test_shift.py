"""Causal convolution and token shift against loops over single steps.

Letters: B batch, T time, D features, S steps that a convolution sees.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from clplat.learners.mixers.shift import CausalConv, shifted

B, D = 3, 5


def sequence(steps: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, steps, D, dtype=torch.float64)


def starts(steps: int) -> Tensor:
    torch.manual_seed(9)
    reset = torch.rand(B, steps) < 0.3
    reset[0] = False
    reset[1, -1] = True
    return reset


def convolved(conv: CausalConv, x: Tensor) -> Tensor:
    """One sequence [T, D] that starts at its first step, one product at a time."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros(D, dtype=x.dtype) if conv.bias is None else conv.bias
        for j in range(min(conv.size, t + 1)):
            row = row + conv.weight[:, conv.size - 1 - j] * x[t - j]
        rows.append(row)
    return torch.stack(rows)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_convolution_equals_single_products(steps: int, size: int, bias: bool) -> None:
    torch.manual_seed(1)
    conv, x = CausalConv(D, size, bias).double(), sequence(steps).requires_grad_()
    y, state = conv(x)
    expected = torch.stack([convolved(conv, row) for row in x])
    close(y, expected)
    assert state.shape == (B, size - 1, D)
    leaves, scale = [x, *conv.parameters()], sequence(steps, seed=4)
    close(
        torch.autograd.grad((y * scale).sum(), leaves),
        torch.autograd.grad((expected * scale).sum(), leaves),
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("steps", "cuts"), [(2, [1]), (13, [1, 2, 5, 12]), (13, list(range(1, 13)))])
def test_convolution_cut_anywhere_equals_the_whole(steps: int, cuts: list[int], size: int) -> None:
    conv, x, reset = CausalConv(D, size).double(), sequence(steps).requires_grad_(), starts(steps)
    for given in (None, reset):
        y, last = conv(x, None, given)
        pieces, state = [], None
        for start, end in itertools.pairwise([0, *cuts, steps]):
            piece, state = conv(x[:, start:end], state, None if given is None else given[:, start:end])
            pieces.append(piece)
        close(torch.cat(pieces, 1), y)
        close(state, last)
        scale = sequence(steps, seed=4)
        (one,) = torch.autograd.grad((torch.cat(pieces, 1) * scale).sum(), x)
        (other,) = torch.autograd.grad((y * scale).sum(), x)
        close(one, other)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_a_reset_starts_the_convolution_afresh(steps: int, size: int) -> None:
    conv, x, reset = CausalConv(D, size).double(), sequence(steps), starts(steps)
    earlier = sequence(size - 1, seed=3)
    y, last = conv(x, earlier, reset)
    for b in range(B):
        edges = sorted({0, *reset[b].nonzero().flatten().tolist(), steps})
        for start, end in itertools.pairwise(edges):
            past = earlier[b] if start == 0 and not reset[b, 0] else earlier[b, :0]
            close(y[b, start:end], convolved(conv, torch.cat([past, x[b, start:end]]))[len(past) :])
        kept = x[b] if reset[b].any() else torch.cat([earlier[b], x[b]])
        kept = kept[-(steps - edges[-2]) :] if reset[b].any() else kept
        padded = torch.cat([torch.zeros(size - 1, D, dtype=x.dtype), kept])
        close(last[b], padded[len(padded) - (size - 1) :])


def test_convolution_forgets_what_overflowed() -> None:
    conv, x = CausalConv(D).double(), sequence(3).requires_grad_()
    state = torch.full((B, 3, D), torch.inf, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[True, False, False]]).expand(B, -1)
    y, last = conv(x, state, reset)
    close(y, conv(x)[0])
    close(last, x)
    found = torch.autograd.grad(y.sum() + last.sum(), [x, state, *conv.parameters()])
    assert all(g.isfinite().all() for g in found)
    assert not found[1].any()


def test_convolution_options() -> None:
    torch.manual_seed(0)
    conv = CausalConv(200, 16)
    assert conv.bias is not None
    for p in (conv.weight, conv.bias):
        assert 0.2 < p.abs().max() <= 0.25
    assert CausalConv(4, bias=False).bias is None
    y, state = conv.bfloat16()(torch.ones(1, 2, 200, dtype=torch.bfloat16), torch.zeros(1, 15, 200))
    assert y.dtype == state.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"width: got 0"):
        CausalConv(0)
    with pytest.raises(ValueError, match=r"size: got 0"):
        CausalConv(3, 0)


def test_token_shift_looks_one_step_back() -> None:
    x, before = sequence(13).requires_grad_(), sequence(1, seed=3)[:, 0].requires_grad_()
    reset = starts(13)
    previous, last = shifted(x, before, reset)
    for b in range(B):
        for t in range(13):
            expected = before[b] if t == 0 else x[b, t - 1]
            close(previous[b, t], torch.zeros_like(expected) if reset[b, t] else expected)
    close(last, x[:, -1])
    fresh, _ = shifted(x)
    close(fresh[:, 0], torch.zeros_like(before))
    close(fresh[:, 1:], x[:, :-1])
    x_grad, before_grad = torch.autograd.grad(previous.sum(), [x, before])
    close(before_grad, (~reset[:, 0]).double()[:, None].expand(-1, D))
    close(x_grad[:, :-1], (~reset[:, 1:]).double()[..., None].expand(-1, -1, D))
    assert not x_grad[:, -1].any()


def test_token_shift_forgets_what_overflowed_and_goes_step_by_step() -> None:
    x = sequence(4)
    infinite = torch.full((B, D), torch.inf, dtype=torch.float64)
    previous, _ = shifted(x, infinite, torch.tensor([[True, False, False, False]]).expand(B, -1))
    close(previous, shifted(x)[0])
    last, rows = None, []
    for t in range(4):
        row, last = shifted(x[:, t : t + 1], last)
        rows.append(row)
    close(torch.cat(rows, 1), previous)
