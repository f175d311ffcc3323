"""Objectives against a loop over examples and steps in float64, what must not matter to them, and the schedules.

Letters: B batch, T time, C classes, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.learners.objective import Objective, Unsupported
from clplat.learners.objectives import Bits, Classification, NextToken, Regression, Tagging, objective_for
from clplat.learners.schedules import constant, steps_down, warmup_cosine
from clplat.streams.batch import concatenate
from clplat.streams.experience import UNSCORED, Batch, Target

B, T, C, D = 4, 6, 5, 3
LENGTHS = torch.tensor([6, 3, 1, 5])
WEIGHT = torch.tensor([2.0, 1.0, 3.0, 0.0], dtype=torch.float64)
KINDS = ["class", "tag", "token", "bits", "value", "value_per_sequence"]
PER_STEP = ["tag", "token", "bits", "value"]
TYPES = {
    "class": Classification,
    "tag": Tagging,
    "token": NextToken,
    "bits": Bits,
    "value": Regression,
    "value_per_sequence": Regression,
}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_per_step = pytest.mark.parametrize("kind", PER_STEP)


def example(kind: str, *, lengths: bool = False, mask: bool = False, unscored: bool = False) -> tuple[Tensor, Batch]:
    """Logits and a batch of a kind; where asked, with padding, masked steps and unscored targets."""
    g = torch.Generator().manual_seed(3)
    y: Tensor
    if kind == "class":
        logits, y = torch.randn(B, C, generator=g), torch.randint(C, (B,), generator=g)
    elif kind in ("tag", "token"):
        logits, y = torch.randn(B, T, C, generator=g), torch.randint(C, (B, T), generator=g)
        if unscored:
            y[torch.rand(B, T, generator=g) < 0.3] = UNSCORED
    elif kind == "bits":
        logits, y = torch.randn(B, T, C, generator=g), torch.randint(2, (B, T, C), generator=g).double()
    else:
        shape = (B, C) if kind == "value_per_sequence" else (B, T, C)
        logits, y = torch.randn(shape, generator=g), torch.randn(shape, generator=g).double()
    return 2 * logits.double(), Batch(
        x=torch.randn(B, T, D, generator=g),
        y=y,
        lengths=LENGTHS if lengths else None,
        mask=torch.rand(B, T, generator=g) < 0.6 if mask else None,
    )


VARIANTS = {
    "plain": {},
    "lengths": {"lengths": True},
    "mask": {"mask": True},
    "unscored": {"unscored": True},
    "all": {"lengths": True, "mask": True, "unscored": True},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def loss_of(kind: str, z: list[float], y: Any) -> float:
    """The loss of one step, from the definition."""
    if kind in ("class", "tag", "token"):
        return math.log(sum(math.exp(v) for v in z)) - z[y]
    if kind == "bits":
        p = [1 / (1 + math.exp(-v)) for v in z]
        return -sum(math.log(q if bit else 1 - q) for q, bit in zip(p, y, strict=True))
    return sum((a - b) ** 2 for a, b in zip(z, y, strict=True)) / 2


def score_of(kind: str, z: list[float], y: Any) -> tuple[float, int]:
    """Score and count of one step, from the definition."""
    if kind in ("class", "tag"):
        return float(max(range(C), key=z.__getitem__) == y), 1
    if kind == "token":
        return loss_of(kind, z, y) / math.log(2), 1
    if kind == "bits":
        return float(sum((v >= 0) == bool(bit) for v, bit in zip(z, y, strict=True))), C
    return 2 * loss_of(kind, z, y), C


def scored_steps(kind: str, batch: Batch) -> list[list[tuple[int, ...]]]:
    """For each row, the places of its targets that are trained on."""
    if kind in ("class", "value_per_sequence"):
        return [[(b,)] for b in range(B)]
    return [
        [
            (b, t)
            for t in range(T)
            if (batch.lengths is None or t < batch.lengths[b])
            and (batch.mask is None or batch.mask[b, t])
            and (kind not in ("tag", "token") or batch.y[b, t] != UNSCORED)
        ]
        for b in range(B)
    ]


@each_variant
@each_kind
def test_equals_a_loop_over_steps(kind: str, variant: str) -> None:
    logits, batch = example(kind, **VARIANTS[variant])
    objective, steps = TYPES[kind](), scored_steps(kind, batch)
    losses = [[loss_of(kind, logits[at].tolist(), batch.y[at].tolist()) for at in row] for row in steps]

    found = objective.losses(logits, batch)
    expected = torch.zeros_like(found)
    for row, values in zip(steps, losses, strict=True):
        for at, value in zip(row, values, strict=True):
            expected[at] = value
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        objective.log_likelihood(logits, batch), torch.tensor([-sum(row) for row in losses], dtype=torch.float64)
    )

    flat = [v for row in losses for v in row]
    assert float(objective(logits, batch)) == pytest.approx(sum(flat) / len(flat), rel=1e-12)
    by_example = TYPES[kind](reduction="sum")
    assert float(by_example(logits, batch)) == pytest.approx(sum(map(sum, losses)) / B, rel=1e-12)

    weighted = replace(batch, weight=WEIGHT)
    total = sum(w * sum(row) for w, row in zip(WEIGHT.tolist(), losses, strict=True))
    count = sum(w * len(row) for w, row in zip(WEIGHT.tolist(), losses, strict=True))
    assert float(objective(logits, weighted)) == pytest.approx(total / count, rel=1e-12)
    assert float(by_example(logits, weighted)) == pytest.approx(total / float(WEIGHT.sum()), rel=1e-12)

    scores = [score_of(kind, logits[at].tolist(), batch.y[at].tolist()) for row in steps for at in row]
    value, number = objective.score(logits, batch)
    assert float(value) == pytest.approx(sum(s for s, _ in scores), rel=1e-12)
    assert int(number) == sum(n for _, n in scores)


@each_kind
def test_weights_equal_repeated_rows(kind: str) -> None:
    sizes = {} if kind in ("class", "value_per_sequence") else {"lengths": True, "unscored": True}
    logits, batch = example(kind, **sizes)
    repeated = torch.tensor([0, 0, 1, 2, 2, 2])  # WEIGHT is 2, 1, 3, 0
    for reduction in ("mean", "sum"):
        objective = TYPES[kind](reduction=reduction)
        a = logits.clone().requires_grad_()
        b = logits.clone().requires_grad_()
        once, often = objective(a, replace(batch, weight=WEIGHT)), objective(b[repeated], batch.rows(repeated))
        torch.testing.assert_close(once, often)
        torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v, z in ((once, a), (often, b))))


def dirty(kind: str, logits: Tensor, batch: Batch, trash: float) -> tuple[Tensor, Batch]:
    """The same with `trash` wherever nothing is scored because of lengths or mask, in logits and in targets."""
    within = torch.arange(T) < LENGTHS[:, None]
    within = within if batch.mask is None else within & batch.mask
    y = batch.y.clone()
    y[~within] = trash if y.is_floating_point() else C - 1
    return logits.masked_fill(~within[..., None], trash), replace(batch, y=y)


@pytest.mark.parametrize("trash", [7.0, math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("mask", [False, True], ids=["padding", "mask"])
@each_per_step
def test_what_is_not_scored_changes_nothing(kind: str, mask: bool, trash: float) -> None:
    logits, batch = example(kind, lengths=True, mask=mask)
    found = []
    for z, one in ((logits, batch), dirty(kind, logits, batch, trash)):
        for reduction in ("mean", "sum"):
            objective = TYPES[kind](reduction=reduction)
            z = z.clone().requires_grad_()
            loss = objective(z, one)
            (gradient,) = torch.autograd.grad(loss, z)
            found.append((objective.losses(z, one), loss, gradient, torch.stack(objective.score(z, one))))
    for clean, soiled in zip(found[:2], found[2:], strict=True):
        for a, b in zip(clean, soiled, strict=True):
            assert torch.equal(a, b)
    gradient = found[0][2]
    assert bool((gradient[1, 3:] == 0).all())
    assert bool((gradient[0] != 0).any())


@each_per_step
def test_padding_a_batch_changes_nothing(kind: str) -> None:
    """Sequences of different lengths in one padded batch, and each alone."""
    logits, batch = example(kind, lengths=True)
    objective = TYPES[kind](reduction="sum")
    alone = []
    for b, n in enumerate(LENGTHS.tolist()):
        one = Batch(x=batch.x[b : b + 1, :n], y=batch.y[b : b + 1, :n])
        alone.append((objective(logits[b : b + 1, :n], one), one))
    torch.testing.assert_close(objective(logits, batch), torch.stack([loss for loss, _ in alone]).mean())
    joined = concatenate([one for _, one in alone])
    torch.testing.assert_close(objective(logits, joined), objective(logits, batch))


def test_the_mask_never_reaches_into_padding() -> None:
    logits, batch = example("bits", lengths=True)
    everywhere = replace(batch, mask=torch.ones(B, T, dtype=torch.bool))
    assert torch.equal(Bits()(logits, everywhere), Bits()(logits, batch))


@pytest.mark.parametrize("kind", ["tag", "token"])
def test_unscored_steps_have_no_loss_no_gradient_and_no_score(kind: str) -> None:
    logits, batch = example(kind, unscored=True)
    where = batch.y == UNSCORED
    assert where.any()
    assert not where.all()
    logits.requires_grad_()
    objective = TYPES[kind]()
    assert bool((objective.losses(logits, batch)[where] == 0).all())
    (gradient,) = torch.autograd.grad(objective(logits, batch), logits)
    assert bool((gradient[where] == 0).all())
    assert bool((gradient[~where] != 0).all())
    assert int(objective.score(logits, batch)[1]) == int((~where).sum())


def test_equal_to_torchs_own() -> None:
    logits, batch = example("class")
    assert torch.equal(Classification()(logits, batch), F.cross_entropy(logits, batch.y))
    ones = replace(batch, weight=torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close(Classification()(logits, ones), F.cross_entropy(logits, batch.y))
    logits, batch = example("token", unscored=True)
    flat = F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), ignore_index=UNSCORED)
    torch.testing.assert_close(NextToken()(logits, batch), flat)
    logits, batch = example("bits")
    torch.testing.assert_close(Bits()(logits, batch), C * F.binary_cross_entropy_with_logits(logits, batch.y))
    logits, batch = example("value")
    torch.testing.assert_close(Regression()(logits, batch), C / 2 * F.mse_loss(logits, batch.y))


@each_variant
@pytest.mark.parametrize("kind", ["tag", "bits", "value"])
def test_gradients_are_right(kind: str, variant: str) -> None:
    logits, batch = example(kind, **VARIANTS[variant])
    weighted = replace(batch, weight=WEIGHT)
    for objective in (TYPES[kind](), TYPES[kind](reduction="sum")):
        assert torch.autograd.gradcheck(lambda z, o=objective: o(z, weighted), logits.requires_grad_())


def test_every_kind_has_its_objective_and_says_which_way_is_up() -> None:
    kinds: dict[Target, tuple[type[Objective], str, bool]] = {
        "class": (Classification, "accuracy", True),
        "tag": (Tagging, "accuracy", True),
        "token": (NextToken, "bits_per_token", False),
        "bits": (Bits, "accuracy", True),
        "value": (Regression, "mse", False),
    }
    for kind, (made, name, higher) in kinds.items():
        objective = objective_for(kind)
        assert type(objective) is made
        assert (objective.targets, objective.score_name, objective.higher_is_better) == ((kind,), name, higher)
        assert objective.reduction == "mean"


@each_kind
def test_an_unknown_reduction_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="reduction: got 'median', allowed are 'mean', 'sum'"):
        TYPES[kind](reduction="median")


def test_the_base_says_what_a_subclass_lacks() -> None:
    class Own(Objective):
        targets = ("class",)

    own, (logits, batch), generator = Own(), example("class"), torch.Generator()
    calls: list[Callable[[], Any]] = [
        lambda: own.losses(logits, batch),
        lambda: own.score(logits, batch),
        lambda: own.answer(logits, batch.y),
        lambda: own.right(logits, batch),
        lambda: own.sample(logits, batch, generator),
        lambda: own.entropy(logits),
        lambda: own.fisher_factors(logits, batch),
        lambda: own.coded(batch.y, 3),
    ]
    for call in calls:
        with pytest.raises(Unsupported, match=r"objective: Own does not define .*\(.*\)\. Choose an option"):
            call()


@pytest.mark.parametrize("kind", ["class", "bits", "value"])
def test_fisher_factors_are_the_covariance_of_the_score(kind: str) -> None:
    """sum_k v_k v_k^T against the mean of the outer products of d log p / d logits over drawn targets."""
    objective = objective_for(kind)
    logits, batch = example(kind)
    logits, batch = logits[:1].double(), batch.rows(torch.arange(1))
    factors = torch.stack([f.flatten() for f in objective.fisher_factors(logits, batch)])
    generator, outer, draws = torch.Generator().manual_seed(0), 0, 4000
    x, y = (t.expand(draws, *t.shape[1:]) for t in (batch.x, batch.y))
    many = Batch(x, y)
    wide = logits.expand(draws, *logits.shape[1:]).clone().requires_grad_()
    drawn = Batch(many.x, objective.sample(wide.detach(), many, generator))
    (slope,) = torch.autograd.grad(objective.log_likelihood(wide, drawn).sum(), wide)
    outer = slope.flatten(1).mT @ slope.flatten(1) / draws
    error = (outer - factors.mT @ factors).abs().max()
    assert error < 5 * float(factors.square().sum(0).max()) / draws**0.5


@pytest.mark.parametrize("kind", ["tag", "token"])
def test_tags_have_no_exact_fisher_and_say_what_to_choose(kind: str) -> None:
    with pytest.raises(Unsupported, match="set fisher=sampled or fisher=empirical"):
        objective_for(kind).fisher_factors(*example(kind))


def test_answers_are_right_where_they_equal_the_targets() -> None:
    for kind in ("class", "tag", "token", "bits"):
        objective, (logits, batch) = objective_for(kind), example(kind)
        same = Batch(batch.x, objective.answer(logits, batch.y))
        assert bool((objective.right(logits, same) == 1).all())
    _, batch = example("bits")
    one_of = torch.full_like(batch.y, 1.0)
    one_of[..., 0] = -1.0
    assert torch.equal(
        objective_for("bits").right(one_of, Batch(batch.x, torch.ones_like(batch.y)))[0, 0],
        torch.tensor(1 - 1 / batch.y.shape[-1], dtype=torch.float64),
    )


def test_entropies_are_those_of_the_distributions() -> None:
    even = torch.zeros(2, 4)
    assert objective_for("class").entropy(even).tolist() == pytest.approx([math.log(4)] * 2)
    assert objective_for("bits").entropy(even).tolist() == pytest.approx([4 * math.log(2)] * 2)
    sure = torch.tensor([[50.0, -50.0]])
    assert float(objective_for("class").entropy(sure)) == pytest.approx(0, abs=1e-6)


def factors(schedule: Callable[[int], float], steps: int) -> list[float]:
    return [schedule(step) for step in range(steps)]


def test_a_constant_schedule_is_one_everywhere() -> None:
    assert factors(constant(7), 7) == [1.0] * 7


def test_warmup_and_cosine_at_points_worked_out_by_hand() -> None:
    # 2 of 8 steps rise: 1/2, 1; then cosine over 5 intervals down to 0.
    half = [0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    assert factors(warmup_cosine(8, warmup=0.25), 8) == pytest.approx([0.5, 1.0, *half])
    assert factors(warmup_cosine(5), 5) == pytest.approx([1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * 2**0.5, 0])
    assert factors(warmup_cosine(3, final=0.2), 3) == pytest.approx([1, 0.6, 0.2])
    assert factors(warmup_cosine(4, warmup=1), 4) == [0.25, 0.5, 0.75, 1.0]
    assert factors(warmup_cosine(4, final=1), 4) == [1.0] * 4
    assert factors(warmup_cosine(1), 1) == [1.0]  # a single step is not thrown away
    assert warmup_cosine(5)(9) == pytest.approx(0)  # past the end it stays down


def test_steps_at_points_worked_out_by_hand() -> None:
    assert factors(steps_down(8, at=[0.5, 0.75]), 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors(steps_down(4, at=[0.75, 0.25], factor=0.5), 4) == [1, 0.5, 0.5, 0.25]
    assert factors(steps_down(3, at=[]), 3) == [1.0] * 3
    assert factors(steps_down(3, at=[0, 1]), 3) == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: warmup_cosine(10, warmup=2), r"warmup: got 2, it must lie in 0..1"),
        (lambda: warmup_cosine(10, warmup=-0.1), r"warmup: got -0.1"),
        (lambda: warmup_cosine(10, final=math.nan), r"final: got nan"),
        (lambda: steps_down(10, at=[0.5, 1.5]), r"at: got \[0.5, 1.5\], .* fractions .* 0..1"),
        (lambda: steps_down(10, at=0.5), r"at: got 0.5, .* list"),  # type: ignore[arg-type]  # on purpose
        (lambda: steps_down(10, at=[0.5], factor=0), r"factor: got 0, it must be above 0"),
    ],
)
def test_schedules_refuse_what_makes_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
