"""SI, MAS and RWalk: importances recomputed by hand from the run's own weights and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from tiny import only
from torch import Tensor

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import GrowingHead, Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Output
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.strategies.mas import MAS
from clplat.strategies.rwalk import RWalk
from clplat.strategies.si import SI
from clplat.strategy import Strategy
from clplat.streams.data import Examples, TensorData
from clplat.streams.experience import UNSCORED, Batch, Experience
from clplat.streams.inputs import Inputs


class Diary(Strategy):
    """Notes, in every step, the weights before and after it and the gradient of the objective alone."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[dict[str, Tensor]]] = []

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.steps.append([])

    def gradients(self, learner: Learner, batch: Batch) -> None:
        with torch.enable_grad():
            objective = learner.objective(learner(batch).logits, batch)
            found = torch.autograd.grad(objective, list(learner.weights().values()))
        self.steps[-1].append(
            {f"g {n}": g for n, g in zip(learner.weights(), found, strict=True)}
            | {f"before {n}": w.detach().clone() for n, w in learner.weights().items()}
        )

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        self.steps[-1][-1] |= {f"after {n}": w.detach().clone() for n, w in learner.weights().items()}


def followed(tiny: Any, strategy: Strategy) -> tuple[Learner, Diary]:
    diary = Diary()
    learner = tiny.trained(Composite({"mine": strategy, "diary": diary}), epochs=2)
    return learner, diary


CASES = {
    "si": Case({"strength": 5.0}, off={"strength": 0.0}),
    "mas": Case({"strength": 5.0, "examples": 20}, off={"strength": 0.0}),
    "rwalk": Case({"strength": 5.0, "interval": 2}, off={"strength": 0.0}),
}


@pytest.mark.parametrize("clip", [True, False])
def test_si_follows_the_path_of_the_task_gradient(tiny: Any, clip: bool) -> None:
    """Also in the later experiences, where the penalty's own gradient must not count."""
    strategy = SI(strength=3.0, damping=0.1, clip_negative=clip)
    learner, diary = followed(tiny, strategy)
    for name in learner.weights():
        importance = torch.zeros_like(learner.weights()[name])
        for steps in diary.steps:
            path = [s[f"g {name}"] * (s[f"after {name}"] - s[f"before {name}"]) for s in steps]
            omega = -torch.stack(path).sum(0)
            moved = steps[-1][f"after {name}"] - steps[0][f"before {name}"]
            importance += (omega.clamp_min(0) if clip else omega) / (moved.square() + 0.1)
        torch.testing.assert_close(strategy.past.importances()[name], importance, rtol=2e-3, atol=1e-6)
        assert torch.equal(strategy.past.anchors()[name], learner.weights()[name])
        assert float(importance.max()) > 1e-4


def test_si_penalty_has_no_half(tiny: Any) -> None:
    strategy = SI(strength=3.0)
    learner = tiny.trained(strategy)
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.1)
    batch = tiny.stream()[0].train.batch(torch.arange(4))
    right = 3.0 * sum(i.sum() * 0.01 for i in strategy.past.importances().values())
    torch.testing.assert_close(strategy.loss(learner, batch, learner(batch))["si"], right, rtol=1e-4, atol=0)


def test_rwalk_by_hand(tiny: Any) -> None:
    strategy = RWalk(strength=0.5, alpha=0.7, interval=3, eps=1e-7)
    learner, diary = followed(tiny, strategy)
    names = list(learner.weights())
    fisher: dict[str, Tensor] = {}
    old: dict[str, Tensor] = {}
    for steps in diary.steps:
        score = {n: torch.zeros_like(learner.weights()[n]) for n in names}
        gain = {n: torch.zeros_like(learner.weights()[n]) for n in names}
        start = {n: steps[0][f"before {n}"] for n in names}
        for number, s in enumerate(steps, 1):
            for n in names:
                square = s[f"g {n}"].square()
                fisher[n] = square if n not in fisher else 0.7 * square + 0.3 * fisher[n]
                gain[n] = gain[n] - s[f"g {n}"] * (s[f"after {n}"] - s[f"before {n}"])
                if number % 3 == 0:
                    moved = s[f"after {n}"] - start[n]
                    score[n] = score[n] + gain[n] / (0.5 * fisher[n] * moved.square() + 1e-7)
                    gain[n], start[n] = torch.zeros_like(gain[n]), s[f"after {n}"]
        old = {n: 0.5 * (score[n] + old[n]) if old else score[n] for n in names}
    top_fisher, top_score = max(f.max() for f in fisher.values()), max(s.max() for s in old.values())
    for n in names:
        right = fisher[n] / top_fisher + old[n].clamp_min(0) / top_score
        torch.testing.assert_close(strategy.past.importances()[n], right, rtol=5e-3, atol=1e-5)
    assert 1 <= max(float(i.max()) for i in strategy.past.importances().values()) <= 2 + 1e-6


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_mas_is_the_mean_absolute_gradient_of_single_examples(tiny: Any, batch_size: int) -> None:
    strategy = MAS(strength=1.0, examples=None, batch_size=batch_size, decay=0.5)
    learner = tiny.learner(strategy).double()
    stream, total = tiny.stream(), {}
    for experience in stream.experiences[:2]:
        data = experience.train
        right = {n: torch.zeros_like(w) for n, w in learner.weights().items()}
        for i in range(len(data)):
            batch = data.batch(torch.tensor([i]))
            batch = Batch(batch.x.double(), batch.y)
            norm = learner(batch).logits.square().sum()
            for n, g in zip(right, torch.autograd.grad(norm, list(learner.weights().values())), strict=True):
                right[n] += g.abs() / len(data)
        total = {n: r + (0.5 * total[n] if total else 0) for n, r in right.items()}
        doubled = Experience(experience.index, "", experience.classes, train=_Double(data), test=data)
        strategy.after_experience(learner, doubled)
    for n, r in total.items():
        torch.testing.assert_close(strategy.past.importances()[n], r, rtol=1e-9, atol=1e-12)


def test_mas_counts_offered_logits_on_scored_steps_only(tiny: Any) -> None:
    stream = tiny.stream()
    grown = Learner(
        mlp(Inputs(features=5, length=0), partial(GrowingHead, outputs=6), hidden=[7]), objective_for("class")
    )
    grown.shape_for(stream[0])
    inputs = Inputs(vocabulary=7, length=6, per_step=True)
    net = recurrent(inputs, partial(Head, outputs=4), mixer=LSTM, hidden=5, layers=1)
    y = torch.randint(0, 4, (8, 6))
    y[:, 3:] = UNSCORED
    tags = TensorData(torch.randint(0, 7, (8, 6)), y)
    tagged = Learner(net, objective_for("tag"))
    for learner, experience in ((grown, stream[0]), (tagged, Experience(0, "", (), train=tags, test=tags))):
        strategy, weights, data = MAS(strength=1.0, examples=None), learner.weights(), experience.train
        strategy.after_experience(learner, experience)
        right = {n: torch.zeros_like(w) for n, w in weights.items()}
        for i in torch.arange(len(data)).split(1):
            logits = learner(data.batch(i)).logits
            norm = (logits[:, :2] if learner is grown else logits[:, :3]).square().sum()
            for n, g in zip(right, torch.autograd.grad(norm, list(weights.values())), strict=True):
                right[n] += g.abs() / len(data)
        for n, importance in strategy.past.importances().items():
            torch.testing.assert_close(importance, right[n], rtol=1e-4, atol=1e-5)


class _Double(Examples):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> Batch:
        batch = self.data.batch(index)
        return Batch(batch.x.double(), batch.y)

    def targets(self) -> Any:
        return self.data.targets()


def test_mas_needs_no_targets(tiny: Any) -> None:
    one, two = tiny.learner(MAS(1.0)), tiny.learner(MAS(1.0))
    experience = tiny.stream()[0]
    other = tiny.stream()[0]
    other.train.y = other.train.y.flip(0)
    only(one).after_experience(one, experience)
    only(two).after_experience(two, other)
    assert torch.equal(only(one).past.importance, only(two).past.importance)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SI, {"strength": -1}, "strength: got -1"),
        (SI, {"strength": 1, "damping": 0}, "damping: got 0"),
        (MAS, {"strength": -1}, "strength: got -1"),
        (MAS, {"strength": 1, "decay": 2}, "decay: got 2"),
        (MAS, {"strength": 1, "examples": 0}, "examples: got 0"),
        (RWalk, {"strength": -1}, "strength: got -1"),
        (RWalk, {"strength": 1, "alpha": 2}, "alpha: got 2"),
        (RWalk, {"strength": 1, "interval": 0}, "interval: got 0"),
    ],
)
def test_wrong_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
