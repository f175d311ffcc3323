"""Relevance maps and PackNet: what is frozen stays in every bit, what is pruned and what is free is as defined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from tiny import only, sequences
from torch import Tensor, nn

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.net import Block, Net, State
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.per_task.masked import MaskedNet, TaskMasks, pack, unpack
from clplat.per_task.net import lowest_entropy
from clplat.settings import Training
from clplat.strategies.packnet import PackNet
from clplat.strategies.relevance_maps import RelevanceMaps
from clplat.strategy import Strategy
from clplat.streams.experience import Experience
from clplat.streams.inputs import Inputs
from clplat.tracking.base import NoTracker

K, C, T, D = 3, 6, 5, 4
TASKS = [(0, 1), (2, 3), (4, 5)]
OPTIMIZERS = [
    partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
    partial(torch.optim.AdamW, lr=1e-2, weight_decay=1.0),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
]


class Convolution(Block):
    """A causal convolution over time, for a net that has one."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(features, hidden, 3, padding=2)

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        return self.conv(hidden.mT)[..., : hidden.shape[1]].mT.relu(), None


def learner(strategy: Strategy, body: str = "lstm", tasks: bool = True, optimizer: Any = OPTIMIZERS[0]) -> Learner:
    torch.manual_seed(1)
    head: Callable[[int], Head] = partial(TaskHead, outputs=C, tasks=TASKS) if tasks else partial(Head, outputs=C)
    if body == "lstm":
        net = recurrent(Inputs(features=D, length=T), head, mixer=LSTM, hidden=6, layers=2)
    else:
        net = Net(nn.Linear(D, 5), [Convolution(5, 7)], head(7))
    return Learner(net, objective_for("class"), strategy, optimizer)


class Watch(Strategy):
    """Keeps, after each experience, masks, weights and the logits of all tasks learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[list[Tensor]] = []
        self.logits: list[list[Tensor]] = []

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        net = learner.net
        assert isinstance(net, MaskedNet)
        self.weights.append([w.detach().clone() for w in net.parts(net.matrices)])
        learner.eval()
        tests = [e.test.batch(torch.arange(20)) for e in sequences()]
        self.logits.append([net.as_task(tests[k], k).logits.clone() for k in range(experience.index + 1)])
        learner.train()


def run(
    trainer: Callable, strategy: Strategy, epochs: int = 4, tracker: NoTracker | None = None, **options: Any
) -> tuple[MaskedNet, Watch, Tensor]:
    watch = Watch()
    made = learner(Composite({"it": strategy, "watch": watch}), **options)
    training = Training(batch_size=16, epochs=epochs)
    results = Run(sequences(options.get("tasks", True)), made, trainer(), training, tracker=tracker).go()
    assert isinstance(made.net, MaskedNet)
    return made.net, watch, results.R


def masks(net: MaskedNet) -> list[list[Tensor]]:
    """Of each learned task, one mask a matrix."""
    return [net._split(net.masks.mask(label, sum(net.sizes))) for label in net.masks.labels]


def strategies() -> dict[str, Callable[[], Strategy]]:
    return {
        "relevance_maps": lambda: RelevanceMaps(prunings=3),
        "packnet": lambda: PackNet(),
        "packnet own": lambda: PackNet(vectors="own", prune_at=1.0),
    }


CASES = {
    "relevance_maps": Case({"prunings": 2}, not_counted=("tasks._extra_state",)),
    "packnet": Case(tasks=True, not_counted=("tasks._extra_state",)),
}


def test_bits_survive_packing() -> None:
    for size in (1, 7, 8, 9, 64, 1001):
        bits = torch.rand(size) < 0.4
        packed = pack(bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-size // 8)
        assert torch.equal(unpack(packed, size), bits)
    assert pack(torch.tensor([True, False, False, True])).tolist() == [9]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("body", ["lstm", "convolution"])
@pytest.mark.parametrize("name", sorted(strategies()))
def test_learned_tasks_stay_the_same_in_every_bit(trainer: Callable, name: str, body: str, optimizer: Any) -> None:
    """Frozen weights and old logits, whatever momentum and weight decay would do to them."""
    net, watch, R = run(trainer, strategies()[name](), body=body, optimizer=optimizer)
    names = set(net.matrices)
    assert names == (
        {"embedding.weight", "blocks.0.conv.weight"}
        if body == "convolution"
        else {f"blocks.{n}.mixer.rnn.weight_{kind}_l0" for n in range(2) for kind in ("ih", "hh")}
    )
    moved = False
    for task, mask in enumerate(masks(net)):
        for later in range(task, K):
            for m, then, now in zip(mask, watch.weights[task], watch.weights[later], strict=True):
                assert torch.equal(then[m], now[m])
                moved |= not torch.equal(then, now)
            assert torch.equal(watch.logits[task][task], watch.logits[later][task])
    assert moved
    final = R[R.shape[0] - 1]
    assert torch.equal(final[:1], R[1, :1])


@pytest.mark.parametrize("name", sorted(strategies()))
def test_free_capacity_is_what_no_mask_covers_and_is_logged(trainer: Callable, name: str) -> None:
    kept: list[tuple[float, int]] = []

    class Kept(NoTracker):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            if "capacity/free" in metrics:
                kept.append((metrics["capacity/free"], step))

    net, _, _ = run(trainer, strategies()[name](), tracker=Kept())
    covered = torch.zeros(sum(net.sizes), dtype=torch.bool)
    expected = []
    for mask in masks(net):
        covered |= torch.cat([m.flatten() for m in mask])
        expected.append(1 - int(covered.sum()) / len(covered))
    assert [value for value, _ in kept] == pytest.approx(expected)
    assert [step for _, step in kept] == [12, 24, 36]
    assert 1 > expected[0] > expected[1] > expected[2]
    assert net.free_share() == pytest.approx(expected[-1])


def test_packnet_releases_the_smallest_of_the_free_weights(trainer: Callable) -> None:
    net, watch, _ = run(trainer, PackNet(prune=0.75, prune_at=1.0))
    before = [torch.zeros_like(m) for m in masks(net)[0]]
    for task, mask in enumerate(masks(net)):
        for m, old, w in zip(mask, before, watch.weights[task], strict=True):
            assert bool(m[old].all())  # a task uses those of earlier ones
            free = int((~old).sum())
            assert int((m & ~old).sum()) == free - round(0.75 * free)
            assert float(w[~m].abs().max()) == 0
        before = mask
    assert abs(1 - float(torch.cat([m.flatten() for m in before]).float().mean()) - 0.75**3) < 0.02


def test_packnet_keeps_the_largest_and_retrains_them() -> None:
    made = learner(PackNet(prune=0.5))
    only(made).setup(made, sequences())
    made.begin(sequences()[0])
    net = made.net
    assert isinstance(net, MaskedNet) and isinstance(only(made), PackNet)
    before = [w.detach().clone() for w in net.parts(net.matrices)]
    only(made)._release(net)
    for w, old, alive in zip(net.parts(net.matrices), before, net._split(net.alive), strict=True):
        assert float(old[alive].abs().min()) >= float(old[~alive].abs().max())
        assert torch.equal(w[alive], old[alive])
    optimizer = made.handover.begin(made.parameter_groups())
    for _ in range(3):
        optimizer.zero_grad()
        batch = sequences()[0].train.batch(torch.arange(16))
        made.objective(made(batch).logits, batch).backward()
        only(made).gradients(made, batch)
        optimizer.step()
        net.restore()
    for w, old, alive in zip(net.parts(net.matrices), before, net._split(net.alive), strict=True):
        assert float(w[~alive].detach().abs().max()) == 0
        assert not torch.equal(w[alive], old[alive])


def test_packnet_prunes_in_the_middle_of_an_experience(trainer: Callable) -> None:
    alive: list[int] = []

    class Count(Strategy):
        def after_step(self, learner: Learner, batch: Any, output: Any) -> None:
            assert isinstance(learner.net, MaskedNet)
            alive.append(int(learner.net.alive.sum()))

    made = learner(Composite({"packnet": PackNet(prune=0.5, prune_at=0.5), "count": Count()}))
    Run(sequences(), made, trainer(), Training(batch_size=16, steps=8)).go()
    assert isinstance(made.net, MaskedNet)
    whole = sum(made.net.sizes)
    assert alive[:8] == [whole] * 3 + [alive[3]] * 5
    assert alive[3] == whole - sum(round(0.5 * size) for size in made.net.sizes)


@pytest.mark.parametrize("vectors", ["frozen", "own"])
def test_packnet_s_vectors(trainer: Callable, vectors: str) -> None:
    net, _, _ = run(trainer, PackNet(vectors=vectors))
    sizes = [p.numel() for p in net.parts(net.others)]
    values = [dict(zip(net.others, net.masks.own(k).split(sizes), strict=True)) for k in range(K)]
    biases = [name for name in net.others if name.startswith("blocks")]
    assert len(biases) == 4
    for name in biases:
        assert torch.equal(values[0][name], values[2][name]) == (vectors == "frozen")
    assert not torch.equal(values[0]["head.linear.weight"], values[2]["head.linear.weight"])


def test_a_full_net_still_learns_its_maps_and_heads(trainer: Callable) -> None:
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    net, watch, R = run(trainer, PackNet(prune=0.0, vectors="own"), epochs=20, optimizer=optimizer)
    assert net.free_share() == 0
    for a, b in zip(watch.weights[0], watch.weights[2], strict=True):
        assert torch.equal(a, b)
    assert float(R[-1].min()) > 0.7


def test_relevance_is_the_formula_and_its_threshold_is_0638() -> None:
    net = MaskedNet(learner(Strategy()).net, TaskMasks(), sharpness=100.0)
    a = torch.linspace(0, 1, net.maps[0].numel())
    with torch.no_grad():
        net.maps[0].copy_(a.view(net.maps[0].shape))
    r = net.relevance(0).flatten()
    torch.testing.assert_close(r, (1 / (1 + torch.exp(-100 * (a - 0.5)))))
    above = torch.sigmoid(100 * (torch.tensor([0.637, 0.639], dtype=torch.float64) - 0.5)) > 0.999999
    assert above.tolist() == [False, True]


def test_the_map_s_gradient_against_the_formula() -> None:
    made = learner(RelevanceMaps(sharpness=5.0), body="convolution")
    only(made).setup(made, sequences())
    made.begin(sequences()[0])
    net, batch = made.net, sequences()[0].train.batch(torch.arange(16))
    assert isinstance(net, MaskedNet)
    made.objective(made(batch).logits, batch).backward()
    weights = {n: w.detach().requires_grad_() for n, w in net.weights_for(0).items()}
    output = torch.func.functional_call(net.template, weights, (batch,))
    gradients = torch.autograd.grad(made.objective(output.logits, batch), list(weights.values()))
    for number, (w, g) in enumerate(zip(net.parts(net.matrices), gradients, strict=True)):
        r = net.relevance(number).detach()
        a, w_grad = net.maps[number].grad, w.grad
        assert a is not None and w_grad is not None
        torch.testing.assert_close(a, g * w.detach() * 5.0 * r * (1 - r))
        torch.testing.assert_close(w_grad, g * r)


def test_pruning_by_relevance_and_magnitude() -> None:
    made = learner(RelevanceMaps(magnitude=0.1), body="convolution")
    only(made).setup(made, sequences())
    made.begin(sequences()[0])
    net = made.net
    assert isinstance(net, MaskedNet) and isinstance(only(made), RelevanceMaps)
    assert all(0 <= float(a.detach().min()) < 0.2 and 0.8 < float(a.detach().max()) <= 1 for a in net.maps)
    with torch.no_grad():
        net.parts(net.matrices)[0].fill_(0.05)  # all under the threshold, not under a tenth of it
    only(made)._prune(net)
    first, second = net._split(net.alive)
    assert torch.equal(first, net.relevance(0) > 0.999999)
    kept = net.relevance(1) > 0.999999
    assert torch.equal(second, kept & (net.relevance(1) * net.parts(net.matrices)[1].abs() > 0.1))
    assert 0 < int(second.sum()) < int(kept.sum()) < second.numel()
    before = net.alive.clone()
    with torch.no_grad():
        net.maps[1].fill_(1.0)
    only(made)._prune(net)
    assert not bool((net.alive & ~before).any())  # what is pruned stays pruned


def test_pruning_happens_when_it_should(trainer: Callable) -> None:
    counts: list[int] = []

    class Count(Strategy):
        def after_step(self, learner: Learner, batch: Any, output: Any) -> None:
            assert isinstance(learner.net, MaskedNet)
            counts.append(int(learner.net.alive.sum()))

    made = learner(Composite({"relevance_maps": RelevanceMaps(prune_share=0.5, prunings=2), "count": Count()}))
    Run(sequences(), made, trainer(), Training(batch_size=16, steps=8)).go()
    assert isinstance(made.net, MaskedNet)
    whole = sum(made.net.sizes)
    for start in (0, 8, 16):
        one = counts[start : start + 8]
        assert one[:5] == [whole] * 5 and one[5] == one[6] < whole and one[7] <= one[6]


def test_later_tasks_may_reuse_frozen_weights(trainer: Callable) -> None:
    net, _, _ = run(trainer, RelevanceMaps())
    first, second, _ = (torch.cat([m.flatten() for m in mask]) for mask in masks(net))
    assert 0 < int((first & second).sum()) < int(second.sum())


def test_without_task_labels_the_surest_task_answers(trainer: Callable) -> None:
    net, _, _ = run(trainer, RelevanceMaps(), tasks=False)
    batch = sequences(tasks=False)[1].test.batch(torch.arange(40))
    net.eval()
    _, chosen = lowest_entropy(net, batch, objective_for("class"))
    entropies = torch.stack([torch.special.entr(net.as_task(batch, k).logits.softmax(-1)).sum(-1) for k in range(K)])
    assert torch.equal(chosen, entropies.argmin(0))


def test_stored_bytes_are_a_bit_a_weight_and_the_own_values(trainer: Callable) -> None:
    strategy = PackNet()
    net, _, _ = run(trainer, strategy)
    own = sum(p.numel() for p in net.parts(net.others))
    assert strategy.stored_bytes() == K * (-(-sum(net.sizes) // 8) + 4 * own)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelevanceMaps(sharpness=0.0), "sharpness: got 0.0"),
        (lambda: RelevanceMaps(relevance=1.0), "relevance: got 1.0, it must be at least 0 and below 1"),
        (lambda: RelevanceMaps(magnitude=-1.0), "magnitude: got -1.0"),
        (lambda: RelevanceMaps(prunings=0), "prunings: got 0"),
        (lambda: RelevanceMaps(prune_share=1.5), "prune_share: got 1.5"),
        (lambda: PackNet(prune=1.5), "prune: got 1.5"),
        (lambda: PackNet(prune_at=0.0), "prune_at: got 0.0"),
        (lambda: PackNet(vectors="none"), "allowed are 'frozen', 'own'"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], Strategy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_masked_is_refused() -> None:
    net = Net(nn.Flatten(), [], Head(T * D, C))
    with pytest.raises(ValueError, match="a weight matrix besides its head's"):
        MaskedNet(net, TaskMasks())
