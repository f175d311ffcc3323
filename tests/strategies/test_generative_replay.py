"""Generative replay: the generator's bound and samples, whose weights move when, and the two losses by hand."""

from __future__ import annotations

import math
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
from clplat.learners.nets.heads import Head
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.rehearsal.vae import SequenceVAE
from clplat.strategies.generative_replay import GenerativeReplay
from clplat.streams.data import Examples
from clplat.streams.experience import Batch, Experience, Stream, StreamError
from clplat.streams.inputs import Inputs


def noise(rows: int, latent: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, latent, generator=torch.Generator().manual_seed(seed))


CASES = {"generative_replay": Case({"rows": 8, "hidden": 8, "latent": 3}, off={"rows": 0})}


def test_the_bound_by_hand() -> None:
    vae = SequenceVAE(steps=4, features=3, vocabulary=None, hidden=8, latent=2, deviation=0.5)
    x, z = torch.randn(6, 4, 3), noise(6)
    mean, log_variance = vae.posterior(vae.encoder(x)[1][0]).chunk(2, -1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    out = vae.decode(mean + posterior.stddev * z)
    likelihood = torch.distributions.Normal(out, 0.5).log_prob(x).sum((1, 2))
    constant = -12 * math.log(0.5 * math.sqrt(2 * math.pi))
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    right = (divergence - likelihood + constant).mean()
    torch.testing.assert_close(vae.loss(Batch(x, x), z), right)


def test_tokens_are_drawn_from_their_distribution() -> None:
    vae = SequenceVAE(steps=2, features=None, vocabulary=4, hidden=8, latent=2, deviation=1.0)
    z = noise(1).expand(40_000, -1)
    uniform = torch.rand(40_000, 2, generator=torch.Generator().manual_seed(1))
    drawn = vae.generate(z, uniform)
    p = vae.decode(z[:1]).softmax(-1)[0]
    for t in range(2):
        found = drawn[:, t].bincount(minlength=4) / 40_000
        assert bool(((found - p[t]).abs() < 4.5 * (p[t] * (1 - p[t]) / 40_000).sqrt()).all())
    x = torch.randint(0, 4, (5, 2))
    assert float(vae.loss(Batch(x, x), noise(5)).detach()) > 0


@pytest.mark.parametrize(("steps", "tokens"), [(6, False), (0, False), (6, True)])
def test_it_learns_what_it_is_shown(steps: int, tokens: bool) -> None:
    """Two kinds of sequences: what is generated is nearer to one of them than they are to each other."""
    torch.manual_seed(0)
    shape = (2, steps, 3) if steps else (2, 3)
    kinds = torch.randint(0, 5, (2, 6)) if tokens else torch.randn(shape)
    vae = SequenceVAE(steps, None if tokens else 3, 5 if tokens else None, hidden=24, latent=2, deviation=0.3)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    for step in range(300):
        x = kinds[torch.randint(0, 2, (32,))]
        optimizer.zero_grad()
        vae.loss(Batch(x, x), noise(32, seed=step)).backward()
        optimizer.step()
    made = vae.generate(noise(200, seed=9), torch.rand(200, max(steps, 1)))
    assert made.shape == (200, *kinds.shape[1:])
    apart = (made[:, None] - kinds[None]).float().square().flatten(2).mean(2)  # [200, 2]
    between = float((kinds[0] - kinds[1]).float().square().mean())
    assert float((apart.min(1).values < 0.15 * between).float().mean()) > 0.8
    share = float((apart.argmin(1) == 0).float().mean())
    assert 0.2 < share < 0.8


def begun(tiny: Any, strategy: GenerativeReplay, stream: Any, index: int = 2) -> Any:
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    for k in range(index):
        learner.begin(stream[k])
        with torch.no_grad():
            for p in learner.net.parameters():
                p.add_(0.3 * torch.randn_like(p))
        learner.end(stream[k])
    learner.begin(stream[index])
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return learner


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_loss_by_hand_in_the_third_experience(tiny: Any, labels: str) -> None:
    stream = tiny.stream()
    strategy = GenerativeReplay(rows=5, hidden=8, latent=2, labels=labels, temperature=2.0)
    learner = begun(tiny, strategy, stream)
    batch = stream[2].train.batch(torch.arange(9))
    assert strategy.batch(learner, batch) is batch
    strategy.before_step(learner, batch)
    made = strategy._generated
    assert made is not None and made.x.shape == (5, 5)
    old, new = strategy.teacher(made).logits, learner(made).logits
    assert torch.equal(made.y, old.argmax(-1))
    if labels == "hard":
        past = F.cross_entropy(new, made.y)
    else:
        past = 4 * F.kl_div((new / 2).log_softmax(-1), (old / 2).softmax(-1), reduction="batchmean")
    output = learner(batch)
    right = F.cross_entropy(output.logits, batch.y) / 3 + past * 2 / 3
    torch.testing.assert_close(strategy.objective(learner, batch, output), right)


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("mask", ["seen", "experience"])
def test_the_past_is_compared_among_the_classes_that_compete(tiny: Any, labels: str, mask: str) -> None:
    """A shared head answers with classes not met yet too: masked ones would make the loss infinite."""
    stream = tiny.stream()
    strategy = GenerativeReplay(rows=40, hidden=8, latent=2, labels=labels)
    learner = tiny.learner(strategy, stream, logit_mask=mask)
    strategy.setup(learner, stream)
    learner.begin(stream[0])
    with torch.no_grad():
        learner.net.head.linear.bias[4:] += 1.0  # not met before the third experience
    learner.end(stream[0])
    learner.begin(stream[1])
    with torch.no_grad():
        learner.net.head.linear.bias[0] += 0.5
    batch = stream[1].train.batch(torch.arange(9))
    strategy.before_step(learner, batch)
    made = strategy._generated
    assert made is not None and bool((made.y < 4).all())
    output = learner(batch)
    past = 2 * strategy.objective(learner, batch, output) - learner.objective(output.logits, batch)
    if labels == "hard":
        right = learner.objective(learner(made).logits, made)
    else:
        old, new = strategy.teacher(made).logits, learner.net(made).logits
        allowed = learner.same_experience[made.y] if mask == "experience" else learner.seen.expand(len(made), -1)
        p, q = ((z / 2).masked_fill(~allowed, -1e9).softmax(-1) for z in (old, new))
        right = 4 * torch.where(allowed, p * (p / q).log(), 0).sum(-1).mean()
    torch.testing.assert_close(past, right)


def test_the_generators_optimiser_follows_its_weights_after_a_resume(tiny: Any) -> None:
    """Weights are loaded on the CPU and moved afterwards; here they change their type instead of the device."""
    stream = tiny.stream()
    learners = []
    for _ in range(2):
        strategy = GenerativeReplay(rows=5, hidden=8, latent=2)
        learner = tiny.learner(strategy, stream)
        strategy.setup(learner, stream)
        learners.append((learner, strategy))
    (learner, strategy), (other, resumed) = learners
    learner.begin(stream[0])
    batch = stream[0].train.batch(torch.arange(9))
    strategy.before_step(learner, batch)
    strategy.after_step(learner, batch, learner(batch))
    other.load_state_dict(learner.state_dict())
    assert resumed.get_extra_state()["optimizer"] is not None  # a checkpoint before anything else would have it too
    other.double()
    other.enter(stream[0])
    batch = replace(batch, x=batch.x.double())
    resumed._random.set_state(strategy._random.get_state())
    z = torch.randn(9, 2, dtype=torch.float64)
    resumed._normal = lambda rows, like: z  # type: ignore[method-assign]
    resumed.before_step(other, batch)
    resumed.after_step(other, batch, other(batch))
    assert resumed.optimizer is not None
    moments = list(resumed.optimizer.state.values())
    assert moments and all(s["exp_avg"].dtype == torch.float64 and int(s["step"]) == 2 for s in moments)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_generated_rows_are_trained_on_scored_steps_only(labels: str) -> None:
    strategy, data = GenerativeReplay(rows=5, hidden=8, labels=labels), FixedLength(6)
    inputs = Inputs(vocabulary=2, length=6, per_step=True)
    net = recurrent(inputs, partial(Head, outputs=2), mixer=LSTM, hidden=8)
    learner = Learner(net, objective_for("tag"), strategy)
    first, second = (Experience(k, str(k), (), train=data, test=data) for k in range(2))
    strategy.setup(learner, Stream("bits", (first, second), "domain_incremental", "tag", 2, vocabulary=2, length=6))
    learner.begin(first)
    learner.end(first)
    learner.begin(second)
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batch = data.batch(torch.arange(3))
    strategy.before_step(learner, batch)
    made = strategy._generated
    assert made is not None and made.mask is not None
    assert torch.equal(made.mask, batch.mask[[0, 1, 2, 0, 1]])  # type: ignore[index]  # it has one
    old, new = strategy.teacher(made).logits[made.mask], learner(made).logits[made.mask]
    if labels == "hard":
        past = F.cross_entropy(new, old.argmax(-1))
    else:
        past = 4 * F.kl_div((new / 2).log_softmax(-1), (old / 2).softmax(-1), reduction="batchmean")
    output = learner(batch)
    right = 0.5 * learner.objective(output.logits, batch) + 0.5 * past
    torch.testing.assert_close(strategy.objective(learner, batch, output), right)


class FixedLength(Examples):
    """Tagged sequences of bits, of one length; a different half of the steps is scored in each."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randint(0, 2, (40, steps), generator=generator)
        self.mask = torch.rand(40, steps, generator=generator) < 0.5
        self.mask[:, 0] = True

    def __len__(self) -> int:
        return 40

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.x[index], self.x[index], mask=self.mask[index])


def test_nothing_is_generated_in_the_first_experience(tiny: Any) -> None:
    stream, strategy = tiny.stream(), GenerativeReplay(rows=5, hidden=8, latent=2)
    learner = begun(tiny, strategy, stream, index=0)
    batch = stream[0].train.batch(torch.arange(9))
    strategy.before_step(learner, batch)
    assert strategy._generated is None
    output = learner(batch)
    assert torch.equal(strategy.objective(learner, batch, output), learner.objective(output.logits, batch))


def test_generated_rows_belong_to_earlier_tasks(tiny: Any) -> None:
    stream, strategy = tiny.stream(tasks=True), GenerativeReplay(rows=200, hidden=8, latent=2)
    learner = begun(tiny, strategy, stream)
    strategy.before_step(learner, stream[2].train.batch(torch.arange(9)))
    made = strategy._generated
    assert made is not None and made.task is not None
    counts = made.task.bincount(minlength=3)
    assert int(counts[2]) == 0 and int(counts[:2].min()) > 60
    assert torch.equal(made.y // 2, made.task)  # answers lie in the task's own classes


def test_each_optimiser_moves_its_own_weights(tiny: Any) -> None:
    stream, strategy = tiny.stream(), GenerativeReplay(rows=5, hidden=8, latent=2)
    learner = begun(tiny, strategy, stream)
    optimizer = learner.handover.begin(learner.parameter_groups())
    main = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert main == {id(p) for p in learner.net.parameters()}
    batch = stream[2].train.batch(torch.arange(9))
    strategy.before_step(learner, batch)
    net = [p.detach().clone() for p in learner.net.parameters()]
    young = [p.detach().clone() for p in strategy.generator.parameters()]
    old = [p.detach().clone() for p in strategy.old.parameters()]
    with torch.no_grad():
        strategy.after_step(learner, batch, learner(batch))
    assert all(torch.equal(a, b) for a, b in zip(net, learner.net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old, strategy.old.parameters(), strict=True))
    stayed = {n for a, (n, b) in zip(young, strategy.generator.named_parameters(), strict=True) if torch.equal(a, b)}
    assert stayed == {"encoder.weight_hh_l0"}  # one step from a state of zeros: no gradient
    assert all(p.grad is None for p in strategy.generator.parameters())


def test_sequences_of_different_lengths_are_refused(tiny: Any) -> None:
    stream, strategy = tiny.stream(), GenerativeReplay(rows=5)
    learner = tiny.learner(Composite({"mine": strategy}), stream)

    class Ragged:
        def __len__(self) -> int:
            return 4

        def batch(self, index: Tensor) -> Batch:
            return Batch(torch.zeros(len(index), 4, 2), torch.zeros(len(index)), lengths=torch.ones(len(index)))

    ragged: Any = Ragged()
    with pytest.raises(StreamError, match="one length"):
        learner.strategy.setup(learner, replace(stream, experiences=(replace(stream[0], train=ragged),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": -1}, "^rows: got -1"),
        ({"latent": 0}, "^latent: got 0"),
        ({"deviation": 0.0}, "^deviation: got 0"),
        ({"labels": "x"}, "allowed are 'hard', 'soft'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerativeReplay(**options)
