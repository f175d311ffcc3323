"""Forgetting and generalisation of linear regression against the closed forms of Lin, Ju, Liang & Shroff (2023,
arXiv 2302.05836): an oracle for everything between a score and a metric.

y_t = X_t w*_t + z_t with X_t [n, p] and z_t Gaussian, fresh in every experience, the noise of variance s2. The learner
starts from 0 and takes the interpolator next to where it is, which is where gradient descent converges to. The model
error of experience i is L_i(w) = ||w - w*_i||^2; it is what the platform evaluates, since the test set is a scaled
identity without noise. Letters: T experiences, p features, n examples, S simulated runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.metrics import summary
from clplat.scores import ScoreTable
from clplat.settings import Training
from clplat.strategy import Session, Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs

ALLOWED = 4.0
"""Standard errors by which a simulated mean may differ from its closed form."""


def closed_errors(teachers: Tensor, n: int, s2: float) -> Tensor:
    """E L_i(w_t) [T, T] for w*_1..w*_T [T, p], t the row: the overparameterised case, p >= n + 2."""
    count, p = teachers.shape
    r, noise = 1 - n / p, p * s2 / (p - n - 1)
    errors = torch.zeros(count, count, dtype=torch.float64)
    for t in range(1, count + 1):
        for i in range(count):
            apart = sum(r ** (t - k) * (teachers[k - 1] - teachers[i]).square().sum() for k in range(1, t + 1))
            errors[t - 1, i] = r**t * teachers[i].square().sum() + (1 - r) * apart + noise * (1 - r**t)
    return errors


def closed_forgetting(teachers: Tensor, n: int, s2: float) -> float:
    """E F_T as the theorem has it, with its coefficients c_ij; p >= n + 2."""
    count, p = teachers.shape
    r, noise, total = 1 - n / p, p * s2 / (p - n - 1), 0.0
    for i in range(1, count):
        total += (r**count - r**i) * float(teachers[i - 1].square().sum()) + noise * (r**i - r**count)
        for j in range(i + 1, count + 1):
            c = (1 - r) * (r ** (count - i) - r ** (j - i) + r ** (count - j))
            total += c * float((teachers[i - 1] - teachers[j - 1]).square().sum())
    return total / (count - 1)


def closed_underparameterised(teachers: Tensor, n: int, s2: float) -> tuple[float, float]:
    """E F_T and E G_T for n >= p + 2, where each experience is solved by least squares alone."""
    count, p = teachers.shape
    apart = (teachers - teachers[-1]).square().sum(1)
    return float(apart[:-1].sum()) / (count - 1), float(apart.mean()) + p * s2 / (n - p - 1)


def simulated(teachers: Tensor, n: int, s2: float, runs: int, seed: int) -> Tensor:
    """Model errors [S, T, T] of `runs` simulated runs."""
    generator, p = torch.Generator().manual_seed(seed), teachers.shape[1]
    w, errors = torch.zeros(runs, p, dtype=torch.float64), []
    for teacher in teachers:
        x = torch.randn(runs, n, p, generator=generator, dtype=torch.float64)
        z = s2**0.5 * torch.randn(runs, n, generator=generator, dtype=torch.float64)
        w = w + _correction(x, x @ teacher + z - (x @ w[..., None])[..., 0])
        errors.append((w[:, None] - teachers).square().sum(-1))
    return torch.stack(errors, 1)


def _correction(x: Tensor, residual: Tensor) -> Tensor:
    """The smallest change [..., p] that solves x [..., n, p] for the residual [..., n], in the least-squares sense."""
    if x.shape[-2] <= x.shape[-1]:
        return (x.mT @ torch.linalg.solve(x @ x.mT, residual[..., None]))[..., 0]
    return torch.linalg.solve(x.mT @ x, x.mT @ residual[..., None])[..., 0]


def metrics_of(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Forgetting and average error [S] of model errors [S, T, T], by the platform's score table and summary."""
    forgetting, average = [], []
    for rows in errors:
        table = ScoreTable(rows.shape[1], "mse", higher_is_better=False)
        for t, row in enumerate(rows):
            table.append(row, trained=t, step=t)
        values = summary(table)
        forgetting.append(-values["backward_transfer"])
        average.append(values["average"])
    return torch.tensor(forgetting, dtype=torch.float64), torch.tensor(average, dtype=torch.float64)


def agree(values: Tensor, closed: float, known: float = 0.05) -> None:
    """The mean of `values` [S] is `closed`, up to ALLOWED standard errors, which must be small for that to count."""
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - closed) < ALLOWED * error, (float(values.mean()), closed, error)
    assert error < known * max(1.0, abs(closed))


def teachers_of(count: int, p: int, seed: int = 0) -> Tensor:
    common, own = (
        torch.randn(k, p, generator=torch.Generator().manual_seed(seed + k), dtype=torch.float64) for k in (1, count)
    )
    return (common + 0.7 * own) * (6 / p) ** 0.5


@pytest.mark.parametrize(("count", "n", "p"), [(2, 10, 40), (4, 20, 60), (6, 5, 30), (3, 2, 100), (5, 12, 24)])
def test_the_two_closed_forms_are_one(count: int, n: int, p: int) -> None:
    teachers = teachers_of(count, p)
    errors = closed_errors(teachers, n, 0.25)
    by_rows = float((errors[-1] - errors.diagonal())[:-1].mean())
    assert by_rows == pytest.approx(closed_forgetting(teachers, n, 0.25), rel=1e-12)


@pytest.mark.parametrize(("count", "n", "p"), [(2, 10, 40), (4, 20, 60), (6, 5, 30), (3, 2, 100), (5, 12, 24)])
def test_overparameterised_metrics_are_the_closed_forms(count: int, n: int, p: int) -> None:
    teachers = teachers_of(count, p)
    errors = simulated(teachers, n, 0.25, runs=1000, seed=1)
    forgetting, average = metrics_of(errors)
    agree(forgetting, closed_forgetting(teachers, n, 0.25))
    closed = closed_errors(teachers, n, 0.25)
    agree(average, float(closed[-1].mean()))
    for t in range(count):
        for i in range(count):
            agree(errors[:, t, i], float(closed[t, i]))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_any_order_of_the_experiences_has_its_own_closed_form(order: list[int]) -> None:
    teachers = teachers_of(4, 30, seed=5)[order]
    forgetting, average = metrics_of(simulated(teachers, 12, 0.1, runs=1000, seed=2))
    agree(forgetting, closed_forgetting(teachers, 12, 0.1))
    agree(average, float(closed_errors(teachers, 12, 0.1)[-1].mean()))


@pytest.mark.parametrize(("count", "n", "p"), [(4, 40, 10), (3, 14, 8)])
def test_underparameterised_metrics_are_the_closed_forms(count: int, n: int, p: int) -> None:
    teachers = teachers_of(count, p)
    forgetting, average = metrics_of(simulated(teachers, n, 0.25, runs=1000, seed=3))
    f, g = closed_underparameterised(teachers, n, 0.25)
    agree(forgetting, f)
    agree(average, g)


def test_identical_experiences_are_not_forgotten_but_improve() -> None:
    teachers = teachers_of(1, 40).expand(4, 40)
    forgetting, _ = metrics_of(simulated(teachers, 8, 0.01, runs=500, seed=4))
    assert closed_forgetting(teachers, 8, 0.01) < -0.5
    agree(forgetting, closed_forgetting(teachers, 8, 0.01))


class Interpolate(Strategy):
    """Solves each experience at once, by the smallest change of the weights."""

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        return Session(None, 0.0)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        weight, batch = learner.net.head.linear.weight, experience.train.batch(torch.arange(len(experience.train)))
        weight.add_(_correction(batch.x, (batch.y - batch.x @ weight.mT)[:, 0])[None])


def linear_teacher(teachers: Tensor, n: int, s2: float, seed: int) -> Stream:
    """The setting as a stream. The test inputs are sqrt(p) I: the mean squared error on them is the model error."""
    generator, p = torch.Generator().manual_seed(seed), teachers.shape[1]
    test, parts = p**0.5 * torch.eye(p, dtype=torch.float64), []
    for k, teacher in enumerate(teachers):
        x = torch.randn(n, p, generator=generator, dtype=torch.float64)
        z = s2**0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        train = TensorData(x, (x @ teacher + z)[:, None])
        parts.append(Experience(k, str(k), (), train=train, test=TensorData(test, (test @ teacher)[:, None])))
    return Stream("linear_teacher", tuple(parts), "domain_incremental", "value", 1, features=p, length=0)


def learned(
    trainer: Callable, stream: Stream, strategy: Strategy | None, steps: int = 1, lr: float = 0.1
) -> ScoreTable:
    net = mlp(Inputs(features=stream.features, length=0), partial(Head, outputs=1), hidden=[])
    net.head.linear.bias.requires_grad_(False).zero_()
    with torch.no_grad():
        net.head.linear.weight.zero_()
    learner = Learner(net, objective_for("value"), strategy, partial(torch.optim.SGD, lr=lr)).double()
    return Run(stream, learner, trainer(), Training(batch_size=len(stream[0].train), steps=steps)).go().all


def test_whole_runs_of_the_platform_agree_with_the_closed_forms(trainer: Callable) -> None:
    teachers, runs, made = teachers_of(4, 20), 300, trainer()
    tables = [
        learned(lambda: made, linear_teacher(teachers, 6, 0.25, seed), Interpolate()) for seed in range(100, 100 + runs)
    ]
    assert all(not table.higher_is_better and table.score == "mse" for table in tables)
    values = [summary(table) for table in tables]
    agree(-torch.tensor([v["backward_transfer"] for v in values]), closed_forgetting(teachers, 6, 0.25), 0.1)
    agree(torch.tensor([v["average"] for v in values]), float(closed_errors(teachers, 6, 0.25)[-1].mean()), 0.1)


def test_gradient_descent_through_the_trainer_converges_to_the_same_scores(trainer: Callable) -> None:
    stream = linear_teacher(teachers_of(3, 30), 4, 0.25, seed=9)
    exact = learned(trainer, stream, Interpolate())
    # The objective is a mean over n rows of half a square: its curvature is that of X^T X / n.
    curvature = max(
        float(torch.linalg.matrix_norm(e.train.batch(torch.arange(4)).x, 2)) ** 2 / 4 for e in stream.experiences
    )
    descended = learned(trainer, stream, None, steps=400, lr=1 / curvature)
    torch.testing.assert_close(descended.R, exact.R, rtol=0, atol=1e-9)
