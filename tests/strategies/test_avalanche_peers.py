"""Side by side with Avalanche 0.6 on the same weights and batches: equal where its port follows the paper; where it
deviates, the deviation is stated and measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from clplat._torchvision import ensure_importable
from clplat.importance.fisher import fisher
from clplat.learners.learner import Learner
from clplat.rehearsal.policies import Reservoir
from clplat.strategies.agem import project as project_average
from clplat.strategies.gem import project as project_all
from clplat.strategies.lwf import LwF
from clplat.strategies.mas import MAS
from clplat.strategies.rwalk import RWalk
from clplat.strategies.si import SI
from clplat.strategies.slda import SLDA
from clplat.strategy import Strategy
from clplat.streams.experience import Batch

ensure_importable()
pytest.importorskip("avalanche")

import avalanche.training.plugins.gem as gem_module  # noqa: E402
from avalanche.benchmarks.utils import as_classification_dataset  # noqa: E402
from avalanche.training.plugins import AGEMPlugin, EWCPlugin, GEMPlugin, MASPlugin, RWalkPlugin  # noqa: E402
from avalanche.training.plugins.synaptic_intelligence import SynapticIntelligencePlugin  # noqa: E402
from avalanche.training.regularization import LearningWithoutForgetting  # noqa: E402
from avalanche.training.storage_policy import ReservoirSamplingBuffer  # noqa: E402
from avalanche.training.supervised.deep_slda import StreamingLDA  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own deprecations


class Plain(nn.Module):
    """The learner's net as Avalanche wants it: a module of inputs alone."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.net = learner.net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(Batch(x, torch.zeros(len(x)).long())).logits


def criterion(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


def dataset(x: Tensor, y: Tensor) -> Any:
    data: Any = TensorDataset(x, y)
    data.targets = y.tolist()  # where Avalanche looks for them
    return as_classification_dataset(data)


def descend(learner: Learner, strategy: Strategy, batch: Batch, lr: float = 0.05) -> None:
    """One step of plain gradient descent with the strategy's hooks."""
    output = learner(batch)
    loss = learner.objective(output.logits, batch) + sum(strategy.loss(learner, batch, output).values())
    learner.zero_grad()
    loss.backward()
    strategy.gradients(learner, batch)
    with torch.no_grad():
        for p in learner.net.parameters():
            assert p.grad is not None
            p -= lr * p.grad
        strategy.after_step(learner, batch, output)


def test_reservoirs_keep_every_example_equally_often() -> None:
    ours, theirs = torch.zeros(60), torch.zeros(60)
    x, y = torch.arange(60.0)[:, None], torch.zeros(60).long()
    for seed in range(300):
        torch.manual_seed(seed)
        peer = ReservoirSamplingBuffer(max_size=15)
        for rows in torch.arange(60).split(20):
            peer.update_from_dataset(dataset(x[rows], y[rows]))
        theirs[[int(peer.buffer[i][0]) for i in range(15)]] += 1
        mine = Reservoir(15, seed)
        for rows in torch.arange(60).split(20):
            mine.insert(Batch(x[rows], y[rows]))
        ours[mine.contents().x.flatten().long()] += 1
    for kept in (ours, theirs):
        assert int(kept.sum()) == 300 * 15
        assert bool(((kept / 300 - 0.25).abs() < 4.5 * (0.25 * 0.75 / 300) ** 0.5).all())


def test_agem_projects_alike(tiny: Any) -> None:
    learner = tiny.learner()
    weights = list(learner.net.parameters())
    for seed in range(10):
        torch.manual_seed(seed)
        own, reference = (torch.randn(sum(w.numel() for w in weights)) for _ in range(2))
        for w, g in zip(weights, own.split([w.numel() for w in weights]), strict=True):
            w.grad = g.view_as(w).clone()
        peer: Any = AGEMPlugin(10, 10)
        peer.buffers, peer.reference_gradients = [None], reference
        peer.after_backward(SimpleNamespace(model=learner.net, device="cpu"))
        found = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
        torch.testing.assert_close(project_average(own, reference), found)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_solves_the_same_problem(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Avalanche leaves the solution to a solver that it does not install: non-negative least squares stand in."""

    def solve(P: Any, q: Any, G: Any, h: Any, solver: str) -> Any:
        lower = -h  # -v <= h
        assert np.array_equal(G, -np.eye(len(q)))
        root = np.linalg.cholesky(P)
        right = -np.linalg.solve(root, q + P @ lower)
        return lower + scipy.optimize.nnls(root.T, right)[0]

    monkeypatch.setattr(gem_module.qpsolvers, "solve_qp", solve)
    for seed in range(10):
        torch.manual_seed(seed)
        past, g = torch.randn(4, 40), torch.randn(40)
        if bool((past @ g >= 0).all()):
            continue
        peer: Any = GEMPlugin(10, margin)
        peer.G = past
        torch.testing.assert_close(project_all(g, past, margin, 1e-3), peer.solve_quadprog(g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_lwf_distils_alike(tiny: Any, temperature: float) -> None:
    stream, strategy = tiny.stream(), LwF(strength=1.0, temperature=temperature)
    learner = tiny.learner(strategy, stream)
    strategy.setup(learner, stream)
    learner.begin(stream[0])
    learner.end(stream[0])
    learner.begin(stream[1])
    batch = stream[1].train.batch(torch.arange(16))
    old = learner(batch).logits.detach()
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    output = learner(batch)
    peer: Any = LearningWithoutForgetting(alpha=1)
    peer.temperature = temperature
    right = peer._distillation_loss(output.logits, old, {0, 1})
    torch.testing.assert_close(strategy.loss(learner, batch, output)["lwf"], right)


@pytest.mark.parametrize("copies", [True, False])
def test_si_sums_the_same_path(tiny: Any, copies: bool) -> None:
    """Equal over one experience, if Avalanche is given copies of the weights. On the CPU it keeps views of the live
    ones instead, so that no weight ever seems to move and its importance is 0. Its other deviations: importance at
    most 0.001, negative importance kept, and from the second experience on the penalty's gradient is on the path."""
    stream, strategy = tiny.stream(), SI(strength=1.0, damping=1e-7, clip_negative=False)
    learner = tiny.learner(strategy, stream)
    plain: Any = Plain(learner)
    peer: Any = SynapticIntelligencePlugin
    kept: tuple[dict, dict] = ({}, {})
    moves: dict[str, dict] = {n: {} for n in ("old_theta", "new_theta", "grad", "trajectory", "cum_trajectory")}
    peer.create_syn_data(plain, kept, moves, set())
    peer.init_batch(plain, kept, moves, set())
    learner.begin(stream[0])

    def part(held: dict) -> None:
        for entry in held.values() if copies else ():
            entry.data = entry.data.clone()

    part(kept[0])
    for rows in torch.arange(40).split(8):
        peer.pre_update(plain, moves, set())
        part(moves["old_theta"])
        descend(learner, strategy, stream[0].train.batch(rows))
        peer.post_update(plain, moves, set())
    peer.update_ewc_data(plain, kept, moves, 0.001, set(), 1, eps=1e-7)
    learner.end(stream[0])
    largest = 0.0
    for name, mine in strategy.past.importances().items():
        theirs = kept[1][f"net.{name}"].data.view_as(mine)
        if copies:
            torch.testing.assert_close(mine.clamp_max(0.001), theirs, rtol=1e-3, atol=1e-6)
        else:
            assert not bool(theirs.any())
        largest = max(largest, float(mine.max()))
    assert largest > 0.001  # so the bound does act


def test_rwalk_scores_alike_over_two_experiences(tiny: Any) -> None:
    """Equal, with our eps at Avalanche's; it takes another forward and backward pass a step for the same gradient."""
    stream = tiny.stream()
    strategy = RWalk(strength=0.3, alpha=0.8, interval=2, eps=float(torch.finfo(torch.float32).eps))
    learner = tiny.learner(strategy, stream)
    plain = Plain(learner)
    peer: Any = RWalkPlugin(ewc_lambda=0.3, ewc_alpha=0.8, delta_t=2)
    clock = SimpleNamespace(train_iterations=0, train_exp_counter=0)
    loop = SimpleNamespace(
        model=plain,
        device="cpu",
        clock=clock,
        _criterion=criterion,
        optimizer=torch.optim.SGD(plain.parameters(), 0.05),
    )
    peer.before_training(loop)
    for k in range(2):
        learner.begin(stream[k])
        clock.train_exp_counter = k
        for number, rows in enumerate(torch.arange(32).split(8)):
            batch = stream[k].train.batch(rows)
            loop.mbatch, clock.train_iterations = (batch.x, batch.y, torch.zeros(8).long()), number
            peer.before_training_iteration(loop)
            loop.loss = torch.zeros(())
            peer.before_backward(loop)
            if k:
                mine = strategy.loss(learner, batch, learner(batch))["rwalk"]
                torch.testing.assert_close(mine, loop.loss, rtol=1e-3, atol=1e-8)
            descend(learner, strategy, batch)
            peer.after_training_iteration(loop)
        learner.end(stream[k])
        peer.after_training_exp(loop)
    for name, mine in strategy.past.importances().items():
        torch.testing.assert_close(mine, peer.exp_penalties[f"net.{name}"].data, rtol=5e-3, atol=1e-5)


def test_avalanche_ewc_squares_gradients_of_batches(tiny: Any) -> None:
    """Its importance is our "batched" estimate; only with batches of one is it the empirical Fisher."""
    stream = tiny.stream()
    learner = tiny.learner(of=stream)
    data, plain = stream[0].train, Plain(learner)
    peer = EWCPlugin(1.0)
    found = {}
    for size in (1, 40):
        importance = peer.compute_importances(
            plain, criterion, torch.optim.SGD(plain.parameters(), 0.1), dataset(data.x, data.y), "cpu", size
        )
        found[size] = {n.removeprefix("net."): p.data for n, p in importance.items()}
    generator = torch.Generator()
    for name in learner.weights():
        empirical = fisher(learner, data, "empirical", None, generator, 7)[name]
        torch.testing.assert_close(found[1][name], empirical)
        torch.testing.assert_close(found[40][name], fisher(learner, data, "batched", None, generator, 40)[name])
        torch.testing.assert_close(found[1][name], fisher(learner, data, "batched", None, generator, 1)[name])
        if bool(empirical.any()):
            assert float(found[40][name].sum()) < 0.5 * float(empirical.sum())


def test_avalanche_mas_takes_the_mean_before_the_absolute_value(tiny: Any) -> None:
    """Equal with batches of one; with larger ones gradients of different examples cancel, against eq. 3."""
    stream, strategy = tiny.stream(), MAS(strength=1.0, examples=None)
    learner = tiny.learner(strategy, stream)
    learner.begin(stream[0])
    learner.end(stream[0])
    data, plain = stream[0].train, Plain(learner)
    peer: Any = MASPlugin()
    for size in (1, 20):
        loop = SimpleNamespace(
            model=plain,
            optimizer=torch.optim.SGD(plain.parameters(), 0.1),
            device="cpu",
            train_mb_size=size,
            experience=SimpleNamespace(dataset=dataset(data.x, data.y)),
        )
        theirs = peer._get_importance(loop)
        total = sum(float(t.data.sum()) for t in theirs.values())
        mine = sum(float(t.sum()) for t in strategy.past.importances().values())
        if size == 1:
            for name, own in strategy.past.importances().items():
                torch.testing.assert_close(own, theirs[f"net.{name}"].data, rtol=1e-4, atol=1e-6)
        else:
            assert total < 0.95 * mine


def test_streaming_lda_alike() -> None:
    torch.manual_seed(0)
    means = 2 * torch.randn(4, 6)
    y = torch.randint(0, 4, (80,))
    x = means[y] + torch.randn(80, 6)
    peer: Any = object.__new__(StreamingLDA)  # its constructor wants a whole training set-up
    peer.device, peer.input_size, peer.shrinkage_param, peer.streaming_update_sigma = "cpu", 6, 1e-4, True
    peer.muK, peer.cK, peer.Sigma = torch.zeros(4, 6), torch.zeros(4), torch.ones(6, 6)
    peer.num_updates, peer.prev_num_updates = 0, -1
    for i in range(80):
        peer.fit(x[i : i + 1], y[i : i + 1])
    mine = SLDA(shrinkage=1e-4, first="stream")
    for rows in torch.arange(80).split(13):
        mine.observe(x[rows], y[rows], 4, pooled=False)
    mine._solve()
    torch.testing.assert_close(mine.covariance().float(), peer.Sigma, rtol=1e-4, atol=1e-5)
    assert mine.means is not None
    torch.testing.assert_close(mine.means.float(), peer.muK)
    logits: Any = torch.zeros(80, 4)
    nothing: Any = None
    torch.testing.assert_close(mine.predict(nothing, nothing, logits, x), peer.predict(x), rtol=1e-3, atol=1e-3)
