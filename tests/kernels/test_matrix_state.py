"""Matrix states beyond the laws of every op: strong decays, overflowed states, chunk sizes, bad input, known forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clplat.kernels.delta import delta_rule, titans
from clplat.kernels.matrix_state import matrix_state, mlstm

B, T, N, K, V = 2, 37, 2, 5, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, T, N, K), torch.nn.functional.normalize(normal(B, T, N, K), dim=-1), normal(B, T, N, V)


def rate() -> Tensor:
    return torch.rand(B, T, N, dtype=torch.float64)


OPS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]], int]] = {
    "matrix_state": (matrix_state, lambda: (*qkv(), -rate()), 1),
    "vector": (matrix_state, lambda: (*qkv(), -torch.rand(B, T, N, K, dtype=torch.float64)), 1),
    "delta_rule": (delta_rule, lambda: (*qkv(), rate(), -rate()), 1),
    "titans": (titans, lambda: (*qkv(), rate(), rate(), rate()), 2),
}
each = pytest.mark.parametrize("name", OPS)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@each
def test_an_overflowed_state_does_not_outlive_a_reset(name: str, backend: str) -> None:
    op, inputs, count = OPS[name]
    args = inputs()
    for x in args:
        x.requires_grad_()
    state = tuple(torch.full((B, N, K, V), torch.inf, dtype=torch.float64) for _ in range(count))
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 0] = True
    o, last = op(*args, state, reset, backend=backend)
    fresh, _ = op(*args, backend="reference")
    assert torch.allclose(o, fresh, atol=1e-12)
    assert all(s.isfinite().all() for s in last)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), args))


@pytest.mark.parametrize("wide", [1, K])
def test_gradients_of_strong_decays_keep_their_digits(wide: int) -> None:
    """Every single gate gradient, down to 1e-26, in float32: nothing is a difference of larger numbers."""
    q, k, v = (x.abs() for x in qkv())
    gate = -60.0 * torch.rand(B, T, N, wide, dtype=torch.float64)
    gate = gate if wide > 1 else gate[..., 0]
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        leaf = gate.to(dtype).requires_grad_()
        o, _ = matrix_state(q.to(dtype), k.to(dtype), v.to(dtype), leaf, backend=backend)
        found.append(torch.autograd.grad(o.sum(), leaf)[0].double())
    assert ((found[1] - found[0]).abs() <= 2e-5 * found[0] + 1e-37).all()


@each
def test_the_size_of_chunks_changes_nothing(name: str) -> None:
    op, inputs, _ = OPS[name]
    args = inputs()
    whole, last = op(*args, chunk=64)
    for chunk in (1, 2, 8):
        o, s = op(*args, chunk=chunk)
        assert torch.allclose(o, whole, atol=1e-11)
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(s, last, strict=True))


def test_no_gate_is_causal_linear_attention() -> None:
    q, k, v = qkv()
    o, _ = matrix_state(q, k, v)
    scores = torch.einsum("bink,bjnk->bnij", q, k).tril()
    assert torch.allclose(o, torch.einsum("bnij,bjnv->binv", scores, v), atol=1e-12)


def test_mlstm_is_the_unstabilised_recurrence() -> None:
    """h = C^T q / max(|n.q|, 1) with exp and sigmoid gates, no stabiliser: xLSTM's equations as they stand."""
    (q, k, v), i, f = qkv(), normal(B, T, N), normal(B, T, N)
    h, (c, n, m) = mlstm(q, k, v, i, f)
    big, total, rows = torch.zeros(B, N, K, V, dtype=torch.float64), torch.zeros(B, N, K, dtype=torch.float64), []
    for t in range(T):
        enter, forget = i[:, t].exp(), f[:, t].sigmoid()
        big = forget[..., None, None] * big + enter[..., None, None] * torch.einsum("bnk,bnv->bnkv", k[:, t], v[:, t])
        total = forget[..., None] * total + enter[..., None] * k[:, t]
        weight = (total * q[:, t]).sum(-1).abs().clamp(min=1.0)
        rows.append(torch.einsum("bnkv,bnk->bnv", big, q[:, t]) / weight[..., None])
    assert torch.allclose(h, torch.stack(rows, 1), atol=1e-12)
    assert torch.allclose(c * m.exp()[..., None, None], big)
    assert torch.allclose(n * m.exp()[..., None], total)


@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_mlstm_is_finite_at_any_input_gate(level: float) -> None:
    (q, k, v), i, f = (x.float() for x in qkv()), torch.full((B, T, N), level, requires_grad=True), torch.zeros(B, T, N)
    h, _ = mlstm(q, k, v, i, f)
    assert h.isfinite().all()
    assert torch.autograd.grad(h.sum(), i)[0].isfinite().all()


def test_titans_without_momentum_is_the_gated_delta_rule_that_asks_before_it_forgets() -> None:
    q, k, v = qkv()
    theta, zero = rate(), torch.zeros(B, T, N, dtype=torch.float64)
    o, (m, _) = titans(q, k, v, zero, zero, theta)
    expected, (s,) = delta_rule(q, k, v, theta)
    assert torch.allclose(o, expected, atol=1e-12)
    assert torch.allclose(m, s, atol=1e-12)


def test_gradients_at_the_ends_of_the_rates_of_titans() -> None:
    """alpha = 1 and eta = 0 are in range: decays of 0 have gradients, too."""
    one, zero = torch.ones(B, T, N, dtype=torch.float64), torch.zeros(B, T, N, dtype=torch.float64)
    args = (*qkv(), one, zero, rate())
    for x in args:
        x.requires_grad_()
    found = [torch.autograd.grad(titans(*args, backend=b)[0].sum(), args) for b in ("reference", "cpu")]
    assert all(torch.allclose(a, e, atol=1e-10) for e, a in zip(*found, strict=True))


def test_bad_input_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"matrix_state: gate has shape \[2, 36, 2\], it must be \[B=2, T=37, N=2\]"):
        matrix_state(q, k, v, rate()[:, 1:])
    with pytest.raises(ValueError, match=r"k has shape \[2, 37, 2, 4\], it must be \[B=2, T=37, N=2, K=5\]"):
        matrix_state(q, k[..., 1:], v)
    with pytest.raises(ValueError, match="chunk=48"):
        matrix_state(q, k, v, chunk=48)
    with pytest.raises(ValueError, match=r"bonus has shape \[2\], it must be \[N=2, K=5\]"):
        matrix_state(q, k, v, bonus=normal(N))
    with pytest.raises(ValueError, match=r"delta_rule: reset has shape \[2\], it must be \[B, T\]=\[2, 37\]"):
        delta_rule(q, k, v, rate(), reset=torch.ones(B, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"beta has shape \[2, 37, 2, 1\]"):
        delta_rule(q, k, v, rate()[..., None])
    with pytest.raises(ValueError, match=r"got 1 tensors as initial state, it takes 2: \(M, S\)"):
        titans(q, k, v, rate(), rate(), rate(), (normal(B, N, K, V),))
    with pytest.raises(ValueError, match=r"mlstm: input_gate has shape \[1, 37, 2\]"):
        mlstm(q, k, v, rate()[:1], rate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_titans_corrects_by_a_memory_that_the_step_forgets(dtype: torch.dtype) -> None:
    """alpha = 1 and eta = 0 forget M and S, but the step's correction asks the memory before it."""
    k = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, 12, 1, 2)
    one = torch.ones(1, 12, 1, dtype=dtype)
    m = torch.tensor([[3.0, 5.0], [0.0, 0.0]], dtype=dtype).view(1, 1, 2, 2).requires_grad_()
    state = (m, torch.zeros_like(m))
    chunked, loop = (titans(k, k, 0 * k, one, 0 * one, one, state, backend=b)[0] for b in ("cpu", "reference"))
    assert loop[0, -1].tolist() == [[3.0, 5.0]]  # written anew with the opposite sign at every step
    torch.testing.assert_close(chunked, loop)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), m)[0] for o in (chunked, loop)))


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_titans_with_strong_gates_over_many_chunks(scale: float) -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 300, 2, 8, generator=g, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    a, b, c = (torch.sigmoid(scale * torch.randn(1, 300, 2, generator=g, dtype=torch.float64)) for _ in range(3))
    exact = titans(q, k, v, a, b, c, backend="reference")[0]
    q, k, v, a, b, c = (x.float() for x in (q, k, v, a, b, c))
    single = titans(q, k, v, a, b, c, backend="cpu")[0]
    assert (single.double() - exact).norm() < 1e-5 * exact.norm()


def test_an_overflowed_state_that_is_forgotten_has_no_gradient_with_a_bonus() -> None:
    q = torch.randn(1, 3, 1, 2, requires_grad=True)
    state, reset = (torch.full((1, 1, 2, 2), torch.inf),), torch.tensor([[True, False, False]])
    o, _ = matrix_state(q, q, q, None, state, reset, bonus=torch.ones(1, 2))
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


def test_mlstm_brings_its_initial_state_to_the_dtype_of_states() -> None:
    q, gate = torch.randn(1, 3, 1, 2), torch.randn(1, 3, 1)
    _, state = mlstm(q, q, q, gate, gate)
    _, last = mlstm(q, q, q, gate, gate, tuple(s.bfloat16() for s in state))
    assert [s.dtype for s in last] == [torch.float32] * 3
