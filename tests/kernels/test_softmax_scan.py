"""The running softmax mean against torch's softmax, and at the edges of what it is given."""

from __future__ import annotations

import pytest
import torch

from clplat.kernels.softmax_scan import softmax_scan


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_it_is_a_softmax_over_every_prefix(backend: str) -> None:
    torch.manual_seed(0)
    scores, values = 3 * torch.randn(1, 5, 1), torch.randn(1, 5, 1, 70)
    o, (lse, last) = softmax_scan(scores, values, backend=backend)
    for t in range(5):
        p = torch.softmax(scores[0, : t + 1, 0], 0)
        torch.testing.assert_close(o[0, t, 0], p @ values[0, : t + 1, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, scores.logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, o[:, -1])


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_score_of_minus_infinity_leaves_a_step_out(backend: str) -> None:
    scores = torch.tensor([[[-torch.inf], [0.3], [-torch.inf], [1000.0], [-1000.0]]])
    values = torch.randn(1, 5, 1, 3).requires_grad_()
    o, _ = softmax_scan(scores, values, backend=backend)
    assert o[0, 0].abs().max() == 0
    torch.testing.assert_close(o[:, 1:3], values[:, 1:2].expand(-1, 2, -1, -1))
    torch.testing.assert_close(o[:, 3:], values[:, 3:4].expand(-1, 2, -1, -1))
    (gradient,) = torch.autograd.grad(o.sum(), values)
    assert gradient.isfinite().all() and gradient[0, [0, 2]].abs().max() == 0


def test_bad_shapes_are_refused() -> None:
    scores, values = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"values has shape \[2, 2, 4, 5\], it must be \[B=2, T=3, N=4, d\]"):
        softmax_scan(scores, values[:, :2])
    with pytest.raises(ValueError, match="no time step"):
        softmax_scan(scores[:, :0], values[:, :0])
    with pytest.raises(ValueError, match=r"reset has shape \[2, 4\], it must be \[B, T\]=\[2, 3\]"):
        softmax_scan(scores, values, None, torch.ones(2, 4))
    with pytest.raises(ValueError, match="got 1 tensors as initial state, it takes 2"):
        softmax_scan(scores, values, (scores[:, 0],))
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        softmax_scan(scores.long(), values)
