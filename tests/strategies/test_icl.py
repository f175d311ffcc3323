"""The ideal continual learner: against minimum-norm, ridge and constrained solutions of all experiences together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.gru import GRU
from clplat.learners.nets.heads import GrowingHead, Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.cumulative import Cumulative
from clplat.strategies.icl import ICL
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.inputs import Inputs

P, N, K = 40, 8, 4
TRAINING = Training(batch_size=8, epochs=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def consistent() -> list[tuple[Tensor, Tensor]]:
    """K regressions with one common solution."""
    right = draw(P, 2, seed=7)
    return [(x, x @ right) for x in (draw(N, P, seed=k) for k in range(K))]


def stream(tasks: Sequence[tuple[Tensor, Tensor]]) -> Stream:
    parts = []
    for k, (x, y) in enumerate(tasks):
        data = TensorData(x, y)
        parts.append(Experience(k, str(k), (), train=data, test=data))
    width, outputs = tasks[0][0].shape[1], tasks[0][1].shape[1]
    return Stream("linear", tuple(parts), "domain_incremental", "value", outputs, features=width, length=0)


def solved(trainer: Callable, tasks: Sequence[tuple[Tensor, Tensor]], **options: Any) -> tuple[Tensor, Run]:
    strategy = ICL(**dict[str, Any](base="initial", bias=False) | options)
    width, outputs = tasks[0][0].shape[1], tasks[0][1].shape[1]
    net = mlp(Inputs(features=width, length=0), partial(Head, outputs=outputs), hidden=[])
    run = Run(stream(tasks), Learner(net, objective_for("value"), strategy).double(), trainer(), TRAINING)
    run.go()
    assert strategy.solution is not None
    return strategy.solution, run


def together(tasks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*tasks, strict=True)
    return torch.cat(x), torch.cat(y)


CASES = {"icl": Case({"batch_size": 16, "random_features": 12}, saves=7)}


def test_null_space_is_the_joint_minimum_norm_solution_and_forgets_nothing(trainer: Callable) -> None:
    got, run = solved(trainer, consistent(), mode="null_space", batch_size=3)
    x, y = together(consistent())
    torch.testing.assert_close(got, torch.linalg.pinv(x) @ y, rtol=0, atol=1e-12)
    assert float((x @ got - y).abs().max()) < 1e-12
    assert float(run.results.R.tril().max()) < 1e-20  # no training loss after its experience, whatever follows
    assert float(run.results.R[0, 1]) > 1
    rest = run.learner.get_buffer("strategy.parts.icl.rest")
    assert rest.shape == (P, P - K * N)
    assert float((x @ rest).abs().max()) < 1e-12


def test_the_order_of_experiences_does_not_matter_but_does_to_finetuning(trainer: Callable) -> None:
    tasks = consistent()
    other = [tasks[k] for k in (2, 0, 3, 1)]
    for options in ({"mode": "null_space"}, {"ridge": 0.3}):
        torch.testing.assert_close(
            solved(trainer, tasks, **options)[0], solved(trainer, other, **options)[0], rtol=0, atol=1e-11
        )

    def finetuned(tasks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        w = torch.zeros(P, 2, dtype=torch.float64)
        for x, y in tasks:
            w = w + torch.linalg.pinv(x) @ (y - x @ w)
        return w

    assert float((finetuned(tasks) - finetuned(other)).norm()) > 0.1
    x, y = tasks[0]
    assert float((x @ finetuned(tasks) - y).norm()) > 0.1  # what the ideal learner does not forget


def test_recursive_least_squares_is_the_joint_ridge_solution(trainer: Callable) -> None:
    tasks = [(x, y + draw(N, 2, seed=20 + k)) for k, (x, y) in enumerate(consistent())]
    x, y = together(tasks)
    for ridge in (0.7, 30.0):
        right = torch.linalg.solve(x.mT @ x + ridge * torch.eye(P, dtype=torch.float64), x.mT @ y)
        for batch_size in (3, 100):
            got, _ = solved(trainer, tasks, ridge=ridge, batch_size=batch_size)
            torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_a_small_ridge_gives_the_joint_minimum_norm_solution(trainer: Callable) -> None:
    got, _ = solved(trainer, consistent(), ridge=1e-9)
    x, y = together(consistent())
    torch.testing.assert_close(got, torch.linalg.pinv(x) @ y, rtol=0, atol=1e-7)


def test_noisy_experiences_are_solved_within_the_old_minimisers(trainer: Callable) -> None:
    """The first has more rows than rank and no exact solution; the second is solved subject to its normal equations."""
    first, second = draw(12, 5, seed=1) @ draw(5, P, seed=2), draw(50, P, seed=3)
    tasks = [(first, draw(12, 2, seed=4)), (second, draw(50, 2, seed=5))]
    with pytest.warns(UserWarning, match="used up"):
        got, _ = solved(trainer, tasks, mode="null_space", batch_size=7)
    (x1, y1), (x2, y2) = tasks
    normal = x1.mT @ x1
    torch.testing.assert_close(normal @ got, x1.mT @ y1, rtol=0, atol=1e-9)
    # Optimality: multipliers exist, so the second loss's gradient lies in the span of the first one's inputs.
    gradient = x2.mT @ (x2 @ got - y2)
    inside = torch.linalg.lstsq(first.mT, gradient, driver="gelsd").solution
    assert float((first.mT @ inside - gradient).abs().max()) < 1e-9
    assert float(gradient.abs().max()) > 0.1  # it is not the unconstrained optimum


def test_with_no_direction_left_it_warns_and_learns_nothing(trainer: Callable) -> None:
    tasks = [(draw(P + 5, P, seed=1), draw(P + 5, 2, seed=2)), (draw(N, P, seed=3), draw(N, 2, seed=4))]
    with pytest.warns(UserWarning, match="used up, later experiences cannot be learned"):
        got, _ = solved(trainer, tasks, mode="null_space")
    x, y = tasks[0]
    torch.testing.assert_close(got, torch.linalg.lstsq(x, y).solution, rtol=0, atol=1e-10)


def test_a_larger_tolerance_keeps_room(trainer: Callable) -> None:
    x = draw(N, P, seed=1)
    x[-1] = x[0] + 1e-4 * x[-1]  # a direction that hardly matters
    _, exact = solved(trainer, [(x, draw(N, 2))], mode="null_space")
    _, truncated = solved(trainer, [(x, draw(N, 2))], mode="null_space", tolerance=1e-3)
    assert exact.learner.get_buffer("strategy.parts.icl.rest").shape[1] == P - N
    assert truncated.learner.get_buffer("strategy.parts.icl.rest").shape[1] == P - N + 1


def classes(per_step: bool = False) -> Stream:
    generator, parts = torch.Generator().manual_seed(5), []
    for k in range(3):
        y = torch.randint(2 * k, 2 * k + 2, (40, 5) if per_step else (40,), generator=generator)
        shift = 0.8 * y[..., None] if per_step else 0.8 * y[:, None, None]
        mask = torch.rand(40, 5, generator=generator) < 0.6 if per_step else None
        data = TensorData(torch.randn(40, 5, 4, generator=generator) + shift, y, mask=mask)
        parts.append(Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data))
    target = "tag" if per_step else "class"
    return Stream("tiny", tuple(parts), "class_incremental", target, 6, features=4, length=5, per_step=per_step)


def sequences(trainer: Callable, given: Stream, strategy: ICL | None, head: type[Head] = Head) -> Run:
    torch.manual_seed(1)
    inputs = Inputs(features=4, length=5, per_step=given.per_step)
    net = recurrent(inputs, partial(head, outputs=6), mixer=GRU, hidden=7)
    run = Run(given, Learner(net, objective_for(given.target), strategy), trainer(), TRAINING)
    run.go()
    return run


def everything(run: Run) -> tuple[Tensor, Batch]:
    batches = [e.train.batch(torch.arange(40)) for e in run.stream]
    with torch.no_grad():
        features = torch.cat([run.learner.net(b).features for b in batches])
    mask = None if batches[0].mask is None else torch.cat([b.mask for b in batches if b.mask is not None])
    return features.double(), Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), mask=mask)


@pytest.mark.parametrize("per_step", [False, True])
def test_classes_and_tags_are_regressed_on_scored_steps_of_frozen_features(trainer: Callable, per_step: bool) -> None:
    strategy = ICL(ridge=0.1, random_features=11, seed=3)
    run = sequences(trainer, classes(per_step), strategy)
    features, batch = everything(run)
    z = torch.randn(7, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 7**0.5
    x, y = torch.cat([torch.relu(features @ z), features.new_ones(*features.shape[:-1], 1)], -1), batch.y
    whole = x
    if per_step:
        assert batch.mask is not None
        x, y = x[batch.mask], y[batch.mask]
    right = torch.linalg.solve(x.mT @ x + 0.1 * torch.eye(12), x.mT @ torch.nn.functional.one_hot(y, 6).double())
    assert strategy.solution is not None
    torch.testing.assert_close(strategy.solution, right, rtol=0, atol=1e-6)
    with torch.no_grad():
        output = run.learner.net(batch)
        answer = strategy.predict(run.learner, batch, output.logits, output.features)
    torch.testing.assert_close(answer.double(), whole @ right, rtol=0, atol=1e-5)
    assert answer.shape == output.logits.shape


def test_only_experience_0_is_trained_and_as_in_finetuning(trainer: Callable) -> None:
    given = classes()
    first = Stream("first", given.experiences[:1], "class_incremental", "class", 6, features=4, length=5)
    plain, run = sequences(trainer, first, None), sequences(trainer, given, ICL())
    for (name, a), b in zip(plain.learner.net.named_parameters(), run.learner.net.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert run.learner.steps == plain.learner.steps == 5
    assert float(run.results.R[-1].mean()) > 0.4  # chance is 1/6: later classes are learned all the same
    untrained = sequences(trainer, given, ICL(base="initial"))
    assert untrained.learner.steps == 0


def test_a_class_that_the_head_does_not_offer_is_never_answered(trainer: Callable) -> None:
    given = classes()
    first = Stream("first", given.experiences[:1], "class_incremental", "class", 6, features=4, length=5)
    run = sequences(trainer, first, ICL(), GrowingHead)
    batch = given[0].test.batch(torch.arange(10))
    with torch.no_grad():
        output = run.learner.net(batch)
        answer = run.learner.strategy.predict(run.learner, batch, output.logits, output.features)
    assert bool((answer[:, 2:] == torch.finfo(torch.float32).min).all())
    assert bool((answer[:, :2].abs() < 10).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "qr"}, "got 'qr', allowed are 'null_space', 'recursive_least_squares'"),
        ({"base": "last"}, "allowed are 'first', 'initial'"),
        ({"random_features": 0}, "random_features: got 0, it must be at least 1"),
        ({"ridge": 0.0}, "must be above 0"),
        ({"tolerance": 1.0}, "below 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ICL(**options)


def test_what_it_cannot_do_is_refused_before_training() -> None:
    net = mlp(Inputs(features=4, length=0), partial(Head, outputs=6), hidden=[])
    with pytest.raises(ValueError, match="no probability, which NextToken is scored by"):
        ICL().setup(Learner(net, objective_for("token")), classes())
    with pytest.raises(ValueError, match="icl and cumulative cannot be used both: each chooses what an experience"):
        Composite({"icl": ICL(), "cumulative": Cumulative()})
