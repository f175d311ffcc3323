"""Laws of all mixers, each row of `LAWS` and `AHEAD` held to them; single mixers' formulas are in `test_mixers_*.py`.

Letters: B batch, T time, D input features, H hidden.
"""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from learners.rows import collected
from torch import Tensor

import clplat.learners.mixers
from clplat.learners.mixers.mixer import Mixer, State
from clplat.weights import functional

B, D, H = 3, 11, 24

LAWS: dict[str, Callable[[int, int], Mixer]] = collected("LAWS")
AHEAD: dict[str, Callable[[int, int], Mixer]] = collected("AHEAD")
MIXERS = LAWS | AHEAD

each_causal = pytest.mark.parametrize("name", LAWS)
each_mixer = pytest.mark.parametrize("name", MIXERS)


def build(name: str) -> Mixer:
    torch.manual_seed(7)
    return MIXERS[name](D, H).double()


def inputs(steps: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, steps, D, dtype=torch.float64)


def memory(mixer: Mixer) -> State:
    """A state that some earlier steps left, as leaves that take gradients."""
    with torch.no_grad():
        _, state = mixer(inputs(5, seed=2))
    assert state is not None
    return tuple(s.clone().requires_grad_(s.is_floating_point()) for s in state)


def gradients(mixer: Mixer, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of an uneven sum of the outputs with respect to the leaves and to every weight."""
    torch.manual_seed(3)
    terms = [(o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs if o.is_floating_point()]
    total = torch.stack(terms).sum()
    return list(torch.autograd.grad(total, [*leaves, *mixer.parameters()]))


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_every_mixer_stands_in_a_table_of_laws() -> None:
    """A class of `mixers/` that no row builds is held to nothing: give it a row beside its formula."""
    shipped: dict[str, type[Mixer]] = {}
    for found in pkgutil.iter_modules(clplat.learners.mixers.__path__, "clplat.learners.mixers."):
        for kind in vars(import_module(found.name)).values():
            if isinstance(kind, type) and issubclass(kind, Mixer) and kind.__module__ == found.name:
                shipped[kind.__qualname__] = kind
    del shipped["Mixer"]
    held = {type(build(name)) for name in MIXERS}
    assert sorted(n for n, kind in shipped.items() if kind not in held) == []
    assert all(build(name).causal for name in LAWS)
    assert not any(build(name).causal for name in AHEAD)


@pytest.mark.parametrize("fresh", [True, False])
@each_causal
def test_parallel_equals_step_by_step(name: str, fresh: bool) -> None:
    # More than a chunk of 32, than two windows of 16, and no power of two.
    mixer, x = build(name), inputs(9 if fresh else 35).requires_grad_()
    first = None if fresh else memory(mixer)
    state: State | None = first
    y, last = mixer(x, first)
    assert last is not None
    rows: list[Tensor] = []
    for x_t in x.unbind(1):
        row, state = mixer.step(x_t, state)
        rows.append(row)
    stepped = torch.stack(rows, 1)
    close(stepped, y)
    close(state, last)
    assert state is not None
    leaves = [x, *(s for s in first or () if s.requires_grad)]
    close(gradients(mixer, [stepped, *state], leaves), gradients(mixer, [y, *last], leaves))


@pytest.mark.parametrize(("steps", "cut"), [(7, 1), (37, 20)])
@each_causal
def test_a_sequence_cut_in_two_equals_the_whole(name: str, steps: int, cut: int) -> None:
    mixer, x = build(name), inputs(steps).requires_grad_()
    first = memory(mixer)
    leaves = [x, *(s for s in first if s.requires_grad)]
    whole, whole_last = mixer(x, first)
    early, between = mixer(x[:, :cut], first)
    late, last = mixer(x[:, cut:], between)
    halves = torch.cat([early, late], 1)
    close(halves, whole)
    close(last, whole_last)
    close(gradients(mixer, [halves, *last], leaves), gradients(mixer, [whole, *whole_last], leaves))


@pytest.mark.parametrize(("steps", "with_state"), [(1, True), (7, False), (23, True)])
@each_causal
def test_reset_starts_a_fresh_sequence(name: str, steps: int, with_state: bool) -> None:
    mixer, x, more = build(name), inputs(steps).requires_grad_(), inputs(4, seed=5)
    state = memory(mixer) if with_state else None
    reset = torch.rand(B, steps, generator=torch.Generator().manual_seed(4)) < 0.2
    reset[0] = False
    reset[1, 0] = True
    reset[2, -1] = True
    y, last = mixer(x, state, reset)
    after, _ = mixer(more, last)  # what the state remembers shows in what follows

    rows, rows_after = [], []
    for b in range(B):
        starts = sorted({0, *reset[b].nonzero().flatten().tolist()})
        pieces = []
        kept: State | None = None
        for start, end in itertools.pairwise([*starts, steps]):
            kept = None if state is None or reset[b, start] else tuple(s[b : b + 1] for s in state)
            piece, kept = mixer(x[b : b + 1, start:end], kept)
            pieces.append(piece)
        rows.append(torch.cat(pieces, 1))
        rows_after.append(mixer(more[b : b + 1], kept)[0])
    close(y, torch.cat(rows))
    close(after, torch.cat(rows_after))
    leaves = [x, *(s for s in state or () if s.requires_grad)]
    close(
        gradients(mixer, [y, after], leaves),
        gradients(mixer, [torch.cat(rows), torch.cat(rows_after)], leaves),
    )


# Not attention: infinite values times a probability of 0 are NaN in every softmax.
@pytest.mark.parametrize("name", [n for n in LAWS if "attention" not in n])
def test_reset_forgets_a_state_that_overflowed(name: str) -> None:
    mixer, x = build(name), inputs(1)
    state = tuple(torch.full_like(s, torch.inf) for s in memory(mixer))
    close(mixer(x, state, torch.ones(B, 1, dtype=torch.bool))[0], mixer(x)[0])


@pytest.mark.parametrize(("steps", "t", "reset"), [(7, 0, False), (7, 3, True), (37, 34, False)])
@each_causal
def test_nothing_depends_on_what_comes_later(name: str, steps: int, t: int, reset: bool) -> None:
    mixer, x = build(name), inputs(steps).requires_grad_()
    starts = torch.zeros(B, steps, dtype=torch.bool) if reset else None
    y, _ = mixer(x, None, starts)
    (gradient,) = torch.autograd.grad(y[:, : t + 1].square().sum(), x)
    assert gradient[:, t].abs().min() > 0
    assert gradient[:, t + 1 :].abs().max() == 0
    other = torch.cat([x[:, : t + 1], 100 * inputs(steps - t - 1, seed=9)], 1)
    close(mixer(other, None, starts)[0][:, : t + 1], y[:, : t + 1])


@each_mixer
def test_padding_changes_nothing(name: str) -> None:
    mixer, x, lengths = build(name), inputs(9), torch.tensor([9, 4, 1])
    padding = torch.arange(9) >= lengths[:, None]
    x[padding] = 1e3
    x.requires_grad_()
    y, _ = mixer(x, lengths=lengths)
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        close(y[b : b + 1, :length], mixer(x[b : b + 1, :length])[0])
        total = total + y[b, :length].square().sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert not gradient[padding].any()


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_says_so_and_refuses_what_it_cannot_do(name: str) -> None:
    mixer, x = build(name), inputs(7)
    y, state = mixer(x)
    assert state is None
    assert (mixer(x.index_fill(1, torch.tensor(6), 5.0))[0] - y)[:, 0].abs().max() > 1e-6
    with pytest.raises(ValueError, match="neither state nor reset"):
        mixer(x, reset=torch.zeros(B, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="neither state nor reset"):
        mixer(x, (y[:, 0],))
    with pytest.raises(ValueError, match="step by step"):
        mixer.step(x[:, 0])


@each_mixer
def test_state_is_never_kept_in_the_module(name: str) -> None:
    mixer, x = build(name), inputs(7)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    first = mixer(x)[0]
    assert first.shape == (B, 7, mixer.width)
    assert torch.equal(mixer(x)[0], first)
    close(dict(mixer.state_dict()), before)


@each_causal
def test_state_holds_one_entry_a_row(name: str) -> None:
    mixer, x = build(name), inputs(7)
    _, state = mixer(x)
    assert state is not None
    assert all(s.shape[0] == B for s in state)
    rows = torch.tensor([2, 0])
    picked, _ = mixer(x[rows], tuple(s[rows] for s in state))
    close(picked, mixer(x, state)[0][rows])


@each_causal
def test_memory_of_a_step_is_constant(name: str) -> None:
    mixer, state = build(name), None
    x, sizes = inputs(18), []
    with torch.no_grad():
        for x_t in x.unbind(1):
            _, state = mixer.step(x_t, state)
            assert state is not None
            sizes.append(sum(s.numel() for s in state))
    assert (sizes[-1] == sizes[-2]) == (name != "attention")  # attention remembers every step, and says so
    assert (sizes[0] == sizes[-1]) == ("attention" not in name)  # that of a window remembers what there is of it


@each_causal
def test_bf16_mixed_precision(name: str) -> None:
    """What `trainer.precision=bf16-mixed` does: near the full precision, and the state may be used outside of it."""
    mixer, x, late = build(name).float(), inputs(9).bfloat16(), inputs(4, seed=2).float()
    whole, _ = mixer(torch.cat([x.float(), late], 1))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)  # in bfloat16, as the layer before gives it
        slopes = torch.autograd.grad(y.float().square().sum(), list(mixer.parameters()), retain_graph=True)
    y_late, _ = mixer(late, state)
    assert all(g.isfinite().all() for g in slopes)
    for found, right in ((y, whole[:, :9]), (y_late, whole[:, 9:])):
        assert (found - right).norm() < 0.05 * right.norm()  # bf16 rounds to 0.4 %, and errors add up over layers


@each_causal
def test_gradients_of_single_rows_side_by_side(name: str) -> None:
    """`torch.func` differentiates every mixer, as the exact Fisher of its nets needs it."""
    mixer, x = build(name), inputs(5)
    weights = {n: p.detach() for n, p in mixer.named_parameters()}
    torch.manual_seed(3)
    wanted = torch.randn_like(mixer(x)[0])

    def score(weights: dict[str, Tensor], row: Tensor, wanted: Tensor) -> Tensor:
        return (functional.call(mixer, weights, row[None])[0][0] * wanted).sum()

    found = torch.func.vmap(torch.func.grad(score), (None, 0, 0))(weights, x, wanted)
    for b in range(B):
        right = torch.autograd.grad((mixer(x[b : b + 1])[0][0] * wanted[b]).sum(), list(mixer.parameters()))
        close([found[n][b] for n in weights], list(right))


# Not those of positive states: their candidates are 1/2 where all weights are 0.
@pytest.mark.parametrize("name", [n for n in MIXERS if "positive" not in n])
def test_functional_call_replaces_weights(name: str) -> None:
    mixer, x = build(name), inputs(7)
    zeros = {k: torch.zeros_like(p) for k, p in mixer.named_parameters()}
    assert mixer(x)[0].abs().max() > 0
    y, _ = torch.func.functional_call(mixer, zeros, (x,))
    assert y.abs().max() == 0
