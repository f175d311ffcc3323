"""LwF, center loss, LFL and distillation for rehearsal: their terms by hand, and what they must leave alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from tiny import shaken
from torch import Tensor
from torch.nn import functional as F

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.strategies.center_loss import CenterLoss
from clplat.strategies.distillation import Distillation, weight_of_classes, weight_of_rehearsal
from clplat.strategies.icarl import ICaRL
from clplat.strategies.lwf import LwF
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import UNSCORED, Batch, Experience, Stream
from clplat.streams.inputs import Inputs


def begun(tiny: Any, strategy: Strategy, stream: Stream, index: int = 1) -> Learner:
    """A learner that has ended experience `index - 1` and begun the next, with weights that have moved since."""
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    for k in range(index):
        learner.begin(stream[k])
        shaken(learner, 0.3)
        learner.end(stream[k])
    learner.begin(stream[index])
    return learner


def old_and_new(tiny: Any, strategy: Strategy, stream: Stream, batch: Batch) -> tuple[Learner, Tensor, Tensor]:
    learner = begun(tiny, strategy, stream)
    before = learner(batch)
    shaken(learner, 0.3)
    return learner, before.logits.detach(), before.features.detach()


def tagged(strategy: Strategy) -> tuple[Learner, Batch]:
    """A learner of tags [B, T] and a batch whose second half of steps is not scored."""
    torch.manual_seed(1)
    inputs = Inputs(vocabulary=7, length=6, per_step=True)
    net = recurrent(inputs, partial(Head, outputs=4), mixer=LSTM, hidden=5, layers=1)
    y = torch.randint(0, 4, (8, 6))
    y[:, 3:] = UNSCORED
    return Learner(net, objective_for("tag"), strategy), Batch(torch.randint(0, 7, (8, 6)), y)


CASES = {
    "lwf": Case(off={"strength": 0.0}, not_counted=("known",)),
    "center_loss": Case({"strength": 0.5}, off={"strength": 0.0, "freeze_head": False}),
    "lfl": Case({"strength": 0.5}, off={"strength": 0.0, "freeze_head": False}),
    "distillation": Case(off={"feature": "none", "prediction": "none"}, not_counted=("known",)),
}


def test_lwf_is_the_divergence_over_old_classes(tiny: Any) -> None:
    stream = tiny.stream()
    batch = stream[1].train.batch(torch.arange(9))
    strategy = LwF(strength=3.0, temperature=2.5)
    learner, old, _ = old_and_new(tiny, strategy, stream, batch)
    output = learner(batch)
    term = strategy.loss(learner, batch, output)["lwf"]
    total = 0.0
    for b in range(9):
        p = [math.exp(v / 2.5) for v in old[b, :2].tolist()]
        q = [math.exp(v / 2.5) for v in output.logits[b, :2].tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert float(term.detach()) == pytest.approx(3.0 * total / 9, rel=1e-4)
    assert float(term.detach()) > 0.01


def test_lwf_with_task_labels_sums_over_old_heads(tiny: Any) -> None:
    stream = tiny.stream(tasks=True)
    batch = stream[2].train.batch(torch.arange(9))
    strategy = LwF(strength=1.0)
    learner = begun(tiny, strategy, stream, index=2)
    before = {k: learner(replace(batch, task=torch.full((9,), k))).logits.detach() for k in (0, 1)}
    shaken(learner, 0.3)
    total = torch.zeros(())
    for k, old in before.items():
        own = slice(2 * k, 2 * k + 2)
        new = learner(replace(batch, task=torch.full((9,), k))).logits[:, own]
        total = total + F.kl_div(
            (new / 2).log_softmax(-1), (old[:, own] / 2).log_softmax(-1), reduction="batchmean", log_target=True
        )
    term = strategy.loss(learner, batch, learner(batch))["lwf"]
    torch.testing.assert_close(term, total)
    (gradient,) = torch.autograd.grad(term, learner.net.head.linear.weight)
    assert bool(gradient[:4].any()) and not bool(gradient[4:].any())


def test_lwf_with_task_labels_and_one_head_for_all_counts_every_class_once(tiny: Any) -> None:
    told, untold = tiny.stream(tasks=True), tiny.stream()
    terms = []
    for stream in (told, replace(told, experiences=untold.experiences)):
        strategy = LwF(strength=1.0)
        learner = tiny.learner(strategy, untold)  # a shared head
        strategy.setup(learner, stream)
        for k in range(2):
            learner.begin(stream[k])
            learner.end(stream[k])
        learner.begin(stream[2])
        torch.manual_seed(2)
        shaken(learner, 0.3)
        batch = stream[2].train.batch(torch.arange(9))
        terms.append(strategy.loss(learner, batch, learner(batch))["lwf"])
    assert torch.equal(*terms)
    assert float(terms[0].detach()) > 1e-3


@pytest.mark.parametrize("kind", [LwF, Distillation, ICaRL])
def test_classes_kept_out_of_the_loss_are_distilled(tiny: Any, kind: Any) -> None:
    """With logit_mask=experience old classes do not compete on new rows; their old answers must still be held."""
    stream = tiny.stream()
    found = []
    for mask in ("all", "experience"):
        strategy = kind(**{LwF: {"strength": 1.0}, Distillation: {"feature": "none"}, ICaRL: {"capacity": 12}}[kind])
        learner = tiny.learner(strategy, stream, logit_mask=mask)
        strategy.setup(learner, stream)
        learner.begin(stream[0])
        learner.end(stream[0])
        learner.begin(stream[1])
        torch.manual_seed(2)
        shaken(learner, 0.3)
        batch = stream[1].train.batch(torch.arange(9))
        output = learner(batch)
        loss = strategy.loss(learner, batch, output)
        value = loss["lwf"] if loss else strategy.objective(learner, batch, output)
        if kind is Distillation:
            value = value - (1 - weight_of_classes(2, 4)) * learner.objective(output.logits, batch)
        value.backward()
        grad = learner.net.head.linear.weight.grad
        assert isinstance(grad, Tensor)
        found.append(grad[:2])  # rows of the old classes
    torch.testing.assert_close(*found)
    assert float(found[1].abs().max()) > 1e-3


def test_lwf_is_nothing_at_the_teacher_and_before_it(tiny: Any) -> None:
    stream = tiny.stream()
    strategy = LwF(strength=1.0)
    learner = begun(tiny, strategy, stream)
    batch = stream[1].train.batch(torch.arange(9))
    assert float(strategy.loss(learner, batch, learner(batch))["lwf"].detach()) == pytest.approx(0, abs=1e-6)
    fresh = LwF(strength=1.0)
    other = tiny.learner(fresh, stream)
    fresh.setup(other, stream)
    other.begin(stream[0])
    assert fresh.loss(other, batch, other(batch)) == {}


def test_lwf_takes_one_strength_an_experience_and_may_leave_replayed_rows(tiny: Any) -> None:
    stream = tiny.stream()
    batch = stream[1].train.batch(torch.arange(8))
    terms = []
    for strength, replayed in (([0.0, 2.0], True), ([0.0, 1.0], True), (1.0, False)):
        strategy = LwF(strength, replayed=replayed)
        torch.manual_seed(0)
        learner, _, _ = old_and_new(tiny, strategy, stream, batch)
        rows = replace(batch, source=torch.tensor([0] * 5 + [1] * 3, dtype=torch.uint8))
        terms.append(strategy.loss(learner, rows, learner(rows))["lwf"])
        if not replayed:
            first = batch.rows(torch.arange(5))
            torch.testing.assert_close(terms[-1], strategy.loss(learner, first, learner(first))["lwf"])
    torch.testing.assert_close(terms[0], 2 * terms[1])


def test_lwf_of_tags_leaves_replayed_rows_and_unscored_steps(tiny: Any) -> None:
    strategy = LwF(strength=1.0, replayed=False)
    learner, batch = tagged(strategy)
    strategy.setup(learner, tiny.stream())
    data = TensorData(batch.x, batch.y)
    experience = Experience(0, "0", (), train=data, test=data)
    learner.begin(experience)
    learner.end(experience)
    shaken(learner, 0.3)
    source = torch.tensor([0, 1] * 4, dtype=torch.uint8)
    joined = replace(batch, source=source)
    old = strategy.teacher(batch).logits[::2, :3] / 2
    output = learner(joined)
    right = F.kl_div((output.logits[::2, :3] / 2).log_softmax(-1), old.softmax(-1), reduction="none").sum(-1).mean()
    torch.testing.assert_close(strategy.loss(learner, joined, output)["lwf"], right)


def test_the_teacher_does_not_move(tiny: Any) -> None:
    strategy = LwF(strength=1.0)
    stream = tiny.stream()
    learner = tiny.trained(strategy, stream)
    kept = {k: v.clone() for k, v in strategy.teacher.net.state_dict().items()}
    learner.train()
    shaken(learner, 0.3)
    learner.strategy.loss(
        learner, stream[0].train.batch(torch.arange(4)), learner(stream[0].train.batch(torch.arange(4)))
    )
    assert all(torch.equal(kept[k], v) for k, v in strategy.teacher.net.state_dict().items())
    assert not any(m.training for m in strategy.teacher.net.modules())
    assert not any(p.requires_grad for p in strategy.teacher.parameters())


def test_a_centre_moves_half_way_by_rate_for_one_example(tiny: Any) -> None:
    """One row, rate a: the centre moves a / 2 of the offset; absent classes stay."""
    strategy = CenterLoss(strength=1.0, rate=0.4)
    learner = tiny.learner(strategy)
    strategy.setup(learner, tiny.stream())
    strategy.centers = torch.randn(6, 7)
    before = strategy.centers.clone()
    batch = Batch(torch.randn(1, 5), torch.tensor([3]))
    output = learner(batch)
    strategy.after_step(learner, batch, output)
    assert isinstance(strategy.centers, Tensor)
    moved = before[3] + 0.2 * (output.features.detach()[0] - before[3])
    torch.testing.assert_close(strategy.centers[3], moved)
    rest = torch.arange(6) != 3
    assert torch.equal(strategy.centers[rest], before[rest])


def test_steps_that_are_not_scored_move_no_centre(tiny: Any) -> None:
    strategy = CenterLoss(strength=1.0, rate=0.5)
    learner, batch = tagged(strategy)
    strategy.setup(learner, tiny.stream())
    assert isinstance(strategy.centers, Tensor)
    output = learner(batch)
    y, features = batch.y[:, :3].flatten(), output.features[:, :3].flatten(0, 1).detach()
    torch.testing.assert_close(
        strategy.loss(learner, batch, output)["center_loss"], 0.5 * features.square().sum(-1).mean()
    )
    with torch.no_grad():
        strategy.after_step(learner, batch, output)
    right = torch.stack([0.5 * features[y == c].sum(0) / (1 + (y == c).sum()) for c in range(4)])
    torch.testing.assert_close(strategy.centers, right)


def test_centres_become_class_means_on_features_that_stay(tiny: Any) -> None:
    strategy = CenterLoss(strength=1.0)
    stream = tiny.stream(experiences=1)
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    learner.begin(stream[0])
    batch = stream[0].train.batch(torch.arange(40))
    output = learner(batch)
    for _ in range(200):
        strategy.after_step(learner, batch, output)
    assert isinstance(strategy.centers, Tensor)
    for c in (0, 1):
        torch.testing.assert_close(strategy.centers[c], output.features[batch.y == c].mean(0).detach())
    apart = sum(((output.features[b] - strategy.centers[batch.y[b]]) ** 2).sum() for b in range(40)) / 40
    torch.testing.assert_close(strategy.loss(learner, batch, output)["center_loss"], 0.5 * apart)


@pytest.mark.parametrize("mode", ["centers", "features"])
@pytest.mark.parametrize("tasks", [False, True])
def test_rows_and_centres_of_old_classes_stay_bitwise(tiny: Any, mode: str, tasks: bool) -> None:
    """Also with an optimiser whose momentum and weight decay move weights that have no gradient."""
    strategy = CenterLoss(strength=0.1, mode=mode)
    stream = tiny.stream(tasks)
    kept: list[tuple[Tensor, ...]] = []

    class Watch(Strategy):
        def after_experience(self, learner: Learner, experience: Any) -> None:
            linear = learner.net.head.linear
            centers = strategy.centers if mode == "centers" else linear.bias
            kept.append((linear.weight.detach().clone(), linear.bias.detach().clone(), centers.detach().clone()))  # type: ignore[union-attr]

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)

    tiny.trained(Composite({"mine": strategy, "watch": Watch()}), stream, optimizer=optimizer, optimizer_state="kept")
    for k in range(2):
        old = slice(0, 2 * k + 2)
        for before, after in zip(kept[k], kept[k + 1], strict=True):
            assert torch.equal(before[old], after[old])
            assert not torch.equal(before[2 * k + 2 : 2 * k + 4], after[2 * k + 2 : 2 * k + 4])


def test_lfl_is_the_mean_squared_distance_to_the_old_features(tiny: Any) -> None:
    strategy, stream = CenterLoss(strength=2.0, mode="features"), tiny.stream()
    batch = stream[1].train.batch(torch.arange(9))
    learner, _, old = old_and_new(tiny, strategy, stream, batch)
    output = learner(batch)
    right = 2.0 * F.mse_loss(output.features, old)
    torch.testing.assert_close(strategy.loss(learner, batch, output)["center_loss"], right)


def test_distillation_weights() -> None:
    assert float(weight_of_rehearsal(torch.tensor(4), 16)) == 0.5
    assert weight_of_classes(4, 7) == pytest.approx(0.4520, abs=1e-4)  # the figure of the released code's first batch


@pytest.mark.parametrize("feature", ["none", "replayed", "all"])
@pytest.mark.parametrize("prediction", ["none", "replayed", "all"])
@pytest.mark.parametrize("mean", ["rows", "rows_and_classes"])
def test_distillation_by_hand(tiny: Any, feature: str, prediction: str, mean: str) -> None:
    strategy, stream = Distillation(feature, prediction, temperature=1.5, mean=mean), tiny.stream()
    if feature == prediction == "none":
        assert "objective" not in strategy.claims
        return
    batch = replace(stream[1].train.batch(torch.arange(9)), source=torch.tensor([0] * 5 + [1] * 4, dtype=torch.uint8))
    learner, old, old_features = old_and_new(tiny, strategy, stream, batch)
    output = learner(batch)
    a, b = math.sqrt(4 / 9), math.log(1 + 2 / 4)
    which = {"replayed": slice(5, 9), "all": slice(0, 9)}
    ce = F.cross_entropy(output.logits, batch.y)
    right = ce
    if feature != "none":
        apart = F.mse_loss(output.features[which[feature]], old_features[which[feature]])
        right = (1 - a) * ce + a * apart
    if prediction != "none":
        rows = which[prediction]
        share = 2 if mean == "rows_and_classes" else 1  # two classes
        kl = (
            1.5**2
            / share
            * F.kl_div(
                (output.logits[rows, :2] / 1.5).log_softmax(-1),
                (old[rows, :2] / 1.5).softmax(-1),
                reduction="batchmean",
            )
        )
        weight = b if prediction == "all" else a
        right = right + weight * kl if feature != "none" else (1 - weight) * ce + weight * kl
    torch.testing.assert_close(strategy.objective(learner, batch, output), right)


def test_distillation_at_the_teacher_is_cross_entropy_alone(tiny: Any) -> None:
    strategy, stream = Distillation("none", "all"), tiny.stream()
    learner = begun(tiny, strategy, stream)
    batch = stream[1].train.batch(torch.arange(9))
    weights = list(learner.weights().values())
    output = learner(batch)
    found = torch.autograd.grad(strategy.objective(learner, batch, output), weights, retain_graph=True)
    right = torch.autograd.grad(F.cross_entropy(output.logits, batch.y), weights)
    for f, r in zip(found, right, strict=True):
        torch.testing.assert_close(f, (1 - weight_of_classes(2, 4)) * r, rtol=1e-4, atol=1e-6)


def test_distillation_works_with_replay(tiny: Any) -> None:
    parts = {"replay": Replay(capacity=20, insert="after"), "distillation": Distillation()}
    learner = tiny.trained(Composite(parts))
    assert parts["distillation"].stored_bytes() == sum(p.numel() * 4 for p in learner.net.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LwF, {"strength": -1.0}, "^strength: got -1"),
        (LwF, {"strength": []}, "^strength: got"),
        (LwF, {"strength": 1.0, "temperature": 0.0}, "^temperature: got 0"),
        (CenterLoss, {"strength": -1.0}, "^strength: got -1"),
        (CenterLoss, {"strength": 1.0, "mode": "x"}, "allowed are 'centers', 'features'"),
        (CenterLoss, {"strength": 1.0, "rate": 2.0}, "^rate: got 2"),
        (CenterLoss, {"strength": 1.0, "centers_after": "x"}, "allowed are 'frozen', 'moving'"),
        (Distillation, {"feature": "x"}, "^feature: got 'x'"),
        (Distillation, {"temperature": 0.0}, "^temperature: got 0"),
        (Distillation, {"mean": "x"}, "allowed are 'rows', 'rows_and_classes'"),
    ],
)
def test_wrong_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
