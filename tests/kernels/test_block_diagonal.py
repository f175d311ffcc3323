"""The recurrence with a block-diagonal transition against one dense matrix a step."""

from __future__ import annotations

import pytest
import torch

from clplat.kernels.block_diagonal import block_scan


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_it_is_a_product_of_dense_matrices(backend: str, size: int) -> None:
    torch.manual_seed(0)
    a, u, h = torch.randn(1, 3, 4, size, size), torch.randn(1, 3, 4, size), torch.randn(1, 4, size)
    y, (last,) = block_scan(a, u, (h,), backend=backend)
    state = h.flatten()
    for t in range(3):
        state = torch.block_diag(*a[0, t]) @ state + u[0, t].flatten()
        torch.testing.assert_close(y[0, t].flatten(), state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, y[:, -1])


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="got blocks of 9, allowed is 1"):
        block_scan(torch.zeros(1, 1, 1, 9, 9), torch.zeros(1, 1, 1, 9))
    with pytest.raises(ValueError, match="square blocks"):
        block_scan(torch.zeros(1, 1, 1, 2, 3), torch.zeros(1, 1, 1, 2))
