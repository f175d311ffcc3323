"""Streaming LDA: against the recurrence example by example, the pooled covariance, and scikit-learn's shrinkage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from sklearn.covariance import OAS
from tiny import only
from torch import Tensor

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.elman import Elman
from clplat.learners.nets.heads import Head
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.cumulative import Cumulative
from clplat.strategies.slda import SLDA, oracle_approximating_shrinkage
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs

H, C = 6, 4


def examples(seed: int = 0, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (count,), generator=generator)
    return torch.randn(count, H, generator=generator, dtype=torch.float64) + y[:, None], y


def observed(x: Tensor, y: Tensor, pooled: bool, pieces: list[int]) -> SLDA:
    slda = SLDA()
    for a, b in zip(x.split(pieces), y.split(pieces), strict=True):
        slda.observe(a, b, C, pooled)
    return slda


def recurrence(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means and covariance, one example after the other."""
    means, counts, sigma = x.new_zeros(C, H), x.new_zeros(C), x.new_ones(H, H)
    for n, (one, label) in enumerate(zip(x, y.tolist(), strict=True)):
        d = one - means[label]
        sigma = (n * sigma + n / (n + 1) * torch.outer(d, d)) / (n + 1)
        means[label] = (counts[label] * means[label] + one) / (counts[label] + 1)
        counts[label] += 1
    return means, sigma


CASES = {"slda": Case({"batch_size": 16}, saves=7)}


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 20, 1, 32]])
def test_the_default_is_the_recurrence(pieces: list[int]) -> None:
    x, y = examples()
    means, sigma = recurrence(x, y)
    slda = observed(x, y, pooled=False, pieces=pieces)
    assert slda.means is not None
    torch.testing.assert_close(slda.means, means)
    torch.testing.assert_close(slda.covariance(), sigma)


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 20, 1, 32]])
def test_exact_is_the_pooled_covariance_whatever_the_order(pieces: list[int]) -> None:
    x, y = examples()
    centred = torch.cat([x[y == c] - x[y == c].mean(0) for c in range(C)])
    pooled = centred.mT @ centred / len(x)
    for order in (torch.arange(60), torch.arange(60).flip(0), y.argsort(), torch.randperm(60)):
        slda = observed(x[order], y[order], pooled=True, pieces=pieces)
        torch.testing.assert_close(slda.covariance(), pooled)
    # ... which the recurrence only is in the limit.
    other = observed(x, y, pooled=False, pieces=pieces).covariance()
    assert float((other - pooled).abs().max()) > 0.01


def test_the_shrinkage_is_that_of_scikit_learn() -> None:
    for count in (8, 60):
        x, _ = examples(count=count)
        got = oracle_approximating_shrinkage(x.mT @ x / count, torch.tensor(float(count), dtype=torch.float64))
        right = OAS(assume_centered=True).fit(x.numpy()).covariance_
        torch.testing.assert_close(got, torch.from_numpy(right))
    equal = oracle_approximating_shrinkage(2 * torch.eye(3).double(), torch.tensor(5.0, dtype=torch.float64))
    torch.testing.assert_close(equal, 2 * torch.eye(3).double())


def stream(per_step: bool = False) -> Stream:
    generator, parts = torch.Generator().manual_seed(5), []
    for k in range(3):
        y = torch.randint(2 * k, 2 * k + 2, (40, 5) if per_step else (40,), generator=generator)
        shift = 0.8 * y[..., None] if per_step else 0.8 * y[:, None, None]
        mask = torch.rand(40, 5, generator=generator) < 0.6 if per_step else None
        data = TensorData(torch.randn(40, 5, 4, generator=generator) + shift, y, mask=mask)
        parts.append(Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data))
    target = "tag" if per_step else "class"
    return Stream("tiny", tuple(parts), "class_incremental", target, 6, features=4, length=5, per_step=per_step)


def trained(trainer: Callable, given: Stream, strategy: SLDA | None) -> Run:
    torch.manual_seed(1)
    inputs = Inputs(features=4, length=5, per_step=given.per_step)
    net = recurrent(inputs, partial(Head, outputs=6), mixer=Elman, hidden=H)
    run = Run(given, Learner(net, objective_for(given.target), strategy), trainer(), Training(batch_size=8, epochs=1))
    run.go()
    return run


@pytest.mark.parametrize("per_step", [False, True])
def test_scores_are_the_linear_discriminant_of_frozen_features(trainer: Callable, per_step: bool) -> None:
    strategy = SLDA(shrinkage=0.01, exact=True, first="stream", batch_size=9)
    run = trained(trainer, stream(per_step), strategy)
    features, labels = [], []
    for experience in run.stream:
        batch = experience.train.batch(torch.arange(40))
        with torch.no_grad():
            f = run.learner.net(batch).features.double()
        keep = torch.ones_like(batch.y, dtype=torch.bool) if batch.mask is None else batch.mask
        features.append(f[keep])
        labels.append(batch.y[keep])
    x, y = torch.cat(features), torch.cat(labels)
    means = torch.stack([x[y == c].mean(0) for c in range(6)])
    sigma = (x - means[y]).mT @ (x - means[y]) / len(x)
    precision = torch.linalg.inv(0.99 * sigma + 0.01 * torch.eye(H))
    torch.testing.assert_close(strategy.covariance(), sigma, rtol=1e-6, atol=1e-9)
    batch = run.stream[1].test.batch(torch.arange(40))
    with torch.no_grad():
        output = run.learner.net(batch)
        scores = strategy.predict(run.learner, batch, output.logits, output.features)
    f = output.features.double()
    right = f @ precision @ means.mT - 0.5 * ((means @ precision) * means).sum(1)
    torch.testing.assert_close(scores.double(), right, rtol=1e-4, atol=1e-4)
    assert float(run.results.R[-1].mean()) > 0.3  # chance is 1/6


def test_the_first_experience_enters_shrunk_and_the_rest_by_the_recurrence(trainer: Callable) -> None:
    strategy = SLDA(batch_size=11)
    run = trained(trainer, stream(), strategy)
    features = []
    for experience in run.stream:
        with torch.no_grad():
            features.append(run.learner.net(experience.train.batch(torch.arange(40))).features.double())
    first = run.stream[0].train.batch(torch.arange(40)).y
    means, counts = torch.zeros(6, H, dtype=torch.float64), torch.zeros(6)
    for c in (0, 1):
        means[c], counts[c] = features[0][first == c].mean(0), (first == c).sum()
    sigma = torch.from_numpy(OAS(assume_centered=True).fit((features[0] - means[first]).numpy()).covariance_)
    n = 40
    for k in (1, 2):
        for one, label in zip(features[k], run.stream[k].train.batch(torch.arange(40)).y.tolist(), strict=True):
            d = one - means[label]
            sigma = (n * sigma + n / (n + 1) * torch.outer(d, d)) / (n + 1)
            means[label] = (counts[label] * means[label] + one) / (counts[label] + 1)
            counts[label], n = counts[label] + 1, n + 1
    torch.testing.assert_close(strategy.covariance(), sigma, rtol=1e-6, atol=1e-9)
    assert strategy.means is not None
    torch.testing.assert_close(strategy.means, means, rtol=1e-6, atol=1e-9)


def test_only_experience_0_is_trained_and_unmet_classes_are_never_answered(trainer: Callable) -> None:
    given = stream()
    first = Stream("first", given.experiences[:1], "class_incremental", "class", 6, features=4, length=5)
    plain, whole, early = (
        trained(trainer, first, None),
        trained(trainer, given, SLDA()),
        trained(trainer, first, SLDA()),
    )
    for (name, a), b in zip(plain.learner.net.named_parameters(), whole.learner.net.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert whole.learner.steps == plain.learner.steps
    batch = given[0].test.batch(torch.arange(10))
    with torch.no_grad():
        output = early.learner.net(batch)
        scores = only(early.learner).predict(early.learner, batch, output.logits, output.features)
    assert bool((scores[:, 2:] == torch.finfo(torch.float32).min).all())
    assert bool((scores[:, :2] > -1e4).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": 1.5}, "must lie in 0..1"),
        ({"first": "lda"}, "allowed are 'oas', 'stream'"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLDA(**options)


def test_what_it_cannot_do_is_refused_before_training() -> None:
    net = recurrent(Inputs(features=4, length=5), partial(Head, outputs=6), mixer=Elman, hidden=H)
    with pytest.raises(
        ValueError, match="tells classes apart and gives no probabilities, which does not do for Regression"
    ):
        SLDA().setup(Learner(net, objective_for("value"), SLDA()), stream())
    with pytest.raises(ValueError, match="slda and cumulative cannot be used both: each chooses what an experience"):
        Composite({"slda": SLDA(), "cumulative": Cumulative()})
    with pytest.raises(ValueError, match="before the first experience has ended"):
        SLDA().covariance()
