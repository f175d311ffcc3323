"""Mamba's selective scan: its sum over the past, steps of size 0, fresh starts, and every block of its kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from clplat.kernels.selective import selective_scan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each back end, with new tensors where it runs."""
    with DEVICE if request.param == "triton" else torch.device("cpu"):
        yield request.param


def test_it_is_a_sum_over_the_past(backend: str) -> None:
    torch.manual_seed(0)
    x, dt, b, c = torch.randn(1, 4, 35), torch.rand(1, 4, 35), torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    a, skip = -torch.rand(35, 2), torch.randn(35)
    y, (h,) = selective_scan(x, dt, b, c, a, skip, backend=backend)
    elapsed, state = dt.cumsum(1), torch.zeros(35, 2)
    for t in range(4):
        between = (elapsed[0, t] - elapsed[0, : t + 1])[..., None] * a
        state = (torch.exp(between) * (dt * x)[0, : t + 1, :, None] * b[0, : t + 1, None]).sum(0)
        torch.testing.assert_close(y[0, t], state @ c[0, t] + skip * x[0, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h[0], state, rtol=1e-4, atol=1e-5)


def test_a_step_of_size_zero_changes_no_state(backend: str) -> None:
    x, b, h = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    _, (last,) = selective_scan(x, torch.zeros(2, 3, 4), b, b, -torch.rand(4, 5), torch.ones(4), (h,), backend=backend)
    torch.testing.assert_close(last, h)


@pytest.mark.parametrize(
    ("states", "width", "reverse"),
    [
        (17, 9, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, 65, False), (1, 65, True), (17, 9, False), (300, 2, False), (300, 2, True))
        ),
    ],
)
def test_triton_at_every_block_of_channels(states: int, width: int, reverse: bool) -> None:
    """Several programs a row, the last one not full, and sums over all of them."""
    torch.manual_seed(states)
    shapes = (2, 3, width), (2, 3, width), (2, 3, states), (2, 3, states), (width, states), (width,), (2, width, states)
    x, dt, b, c, a, skip, h = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    dt, a, reset = dt.abs(), -a.abs(), torch.tensor([[0, 0, 0], [0, 1, 0]])
    exact = [z.requires_grad_() for z in (x, dt, b, c, a, skip, h)]
    single = [z.detach().to(DEVICE, torch.float32).requires_grad_() for z in exact]
    found = []
    for leaves, backend in ((exact, "reference"), (single, "triton")):
        x, dt, b, c, a, skip, h = leaves
        y, (last,) = selective_scan(x, dt, b, c, a, skip, (h,), reset.to(h.device), reverse=reverse, backend=backend)
        loss = (y * torch.arange(3, device=y.device)[:, None]).sum() + (last**2).sum()
        found.append((y, last, *torch.autograd.grad(loss, leaves)))
    for expected, actual in zip(*found, strict=True):
        expected, actual = expected.detach(), actual.detach().double().cpu()
        assert (actual - expected).norm() <= 5e-6 * expected.norm()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, at the step that overflows
def test_an_overflowed_state_does_not_leak_past_a_fresh_start(backend: str) -> None:
    x, b, a = torch.ones(1, 3, 2), torch.ones(1, 3, 2), -torch.ones(2, 2)
    x[0, 0] = torch.inf
    x.requires_grad_()
    y, (last,) = selective_scan(
        x, torch.ones(1, 3, 2), b, b, a, torch.zeros(2), reset=torch.tensor([[0, 1, 0]]), backend=backend
    )
    (dx,) = torch.autograd.grad(y[:, 1:].sum() + last.sum(), x)
    assert last.isfinite().all()
    assert y[:, 1:].isfinite().all()
    torch.testing.assert_close(dx[:, 1], torch.full((1, 2), 2 + 4 * math.exp(-1)))


def test_bad_arguments_are_refused() -> None:
    x, b = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"a has shape \[4, 6\], it must be \[D=4, S=5\]"):
        selective_scan(x, x, b, b, torch.zeros(4, 6), torch.zeros(4))
