"""The formulas of the nonlinear cells, against torch's own modules and against the equations written out again.

That every back end equals the reference is tested in `test_kernels.py`; here also for each variant of the LSTM.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clplat.kernels.cells import elman, gru, lem, lstm, slstm

INTERPRETED = pytest.param("triton", marks=pytest.mark.slow)  # one test of each op there is quick: test_kernels.py
# Numba compiles cells for float64 in some ten seconds each; that they equal the reference is a law of test_kernels.py.
each_definition = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
B, T, N, D = 2, 6, 2, 5
FLOAT64: Any = {"dtype": torch.float64}
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "CIFG": {"coupled": True},
    "NIG": {"input_gate": False},
    "NFG": {"forget_gate": False},
    "NOG": {"output_gate": False},
    "NIAF": {"input_activation": False},
    "NOAF": {"output_activation": False},
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, **FLOAT64)


def heads_of(weight: Tensor, gates: int) -> Tensor:
    """[1, gates, H, H] as [in, out] of torch's [gates H, H]."""
    return weight.view(1, gates, *[weight.shape[1]] * 2).transpose(2, 3)


@each_definition
def test_lstm_is_torchs(backend: str) -> None:
    net, x = nn.LSTM(3, D, batch_first=True, **FLOAT64), normal(B, T, 3)
    w, u, b, b2 = net.all_weights[0]
    y, (h, c) = lstm((x @ w.T + b + b2).view(B, T, 1, 4, D), heads_of(u, 4), backend=backend)
    expected, (h2, c2) = net(x)
    torch.testing.assert_close(y[:, :, 0], expected)
    torch.testing.assert_close((h[:, 0], c[:, 0]), (h2[0], c2[0]))


@each_definition
def test_gru_is_torchs(backend: str) -> None:
    net, x = nn.GRU(3, D, batch_first=True, **FLOAT64), normal(B, T, 3)
    w, u, b, b2 = net.all_weights[0]
    inner = torch.cat([b2[: 2 * D], torch.zeros(D, **FLOAT64)])
    gates = (x @ w.T + b + inner).view(B, T, 1, 3, D)
    y, _ = gru(gates, heads_of(u, 3), b2[2 * D :][None], backend=backend)
    torch.testing.assert_close(y[:, :, 0], net(x)[0])


@pytest.mark.parametrize("relu", [False, True])
@each_definition
def test_elman_is_torchs(backend: str, relu: bool) -> None:
    net = nn.RNN(3, D, nonlinearity="relu" if relu else "tanh", batch_first=True, **FLOAT64)
    x = normal(B, T, 3)
    w, u, b, b2 = net.all_weights[0]
    y, _ = elman((x @ w.T + b + b2).view(B, T, 1, D), u.T[None], relu=relu, backend=backend)
    torch.testing.assert_close(y[:, :, 0], net(x)[0])


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("recurrent_gates", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lstm_variants_are_the_odysseys(variant: str, recurrent_gates: bool) -> None:
    """Greff et al. 2017, written out for one row, one head and one channel at a time."""
    x, weights, p = normal(B, T, N, 4, D), normal(N, 4, D, D), normal(3, N, D)
    full = normal(N, 3, 3, D, D) if recurrent_gates else None
    y, last = lstm(x, weights, peepholes=p, full_gate_recurrence=full, **VARIANTS[variant])
    for b in range(B):
        for n in range(N):
            h, c, old = np.zeros(D), np.zeros(D), np.zeros((3, D))
            for t in range(T):
                z = [x[b, t, n, g].numpy() + h @ weights[n, g].numpy() for g in range(4)]
                if full is not None:
                    for k, g in enumerate((0, 1, 3)):
                        z[g] = z[g] + sum(old[s] @ full[n, s, k].numpy() for s in range(3))
                i = np.ones(D) if variant == "NIG" else logistic(z[0] + p[0, n].numpy() * c)
                f = np.ones(D) if variant == "NFG" else logistic(z[1] + p[1, n].numpy() * c)
                f = 1 - i if variant == "CIFG" else f
                c = f * c + i * (z[2] if variant == "NIAF" else np.tanh(z[2]))
                o = np.ones(D) if variant == "NOG" else logistic(z[3] + p[2, n].numpy() * c)
                h = o * (c if variant == "NOAF" else np.tanh(c))
                old = np.stack([i, f, o])
                np.testing.assert_allclose(y[b, t, n].numpy(), h, rtol=1e-10)
            np.testing.assert_allclose(last[1][b, n].numpy(), c, rtol=1e-10)
    assert len(last) == (5 if recurrent_gates else 2)


@pytest.mark.parametrize("peepholes", [False, True])
@pytest.mark.parametrize("backend", ["cpu", INTERPRETED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lstm_variants_on_every_back_end(variant: str, backend: str, peepholes: bool) -> None:
    leaves = [normal(B, T, N, 4, D), normal(N, 4, D, D) / D**0.5, normal(3, N, D), normal(B, N, D), normal(B, N, D)]
    found = []
    for kind, kind_dtype in (("reference", torch.float64), (backend, torch.float32)):
        x, weights, p, h, c = given = [a.to(kind_dtype).requires_grad_() for a in leaves]
        y, last = lstm(
            x, weights, (h, c), peepholes=p if peepholes else None, backend=kind, reverse=True, **VARIANTS[variant]
        )
        torch.manual_seed(1)
        total = torch.stack([(o.double() * normal(*o.shape)).sum() for o in (y, *last)]).sum()
        grads = torch.autograd.grad(total, given, allow_unused=True)
        found.append([y, *last, *(torch.zeros_like(a) if g is None else g for a, g in zip(given, grads, strict=True))])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "d"),
    [
        ("elman", 17),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("elman", 16), *product(("lstm", "gru", "slstm", "lem"), (16, 17)), ("gru", 50), ("elman", 50))
        ),
    ],
)
def test_triton_sees_aligned_tensors_only(name: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors at odd addresses and of odd widths, with one result: there is no kernel for others."""
    kernels = pytest.importorskip("clplat.kernels.cells_triton")
    seen: list[Any] = []

    class Launched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*given: Any, **constants: Any) -> None:
                seen.extend(given)
                self.kernel[grid](*given, **constants)

            return launch

    for kernel in ("cell_forward", "cell_backward"):
        monkeypatch.setattr(kernels, kernel, Launched(getattr(kernels, kernel)))
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        x, weights, h, reset = (
            torch.randn(shape.numel() + 1)[1:].view(shape)
            for shape in map(torch.Size, ((B, T, N, 4, d), (N, 4, d, d), (4, B, N, d), (B, T)))
        )
        x, weights = x.requires_grad_(), (weights / d**0.5).requires_grad_()
        state = tuple(h[: {"lstm": 2, "gru": 1, "elman": 1, "slstm": 4, "lem": 2}[name]].exp())
        y, last = call(name, x, weights, initial_state=state, reset=reset <= -1, backend=backend)
        grads = torch.autograd.grad(y.square().sum() + last[0].sum(), (x, weights))
        found.append((y, *last, *grads))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    pointers = [a.data_ptr() % 16 for a in seen if isinstance(a, Tensor)]
    assert len(seen) > len(pointers) > 0
    assert not any(pointers)
    assert all(a.shape[-1] % 16 == 0 for a in seen if isinstance(a, Tensor) and a.is_floating_point())


def test_full_gate_recurrence_hands_its_gates_over() -> None:
    x, weights, full = normal(B, T, N, 4, D), normal(N, 4, D, D), normal(N, 3, 3, D, D)
    whole, _ = lstm(x, weights, full_gate_recurrence=full)
    early, state = lstm(x[:, :2], weights, full_gate_recurrence=full)
    late, _ = lstm(x[:, 2:], weights, state, full_gate_recurrence=full)
    torch.testing.assert_close(torch.cat([early, late], 1), whole)


@each_definition
def test_gru_of_the_paper_resets_before_the_product(backend: str) -> None:
    x, weights, bias = normal(B, T, N, 3, D), normal(N, 3, D, D), normal(N, D)
    y, _ = gru(x, weights, bias, reset_after=False, backend=backend)
    h = torch.zeros(B, N, D, **FLOAT64)
    for t in range(T):
        r, z = (torch.sigmoid(x[:, t, :, k] + torch.einsum("bni,nio->bno", h, weights[:, k])) for k in (0, 1))
        n = torch.tanh(x[:, t, :, 2] + torch.einsum("bni,nio->bno", r * h, weights[:, 2]) + bias)
        h = z * h + (1 - z) * n
        torch.testing.assert_close(y[:, t], h)


@each_definition
def test_slstm_is_the_ratio_of_its_unscaled_sums(backend: str) -> None:
    """Without the scale m: c = f c + e^i u, n = f n + e^i, h = o c / n (Beck et al. 2024, equations 8 to 14)."""
    x, weights = normal(B, T, N, 4, D), normal(N, 4, D, D)
    y, (_, c, n, m) = slstm(x, weights, backend=backend)
    h, total, count = (torch.zeros(B, N, D, **FLOAT64) for _ in range(3))
    for t in range(T):
        i, f, u, o = (x[:, t] + torch.einsum("bni,ngio->bngo", h, weights)).unbind(2)
        total = torch.sigmoid(f) * total + i.exp() * u.tanh()
        count = torch.sigmoid(f) * count + i.exp()
        h = torch.sigmoid(o) * total / count
        torch.testing.assert_close(y[:, t], h)
    torch.testing.assert_close((c * m.exp(), n * m.exp()), (total, count))


@each_definition
def test_lem_feeds_its_new_memory_to_its_output(backend: str) -> None:
    x, weights, dt = normal(B, T, N, 4, D), normal(N, 4, D, D), 0.7
    out, _ = lem(x, weights, dt=dt, backend=backend)
    y, z = (torch.zeros(B, N, D, **FLOAT64) for _ in range(2))

    def argument(k: int, t: int, state: Tensor) -> Tensor:
        return x[:, t, :, k] + torch.einsum("bni,nio->bno", state, weights[:, k])

    for t in range(T):
        g, k = dt * argument(0, t, y).sigmoid(), dt * argument(1, t, y).sigmoid()
        z = z + g * (argument(2, t, y).tanh() - z)
        y = y + k * (argument(3, t, z).tanh() - y)
        torch.testing.assert_close(out[:, t], y)


def call(name: str, x: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Cells with 4 gates, or the parts of x and weights that the others have."""
    if name == "gru":
        return gru(x[..., :3, :], weights[:, :3], torch.zeros(x.shape[2], x.shape[4], dtype=x.dtype), **options)
    if name == "elman":
        return elman(x[..., 0, :], weights[:, 0], **options)
    return {"lstm": lstm, "slstm": slstm, "lem": lem}[name](x, weights, **options)


each_cell = pytest.mark.parametrize("name", ["lstm", "gru", "elman", "slstm", "lem"])


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
@each_cell
def test_saturated_gates_stay_finite(name: str, backend: str) -> None:
    x = torch.tensor([-300.0, -60.0, 60.0, 300.0])[torch.randint(4, (B, T, N, 4, D))].requires_grad_()
    weights = torch.randn(N, 4, D, D, requires_grad=True)
    y, last = call(name, x, weights, backend=backend)
    grads = torch.autograd.grad(torch.stack([s.sum() for s in (y, *last[:2])]).sum(), (x, weights), allow_unused=True)
    assert all(a.isfinite().all() for a in (y, *last, *grads) if a is not None)


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
@each_cell
def test_a_reset_stops_what_overflowed(name: str, backend: str) -> None:
    x, weights = torch.randn(B, T, N, 4, D), torch.randn(N, 4, D, D)
    sizes = {"lstm": 2, "gru": 1, "elman": 1, "slstm": 4, "lem": 2}[name]
    broken = tuple(torch.full((B, N, D), float("nan")) for _ in range(sizes))
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 0] = True
    y, last = call(name, x, weights, initial_state=broken, reset=reset, backend=backend)
    assert all(a.isfinite().all() for a in (y, *last))


@each_cell
def test_autocast_keeps_the_state_single(name: str) -> None:
    x, weights = torch.randn(B, T, N, 4, D), torch.randn(N, 4, D, D)
    expected, _ = call(name, x, weights, backend="reference")
    for backend in ("reference", "cpu"):
        with torch.autocast("cpu", torch.bfloat16):
            y, last = call(name, x.bfloat16(), weights, backend=backend)
        assert y.dtype == torch.bfloat16
        assert all(s.dtype == torch.float32 for s in last)
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


def test_wrong_calls_are_refused() -> None:
    x, weights = torch.randn(B, T, N, 4, D), torch.randn(N, 4, D, D)
    with pytest.raises(ValueError, match=r"lstm: gates has shape \[2, 6, 2, 20\], it must be \[B, T, N, 4, d\]"):
        lstm(x.flatten(3), weights)
    with pytest.raises(ValueError, match=r"slstm: recurrent has shape \[2, 4, 5, 4\].*\[N=2, 4, d=5, d=5\]"):
        slstm(x, weights[..., :4])
    with pytest.raises(ValueError, match=r"lem: reset has shape \[2, 5\].*\[2, 6\]"):
        lem(x, weights, reset=torch.zeros(B, T - 1))
    with pytest.raises(ValueError, match=r"got 1 tensors as initial state, it takes 2: \(h, c\)"):
        lstm(x, weights, (torch.zeros(B, N, D),))
    with pytest.raises(ValueError, match=r"peepholes has shape \[3, 2, 4\], it must be \[3, N=2, d=5\]"):
        lstm(x, weights, peepholes=torch.zeros(3, N, D - 1))
    with pytest.raises(ValueError, match=r"lstm: gates has shape \[0, 6, 2, 4, 5\], no size may be 0"):
        lstm(x[:0], weights)
    with pytest.raises(ValueError, match="coupled=True needs"):
        lstm(x, weights, coupled=True, forget_gate=False)
    with pytest.raises(ValueError, match="dt=0"):
        lem(x, weights, dt=0)
    with pytest.raises(ValueError, match="full_gate_recurrence has no Triton kernel"):
        lstm(x, weights, full_gate_recurrence=torch.zeros(N, 3, 3, D, D), backend="triton")
    with pytest.raises(ValueError, match=r"elman: gates has shape \[2, 6, 2, 4, 5\]"):
        elman(x, weights)
    wide = partial(elman, torch.randn(1, 1, 1, 100), backend="triton")
    with pytest.raises(ValueError, match=r"width 100 with torch\.float32.*at most 64"):
        wide(torch.randn(1, 100, 100))
    with pytest.raises(ValueError, match=r"lstm: heads of width 33 with torch\.float32.*at most 32"):
        lstm(torch.randn(1, 1, 1, 4, 33), torch.randn(1, 4, 33, 33), backend="triton")


def test_the_polynomials_of_the_cpu_kernels() -> None:
    numba = pytest.importorskip("numba")
    from clplat.kernels.cells_cpu import FASTMATH, log1p, tanh

    def compiled(function: Any) -> Any:
        @numba.njit(fastmath=FASTMATH, error_model="numpy")
        def run(x: Any, y: Any) -> None:
            for i in range(len(x)):
                y[i] = function(x[i])

        return run

    near, tiny = np.linspace(-20, 20, 4001), np.geomspace(1e-30, 1, 999)
    for function, exact, points in (
        (tanh, np.tanh, np.concatenate([near, tiny, -tiny, [np.inf, -np.inf]])),
        (log1p, np.log1p, np.concatenate([np.linspace(0, 1, 4001), tiny])),
    ):
        x = np.append(points, np.nan).astype(np.float32)
        y = np.empty_like(x)
        compiled(function)(x, y)
        np.testing.assert_allclose(y, exact(x.astype(np.float64)), rtol=2.5e-7)
