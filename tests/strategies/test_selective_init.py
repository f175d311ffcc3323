"""Selective initialisation: the choice against losses taken by hand, on streams where the right one is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from tiny import only
from torch import Tensor

from clplat.composition import Composite, check_stream
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import GrowingHead, Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.selective_init import SelectiveInit
from clplat.strategy import Session, Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs
from clplat.streams.loader import stable_seed
from clplat.weights.flat import flatten, load_flat

N, D, C = 80, 6, 2


def stream(rules: str, tasks: bool = False) -> Stream:
    """Two classes told apart by the sign of one input: experience k by input `rules[k]`, minus: the opposite way."""
    parts, generator = [], torch.Generator().manual_seed(5)
    for k, rule in enumerate(rules.split()):
        x = torch.randn(2 * N, D, generator=generator)
        y = ((x[:, int(rule.strip("-"))] > 0) ^ rule.startswith("-")).long()
        label = k if tasks else None
        train, test = (TensorData(x, y, torch.arange(a, a + N), task=label) for a in (0, N))
        parts.append(Experience(k, rule, (0, 1), train=train, test=test, task_label=label))
    scenario = "task_incremental" if tasks else "domain_incremental"
    return Stream("rules", tuple(parts), scenario, "class", C, features=D, length=0)


def learner(strategy: Strategy | None, head: Callable | None = None, dropout: float = 0.0) -> Learner:
    torch.manual_seed(1)
    head = partial(Head, outputs=C) if head is None else head
    net = mlp(Inputs(features=D, length=0), head, hidden=[16], dropout=dropout)
    return Learner(net, objective_for("class"), strategy, partial(torch.optim.Adam, lr=1e-2))


def per_task(data: Stream) -> Callable:
    return partial(TaskHead, outputs=C, tasks=[e.classes for e in data])


class Watched(Run):
    """Notes the weights from which each experience starts and those at its end."""

    starts: list[Tensor]

    def _fit(self, session: Session, length: int) -> None:
        self.starts = [*getattr(self, "starts", []), flatten(self.learner.net)]
        super()._fit(session, length)


def watched(trainer: Callable, data: Stream, made: Learner) -> tuple[Watched, SelectiveInit]:
    run = Watched(data, made, trainer(), Training(batch_size=8, epochs=8))
    run.go()
    return run, only(made)


CASES = {"selective_init": Case({"examples": 10, "steps": 2})}


@pytest.mark.parametrize("steps", [0, 3])
def test_the_best_past_checkpoint_is_found(steps: int, trainer: Callable) -> None:
    """Experiences 2 and 4 repeat the rules of 0 and 1; 3 is the opposite of 0, where every checkpoint is worse."""
    run, strategy = watched(trainer, stream("0 1 0 -0 1"), learner(SelectiveInit(40, steps)))
    assert strategy.chosen[0] == 0
    assert strategy.chosen[2] in (1, 3) if steps else strategy.chosen[2] == 1
    assert strategy.chosen[4] == 2
    assert strategy.library is not None
    for start, pick in zip(run.starts, strategy.chosen, strict=True):
        assert torch.equal(start, strategy.library[pick])
    if steps == 0:
        assert strategy.chosen[3] in (0, 2)  # never one that learned the opposite


def test_losses_are_zero_shot_losses_on_the_examples_drawn(trainer: Callable) -> None:
    data = stream("0 1 2")
    _, strategy = watched(trainer, data, learner(SelectiveInit(20, seed=3)))
    assert strategy.library is not None
    generator = torch.Generator().manual_seed(stable_seed(3, "selective_init", 2))
    batch = data[2].train.batch(torch.randperm(N, generator=generator)[:20])
    plain = learner(None)
    assert len(strategy.losses[2]) == 3
    for row, loss in enumerate(strategy.losses[2]):
        load_flat(plain.net, strategy.library[row])
        assert loss == pytest.approx(float(plain.objective(plain(batch).logits, batch).detach()))


def test_probe_steps_are_plain_steps_on_other_examples(trainer: Callable) -> None:
    data = stream("0 1")
    _, strategy = watched(trainer, data, learner(SelectiveInit(20, steps=4, seed=3)))
    assert strategy.library is not None
    generator = torch.Generator().manual_seed(stable_seed(3, "selective_init", 1))
    order = torch.randperm(N, generator=generator)
    look, practice = (data[1].train.batch(order[a : a + 20]) for a in (0, 20))
    for row, loss in enumerate(strategy.losses[1]):
        plain = learner(None)
        load_flat(plain.net, strategy.library[row])
        optimizer = plain.handover.make(plain.net.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            plain.objective(plain(practice).logits, practice).backward()
            optimizer.step()
        assert loss == pytest.approx(float(plain.objective(plain(look).logits, look).detach()), rel=1e-5)


@pytest.mark.parametrize(("margin", "pick"), [(0.0, 1), (100.0, 0)])
def test_the_margin_guards_the_base(margin: float, pick: int, trainer: Callable) -> None:
    _, strategy = watched(trainer, stream("0 0"), learner(SelectiveInit(40, margin=margin)))
    assert strategy.chosen == [0, pick]


def test_on_its_examples_the_choice_is_never_worse_than_the_base(trainer: Callable) -> None:
    _, strategy = watched(trainer, stream("0 -0 1 -1 2"), learner(SelectiveInit(40)))
    assert all(losses[pick] <= losses[0] for losses, pick in zip(strategy.losses, strategy.chosen, strict=True))
    assert 0 in strategy.chosen[1:]
    found = strategy.report()
    assert found["chosen"].tolist() == strategy.chosen
    assert found["losses"][3, :4].tolist() == strategy.losses[3]
    assert int(found["losses"].isnan().sum()) == 5 + 3 + 2 + 1


def test_a_good_start_gains_at_matched_steps(trainer: Callable) -> None:
    """Few steps on a rule met before: from its checkpoint the score is higher than from the base."""

    def last(strategy: SelectiveInit) -> float:
        run = Run(stream("0 1 0"), learner(strategy), trainer(), Training(batch_size=8, steps=30))
        run.go()
        return float(run.results.R[2, 2])

    assert last(SelectiveInit(40)) > last(SelectiveInit(40, margin=100.0)) + 0.02


def test_comparing_leaves_no_trace(trainer: Callable) -> None:
    data = stream("0 1 0")
    made = learner(SelectiveInit(20, steps=3, margin=100.0), dropout=0.3)
    watched(trainer, data, made)
    state, modes = torch.get_rng_state(), [m.training for m in made.modules()]
    with torch.no_grad():
        only(made).before_experience(made, data[1])
    assert isinstance(only(made), SelectiveInit)
    assert only(made).library is not None
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in made.modules()] == modes
    assert torch.equal(flatten(made.net), only(made).library[0])
    assert all(p.grad is None for p in made.net.parameters())
    first, second = only(made).losses[-1], copy.copy(only(made))
    second.losses, second.chosen = [], []
    with torch.no_grad():
        second.before_experience(made, data[1])
    assert second.losses[-1] == first  # the same examples and the same dropout


def test_with_task_labels_nothing_is_forgotten(trainer: Callable) -> None:
    data = stream("0 -0 1", tasks=True)
    run, _ = watched(trainer, data, learner(SelectiveInit(40, answer="task")))
    R = run.results.R
    for j in range(3):
        assert torch.equal(R[j:, j], R[j, j].expand(3 - j))
        assert float(R[j, j]) > 0.85
    latest, _ = watched(trainer, data, learner(SelectiveInit(40)))
    assert float(latest.results.R[2, 0]) < float(R[2, 0]) - 0.2


def test_each_row_is_answered_by_its_own_checkpoint(trainer: Callable) -> None:
    data = stream("0 -0 1", tasks=True)
    made = learner(SelectiveInit(40, answer="task"), per_task(data))
    _, strategy = watched(trainer, data, made)
    batch = data[0].test.batch(torch.arange(6))
    batch = copy.copy(batch)
    object.__setattr__(batch, "task", torch.tensor([2, 0, 1, 1, 0, 2]))
    with made.evaluating():
        output = made.net(batch)
        answers = strategy.predict(made, batch, output.logits, output.features)
        plain = learner(None, per_task(data))
        assert strategy.library is not None
        for row, task in enumerate([2, 0, 1, 1, 0, 2]):
            load_flat(plain.net, strategy.library[task + 1])
            torch.testing.assert_close(answers[row], plain.net(batch.rows(torch.tensor([row]))).logits[0])


def test_a_growing_head_is_not_taken_back(trainer: Callable) -> None:
    made = learner(SelectiveInit(20, margin=100.0), partial(GrowingHead, outputs=C))
    watched(trainer, stream("0 1"), made)
    assert isinstance(made.net.head, GrowingHead)
    assert bool(made.net.head.met.all())


def test_memory_is_the_base_and_one_state_an_experience(trainer: Callable) -> None:
    run, strategy = watched(trainer, stream("0 1"), learner(SelectiveInit(20)))
    assert strategy.stored_bytes() == 3 * 4 * flatten(run.learner.net).numel()


def test_task_answers_need_task_labels() -> None:
    with pytest.raises(ValueError, match="needs task labels"):
        check_stream(Composite.of(SelectiveInit(answer="task")), stream("0 1"))
    check_stream(Composite.of(SelectiveInit()), stream("0 1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "examples: got 0, it must be at least 1"),
        ({"steps": -1}, "steps: got -1, it must be at least 0"),
        ({"margin": -0.1}, "margin: got -0.1, it must be at least 0"),
        ({"answer": "best"}, "answer: got 'best', allowed are 'latest', 'task'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveInit(**options)
