"""Gradient projection memory: its bases against brute-force SVD, and old answers that stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.gpm import GPM
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.experience import Data, Experience, Stream
from clplat.streams.inputs import Inputs
from clplat.weights.subspace import collect, extended, without

SGD, ADAM = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1)


ANY = Stream("any", (), "domain_incremental", "class", 1)  # GPM does not read it


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {"gpm": Case({"energy": 0.8, "examples": 20}, off={"energy": 0.0})}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.97, 1.0])
def test_a_basis_is_extended_by_as_few_directions_as_the_energy_needs(energy: float) -> None:
    first, second = draw(30, 12, seed=1) * torch.arange(1, 13), draw(9, 12, seed=2) @ draw(12, 12, seed=3)
    triangle = None
    for part in first.split(7):
        triangle = collect(triangle, part)
    assert triangle is not None
    torch.testing.assert_close(triangle.mT @ triangle, first.mT @ first)
    basis = extended(None, triangle, energy, 1e-12)
    _, sizes, right = np.linalg.svd(first.numpy())
    count = 12 if energy == 1 else int(np.argmax(np.cumsum(sizes**2) >= energy * (sizes**2).sum())) + 1
    assert basis.shape == (12, count)
    projector = torch.from_numpy(right[:count].T @ right[:count])
    torch.testing.assert_close(basis @ basis.mT, projector)
    if count == 12:
        return
    # Later inputs: what the old basis holds of them counts, and only what it misses adds directions.
    both = extended(basis, second, energy, 1e-12)
    torch.testing.assert_close(both[:, :count], basis)
    torch.testing.assert_close(both.mT @ both, torch.eye(both.shape[1], dtype=torch.float64))

    def held(directions: Tensor) -> float:
        return float((second @ directions).square().sum() / second.square().sum())

    assert held(both) >= energy
    added = both.shape[1] - count
    assert added == 0 or held(both[:, :-1]) < energy
    missed = second - second @ basis @ basis.mT
    leading = torch.linalg.svd(missed, full_matrices=False).Vh[:added]
    torch.testing.assert_close((leading @ both[:, count:]).abs(), torch.eye(added, dtype=torch.float64))


def test_directions_that_are_rounding_are_left_out_and_room_is_kept_to() -> None:
    rows = draw(3, 10, seed=1)
    basis = extended(None, torch.cat([rows, rows @ rows.mT @ rows]), 1.0, 1e-12)
    assert basis.shape == (10, 3)
    assert extended(basis, rows, 1.0, 1e-12).shape == (10, 3)
    assert extended(basis, draw(7, 10, seed=2), 1.0, 1e-12, room=2).shape == (10, 5)
    assert extended(None, rows[:0], 1.0, 1e-12).shape == (10, 0)


def test_few_long_rows_cost_little_and_give_the_same_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthogonal gradient descent has some hundred rows as long as the net: no decomposition may see them wide."""
    svd, rows, old = torch.linalg.svd, draw(6, 500, seed=1) * torch.arange(1, 7)[:, None], draw(4, 500, seed=2)
    basis = extended(None, old, 1.0, 1e-12)
    missed = rows - rows @ basis @ basis.mT
    right = svd(missed, full_matrices=False).Vh[:3].mT

    def narrow(matrix: Tensor, **options: bool) -> object:
        assert max(matrix.shape) <= 10, "the decomposition of a wide matrix is slow"
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", narrow)
    both = extended(basis, rows, 1.0, 1e-12, room=3)
    torch.testing.assert_close(both.mT @ both, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(both[:, 4:] @ both[:, 4:].mT, right @ right.mT)


def test_a_projection_is_exact_in_half_precision_runs_too() -> None:
    rows, basis = draw(5, 30).float(), extended(None, draw(8, 30, seed=1), 1.0, 1e-12).float()
    plain = without(rows, basis)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(without(rows, basis), plain)
    assert float((plain @ basis).abs().max()) < 1e-5


def experiences(kind: str) -> list[Experience]:
    """Three sequences an experience: few enough that their subspaces leave room."""
    parts = []
    for k in range(3):
        x = draw(3, 3, 4, seed=k)
        y = torch.tensor([2 * k, 2 * k + 1, 2 * k])
        data: Data = TensorData(x[:, 0] if kind == "mlp" else x, y)
        if kind == "tokens":
            data = TensorData(torch.tensor([[3 * k, 3 * k + 1], [3 * k + 1, 3 * k], [3 * k, 3 * k]]), y)
        parts.append(Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data))
    return parts


def net(kind: str) -> Net:
    head = partial(Head, outputs=6)
    if kind == "mlp":
        return mlp(Inputs(features=4, length=0), head, hidden=[20, 20])
    if kind == "transformer":
        return transformer(Inputs(features=4, length=3), head, hidden=16, layers=1, heads=2)
    if kind == "tokens":
        return recurrent(Inputs(vocabulary=9, length=2), head, mixer=GRU, hidden=20, embedding=12)
    return recurrent(
        Inputs(features=4, length=3), head, mixer={"lstm": LSTM, "gru": GRU, "elman": Elman}[kind], hidden=20
    )


def start(trainer: Callable, kind: str, strategy: GPM, optimizer: Callable, count: int = 3) -> Run:
    torch.manual_seed(1)
    parts = experiences(kind)[:count]
    shape: dict[str, Any] = {"features": 4, "length": 0 if kind == "mlp" else 3}
    if kind == "tokens":
        shape = {"vocabulary": 9, "length": 2}
    stream = Stream("tiny", tuple(parts), "class_incremental", "class", 6, **shape)
    learner = Learner(net(kind), objective_for("class"), strategy, optimizer).double()
    return Run(stream, learner, trainer(), Training(batch_size=3, steps=15))


def answers(run: Run) -> Tensor:
    """Logits [3, 6] of experience 0's training set."""
    with torch.no_grad():
        return run.learner.eval().net(run.stream[0].train.batch(torch.arange(3))).logits


@pytest.mark.parametrize("kind", ["mlp", "lstm", "gru", "elman", "transformer", "tokens"])
@pytest.mark.parametrize(("apply_to", "optimizer"), [("gradient", SGD), ("update", SGD), ("update", ADAM)])
def test_with_all_energy_no_old_answer_changes(
    trainer: Callable, kind: str, apply_to: str, optimizer: Callable
) -> None:
    def go(count: int) -> Run:
        run = start(trainer, kind, GPM(energy=1.0, apply_to=apply_to), optimizer, count)
        run.go()
        return run

    one, all_ = go(1), go(3)
    torch.testing.assert_close(answers(one), answers(all_), rtol=0, atol=1e-9)
    moved = [n for n, p in one.learner.net.named_parameters() if not torch.equal(p, all_.learner.net.get_parameter(n))]
    assert moved and not any("bias" in name or "norm" in name for name in moved)
    assert any("head" in name for name in moved)


def test_adam_breaks_the_gradient_form_and_finetuning_forgets(trainer: Callable) -> None:
    def change(strategy: GPM) -> float:
        before, after = (start(trainer, "gru", strategy_, ADAM, n) for strategy_, n in ((GPM(1.0), 1), (strategy, 3)))
        before.go()
        after.go()
        return float((answers(before) - answers(after)).abs().max())

    assert change(GPM(energy=1.0, apply_to="gradient")) > 0.01
    assert change(GPM(energy=0.0)) > 0.1


def test_with_sgd_both_forms_are_the_same(trainer: Callable) -> None:
    made = []
    for apply_to in ("gradient", "update"):
        run = start(trainer, "lstm", GPM(energy=0.9, apply_to=apply_to), SGD)
        run.go()
        made.append(run.learner.net.state_dict())
    for name in made[0]:
        torch.testing.assert_close(made[0][name], made[1][name], rtol=0, atol=1e-12)


def test_biases_can_be_left_free(trainer: Callable) -> None:
    run = start(trainer, "lstm", GPM(energy=1.0, others="free"), SGD)
    run.go()
    one = start(trainer, "lstm", GPM(energy=1.0), SGD, 1)
    one.go()
    assert not torch.equal(
        run.learner.net.get_parameter("head.linear.bias"), one.learner.net.get_parameter("head.linear.bias")
    )
    assert float((answers(one) - answers(run)).abs().max()) > 1e-3


def linear(tasks: list[tuple[Tensor, Tensor]], strategy: Any, steps: int = 1500) -> Tensor:
    """Gradient descent on one linear layer from 0, until each experience is solved."""
    width = tasks[0][0].shape[1]
    made = Learner(
        mlp(Inputs(features=width, length=0), partial(Head, outputs=1), hidden=[]), objective_for("value"), strategy
    ).double()
    made.net.head.linear.bias.requires_grad_(False).zero_()
    weight = made.net.head.linear.weight
    with torch.no_grad():
        weight.zero_()
    strategy.setup(made, ANY)
    for k, (x, y) in enumerate(tasks):
        data = TensorData(x, y)
        batch = data.batch(torch.arange(len(x)))
        rate = 1.0 / float(torch.linalg.matrix_norm(x, 2)) ** 2
        for _ in range(steps):
            weight.grad = None
            (made.objective(made.net(batch).logits, batch) * len(x)).backward()
            strategy.gradients(made, batch)
            with torch.no_grad():
                assert weight.grad is not None
                weight -= rate * weight.grad
        with torch.no_grad():
            strategy.after_experience(made, Experience(k, str(k), (), train=data, test=data))
    return weight.detach()[0]


def test_on_a_linear_layer_it_is_the_ideal_continual_learner() -> None:
    """Four experiences of 8 rows in 40 dimensions with a common solution: the joint minimum-norm solution."""
    right = draw(40, 1, seed=9)
    tasks = [(x, x @ right) for x in (draw(8, 40, seed=k) for k in range(4))]
    got = linear(tasks, GPM(energy=1.0, examples=None, apply_to="gradient"))
    x, y = torch.cat([t[0] for t in tasks]), torch.cat([t[1] for t in tasks])
    torch.testing.assert_close(got, (torch.linalg.pinv(x) @ y)[:, 0], rtol=0, atol=1e-8)
    assert float((x @ got - y[:, 0]).abs().max()) < 1e-8
    plain = linear(tasks, GPM(energy=0.0))
    assert float((x @ plain - y[:, 0]).abs().max()) > 0.1


@pytest.mark.parametrize("mixer", [LSTM, GRU])
def test_padding_is_no_input(mixer: Callable) -> None:
    x = draw(5, 4, seed=1)
    ragged = RaggedData(x, torch.tensor([0, 1, 5]), torch.tensor([0, 1]))
    made = Learner(
        recurrent(Inputs(features=4), partial(Head, outputs=2), mixer=mixer, hidden=20), objective_for("class")
    ).double()
    strategy = GPM(energy=1.0)
    strategy.setup(made, ANY)
    with torch.no_grad():
        strategy.after_experience(made, Experience(0, "0", (0, 1), train=ragged, test=ragged))
        inputs, hidden = (strategy.get_buffer(f"basis_blocks__0__mixer__rnn__weight_{n}_l0") for n in ("ih", "hh"))
        first, second = ragged.batch(torch.tensor([0])), ragged.batch(torch.tensor([1]))
        states = torch.cat([made.net.lower(b, 1)[0][0, :-1] for b in (first, second)])
    assert inputs.shape[1] == 4
    assert hidden.shape[1] == len(states) == 3  # those that a valid step was computed from; the zero state adds none
    torch.testing.assert_close(states @ hidden @ hidden.mT, states)


def test_embedding_rows_of_old_tokens_stay(trainer: Callable) -> None:
    run = start(trainer, "tokens", GPM(energy=0.5), ADAM, 2)
    before = run.learner.net.get_parameter("embedding.weight").detach().clone()
    run.go()
    after = run.learner.net.get_parameter("embedding.weight").detach()
    held = run.learner.get_buffer("strategy.parts.gpm.basis_embedding__weight")
    assert held.tolist() == [True] * 2 + [False] + [True] * 2 + [False] * 4
    one = start(trainer, "tokens", GPM(energy=0.5), ADAM, 1)
    one.go()
    assert torch.equal(after[:2], one.learner.net.get_parameter("embedding.weight")[:2])
    assert not torch.equal(after[3:5], before[3:5])


def test_heads_of_single_tasks_are_free_and_shared_ones_are_not() -> None:
    for head, projected in ((partial(Head, outputs=6), True), (_task_head, False)):
        made = Learner(mlp(Inputs(features=4, length=0), head, hidden=[5]), objective_for("class"))
        strategy = GPM(energy=0.9)
        strategy.setup(made, ANY)
        data = TensorData(draw(8, 4).float(), torch.zeros(8, dtype=torch.int64), task=0)
        with torch.no_grad():
            strategy.after_experience(made, Experience(0, "0", (0, 1), train=data, test=data, task_label=0))
        assert (strategy.get_buffer("basis_head__linear__weight") is not None) == projected
        strategy = GPM(energy=0.9, head="free")
        strategy.setup(made, ANY)
        with torch.no_grad():
            strategy.after_experience(made, Experience(0, "0", (0, 1), train=data, test=data, task_label=0))
        assert strategy.get_buffer("basis_head__linear__weight") is None


def _task_head(features: int) -> Head:
    return TaskHead(features, 6, [(0, 1), (2, 3), (4, 5)])


def test_the_threshold_grows_with_the_experiences() -> None:
    made = Learner(mlp(Inputs(features=12, length=0), partial(Head, outputs=6), hidden=[]), objective_for("class"))
    fixed, growing = GPM(energy=0.6, energy_growth=0.0), GPM(energy=0.6, energy_growth=0.4)
    for strategy in (fixed, growing):
        strategy.setup(made, ANY)
        for k in range(2):
            data = TensorData(draw(50, 12, seed=k).float(), torch.zeros(50, dtype=torch.int64))
            with torch.no_grad():
                strategy.after_experience(made, Experience(k, str(k), (0,), train=data, test=data))
    assert growing.get_buffer("basis_head__linear__weight").shape[1] == 12  # all of it at 1
    assert fixed.get_buffer("basis_head__linear__weight").shape[1] < 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 1.1}, "^energy: got 1.1, it must lie in 0..1"),
        ({"energy_growth": -0.1}, "^energy_growth: got -0.1"),
        ({"apply_to": "step"}, "allowed are 'update', 'gradient'"),
        ({"head": "shared"}, "allowed are 'auto', 'project', 'free'"),
        ({"others": "project"}, "allowed are 'freeze', 'free'"),
        ({"examples": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPM(**options)
