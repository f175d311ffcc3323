"""RWKV-4's time mixing against its sum, and with keys of any size; numba's exponential."""

from __future__ import annotations

import pytest
import torch

from clplat.kernels.wkv import wkv


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_it_is_a_sum_over_the_past(backend: str) -> None:
    torch.manual_seed(0)
    k, v, decay, bonus = torch.randn(1, 3, 33), torch.randn(1, 3, 33), torch.rand(33), torch.randn(33)
    y, (num, den, top) = wkv(k, v, decay, bonus, backend=backend)
    for t in range(3):
        past = torch.exp(k[0, :t] - torch.arange(t - 1, -1, -1)[:, None] * decay)
        now = torch.exp(bonus + k[0, t])
        expected = ((past * v[0, :t]).sum(0) + now * v[0, t]) / (past.sum(0) + now)
        torch.testing.assert_close(y[0, t], expected, rtol=1e-5, atol=1e-6)
    weights = torch.exp(k[0] - torch.tensor([2.0, 1.0, 0.0])[:, None] * decay)
    torch.testing.assert_close((den * top.exp())[0], weights.sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((num * top.exp())[0], (weights * v[0]).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_keys_of_any_size_do_not_overflow(backend: str) -> None:
    k = torch.tensor([[[500.0], [-500.0], [0.0]]])
    v = torch.tensor([[[1.0], [2.0], [3.0]]]).requires_grad_()
    y, _ = wkv(k, v, torch.tensor([0.1]), torch.tensor([0.0]), backend=backend)
    torch.testing.assert_close(y, torch.ones_like(y))
    (gradient,) = torch.autograd.grad(y.sum(), v)
    torch.testing.assert_close(gradient, torch.tensor([[[3.0], [0.0], [0.0]]]))


def test_bad_shapes_are_refused() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"decay has shape \[3\], it must be \[D=4\]"):
        wkv(x, x, torch.zeros(3), torch.zeros(4))
