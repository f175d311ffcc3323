"""The diagonal recurrence beyond the laws that all kernels obey: formulas, numbers at the edge, tiles and chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clplat.kernels import diagonal
from clplat.kernels.backend import State

B, T, D = 2, 9, 5
OPS: dict[str, tuple[Callable[..., tuple[Tensor, State]], int, int]] = {
    "scan": (diagonal.scan, 2, 0),
    "constant_scan": (diagonal.constant_scan, 1, 1),
    "min_gru": (diagonal.min_gru, 2, 0),
    "min_lstm": (diagonal.min_lstm, 3, 0),
    "rg_lru": (diagonal.rg_lru, 3, 1),
    "hgrn": (diagonal.hgrn, 2, 1),
}
each_op = pytest.mark.parametrize("name", OPS)
each_backend = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
# The law that they equal the reference is in test_kernels.py; in float64 numba compiles them anew.
each_definition = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def one_step(name: str, before: float | None, x: list[float], w: float) -> float:
    """The papers' equations, one number at a time; `before` None at a sequence's first step."""
    h = 0.0 if before is None else before
    if name == "scan":
        return x[0] * h + x[1]
    if name == "constant_scan":
        return w * h + x[0]
    if name == "min_gru":
        z = sigmoid(x[0])
        return (1 - z) * h + z * x[1]
    if name == "min_lstm":
        f, i = sigmoid(x[0]), sigmoid(x[1])
        return f / (f + i) * h + i / (f + i) * x[2]
    if name == "rg_lru":
        a = sigmoid(-w) ** (8 * sigmoid(x[0]))
        root = 1.0 if before is None else math.sqrt(1 - a * a)
        return a * h + root * sigmoid(x[1]) * x[2]
    f = w + (1 - w) * sigmoid(x[0])
    return f * h + (1 - f) * x[1] * sigmoid(x[1])


def drawn(name: str, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    _, inputs, weights = OPS[name]
    made = [scale * torch.randn(B, T, D, dtype=dtype) for _ in range(inputs)]
    return made + [torch.rand(D, dtype=dtype)] * weights


@each_definition
@each_op
def test_equals_the_equations_of_the_papers(name: str, backend: str) -> None:
    op, inputs, weights = OPS[name]
    given, state = drawn(name), torch.randn(B, D, dtype=torch.float64)
    reset = torch.rand(B, T) <= 0.3
    h, (last,) = op(*given, (state,), reset, backend=backend)
    for b in range(B):
        for d in range(D):
            before: float | None = state[b, d].item()
            for t in range(T):
                x = [g[b, t, d].item() for g in given[:inputs]]
                w = given[-1][d].item() if weights else 0.0
                before = one_step(name, None if reset[b, t] else before, x, w)
                assert h[b, t, d].item() == pytest.approx(before, rel=1e-12, abs=1e-13)
            assert last[b, d].item() == h[b, -1, d].item()


@each_backend
@each_op
def test_an_overflowed_state_does_not_pass_a_reset(name: str, backend: str) -> None:
    op = OPS[name][0]
    given = [g.requires_grad_() for g in drawn(name, torch.float32)]
    state = torch.full((B, D), math.inf)
    reset = torch.zeros(B, T)
    reset[:, 3] = 1
    h, (last,) = op(*given, (state,), reset, backend=backend)
    fresh, _ = op(*(g[:, 3:] if g.ndim == 3 else g for g in given), backend=backend)
    assert not h[:, :3].isfinite().any()
    torch.testing.assert_close(h[:, 3:], fresh)
    for g in torch.autograd.grad(h[:, 3:].sum() + last.sum(), [g for g in given if g.ndim == 3]):
        assert g[:, 3:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
@each_op
def test_saturated_gates_give_finite_values_and_gradients(name: str, backend: str) -> None:
    op, inputs, _ = OPS[name]
    given = drawn(name, torch.float32)
    if inputs > 1 and name != "scan":
        given[: inputs - 1] = [(100 * g.sign()).requires_grad_() for g in given[: inputs - 1]]
    given = [g.detach().requires_grad_() for g in given]
    h, (last,) = op(*given, (torch.randn(B, D),), backend=backend)
    found = torch.autograd.grad(h.square().sum() + last.sum(), given)
    assert all(x.isfinite().all() for x in (h, last, *found))
    double, _ = op(*(g.detach().double() for g in given), (torch.zeros(B, D),), backend="reference")
    single, _ = op(*(g.detach() for g in given), (torch.zeros(B, D),), backend=backend)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_nan_is_not_swallowed_by_a_gate(backend: str) -> None:
    gate = torch.zeros(1, 4, 40)
    gate[0, 1, 7] = math.nan
    h, _ = diagonal.min_gru(gate, torch.ones(1, 4, 40), backend=backend)
    assert h[0, 1:, 7].isnan().all()
    assert h.isnan().sum() == 3


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_rg_lru_keeps_its_digits_where_nothing_decays(backend: str) -> None:
    """1 - a^2 = 2e-6 here: squared in float32 it would have one digit."""
    r, i, x = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 50.0), torch.ones(1, 2, 3)
    decay = torch.full((3,), math.log(math.expm1(1e-6 / 4)))
    h, _ = diagonal.rg_lru(r, i, x, decay, (torch.zeros(1, 3),), backend=backend)
    torch.testing.assert_close(h[:, 0], torch.full((1, 3), math.sqrt(-math.expm1(-2e-6))), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_the_square_root_of_rg_lru_has_a_bounded_slope(backend: str) -> None:
    """At a = 1 the derivative by log a is -2 a^2 times the limit, times the input; at most, not infinite."""
    r = torch.full((1, 1, 1), -100.0, dtype=torch.float32)
    decay = torch.zeros(1, requires_grad=True)
    one = torch.ones(1, 1, 1)
    r = torch.full((1, 1, 1), -20.0, requires_grad=True)
    h, _ = diagonal.rg_lru(r, 50 * one, one, decay, (torch.zeros(1, 1),), backend=backend)
    (found,) = torch.autograd.grad(h.sum(), r)
    gate = sigmoid(-20.0)
    log_a = -8 * gate * math.log(2)
    slope = min(0.5 / math.sqrt(-math.expm1(2 * log_a)), diagonal.SQRT_SLOPE_LIMIT)
    assert slope == diagonal.SQRT_SLOPE_LIMIT
    assert found.item() == pytest.approx(slope * -2 * log_a, rel=1e-4)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "reverse"),
    [
        pytest.param(name, reverse, marks=[] if (name, reverse) == ("rg_lru", True) else pytest.mark.slow)
        for name in OPS
        for reverse in (False, True)
    ],
)
def test_chunks_of_time_equal_one_walk(name: str, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's two passes, taken where there are few channels, against its single one; several tiles a chunk too."""
    from clplat.kernels import diagonal_triton

    op, inputs, weights = OPS[name]
    reset = torch.rand(1, 50) <= 0.1
    leaves = [torch.randn(1, 50, 3).requires_grad_() for _ in range(inputs)]
    leaves += [torch.rand(3).requires_grad_()] * weights + [torch.randn(1, 3).requires_grad_()]
    results = []
    monkeypatch.setattr(diagonal_triton, "STEPS", 8)
    for saturating, chunks in ((0, (1, 56)), (1 << 40, (3, 24))):
        monkeypatch.setattr(diagonal_triton, "SATURATING", saturating)
        assert diagonal_triton.chunks(1, 50, 3) == chunks
        h, (last,) = op(*leaves[:-1], (leaves[-1],), reset, reverse=reverse, backend="triton")
        found = torch.autograd.grad((h * torch.arange(50.0)[:, None]).sum() + last.sum(), leaves)
        results.append([h, last, *found])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_how_time_is_cut_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from clplat.kernels import diagonal_triton
    from clplat.kernels.diagonal_triton import chunks

    monkeypatch.setattr(diagonal_triton, "STEPS", 32)
    assert chunks(8, 4096, 2048) == (1, 4096)  # enough channels for one pass
    assert chunks(1, 31, 8) == (1, 32)
    for b, t, d in ((1, 4096, 64), (2, 5000, 100), (1, 65, 1)):
        count, length = chunks(b, t, d)
        assert count > 1 or t < 2 * length
        assert length % 32 == 0
        assert (count - 1) * length < t <= count * length


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_slabs_do_not_change_the_result(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from clplat.kernels import diagonal_cpu

    monkeypatch.setattr(diagonal_cpu, "SERIAL_BELOW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("scan", "rg_lru"):
        op, inputs, weights = OPS[name]
        leaves = [torch.randn(2, 5, 70).requires_grad_() for _ in range(inputs)]
        leaves += [torch.rand(70).requires_grad_()] * weights
        results = []
        for backend in ("cpu", "reference"):
            h, _ = op(*leaves, backend=backend)
            results.append([h, *torch.autograd.grad(h.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_op
def test_inputs_of_mixed_precision_meet_in_the_wider(name: str) -> None:
    op, inputs, _ = OPS[name]
    given = drawn(name, torch.float32)
    given[0] = given[0].bfloat16()
    h, (last,) = op(*given)
    assert h.dtype == (torch.float32 if inputs > 1 else torch.bfloat16)
    assert last.dtype == torch.float32


def test_what_does_not_fit_is_refused_with_what_to_do() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"min_gru: candidate has shape \[2, 3, 1\], it must be \[B=2, T=3, D=4\]"):
        diagonal.min_gru(x, x[..., :1])
    with pytest.raises(ValueError, match=r"scan: a has shape \[2, 4\], it must be \[B, T, D\]"):
        diagonal.scan(x[:, 0], x)
    with pytest.raises(ValueError, match="no time step"):
        diagonal.scan(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"hgrn: lower_bound has shape \[3\], it must be \[D=4\]"):
        diagonal.hgrn(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"h of the initial state has shape \[2, 3\], it must be \[2, 4\]"):
        diagonal.scan(x, x, (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match=r"reset has shape \[2\], it must be \[B, T\]=\[2, 3\]"):
        diagonal.scan(x, x, reset=torch.zeros(2))
    with pytest.raises(ValueError, match="make both real or both complex"):
        diagonal.scan(x, x + 0j)
    with pytest.raises(ValueError, match="give b as complex numbers"):
        diagonal.constant_scan(x, torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex64, it must be a real floating-point one"):
        diagonal.min_gru(x + 0j, x + 0j)
    with pytest.raises(ValueError, match=r"int64, it must be a floating-point one"):
        diagonal.scan(x.long(), x.long())
    with pytest.raises(ValueError, match="c=0"):
        diagonal.rg_lru(x, x, x, torch.zeros(4), c=0)
    with pytest.raises(ValueError, match="computes in float32"):
        diagonal.scan(x.double(), x.double(), backend="triton")


def test_the_second_derivative_of_the_reference() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    decay = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *x: diagonal.rg_lru(*x, backend="reference")[0],
        (*inputs, decay),
    )
