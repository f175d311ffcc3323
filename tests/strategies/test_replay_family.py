"""DER, ER-ACE, A-GEM, GEM, MIR, GDumb, iCaRL: their losses and projections by hand, brute force and invariants."""

from __future__ import annotations

import itertools
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor
from torch.nn import functional as F

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import GrowingHead, Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Output
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.rehearsal.herding import herding
from clplat.rehearsal.policies import Ranked
from clplat.strategies.agem import AGEM
from clplat.strategies.agem import project as project_average
from clplat.strategies.der import DER
from clplat.strategies.er_ace import ERACE
from clplat.strategies.freeze import Freeze
from clplat.strategies.gdumb import GDumb, Greedy
from clplat.strategies.gem import GEM, solve_dual
from clplat.strategies.gem import project as project_all
from clplat.strategies.icarl import ICaRL
from clplat.strategies.joint import Joint
from clplat.strategies.mir import MIR
from clplat.strategies.replay import Replay
from clplat.strategy import Session, Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import UNSCORED, Batch, Experience
from clplat.streams.inputs import Inputs


def rows(n: int, classes: tuple[int, int] = (0, 2), seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 5, generator=g), torch.randint(*classes, (n,), generator=g))


def gradient(learner: Learner, batch: Batch) -> Tensor:
    loss = learner.objective(learner(batch).logits, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.weights().values()))])


def grads(learner: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.weights().values() if p.grad is not None])


# DER


CASES = {
    "der": Case({"capacity": 20, "rows": 8}, off={"capacity": 0}),
    "derpp": Case({"capacity": 20, "rows": 8}, off={"alpha": 0.0, "beta": 0.0}),
    "er_ace": Case({"capacity": 20, "rows": 8}, off={"capacity": 0}),
    "agem": Case({"capacity_per_experience": 10, "rows": 8}, off={"capacity_per_experience": 0}),
    "gem": Case({"capacity_per_experience": 10}, off={"capacity_per_experience": 0}),
    "mir": Case({"capacity": 20, "rows": 4, "candidates": 8}, off={"capacity": 0}),
    "gdumb": Case({"capacity": 30}, not_counted=("initial",)),
    "icarl": Case({"capacity": 12}),
}


def test_der_stores_the_logits_of_the_step_and_adds_both_terms(tiny: Any) -> None:
    strategy = DER(capacity=50, alpha=0.3, beta=0.7, rows=6)
    learner = tiny.learner(strategy)
    first = rows(20)
    assert strategy.batch(learner, first) is first
    strategy.before_step(learner, first)
    assert strategy.loss(learner, first, learner(first)) == {}
    output = learner(first)
    strategy.after_step(learner, first, output)
    assert torch.equal(strategy.buffer.contents().extra["logits"], output.logits.detach())
    with torch.no_grad():
        for p in learner.net.parameters():
            p.mul_(1.5)
    strategy.before_step(learner, rows(8, seed=1))
    one, two = strategy._drawn
    assert len(one) == len(two) == 6
    assert not torch.equal(one.x, two.x)  # two independent draws
    terms = strategy.loss(learner, first, output)
    torch.testing.assert_close(terms["der_logits"], 0.3 * F.mse_loss(learner(one).logits, one.extra["logits"]))
    torch.testing.assert_close(terms["der_classes"], 0.7 * F.cross_entropy(learner(two).logits, two.y))
    again = strategy.loss(learner, first, output)  # another look at the same step sees the same rows
    assert all(torch.equal(again[k], terms[k]) for k in terms)


def test_der_stores_current_rows_only(tiny: Any) -> None:
    strategy = DER(capacity=50)
    learner = tiny.learner(strategy)
    batch = replace(rows(6), source=torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.uint8))
    strategy.after_step(learner, batch, learner(batch))
    assert torch.equal(strategy.buffer.contents().x, batch.x[[0, 1, 4]])


def test_der_ignores_logits_that_a_growing_head_did_not_offer(tiny: Any) -> None:
    stream, strategy = tiny.stream(), DER(capacity=50, alpha=1.0, beta=0.0, rows=20)
    net = mlp(Inputs(features=5, length=0), partial(GrowingHead, outputs=6), hidden=[7])
    learner = Learner(net, objective_for("class"), strategy)
    learner.shape_for(stream[0])
    batch = rows(20)
    strategy.after_step(learner, batch, learner(batch))
    learner.shape_for(stream[1])
    with torch.no_grad():
        net.head.linear.bias.add_(0.5)
    strategy.before_step(learner, batch)
    term = strategy.loss(learner, batch, learner(batch))["der_logits"]
    assert float(term.detach()) == pytest.approx(0.25, rel=1e-5)  # both logits that were offered moved by a half


def test_der_holds_logits_on_scored_steps_only() -> None:
    strategy = DER(capacity=50, alpha=1.0, beta=0.0)
    inputs = Inputs(vocabulary=7, length=6, per_step=True)
    net = recurrent(inputs, partial(Head, outputs=4), mixer=LSTM, hidden=5, layers=1)
    learner = Learner(net, objective_for("tag"), strategy)
    y = torch.randint(0, 4, (8, 6))
    y[:, 3:] = UNSCORED
    batch = Batch(torch.randint(0, 7, (8, 6)), y)
    strategy.after_step(learner, batch, learner(batch))
    with torch.no_grad():
        net.head.linear.weight.mul_(1.5)
    strategy.before_step(learner, batch)
    drawn = strategy._drawn[0]
    term = strategy.loss(learner, batch, learner(batch))["der_logits"]
    torch.testing.assert_close(term, F.mse_loss(learner(drawn).logits[:, :3], drawn.extra["logits"][:, :3]))


# ER-ACE


def test_er_ace_by_hand(tiny: Any) -> None:
    strategy = ERACE(capacity=50, rows=5)
    learner = tiny.learner(strategy)
    for k in range(2):
        learner.shape_for(tiny.stream()[k])
    old, new = rows(9), rows(7, (2, 4), seed=1)
    assert strategy.batch(learner, old) is old
    strategy.before_step(learner, old)
    both = strategy.batch(learner, new)
    assert len(both) == 12
    output = learner(both)
    present, seen = sorted(set(new.y.tolist())), [0, 1, 2, 3]
    current = F.cross_entropy(output.logits[:7][:, present], new.y - 2 if len(present) == 2 else new.y * 0)
    replayed = F.cross_entropy(output.logits[7:][:, seen], both.y[7:])
    torch.testing.assert_close(strategy.objective(learner, both, output), current + replayed)
    (slope,) = torch.autograd.grad(strategy.objective(learner, new, learner(new)), learner.net.head.linear.bias)
    assert not bool(slope[:2].any())  # the current rows do not push old classes down


def test_er_ace_and_icarl_weigh_rows(tiny: Any) -> None:
    weight = torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0, 0.0])
    whole, stream = rows(6), tiny.stream()
    for strategy in (ERACE(capacity=50), ICaRL(capacity=12)):
        learner = tiny.learner(strategy, stream)
        strategy.setup(learner, stream)
        learner.begin(stream[0])
        batch = replace(whole, weight=weight)
        found = strategy.objective(learner, batch, learner(batch))
        each = torch.stack(
            [strategy.objective(learner, one, learner(one)) for one in map(whole.rows, torch.arange(6).split(1))]
        )
        if isinstance(strategy, ERACE):  # alone, a row has the classes of its own batch: both classes occur here
            logits = learner(whole).logits[:, :2]
            each, count = F.cross_entropy(logits, whole.y, reduction="none"), 6.0
        else:
            count = float(weight.sum())
        torch.testing.assert_close(found, (each * weight).sum() / count)


# A-GEM and GEM


def test_agem_projection() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        g, r = torch.randn(2, 30, dtype=torch.float64)
        projected = project_average(g, r)
        if g @ r >= 0:
            assert torch.equal(projected, g)
        else:
            assert abs(float(projected @ r)) < 1e-12
            torch.testing.assert_close(projected, g - (g @ r) / (r @ r) * r)
    g = torch.randn(30)
    assert torch.equal(project_average(g, torch.zeros(30)), g)


def brute_force(gram: Tensor, along: Tensor, margin: float, eps: float) -> Tensor:
    """The dual by trying every set of entries that sit at the margin."""
    k, best, lowest = len(along), along, float("inf")
    q = gram + eps * torch.eye(k, dtype=gram.dtype)
    for bits in itertools.product([False, True], repeat=k):
        free = torch.tensor(bits)
        v = torch.full((k,), margin, dtype=gram.dtype)
        if free.any():
            v[free] = torch.linalg.solve(q[free][:, free], -along[free] - q[free][:, ~free] @ v[~free])
        if bool((v >= margin - 1e-9).all()):
            value = float(0.5 * v @ q @ v + along @ v)
            if value < lowest:
                best, lowest = v, value
    return best


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_gem_dual_equals_brute_force(k: int, margin: float) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        past, g = torch.randn(k, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        gram, along = past @ past.mT, past @ g
        found = solve_dual(gram, along, margin, 1e-3)
        if bool((along >= 0).all()):
            assert not bool(found.any())
            continue
        torch.testing.assert_close(found, brute_force(gram, along, margin, 1e-3), rtol=1e-5, atol=1e-6)
        if margin == 0:
            projected = project_all(g, past, 0.0, 1e-9)
            assert float((past @ projected).min()) > -1e-5  # no loss rises
    torch.manual_seed(0)
    past, g = torch.randn(20, 50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    assert float((past @ project_all(g, past, 0.0, 1e-9)).min()) > -1e-6  # as many experiences as papers have


@pytest.mark.parametrize("kind", [AGEM, GEM])
def test_a_step_projects_the_gradient_of_the_batch(tiny: Any, kind: Any) -> None:
    strategy = kind(capacity_per_experience=10)
    stream = tiny.stream()
    learner = tiny.learner(strategy, stream)
    for k in range(2):
        learner.begin(stream[k])
        learner.end(stream[k])
    learner.begin(stream[2])
    assert len(strategy.memory) == 20
    memories = [strategy.memory.contents().rows(strategy.memory.contents().extra["experience"] == k) for k in (0, 1)]
    assert [len(m) for m in memories] == [10, 10]
    assert all(set(m.y.tolist()) <= set(stream[k].classes) for k, m in enumerate(memories))
    batch = stream[2].train.batch(torch.arange(16))
    strategy.before_step(learner, batch)
    learner.objective(learner(batch).logits, batch).backward()
    own = grads(learner)
    strategy.gradients(learner, batch)
    if kind is AGEM:
        assert strategy._drawn is not None
        right = project_average(own, gradient(learner, strategy._drawn))
    else:
        right = project_all(own, torch.stack([gradient(learner, m) for m in memories]))
    torch.testing.assert_close(grads(learner), right)
    assert not torch.equal(grads(learner), own)  # new classes harm old ones here


@pytest.mark.parametrize("kind", ["agem", "gem"])
def test_projections_keep_full_precision_under_autocast(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    own = torch.randn(3000, generator=g)
    past = torch.randn(3, 3000, generator=g) - 0.3 * own
    past[1] = past[0] + 0.01 * past[1]  # nearly the same constraint twice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project_average(own, past[0]) if kind == "agem" else project_all(own, past, margin=0.0)
    right = project_average(own, past[0]) if kind == "agem" else project_all(own, past, margin=0.0)
    torch.testing.assert_close(found, right)


def test_gem_keeps_the_latest_rows_or_a_sample(tiny: Any) -> None:
    stream = tiny.stream()
    for policy, right in (("latest", stream[0].train.x[-10:]), ("uniform", None)):
        strategy = GEM(capacity_per_experience=10, policy=policy)
        learner = tiny.learner(strategy, stream)
        strategy.after_experience(learner, stream[0])
        held = {tuple(x) for x in strategy.memory.contents().x.tolist()}
        assert len(held) == 10
        if right is not None:
            assert held == {tuple(x) for x in right.tolist()}


# MIR


def test_mir_scores_by_a_virtual_step(tiny: Any) -> None:
    strategy = MIR(capacity=60, rows=4, candidates=20, lr=0.3)
    learner = tiny.trained(strategy)
    batch, candidates = rows(8, (4, 6)), strategy.buffer.sample(20)
    kept = {n: w.detach().clone() for n, w in learner.weights().items()}
    found = strategy.interference(learner, batch, candidates)
    assert all(torch.equal(kept[n], w) for n, w in learner.weights().items())
    other, step = deepcopy(learner), _split(gradient(learner, batch), learner)
    with torch.no_grad():
        for p, g in zip(other.weights().values(), step, strict=True):
            p.sub_(0.3 * g)
        right = F.cross_entropy(other(candidates).logits, candidates.y, reduction="none")
        right = right - F.cross_entropy(learner(candidates).logits, candidates.y, reduction="none")
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_mir_replays_the_most_interfered(tiny: Any) -> None:
    strategy = MIR(capacity=60, rows=4, candidates=1000, lr=0.3)  # all that is held
    learner = tiny.trained(strategy)
    batch = rows(8, (4, 6))
    held = strategy.buffer.contents()
    worst = strategy.interference(learner, batch, held).topk(4).indices
    joined = strategy.batch(learner, batch)
    assert {tuple(x) for x in joined.x[8:].tolist()} == {tuple(x) for x in held.x[worst].tolist()}


def _split(vector: Tensor, learner: Learner) -> list[Tensor]:
    weights = list(learner.weights().values())
    return [v.view_as(w) for v, w in zip(vector.split([w.numel() for w in weights]), weights, strict=True)]


# GDumb


def test_the_greedy_sampler_balances_classes_as_they_come() -> None:
    buffer = Greedy(capacity=12, seed=0)
    y = torch.tensor([0] * 30)
    buffer.insert(Batch(torch.arange(30.0)[:, None], y))
    assert buffer.contents().x.flatten().tolist() == list(range(12))  # the first that came
    buffer.insert(Batch(100 + torch.arange(5.0)[:, None], y[:5] + 1))
    assert Counter(buffer.contents().y.tolist()) == {0: 7, 1: 5}
    buffer.insert(Batch(200 + torch.arange(50.0)[:, None], torch.arange(50) % 3))
    assert Counter(buffer.contents().y.tolist()) == {0: 4, 1: 4, 2: 4}
    held = buffer.contents()
    for label, slots in buffer.held.items():
        assert buffer.y is not None
        assert all(int(buffer.y[s]) == label for s in slots)
    assert sorted(s for slots in buffer.held.values() for s in slots) == list(range(12))
    of_two = held.x[held.y == 2].flatten()
    assert bool((of_two >= 200).all())


def test_greedy_evictions_are_uniform() -> None:
    stayed = torch.zeros(10)
    for seed in range(600):
        buffer = Greedy(capacity=10, seed=seed)
        buffer.insert(Batch(torch.arange(10.0)[:, None], torch.zeros(10).long()))
        buffer.insert(Batch(50 + torch.arange(5.0)[:, None], torch.ones(5).long()))
        held = buffer.contents().x.flatten()
        stayed[held[held < 50].long()] += 1
    # each of the first ten stays with probability 1/2; 4.5 standard deviations of 600 draws
    assert bool(((stayed / 600 - 0.5).abs() < 4.5 * (0.25 / 600) ** 0.5).all())


def test_gdumb_trains_on_its_memory_from_the_initial_weights(tiny: Any) -> None:
    seen: list[set[int]] = []

    class Recording(GDumb):
        def session(self, stream: Any, index: int, session: Session) -> Session:
            session = super().session(stream, index, session)
            assert session.data is not None
            seen.append(set(session.data.batch(torch.arange(len(session.data))).y.tolist()))
            assert len(session.data) == 30
            return session

    class Watch(Strategy):
        def before_experience(self, learner: Learner, experience: Experience) -> None:
            starts.append(torch.cat([w.detach().flatten() for w in learner.weights().values()]))

    starts: list[Tensor] = []
    learner = tiny.trained(Composite({"gdumb": Recording(capacity=30), "watch": Watch()}))
    assert seen == [{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], torch.cat([w.detach().flatten() for w in learner.weights().values()]))


def test_gdumb_alone_chooses_what_is_trained() -> None:
    with pytest.raises(ValueError, match="gdumb and joint cannot be used both: each chooses what an experience"):
        Composite({"gdumb": GDumb(capacity=30), "joint": Joint()})


# herding and iCaRL


def test_gdumb_goes_with_frozen_layers(tiny: Any) -> None:
    stream = tiny.stream()
    learner = tiny.learner(Composite({"gdumb": GDumb(20), "freeze": Freeze(blocks=1, start=1)}), stream)
    learner.strategy.setup(learner, stream)
    first = deepcopy(learner.net.state_dict())
    learner.begin(stream[0])
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(1.0)
    moved = deepcopy(learner.net.state_dict())
    learner.end(stream[0])
    learner.begin(stream[1])
    free = set(learner.weights())
    assert free and len(free) < len(first)
    for name, value in learner.net.named_parameters():
        assert torch.equal(value, first[name] if name in free else moved[name])


def test_herding_is_greedy() -> None:
    torch.manual_seed(0)
    features = F.normalize(torch.randn(25, 4, dtype=torch.float64), dim=-1)
    mean, chosen = features.mean(0), []
    for k in range(1, 11):
        gaps = {
            i: float((mean - (features[chosen].sum(0) + features[i]) / k).norm()) for i in range(25) if i not in chosen
        }
        chosen.append(min(gaps, key=lambda i: gaps[i]))
    assert herding(features, 10).tolist() == chosen
    assert sorted(herding(features, 99).tolist()) == list(range(25))


def test_herded_exemplars_shrink_to_the_first_ranks() -> None:
    buffer = Ranked(12)
    for label in range(3):
        x = torch.arange(20.0)[:, None] + 100 * label
        rank = torch.randperm(20, generator=torch.Generator().manual_seed(label))
        buffer.insert_ranked(Batch(x, torch.full((20,), label)), rank)
        held = buffer.contents()
        share = 12 // (label + 1)
        assert Counter(held.y.tolist()) == dict.fromkeys(range(label + 1), share)
        own = held.x[held.y == label].flatten() - 100 * label
        assert sorted(own.tolist()) == sorted(x.flatten()[rank < share].sub(100 * label).tolist())


def test_herded_replay_holds_the_first_in_herding_order(tiny: Any) -> None:
    strategy, stream = Replay(capacity=12, policy="herding", insert="after"), tiny.stream()
    learner = tiny.learner(strategy, stream)
    strategy.after_experience(learner, stream[0])
    data = stream[0].train
    assert isinstance(data, TensorData)
    for label in (0, 1):
        members = data.x[data.y == label]
        order = herding(F.normalize(learner.features(Batch(members, members)).detach(), dim=-1), 6)
        held = strategy.buffer.contents()
        assert {tuple(x) for x in held.x[held.y == label].tolist()} == {tuple(x) for x in members[order].tolist()}


def test_herded_replay_fills_the_shares_of_classes_that_come_again(tiny: Any) -> None:
    strategy, stream = Replay(capacity=12, policy="herding", insert="after"), tiny.stream()
    learner = tiny.learner(strategy, stream)
    for k, classes in enumerate([(0, 1), (1, 2)]):
        batch = rows(40, (classes[0], classes[1] + 1), seed=k)
        data = TensorData(batch.x, batch.y)
        strategy.after_experience(learner, Experience(k, str(k), classes, train=data, test=data))
    assert strategy.buffer.contents().y.bincount().tolist() == [4, 4, 4]


def test_icarl_never_answers_with_a_class_without_exemplars(tiny: Any) -> None:
    strategy, stream = ICaRL(capacity=1), tiny.stream()
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    learner.begin(stream[0])
    learner.end(stream[0])
    held = strategy.exemplars.contents()
    batch, features = rows(9), -learner.features(held).detach().expand(9, -1)  # as far from the exemplar as can be
    answers = strategy.predict(learner, batch, torch.zeros(9, 6), features).argmax(-1)
    assert torch.equal(answers, held.y.expand(9))


def test_icarl_loss_by_hand(tiny: Any) -> None:
    strategy, stream = ICaRL(capacity=12), tiny.stream()
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    learner.begin(stream[0])
    learner.end(stream[0])
    batch = stream[1].train.batch(torch.arange(9))
    learner.begin(stream[1])
    old = learner(batch).logits.sigmoid().detach()
    with torch.no_grad():
        for p in learner.net.parameters():
            p.mul_(1.3)
    output = learner(batch)
    targets = torch.cat([old[:, :2], F.one_hot(batch.y, 6)[:, 2:4]], 1)
    right = F.binary_cross_entropy(output.logits[:, :4].sigmoid(), targets)
    torch.testing.assert_close(strategy.objective(learner, batch, output), right)


def test_icarl_answers_with_the_nearest_mean_of_exemplars(tiny: Any) -> None:
    strategy, stream = ICaRL(capacity=12), tiny.stream()
    learner = tiny.trained(strategy, stream)
    learner.eval()
    held = strategy.exemplars.contents()
    assert Counter(held.y.tolist()) == dict.fromkeys(range(6), 2)
    features = F.normalize(learner.features(held).detach(), dim=-1)
    means = torch.stack([F.normalize(features[held.y == c].mean(0), dim=0) for c in range(6)])
    batch = stream[1].test.batch(torch.arange(20))
    output: Output = learner(batch)
    answers = strategy.predict(learner, batch, output.logits, output.features)
    right = torch.stack([(F.normalize(output.features, dim=-1) - m).norm(dim=-1) for m in means]).argmin(0)
    assert torch.equal(answers.argmax(-1), right)
    logits = ICaRL(capacity=12, nearest_mean=False)
    assert logits.predict(learner, batch, output.logits, output.features) is output.logits


def test_icarl_trains_on_new_data_and_exemplars(tiny: Any) -> None:
    strategy, stream = ICaRL(capacity=12), tiny.stream()
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    assert strategy.session(stream, 0, Session(stream[0].train)).data is stream[0].train
    learner.begin(stream[0])
    learner.end(stream[0])
    data = strategy.session(stream, 1, Session(stream[1].train)).data
    assert data is not None
    assert Counter(data.batch(torch.arange(len(data))).y.tolist()[40:]) == {0: 6, 1: 6}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DER, {"capacity": 5, "alpha": -1}, "^alpha: got -1"),
        (DER, {"capacity": 5, "rows": 0}, "^rows: got 0"),
        (DER, {"capacity": -5}, "^capacity: got -5"),
        (ERACE, {"capacity": 5, "rows": 0}, "^rows: got 0"),
        (AGEM, {"capacity_per_experience": 5, "rows": 0}, "^rows: got 0"),
        (AGEM, {"capacity_per_experience": -5}, "^capacity_per_experience: got -5"),
        (GEM, {"capacity_per_experience": 5, "margin": -1}, "^margin: got -1"),
        (GEM, {"capacity_per_experience": 5, "policy": "x"}, "allowed are 'latest', 'uniform'"),
        (MIR, {"capacity": 5, "candidates": 0}, "candidates: got 0"),
        (MIR, {"capacity": 5, "lr": 0.0}, "lr: got 0"),
        (GDumb, {"capacity": 0}, "^capacity: got 0"),
        (ICaRL, {"capacity": 0}, "^capacity: got 0"),
        (Replay, {"capacity": 5, "policy": "herding"}, "needs the whole experience"),
    ],
)
def test_wrong_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_shares_by_experience_of_token_inputs(tiny: Any) -> None:
    """Token ids are integers; the weights of rows are not."""
    strategy = Replay(capacity=20, rows=4, weighting="experiences")
    learner, stream = tiny.learner(strategy), tiny.stream()
    batch = Batch(torch.randint(0, 7, (8, 6)), torch.zeros(8, dtype=torch.int64))
    strategy.batch(learner, batch)
    strategy.before_step(learner, batch)
    strategy.before_experience(learner, stream[2])
    weight = strategy.batch(learner, batch).weight
    assert weight is not None
    torch.testing.assert_close(weight, torch.tensor([1 / 3 * 12 / 8] * 8 + [2 / 3 * 12 / 4] * 4))
