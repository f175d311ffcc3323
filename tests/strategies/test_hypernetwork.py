"""Hypernetworks: the proposed step, the regulariser, generation by task, initial variances and task inference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import instantiate
from tiny import only, sequences
from torch import Tensor, nn
from torch.func import functional_call

from clplat.build import build_learner
from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.net import Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.per_task.generated import GeneratedNet, TaskEmbeddings, _drawn
from clplat.per_task.generators import Chunked, Full, Generator, Piece
from clplat.per_task.net import lowest_entropy
from clplat.per_task.recurrent import Recurrent
from clplat.per_task.regularizer import orthogonality
from clplat.settings import Training
from clplat.strategies.hypernetwork import Hypernetwork
from clplat.strategies.joint import Joint
from clplat.strategies.lwf import LwF
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.streams.inputs import Inputs
from clplat.streams.permuted_copy import permuted_copy

K, C, T, D = 3, 6, 5, 4
INPUTS = Inputs(features=D, length=T)
TASKS = [(0, 1), (2, 3), (4, 5)]
ADAM = partial(torch.optim.Adam, lr=1e-2)


def net(tasks: bool = True) -> Net:
    torch.manual_seed(1)
    head: Callable[[int], Head] = partial(Head, outputs=C)
    if tasks:
        head = partial(TaskHead, outputs=C, tasks=TASKS)
    return recurrent(INPUTS, head, mixer=LSTM, hidden=6)


def learner(strategy: Strategy, tasks: bool = True, optimizer: Any = ADAM) -> Learner:
    return Learner(net(tasks), objective_for("class"), strategy, optimizer)


def strategy(**options: Any) -> Hypernetwork:
    given: dict[str, Any] = {"beta": 1.0, "kind": "chunked", "hidden": [7], "embedding": 3, "chunk": 50, "code": 4}
    return Hypernetwork(**(given | options))


def generated(made: Learner) -> GeneratedNet:
    assert isinstance(made.net, GeneratedNet)
    return made.net


def taught(**options: Any) -> Learner:
    """A learner in its third task, with gradients and an optimiser that has taken steps."""
    made = learner(strategy(**options))
    made.strategy.setup(made, sequences())
    for experience in sequences():
        made.begin(experience)
        optimizer = made.handover.begin(made.parameter_groups())
        for _ in range(3):
            optimizer.zero_grad()
            batch = experience.train.batch(torch.arange(16))
            made.objective(made(batch).logits, batch).backward()
            if experience.index < 2 or _ < 2:
                optimizer.step()
        if experience.index < 2:
            made.end(experience)
    return made


def after_a_step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Copies of the weights on which a copy of the optimiser has taken its step."""
    copies, other = deepcopy((weights, optimizer))
    for one, copy in zip(weights, copies, strict=True):
        copy.grad = None if one.grad is None else one.grad.clone()
    other.step()
    return copies


CASES = {
    "hypernetwork": Case({"hidden": [6], "embedding": 4, "beta": 1.0}, not_counted=("tasks._extra_state",)),
    "chunked_hypernetwork": Case(
        {"hidden": [8, 8], "embedding": 4, "chunk": 100, "code": 4, "beta": 1.0, "subset": 1, "targets": "outputs"},
        tasks=True,
        not_counted=("tasks._extra_state",),
    ),
}


@pytest.mark.parametrize("targets", ["weights", "outputs"])
@pytest.mark.parametrize("lookahead", [True, False])
def test_the_regulariser_against_its_definition(targets: str, lookahead: bool) -> None:
    made = taught(beta=3.0, lookahead=lookahead, targets=targets)
    target, optimizer = generated(made), made.optimizer
    assert optimizer is not None and target.tasks.past == [0, 1]
    parameters = dict(target.generator.named_parameters())
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    start = deepcopy(dict(target.generator.state_dict()))

    real = after_a_step(list(parameters.values()), optimizer)
    step = {n: (new - p).detach() for (n, p), new in zip(parameters.items(), real, strict=True)}
    theta = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    moved = {n: theta[n] + step[n] if lookahead else theta[n] for n in theta}
    past = target.embeddings.learned
    assert past is not None and len(past) == 2
    h = functional_call(target.generator, moved, (past,))[0]
    stored = only(made).past.outputs
    if stored is None:
        flat = only(made).past.theta
        assert flat is not None
        old = {}
        for n, p in parameters.items():
            old[n], flat = flat[: p.numel()].view(p.shape), flat[p.numel() :]
        stored = functional_call(target.generator, old, (past,))[0].detach()
    total = torch.zeros(())
    for j, task in enumerate([0, 1]):
        at = 0
        for piece in target.pieces:
            apart = (h[j, at : at + piece.size] - stored[j, at : at + piece.size]).view(piece.shape)
            at += piece.size
            if piece.names[0].startswith("head."):
                apart = apart[2 * task : 2 * task + 2]  # a head's rows count for its own task only
            total = total + apart.square().sum()
    (3.0 / 2 * total).backward()
    assert float(total.detach()) > 0

    made.strategy.gradients(made, sequences()[2].train.batch(torch.arange(4)))
    for name, p in parameters.items():
        gradient = theta[name].grad
        assert p.grad is not None and gradient is not None
        torch.testing.assert_close(p.grad, before[name] + gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(p, start[name])


def test_a_subset_is_drawn_anew_and_stands_for_all_on_average() -> None:
    made = taught(beta=2.0, subset=1, targets="outputs")
    parameters = list(generated(made).generator.parameters())
    task = [p.grad.clone() for p in parameters if p.grad is not None]

    def added() -> Tensor:
        for p, g in zip(parameters, task, strict=True):
            p.grad = g.clone()
        made.strategy.gradients(made, sequences()[2].train.batch(torch.arange(4)))
        return torch.cat([(p.grad - g).flatten() for p, g in zip(parameters, task, strict=True) if p.grad is not None])

    drawn = torch.stack([added() for _ in range(40)])
    different = drawn.round(decimals=4).unique(dim=0)
    assert len(different) == 2
    only(made).past.subset = None
    torch.testing.assert_close(different.mean(0), added(), rtol=1e-2, atol=1e-3)


def test_beta_zero_keeps_and_adds_nothing() -> None:
    made = taught(beta=0.0)
    before = [p.grad.clone() for p in made.net.parameters() if p.grad is not None]
    made.strategy.gradients(made, sequences()[2].train.batch(torch.arange(4)))
    assert all(torch.equal(p.grad, g) for p, g in zip(made.net.parameters(), before, strict=True) if p.grad is not None)
    embeddings = (1 + 2) * 3 * 4  # current and learned
    assert made.strategy.stored_bytes() == embeddings


def test_old_embeddings_stay_bitwise_and_the_net_is_generated_once_a_pass() -> None:
    made = taught()
    learned = generated(made).embeddings.learned
    assert learned is not None and learned.shape == (2, 3)
    before, current = learned.clone(), generated(made).embeddings.current.detach().clone()
    calls: list[Tensor] = []
    generated(made).generator.register_forward_hook(lambda module, args, out: calls.append(args[0]))
    made(sequences()[2].train.batch(torch.arange(4)))
    assert len(calls) == 1
    made.strategy.gradients(made, sequences()[2].train.batch(torch.arange(4)))
    assert made.optimizer is not None
    made.optimizer.step()
    assert torch.equal(generated(made).embeddings.learned, before)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(generated(made).embeddings.current, current)
    made.end(sequences()[2])
    assert torch.equal(generated(made).embeddings.embedding(2), generated(made).embeddings.current)
    assert torch.equal(generated(made).embeddings.embedding(0), before[0])


def test_it_holds_what_it_generated(trainer: Callable) -> None:
    drift = {}
    for beta in (0.0, 100.0):
        ends: list[dict[str, Tensor]] = []

        class Watch(Strategy):
            def after_experience(self, learner: Learner, experience: Experience) -> None:
                ends.append({n: w.clone() for n, w in generated(learner).weights_for(0).items()})  # noqa: B023 - used at once

        made = learner(Composite({"hypernetwork": strategy(beta=beta), "watch": Watch()}))
        Run(sequences(), made, trainer(), Training(batch_size=16, epochs=4)).go()
        drift[beta] = max(float((ends[-1][n] - w).abs().max()) for n, w in ends[0].items() if "head" not in n)
    assert drift[100.0] < 0.2 * drift[0.0]


def mixed() -> Batch:
    return Batch(
        x=torch.randn(7, T, D),
        y=torch.zeros(7, dtype=torch.long),
        lengths=torch.tensor([5, 3, 5, 2, 4, 5, 1]),
        task=torch.tensor([2, 0, 1, 0, 2, 2, 1]),
        source=torch.tensor([0, 1, 1, 1, 0, 0, 1], dtype=torch.uint8),
    )


def test_rows_of_several_tasks_get_each_its_weights() -> None:
    made, batch = taught(), mixed()
    state = ((torch.randn(7, 6), torch.randn(7, 6)),)
    reset = torch.rand(7, T) < 0.3
    whole = made.net(batch, state, reset)
    hidden, _ = made.net.lower(batch, 1, state, reset)
    upper = made.net.upper(hidden, 1, batch)
    for row in range(7):
        one = batch.rows(torch.tensor([row]))
        weights = generated(made).weights_for(int(one.task))  # pyright: ignore[reportArgumentType]  # it has tasks
        plain = net()
        plain.load_state_dict(weights, strict=False)
        right = plain(one, tuple(tuple(s[row : row + 1] for s in part) for part in state), reset[row : row + 1])
        for found in (whole, upper):
            torch.testing.assert_close(found.logits[row], right.logits[0])
            torch.testing.assert_close(found.features[row], right.features[0])
        for a, b in zip(whole.state[0] or (), right.state[0] or (), strict=True):
            torch.testing.assert_close(a[row], b[0])


def test_generated_weights_keep_their_precision_under_autocast() -> None:
    made = taught()
    with torch.autocast("cpu", torch.bfloat16):
        under = generated(made).weights_for(0)
    plain = generated(made).weights_for(0)
    assert all(torch.equal(under[n], w) for n, w in plain.items())


MAKERS: dict[str, Callable[[list[Piece], torch.Generator], Generator]] = {
    "full": lambda p, g: Full(p, 16, 1.0, [30, 30], "relu", g),
    "linear": lambda p, g: Full(p, 16, 1.0, [], "relu", g),
    "chunked": lambda p, g: Chunked(p, 16, 1.0, [40, 40], "relu", 64, 24, 0.5, g),
    "recurrent": lambda p, g: Recurrent(p, 16, 1.0, 40, 64, 24, 1.0, g),
}


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_initial_variances_are_those_of_the_net(kind: str) -> None:
    torch.manual_seed(0)
    plain = transformer(INPUTS, partial(Head, outputs=C), hidden=16, layers=1, heads=2)
    wanted = {n: p.detach().clone() for n, p in plain.named_parameters()}
    # Many generators, since the weights of one come from few random numbers.
    found: dict[str, list[Tensor]] = {n: [] for n in wanted}
    for seed in range(12):
        tasks = TaskEmbeddings(16, 1.0, seed)
        g = torch.Generator().manual_seed(seed)
        made = GeneratedNet(deepcopy(plain), tasks, lambda p, g=g: MAKERS[kind](list(p), g))
        for label in range(4):
            for n, w in made.weights_for(label).items():
                found[n].append(w.detach())
    ratios = {
        n: float((torch.stack(w).square().mean() / wanted[n].square().mean()).sqrt())
        for n, w in found.items()
        if wanted[n].ndim == 2
    }
    total = torch.cat([torch.stack(w).flatten() for n, w in found.items() if wanted[n].ndim == 2]).square().mean()
    overall = torch.cat([w.flatten() for w in wanted.values() if w.ndim == 2]).square().mean()
    assert float((total / overall).sqrt()) == pytest.approx(1, rel=0.25)
    if kind in ("full", "linear"):
        assert all(0.7 < r < 1.4 for r in ratios.values()), ratios
        for n, w in found.items():
            if wanted[n].ndim < 2:  # biases and gains start as they are
                assert all(torch.equal(one, wanted[n]) for one in w)


def test_chunk_codes_spread_where_the_target_s_variances_differ() -> None:
    pieces = [Piece(("a",), (64, 10), 0.1), Piece(("b",), (64, 10), 0.4)]
    flats = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        made = Chunked(pieces, 8, 1.0, [60], "relu", 64, 8, 1.0, g)
        flats.append(made(torch.randn(20, 8, generator=g))[0].detach())
    a, b = torch.cat(flats).split(640, 1)
    assert float(a.square().mean().sqrt()) == pytest.approx(0.1, rel=0.15)
    assert float(b.square().mean().sqrt()) == pytest.approx(0.4, rel=0.15)


@pytest.mark.parametrize("kind", ["class", "bits", "tag"])
def test_task_inference_takes_the_lowest_entropy_of_each_row(kind: str) -> None:
    made = taught()
    target = generated(made)
    per_step = kind != "class"
    target.per_step = target.template.per_step = per_step
    target.template.head = target.head = Head(6, C)  # all outputs for every task
    target.template.head.linear.weight.data.mul_(5)
    x, scored = 2 * torch.randn(40, T, D), torch.rand(40, T) < 0.6 if per_step else None
    y = {"class": torch.zeros(40), "tag": torch.zeros(40, T), "bits": torch.zeros(40, T, C)}[kind].long()
    batch = Batch(x, y, mask=scored)
    head = {f"head.{n}": p for n, p in target.template.head.named_parameters()}
    generate = target.weights_for
    target.weights_for = lambda label: generate(label) | head  # pyright: ignore[reportAttributeAccessIssue]
    logits, chosen = lowest_entropy(target, batch, objective_for(kind))
    options = [target.as_task(batch, label).logits.detach().double() for label in range(3)]
    for row in range(40):
        values = []
        for option in options:
            z, total = option[row].view(-1, C), 0.0
            for t in range(len(z)):
                if scored is not None and not scored[row, t]:
                    continue
                if kind == "bits":
                    p = z[t].sigmoid()
                    total -= float((p * p.log() + (1 - p) * (1 - p).log()).sum())
                else:
                    p = z[t].softmax(-1)
                    total -= float((p * p.log()).sum())
            values.append(total)
        best = min(range(3), key=values.__getitem__)
        if sorted(values)[1] - sorted(values)[0] > 1e-4:
            assert int(chosen[row]) == best
            torch.testing.assert_close(logits[row].double(), options[best][row])
    assert len(set(chosen.tolist())) > 1
    with pytest.raises(ValueError, match="entropy"):
        lowest_entropy(target, batch, objective_for("value"))


def test_without_task_labels_predict_infers_and_with_them_it_does_not(trainer: Callable) -> None:
    made = learner(strategy(), tasks=False)
    Run(sequences(tasks=False), made, trainer(), Training(batch_size=16, epochs=1)).go()
    made.eval()
    batch = sequences(tasks=False)[0].test.batch(torch.arange(20))
    with torch.no_grad():
        output = made.net(batch)
        told = Batch(x=batch.x, y=batch.y, task=torch.zeros(20, dtype=torch.long))
        found = made.strategy.predict(made, batch, output.logits, output.features)
        right, _ = lowest_entropy(generated(made), batch, made.objective)
        assert torch.equal(found, right)
        logits = torch.randn(20, C)
        assert made.strategy.predict(made, told, logits, output.features) is logits


@pytest.mark.parametrize("kind", ["full", "chunked"])
def test_bits_at_every_step_are_learned(trainer: Callable, kind: str) -> None:
    """Permuted copy with an Elman net, the orthogonality of its recurrence included."""
    copies = permuted_copy(experiences=2, pattern_steps=2, width=2, train_size=200, test_size=50)
    head = partial(TaskHead, outputs=2, tasks=[(0, 1), (0, 1)])
    body = recurrent(Inputs(features=3, length=5, per_step=True), head, mixer=Elman, hidden=12)
    made = Learner(body, objective_for("bits"), strategy(kind=kind, orthogonal=0.1), partial(torch.optim.Adam, lr=1e-2))
    results = Run(copies, made, trainer(), Training(batch_size=32, steps=120)).go()
    assert float(results.R[-1, 1]) > 0.65
    weights = generated(made).weights_for(0)
    u = weights["blocks.0.mixer.rnn.weight_hh_l0"]
    torch.testing.assert_close(orthogonality(weights), ((u.mT @ u - torch.eye(12)) ** 2).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta: got -1.0, it must be at least 0"),
        ({"kind": "half"}, "got 'half', allowed are 'full', 'chunked'"),
        ({"act": "gelu"}, "got 'gelu', allowed are 'relu', 'elu'"),
        ({"targets": "all"}, "allowed are 'weights', 'outputs'"),
        ({"subset": 0}, "subset: got 0"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"hidden": [5, 0]}, "hidden: got 0"),
        ({"embedding_std": 0.0}, "embedding_std: got 0.0, it must be above 0"),
        ({"orthogonal": -1.0}, "orthogonal: got -1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**options)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="hypernetwork gives each task weights of its own, joint chooses what"):
        Composite({"hypernetwork": strategy(), "joint": Joint()})
    with pytest.raises(ValueError, match="cannot be used both: each gives each task weights of its own"):
        Composite({"hypernetwork": strategy(), "chunked_hypernetwork": strategy()})
    with pytest.raises(ValueError, match="lwf works on the layers' own weights"):
        Composite({"lwf": LwF(1.0), "chunked_hypernetwork": strategy()})


def test_nets_that_cannot_be_generated_are_refused() -> None:
    def setup(body: Net, **options: Any) -> None:
        made = learner(strategy(**options))
        made.net = body
        made.strategy.setup(made, sequences())

    with pytest.raises(ValueError, match="no recurrent matrices"):
        setup(transformer(INPUTS, partial(Head, outputs=C), hidden=8, layers=1, heads=2), orthogonal=1.0)
    body = net()
    body.blocks.append(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="keeps running statistics"):
        setup(body)


def test_values_without_task_labels_are_refused_before_training() -> None:
    made = learner(strategy(), tasks=False)
    made.objective = objective_for("value")
    with pytest.raises(ValueError, match="Regression has none: use a task-incremental stream"):
        made.strategy.setup(made, sequences(tasks=False))
    made.strategy.setup(made, sequences())


def test_the_published_experiment_composes() -> None:
    with initialize_config_dir(str((Path(__file__).parents[2] / "conf").resolve()), version_base=None):
        cfg = compose("train", ["experiment=permuted_copy_hypernetwork"])
    made = instantiate(cfg.strategy["chunked_hypernetwork"], _convert_="all")
    assert (made.past.beta, made.orthogonal, made.chunk, made.past.lookahead) == (10.0, 10.0, 2500, False)
    assert (cfg.training.steps, cfg.training.epochs, cfg.learner.clip_norm, cfg.objective.reduction) == (
        20000,
        None,
        1,
        "sum",
    )


@pytest.mark.parametrize("kind", ["chunked_hypernetwork", "recurrent_hypernetwork"])
@pytest.mark.parametrize("name", ["s4d", "lru", "mamba", "mlstm", "rwkv6", "slstm"])
def test_mixers_start_finite_and_from_their_own_rules(name: str, kind: str) -> None:
    """At their full size: the values that such a mixer computes instead of drawing them are no standard deviations."""
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [f"learner={name}", f"strategy=[{kind}]", "stream.task_incremental=true"])
    digits = instantiate(cfg.stream)
    torch.manual_seed(0)
    made = build_learner(cfg, digits)
    ruled = {n: p.detach().clone() for n, p in made.net.named_parameters() if p.ndim > 1 and len(p.unique()) < 200}
    made.strategy.setup(made, digits)
    made.begin(digits[0])
    assert isinstance(made.net, GeneratedNet)
    start = made.net.weights_for(0)
    for n, value in ruled.items():
        if float(value.abs().max()) > 0:
            assert float((start[n].detach() - value).square().mean().sqrt()) < 0.75, n
    optimizer = made.handover.begin(made.parameter_groups())
    for batch in digits[0].train.batches(torch.arange(96).split(32)):
        optimizer.zero_grad()
        loss = made.objective(made(batch).logits, batch)
        assert bool(loss.isfinite())
        loss.backward()
        optimizer.step()


def test_what_was_drawn_is_told_from_what_follows_a_rule() -> None:
    drawn = [nn.Linear(8, 1), nn.Linear(2, 2), nn.Linear(128, 512), nn.Embedding(11, 8)]
    ruled = [torch.zeros(4, 8), torch.ones(2, 3), torch.arange(32.0).repeat(8, 1), torch.eye(16), torch.randn(9)]
    assert all(_drawn(module.weight.detach()) for module in drawn)
    assert not any(_drawn(value) for value in ruled)
