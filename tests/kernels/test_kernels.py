"""The laws of recurrent kernels, once for all of them: every op, every back end, every gradient.

The reference back end is the definition, in float64 and differentiated by autograd; the others must equal it. Triton
kernels run in its interpreter here, and on the device where there is one (`pytest -m gpu`, with long
sequences beside).

Letters: B batch, T time, D channels, N heads.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clplat.kernels import cells, diagonal
from clplat.kernels.backend import HAS_NUMBA, State, choose
from clplat.kernels.block_diagonal import block_scan
from clplat.kernels.delta import delta_rule, titans
from clplat.kernels.matrix_state import matrix_state, mlstm
from clplat.kernels.selective import selective_scan
from clplat.kernels.softmax_scan import softmax_scan
from clplat.kernels.wkv import wkv

Op = Callable[..., tuple[Tensor, State]]


@dataclass(frozen=True)
class Case:
    """One op with the means to make its inputs; everything is float64 and drawn from a generator.

    Attributes:
        op: called as op(*inputs, *weights, initial_state, reset, reverse=..., backend=...).
        inputs: (B, T, D, draw) -> tensors [B, T, ...].
        weights: (D, draw) -> tensors without batch and time.
        state: (B, D, draw) -> tensors [B, ...].
        after: what of a final state is compared: (state) -> tensors; the identity but where a state has more than one
            form that means the same (a stabiliser's scale).
        sizes: D of the shape tests.
        shape: (B, T, D) of the other tests.
        small: D of gradcheck, opcheck and compilation.
    """

    op: Op
    inputs: Callable[[int, int, int, Draw], tuple[Tensor, ...]]
    state: Callable[[int, int, Draw], State]
    weights: Callable[[int, Draw], tuple[Tensor, ...]] = lambda d, draw: ()
    after: Callable[[State], State] = lambda state: state
    sizes: tuple[int, ...] = (1, 40, 100)
    small: int = 3
    shape: tuple[int, int, int] = (3, 19, 40)
    backends: tuple[str, ...] = ("cpu", "triton")


class Draw:
    """Draws float64 tensors.

    Args:
        seed: of its generator.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform in low..high."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)


FEW_TILES = (1, 70)
"""D of matrix states: several tiles of keys and of values, neither full; more takes the interpreter too long."""


def matrix_inputs(b: int, t: int, d: int, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [B, T, 2, D], v [B, T, 2, D // 2 + 1], small enough that nothing grows with D or T."""
    return draw.normal(b, t, 2, d) * d**-0.5, draw.normal(b, t, 2, d) * d**-0.5, draw.normal(b, t, 2, d // 2 + 1)


def unit_keys(b: int, t: int, d: int, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """As `matrix_inputs`, with keys of length 1, as delta rules need them."""
    q, k, v = matrix_inputs(b, t, d, draw)
    return q, torch.nn.functional.normalize(k, dim=-1), v


def matrix_memory(b: int, d: int, draw: Draw) -> State:
    """(S [B, 2, D, D // 2 + 1],)."""
    return (draw.normal(b, 2, d, d // 2 + 1),)


def log_decays(draw: Draw, *shape: int) -> Tensor:
    """Weak, so that much of the initial state is left at the end, with a strong one here and there, down to -60."""
    weak, strong = draw.uniform(-0.1, 0, *shape), draw.uniform(-60, 0, *shape)
    return torch.where(draw.uniform(0, 1, *shape) < 0.03, strong, weak)


def ungated(op: Op, inputs: int) -> Op:
    """An op without its gate, the argument after its first `inputs`."""
    return lambda *args, **options: op(*args[:inputs], None, *args[inputs:], **options)


def with_bonus(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor, *rest: Any, **options: Any) -> Any:
    """`matrix_state` with its bonus among the weights."""
    return matrix_state(q, k, v, gate, *rest, bonus=bonus, **options)


def unscaled(state: State) -> State:
    """C and n of an mLSTM without their common scale exp(m)."""
    c, n, m = state
    return c * m.exp()[..., None, None], n * m.exp()[..., None]


INTERPRETED: dict[str, Any] = {"sizes": (1, 33), "shape": (3, 19, 20)}
"""Sizes for kernels with an associative scan, which Triton's interpreter combines number by number."""


def normals(draw: Draw, count: int, *shape: int) -> tuple[Tensor, ...]:
    return tuple(2 * draw.normal(*shape) for _ in range(count))


def diagonal_state(b: int, d: int, draw: Draw) -> State:
    return (draw.normal(b, d),)


def complex_normal(draw: Draw, *shape: int) -> Tensor:
    return torch.complex(draw.normal(*shape), draw.normal(*shape))


def complex_state(b: int, d: int, draw: Draw) -> State:
    return (complex_normal(draw, b, d),)


def decays(draw: Draw, *shape: int) -> Tensor:
    """Complex numbers within the unit circle."""
    return torch.polar(draw.uniform(0, 1, *shape), draw.uniform(-3, 3, *shape))


def heads(d: int) -> tuple[int, int]:
    """N and width of a head that make D channels: Triton's kernels take float32 heads of at most 32."""
    n = 4 if d >= 100 else 2 if d >= 40 else 1
    return n, d // n


def cell(op: Op, gates: int, states: int, vectors: tuple[int, ...] = ()) -> Case:
    """A cell with heads: gates, recurrent weights, and as many more [k, N, d] as `vectors` says (0: without k)."""

    def inputs(b: int, t: int, d: int, draw: Draw) -> tuple[Tensor, ...]:
        return (draw.normal(b, t, heads(d)[0], *[gates] * (gates > 1), heads(d)[1]),)

    def weights(d: int, draw: Draw) -> tuple[Tensor, ...]:
        n, width = heads(d)
        matrices = draw.normal(n, *[gates] * (gates > 1), width, width) / width**0.5
        # Peepholes of unit size make the LSTM expansive: float32 then differs from float64 in any form of it.
        return matrices, *(0.3 ** (k > 0) * draw.normal(*[k] * (k > 0), n, width) for k in vectors)

    def state(b: int, d: int, draw: Draw) -> State:
        made = [draw.normal(b, *heads(d)) for _ in range(states)]
        if states == 4:  # sLSTM's normaliser is a sum of positive numbers
            made[2] = draw.uniform(0.5, 2, b, *heads(d))
        return tuple(made)

    return Case(op, inputs, state, weights)


def peephole_lstm(gates: Tensor, recurrent: Tensor, peepholes: Tensor, *rest: Any, **options: Any) -> Any:
    return cells.lstm(gates, recurrent, *rest, peepholes=peepholes, **options)


# Every op obeys every law below: a new one needs one entry here.
CASES: dict[str, Case] = {
    "lstm": cell(peephole_lstm, 4, 2, (3,)),
    "gru": cell(cells.gru, 3, 1, (0,)),
    "gru_paper": cell(partial(cells.gru, reset_after=False), 3, 1, (0,)),
    "elman": cell(cells.elman, 1, 1),
    "slstm": cell(cells.slstm, 4, 4),
    "lem": cell(partial(cells.lem, dt=0.7), 4, 2),
    "scan": Case(
        diagonal.scan,
        lambda b, t, d, draw: (draw.uniform(-0.3, 1.1, b, t, d), draw.normal(b, t, d)),
        diagonal_state,
        **INTERPRETED,
    ),
    "scan_complex": Case(
        diagonal.scan,
        lambda b, t, d, draw: (decays(draw, b, t, d), complex_normal(draw, b, t, d)),
        complex_state,
        **INTERPRETED,
    ),
    "constant_scan": Case(
        diagonal.constant_scan,
        lambda b, t, d, draw: (draw.normal(b, t, d),),
        diagonal_state,
        weights=lambda d, draw: (draw.uniform(-0.3, 1, d),),
        **INTERPRETED,
    ),
    "constant_scan_complex": Case(
        diagonal.constant_scan,
        lambda b, t, d, draw: (complex_normal(draw, b, t, d),),
        complex_state,
        weights=lambda d, draw: (decays(draw, d),),
        **INTERPRETED,
    ),
    "min_gru": Case(diagonal.min_gru, lambda b, t, d, draw: normals(draw, 2, b, t, d), diagonal_state, **INTERPRETED),
    "min_lstm": Case(diagonal.min_lstm, lambda b, t, d, draw: normals(draw, 3, b, t, d), diagonal_state, **INTERPRETED),
    "rg_lru": Case(
        diagonal.rg_lru,
        lambda b, t, d, draw: normals(draw, 3, b, t, d),
        diagonal_state,
        weights=lambda d, draw: (draw.uniform(-5, 0, d),),
        **INTERPRETED,
    ),
    "hgrn": Case(
        diagonal.hgrn,
        lambda b, t, d, draw: normals(draw, 2, b, t, d),
        diagonal_state,
        weights=lambda d, draw: (draw.uniform(0, 0.9, d),),
        **INTERPRETED,
    ),
    "softmax_scan": Case(
        softmax_scan,
        lambda b, t, d, draw: (2 * draw.normal(b, t, 2), draw.normal(b, t, 2, d)),
        lambda b, d, draw: (draw.normal(b, 2), draw.normal(b, 2, d)),
        sizes=(1, 5),  # the interpreter scans number by number; more in test_softmax_scan.py
        shape=(3, 19, 5),
    ),
    "block_scan": Case(
        block_scan,
        lambda b, t, d, draw: (draw.uniform(-0.5, 0.5, b, t, d, 3, 3), draw.normal(b, t, d, 3)),
        lambda b, d, draw: (draw.normal(b, d, 3),),
    ),
    "selective_scan": Case(
        selective_scan,
        lambda b, t, d, draw: (
            draw.normal(b, t, d),
            draw.uniform(0.01, 1, b, t, d),
            draw.normal(b, t, 3),
            draw.normal(b, t, 3),
        ),
        lambda b, d, draw: (draw.normal(b, d, 3),),
        weights=lambda d, draw: (-draw.uniform(0.1, 3, d, 3), draw.normal(d)),
        sizes=(1, 5),  # the interpreter goes step by step; blocks of channels and states in test_selective.py
    ),
    "wkv": Case(
        wkv,
        lambda b, t, d, draw: (2 * draw.normal(b, t, d), draw.normal(b, t, d)),
        lambda b, d, draw: (draw.normal(b, d), draw.uniform(0.5, 2, b, d), draw.normal(b, d)),
        weights=lambda d, draw: (draw.uniform(0.01, 2, d), draw.normal(d)),
        # The state means num exp(max) and den exp(max).
        after=lambda state: (state[0] / state[1], state[1].log() + state[2].detach()),
        sizes=(1, 5),  # the interpreter scans number by number; more in test_wkv.py
        shape=(3, 19, 5),
    ),
    "matrix_state": Case(ungated(matrix_state, 3), matrix_inputs, matrix_memory, sizes=FEW_TILES),
    "matrix_state_constant": Case(
        matrix_state,
        matrix_inputs,
        matrix_memory,
        weights=lambda d, draw: (-draw.uniform(0.01, 0.5, 2),),
        sizes=FEW_TILES,
    ),
    "matrix_state_scalar": Case(
        matrix_state,
        lambda b, t, d, draw: (*matrix_inputs(b, t, d, draw), log_decays(draw, b, t, 2)),
        matrix_memory,
        sizes=FEW_TILES,
    ),
    "matrix_state_vector": Case(
        with_bonus,
        lambda b, t, d, draw: (*matrix_inputs(b, t, d, draw), log_decays(draw, b, t, 2, d)),
        matrix_memory,
        weights=lambda d, draw: (draw.normal(2, d),),
        sizes=FEW_TILES,
    ),
    "mlstm": Case(
        mlstm,
        lambda b, t, d, draw: (*matrix_inputs(b, t, d, draw), draw.normal(b, t, 2), 3 + draw.normal(b, t, 2)),
        lambda b, d, draw: (*matrix_memory(b, d, draw), draw.normal(b, 2, d), draw.normal(b, 2)),
        after=unscaled,
        sizes=FEW_TILES,
    ),
    "delta_rule": Case(
        delta_rule,
        lambda b, t, d, draw: (*unit_keys(b, t, d, draw), draw.uniform(0, 1, b, t, 2), log_decays(draw, b, t, 2)),
        matrix_memory,
        sizes=FEW_TILES,
    ),
    "delta_rule_ungated": Case(
        ungated(delta_rule, 4),
        lambda b, t, d, draw: (*unit_keys(b, t, d, draw), draw.uniform(0, 1, b, t, 2)),
        matrix_memory,
        sizes=FEW_TILES,
    ),
    "titans": Case(
        titans,
        lambda b, t, d, draw: (*unit_keys(b, t, d, draw), *(draw.uniform(0, 0.5, b, t, 2) for _ in range(3))),
        lambda b, d, draw: (*matrix_memory(b, d, draw), *matrix_memory(b, d, draw)),
        backends=("cpu",),  # its chunked torch form runs on every device
    ),
}

CUDA = torch.cuda.is_available()
FORMS = {
    "lstm", "elman", "scan_complex", "constant_scan", "min_lstm", "softmax_scan", "block_scan", "selective_scan", "wkv",
    "matrix_state_scalar", "mlstm", "delta_rule", "titans",
}  # fmt: skip
"""Every custom op, with and without what it need not have; the other ops call one of them with other numbers."""
# Without a device Triton's interpreter takes seconds for a test: by default it has one of each op, and the laws below
# are held to by every custom op, not by every op that calls it.
TRITON = pytest.mark.gpu if CUDA else pytest.mark.slow
PAIRS = [
    pytest.param(name, backend, marks=[TRITON] if backend == "triton" else [])
    for name, case in CASES.items()
    for backend in case.backends
    if backend != "triton" or CUDA or name in FORMS
]
ON_DEVICE = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
each_op = pytest.mark.parametrize("name", CASES)
each_form = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FORMS else [pytest.mark.slow]) for name in CASES]
)
each_backend = pytest.mark.parametrize(("name", "backend"), PAIRS)
# The definition is exact in float64. Numba compiles for each dtype, for seconds: float64 is for the slow run, and so is
# Triton in its interpreter; on a device it has float32 only.
each_definition = pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        *((name, "reference", torch.float64) for name in CASES),
        *((n, "cpu", torch.float32) for n, case in CASES.items() if "cpu" in case.backends),
        *(
            pytest.param(n, "cpu", torch.float64, marks=pytest.mark.slow)
            for n, case in CASES.items()
            if "cpu" in case.backends
        ),
        *(
            pytest.param(n, "triton", torch.float32, marks=ON_DEVICE)
            for n, case in CASES.items()
            if "triton" in case.backends
        ),
    ],
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Given:
    """Leaves of one call: inputs, weights, initial state, resets [B, T]."""

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    state: State
    reset: Tensor

    def leaves(self) -> list[Tensor]:
        return [*self.inputs, *self.weights, *self.state]

    def to(self, dtype: torch.dtype, device: torch.device) -> Given:
        def moved(x: Tensor) -> Tensor:
            kind = x.dtype if not (x.is_floating_point() or x.is_complex()) else dtype
            if x.is_complex():
                kind = torch.complex128 if dtype == torch.float64 else torch.complex64
            return x.detach().to(device, kind).requires_grad_()

        inputs, weights, state = (tuple(map(moved, part)) for part in (self.inputs, self.weights, self.state))
        return Given(inputs, weights, state, self.reset.to(device))


def given(name: str, b: int | None = None, t: int | None = None, d: int | None = None, seed: int = 1) -> Given:
    case, draw = CASES[name], Draw(seed)
    b, t, d = b or case.shape[0], t or case.shape[1], d or case.shape[2]
    inputs, weights, state = case.inputs(b, t, d, draw), case.weights(d, draw), case.state(b, d, draw)
    reset = torch.rand(b, t, generator=draw.generator) <= 0.2
    reset[0] = False
    for x in (*inputs, *weights, *state):
        x.requires_grad_()
    return Given(inputs, weights, state, reset)


def run(name: str, g: Given, backend: str | None, resets: bool = False, reverse: bool = False) -> list[Tensor]:
    """y and the final state, as one list."""
    case = CASES[name]
    y, last = case.op(*g.inputs, *g.weights, g.state, g.reset if resets else None, reverse=reverse, backend=backend)
    return [y, *case.after(last)]


def uneven_sum(outputs: list[Tensor]) -> Tensor:
    draw = Draw(3)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for o in outputs:
        for part in (o.real, o.imag) if o.is_complex() else (o,):
            total = total + (part.double() * draw.normal(*part.shape).to(o.device)).sum()
    return total


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of an uneven sum of all outputs by all leaves."""
    found = torch.autograd.grad(uneven_sum(outputs), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each tensor within a relative error in the Euclidean norm."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, i
        assert a.isfinite().all(), f"tensor {i} is not finite"
        wide = torch.complex128 if e.is_complex() else torch.float64
        a, e = a.to("cpu", wide), e.to("cpu", wide)
        scale = max(e.norm().item(), 1e-6 * e.numel() ** 0.5)
        assert (a - e).norm().item() / scale <= tolerance, f"tensor {i}: {(a - e).norm().item() / scale:.1e}"


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else torch.device("cpu")


def defined(name: str, backend: str, dtype: torch.dtype) -> tuple[Given, float]:
    """Leaves, and the relative error allowed in values (gradients: 100 times)."""
    return given(name).to(dtype, device_of(backend)), 2e-6 if dtype == torch.float32 else 1e-12


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@each_backend
def test_values_and_gradients_equal_the_reference(name: str, backend: str, resets: bool, reverse: bool) -> None:
    exact = given(name)
    single = exact.to(torch.float32, device_of(backend))
    expected, actual = run(name, exact, "reference", resets, reverse), run(name, single, backend, resets, reverse)
    assert_near(actual, expected, 2e-6)
    assert_near(gradients(actual, single.leaves()), gradients(expected, exact.leaves()), 5e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[TRITON] if CUDA else []) for n, case in CASES.items() if "triton" in case.backends],
)
def test_triton_kernels_equal_the_reference_over_a_few_steps(name: str) -> None:
    """What the other tests do, small enough for the interpreter: reversed, with a reset and an initial state."""
    exact = given(name, 2, 4, CASES[name].small)
    exact.reset[1, 2] = True
    single = exact.to(torch.float32, DEVICE)
    expected, actual = run(name, exact, "reference", True, True), run(name, single, "triton", True, True)
    assert_near(actual, expected, 2e-6)
    assert_near(gradients(actual, single.leaves()), gradients(expected, exact.leaves()), 5e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 63), (3, 65)])
@each_backend
def test_ugly_shapes(name: str, backend: str, shape: tuple[int, int]) -> None:
    sizes = CASES[name].sizes
    if backend == "triton" and not CUDA and shape == (2, 63):
        sizes = sizes[:1]  # the interpreter takes seconds for each; (3, 65) has them all
    for size in sizes:
        exact = given(name, *shape, size)
        single = exact.to(torch.float32, device_of(backend))
        expected, actual = run(name, exact, "reference", True), run(name, single, backend, True)
        assert_near(actual, expected, 3e-6)
        assert_near(gradients(actual, single.leaves()), gradients(expected, exact.leaves()), 1e-5)


TORCH_ONLY = ("matrix_state", "mlstm", "delta_rule", "titans")
"""What the names of ops begin with whose `cpu` back end is torch, and so costs no compilation."""

BY_HAND = (("wkv", "reference"), ("rg_lru", "reference"))
"""References that are not left to autograd: a scale that is detached, a slope that is bounded."""


@pytest.mark.parametrize(
    ("name", "backend", "reverse"),
    [
        pytest.param(n, b, reverse, marks=[] if quick else [pytest.mark.slow])
        for n, case in CASES.items()
        for b in ("reference", *case.backends)
        if b != "triton"
        for reverse in (False, True)
        for quick in ((n, b) in BY_HAND or (b == "cpu" and reverse and n.startswith(TORCH_ONLY)),)
    ],
)
def test_gradcheck(name: str, backend: str, reverse: bool) -> None:
    """All inputs, the initial state too, and the final state's gradient live, against finite differences."""
    g = given(name, 2, 5, CASES[name].small)
    n, w = len(g.inputs), len(g.weights)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        part = Given(leaves[:n], leaves[n : n + w], leaves[n + w :], g.reset)
        return tuple(run(name, part, backend, True, reverse))

    assert torch.autograd.gradcheck(call, tuple(g.leaves()))


@pytest.mark.parametrize("cut", [1, 7, 18])
@each_definition
def test_cut_in_two_equals_the_whole(name: str, backend: str, dtype: torch.dtype, cut: int) -> None:
    (g, exact), op, after = defined(name, backend, dtype), CASES[name].op, CASES[name].after
    early = tuple(x[:, :cut] for x in g.inputs)
    late = tuple(x[:, cut:] for x in g.inputs)
    whole = run(name, g, backend, True)
    y1, between = op(*early, *g.weights, g.state, g.reset[:, :cut], backend=backend)
    y2, last = op(*late, *g.weights, between, g.reset[:, cut:], backend=backend)
    halves = [torch.cat([y1, y2], 1), *after(last)]
    assert_near(halves, whole, exact)
    assert_near(gradients(halves, g.leaves()), gradients(whole, g.leaves()), 100 * exact)


@each_definition
def test_resets_equal_separate_documents(name: str, backend: str, dtype: torch.dtype) -> None:
    (g, exact), op, after = defined(name, backend, dtype), CASES[name].op, CASES[name].after
    g.reset[1, 0] = True
    whole = run(name, g, backend, True)
    rows, lasts = [], []
    for b in range(len(g.reset)):
        starts = sorted({0, *g.reset[b].nonzero().flatten().tolist()})
        pieces = []
        kept: State | None = None
        for start, end in itertools.pairwise([*starts, g.reset.shape[1]]):
            kept = tuple(s[b : b + 1] for s in g.state) if start == 0 and not g.reset[b, 0] else None
            y, kept = op(*(x[b : b + 1, start:end] for x in g.inputs), *g.weights, kept, backend=backend)
            pieces.append(y)
        assert kept is not None
        rows.append(torch.cat(pieces, 1))
        lasts.append(after(kept))
    apart = [torch.cat(rows), *(torch.cat(parts) for parts in zip(*lasts, strict=True))]
    assert_near(whole, apart, exact)
    assert_near(gradients(whole, g.leaves()), gradients(apart, g.leaves()), 100 * exact)


@each_definition
def test_reverse_equals_a_flip_of_time(name: str, backend: str, dtype: torch.dtype) -> None:
    g, exact = defined(name, backend, dtype)
    flipped = Given(tuple(x.flip(1) for x in g.inputs), g.weights, g.state, g.reset.flip(1))
    back, flip = run(name, g, backend, True, True), run(name, flipped, backend, True)
    flip[0] = flip[0].flip(1)
    assert_near(back, flip, exact)
    assert_near(gradients(back, g.leaves()), gradients(flip, g.leaves()), 100 * exact)


@each_backend
def test_rows_do_not_depend_on_one_another(name: str, backend: str) -> None:
    g = given(name).to(torch.float32, device_of(backend))
    rows = torch.tensor([2, 0, 1], device=device_of(backend))
    moved = Given(tuple(x[rows] for x in g.inputs), g.weights, tuple(s[rows] for s in g.state), g.reset[rows])
    assert_near(run(name, moved, backend, True), [o[rows] for o in run(name, g, backend, True)], 1e-6)


@each_backend
def test_inputs_need_not_be_contiguous(name: str, backend: str) -> None:
    g = given(name).to(torch.float32, device_of(backend))
    strided = Given(
        tuple(_strided(x) for x in g.inputs),
        tuple(_strided(x) for x in g.weights),
        tuple(_strided(x) for x in g.state),
        g.reset.t().contiguous().t(),
    )
    whole, parts = run(name, g, backend, True), run(name, strided, backend, True)
    assert_near(parts, whole, 1e-6)
    assert_near(gradients(parts, strided.leaves()), gradients(whole, g.leaves()), 1e-6)


def _strided(x: Tensor) -> Tensor:
    """The same values, not contiguous in any dimension."""
    wide = x.detach().repeat_interleave(2, -1)[..., ::2] if x.ndim else x.detach().clone()
    return wide.requires_grad_()


@each_backend
def test_every_output_is_written(name: str, backend: str) -> None:
    """Poisoned allocations: what a kernel leaves unwritten shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        g = given(name, 3, 33, CASES[name].sizes[-1]).to(torch.float32, device_of(backend))
        outputs = run(name, g, backend, True)
        found = gradients(outputs, g.leaves())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in [*outputs, *found])


@each_backend
def test_without_a_state_it_is_the_fresh_one(name: str, backend: str) -> None:
    """None as initial state equals a reset that forgets the given one at the first step."""
    g = given(name).to(torch.float32, device_of(backend))
    reset = torch.zeros_like(g.reset)
    reset[:, 0] = True
    op, after = CASES[name].op, CASES[name].after
    y, last = op(*g.inputs, *g.weights, None, None, backend=backend)
    y2, last2 = op(*g.inputs, *g.weights, g.state, reset, backend=backend)
    assert_near([y, *after(last)], [y2, *after(last2)], 1e-6)


@each_backend
def test_half_precision_inputs(name: str, backend: str) -> None:
    """bf16 inputs: the state stays float32, outputs and gradients are within what the storage rounds."""
    g = given(name).to(torch.bfloat16, device_of(backend))
    if any(x.is_complex() for x in g.inputs):
        pytest.skip("there is no complex bf16")
    g = Given(g.inputs, g.weights, tuple(s.detach().float().requires_grad_() for s in g.state), g.reset)
    exact = g.to(torch.float64, torch.device("cpu"))
    actual, expected = run(name, g, backend, True), run(name, exact, "reference", True)
    assert actual[0].dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in actual[1:])
    # Triton's interpreter truncates where a GPU and torch round.
    assert_near(actual[:1], expected[:1], 8e-3)
    assert_near(actual[1:], expected[1:], 8e-3)
    assert_near(gradients(actual, g.leaves()), gradients(expected, exact.leaves()), 2e-2)


@each_op
def test_autocast_leaves_states_and_their_products_alone(name: str) -> None:
    g = given(name, t=130).to(torch.float32, torch.device("cpu"))
    expected = run(name, g, "cpu", True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(name, g, "cpu", True)
    assert_near(actual, expected, 1e-6)
    assert_near(gradients(actual, g.leaves()), gradients(expected, g.leaves()), 1e-5)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "triton" in case.backends])
@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_long_sequences_on_a_device(name: str, resets: bool) -> None:
    """Many tiles in every direction, which the interpreter has no time for."""
    exact = given(name, 5, 1030, CASES[name].sizes[-1]).to(torch.float64, DEVICE)
    single = exact.to(torch.float32, DEVICE)
    expected, actual = run(name, exact, "reference", resets), run(name, single, "triton", resets)
    assert_near(actual, expected, 1e-5)
    assert_near(gradients(actual, single.leaves()), gradients(expected, exact.leaves()), 5e-5)


@each_form
def test_opcheck(name: str) -> None:
    """torch's own checks of a custom op: schema, fake tensors, autograd registration, ahead-of-time dispatch."""
    g = given(name, 2, 5, CASES[name].small).to(torch.float32, torch.device("cpu"))
    for args, kwargs in recorded_ops(partial(run, name, g, "cpu", True)):
        torch.library.opcheck(*args, **kwargs)


def recorded_ops(call: Callable[[], Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of clplat's own ops within `call`, as arguments of opcheck."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())

    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "clplat":
                seen.append(((func, tree_map_only(Tensor, leaf, args)), {"kwargs": kwargs or {}}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        call()
    assert seen, "no op of clplat was called"
    return iter(seen)


@each_form
def test_compiles_without_graph_breaks(name: str) -> None:
    g = given(name, 2, 5, CASES[name].small).to(torch.float32, torch.device("cpu"))
    torch._dynamo.reset()  # all cases share one lambda, and its recompilations have a limit
    whole = torch.compile(lambda: tuple(run(name, g, "cpu", True)), fullgraph=True, backend="aot_eager")
    expected = run(name, g, "cpu", True)
    actual = list(whole())
    assert_near(actual, expected, 1e-6)
    assert_near(gradients(actual, g.leaves()), gradients(expected, g.leaves()), 1e-6)


@each_op
def test_transforms_of_torch_func_take_the_reference(name: str) -> None:
    """torch's custom ops know neither vmap nor `torch.func.grad`; left to choose, ours are differentiable by both."""
    g = given(name, 2, 5, CASES[name].small)
    expected = gradients(run(name, g, "reference", True), g.leaves())

    def score(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], state: State) -> Tensor:
        return uneven_sum(run(name, Given(inputs, weights, state, g.reset), None, True))

    inputs, weights, state = torch.func.grad(score, (0, 1, 2))(g.inputs, g.weights, g.state)
    assert_near([*inputs, *weights, *state], expected, 1e-9)


@each_op
def test_works_without_numba(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clplat.kernels.backend.HAS_NUMBA", False)
    exact = given(name)
    single = exact.to(torch.float32, torch.device("cpu"))
    expected, actual = run(name, exact, "reference", True), run(name, single, "cpu", True)
    assert_near(actual, expected, 2e-6)
    assert_near(gradients(actual, single.leaves()), gradients(expected, exact.leaves()), 5e-6)


def test_the_back_end_follows_the_tensor_and_the_argument() -> None:
    x = torch.zeros(1)
    assert HAS_NUMBA, "the tests compare numba's kernels: pip install -e '.[dev]'"
    assert choose(None, x) == "cpu"
    assert choose("reference", x) == "reference"
    assert choose(None, torch.zeros(1, dtype=torch.int64)) == "reference"
    with pytest.raises(ValueError, match=r"'cuda'.*'reference', 'cpu', 'triton'"):
        choose("cuda", x)
    with pytest.raises(ValueError, match="backend='cpu' got a tensor on meta"):
        choose("cpu", torch.zeros(1, device="meta"))


def test_compiled_kernels_leave_the_number_of_torchs_threads_alone() -> None:
    """In a process of its own: numba starts its threads once, and shares OpenMP's setting with torch."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from clplat.kernels.diagonal import scan\n"
        "from clplat.kernels.softmax_scan import softmax_scan\n"
        "from clplat.kernels.cells import elman\n"
        "scan(torch.rand(4, 300, 200), torch.rand(4, 300, 200)); print(torch.get_num_threads())\n"
        "softmax_scan(torch.rand(4, 300, 2), torch.rand(4, 300, 2, 64)); print(torch.get_num_threads())\n"
        "elman(torch.rand(4, 99, 1, 64), torch.rand(1, 64, 64)); print(torch.get_num_threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1"] * 3, done.stdout + done.stderr


def test_importing_a_family_imports_no_compiler() -> None:
    names = "block_diagonal, cells, delta, diagonal, matrix_state, selective, softmax_scan, wkv"
    code = f"import sys; from clplat.kernels import {names}; print({{'numba', 'triton'}} & set(sys.modules))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"
