"""`trainer.precision=64-true`: weights, scores and all that strategies keep are float64, from the first evaluation on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.tracking.base import NoTracker
from strategies import test_conformance as conformance

WIDE = (torch.float64, torch.complex128)
NETS = {
    "lstm": partial(recurrent, mixer=LSTM, hidden=6, layers=1, dropout=0.0),
    "gru": partial(recurrent, mixer=GRU, hidden=6, layers=1, dropout=0.0),
    "transformer": partial(transformer, hidden=8, layers=1, heads=2, dropout=0.0),
    "mlp": partial(mlp, hidden=[6], dropout=0.0),
}


class Losses(NoTracker):
    """Keeps the objective of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.values += [value for key, value in metrics.items() if key == "train/objective"]


def narrow(learner: Learner) -> list[str]:
    """Names of tensors of floats that are not in double precision."""
    state = learner.state_dict().items()
    floats = {k: v for k, v in state if torch.is_tensor(v) and (v.is_floating_point() or v.is_complex())}
    return [name for name, value in floats.items() if value.dtype not in WIDE]


def values_stream() -> Stream:
    """Two experiences of real values to predict from [T, 4]."""
    generator, parts = torch.Generator().manual_seed(5), []
    for k in range(2):
        x, y = torch.randn(24, 5, 4, generator=generator), torch.randn(24, 3, generator=generator)
        data = TensorData(x, y)
        parts.append(Experience(k, str(k), (), train=data, test=data))
    return Stream("values", tuple(parts), "domain_incremental", "value", 3, features=4, length=5)


def made(name: str, of: Stream) -> Learner:
    torch.manual_seed(1)
    net = NETS[name](of.inputs, partial(Head, outputs=of.outputs))
    return Learner(net, objective_for(of.target), None, partial(torch.optim.SGD, lr=0.1))


def loop_of(learner: Learner, of: Stream) -> tuple[list[float], Tensor]:
    """Losses and weights of a plain loop in double precision over the batches of a run's first experience."""
    seen: list[Batch] = []
    watched = made("mlp" if of.features and not of.length else "lstm", of)

    class Watch(NoTracker):
        pass

    run = Run(of, watched, quiet_trainer(), Training(batch_size=8, epochs=1, log_every_n_steps=1), tracker=Watch())
    learn = run.stepper._learn
    run.stepper._learn = lambda batch: (seen.append(batch), learn(batch))  # type: ignore[method-assign,assignment]
    run.begin()
    run._learn_experience()
    optimizer, losses = torch.optim.SGD(learner.net.parameters(), lr=0.1), []
    for batch in seen:
        y = batch.y.double() if batch.y.is_floating_point() else batch.y
        wide = Batch(batch.x.double(), y)
        optimizer.zero_grad()
        loss = learner.objective(learner.net(wide).logits, wide)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in learner.net.parameters()])


@pytest.mark.parametrize("target", ["class", "value"])
@pytest.mark.parametrize("name", NETS)
def test_every_loss_is_that_of_a_plain_loop_in_double_precision(name, target):
    of = values_stream() if target == "value" else tiny.sequences(tasks=False, experiences=2)
    learner, tracker = made(name, of), Losses()
    twin = copy.deepcopy(learner).double()
    run = Run(
        of,
        learner,
        quiet_trainer(precision="64-true"),
        Training(batch_size=8, epochs=1, log_every_n_steps=1),
        tracker=tracker,
    )
    run.begin()
    run._learn_experience()
    losses, weights = loop_of(twin, of)
    assert tracker.values == pytest.approx(losses, rel=1e-13)
    assert not narrow(learner)
    assert torch.allclose(tiny.flat(learner), weights, rtol=1e-12, atol=1e-14)


def test_scores_before_any_step_are_computed_in_double_precision():
    of = values_stream()
    learner = made("gru", of)
    twin = copy.deepcopy(learner).double()
    run = Run(of, learner, quiet_trainer(precision="64-true"), Training(batch_size=8, epochs=1))
    run.begin()
    run.score(trained=-1, final=True)
    batch = of[0].test.batch(torch.arange(24))
    wide = Batch(batch.x.double(), batch.y.double())
    with torch.no_grad():
        value, count = twin.objective.score(twin.net(wide).logits, wide)
    assert run.results.all.rows.dtype == torch.float64
    assert float(run.results.all.baseline[0]) == pytest.approx(float(value / count), rel=1e-13)
    assert torch.get_default_dtype() == torch.float32


def test_single_precision_stays_what_it_is(tmp_path):
    learner = tiny.trained()
    assert {p.dtype for p in learner.parameters()} == {torch.float32}


def check(name: str, folder: Path, net: str = "lstm") -> None:
    """A strategy in double precision, killed and resumed, against one that was not."""
    case, wide = conformance.CASES[name], {"precision": "64-true"}
    whole = conformance.train(conformance.alone(name), net, case.tasks, **wide)
    assert not narrow(whole.learner), name
    often = Training(batch_size=16, epochs=1, chunk=3, checkpoint_every_n_steps=1)

    def start(folder: Path) -> Run:
        stream = conformance.make_stream(case.tasks)
        learner = conformance.make_learner(stream, conformance.alone(name), net)
        run = Run(stream, learner, quiet_trainer(**wide), often, folder=folder)
        torch.manual_seed(0)
        return run

    resumed = tiny.killed_and_resumed(start, folder, min(9, case.saves))
    assert not conformance.different(conformance.weights(resumed.learner), conformance.weights(whole.learner))
    assert not narrow(resumed.learner)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["gdumb", "icarl", "derpp"])
def test_strategies_that_keep_rows_means_and_logits(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(conformance.CASES))
def test_every_strategy_from_the_first_evaluation_to_a_resume(name, tmp_path):
    check(name, tmp_path)


def options() -> Any:
    from clplat.catalogue import CONF, options

    return options(CONF / "learner")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("name", options())
def test_every_learner_trains_and_scores(name, precision, tmp_path, monkeypatch):
    from hydra import compose, initialize_config_module

    import clplat.loop
    from clplat.report.summary import Names
    from clplat.train import train

    monkeypatch.chdir(tmp_path)
    runs, go = [], clplat.loop.Run.go
    monkeypatch.setattr(clplat.loop.Run, "go", lambda run: (runs.append(run), go(run))[1])
    layout = "pixels" if name in ("mlp", "masked_mlp") else "rows"
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose(
            "train",
            [
                f"learner={name}", f"stream.layout={layout}", f"trainer.precision={precision}", "strategy=finetune",
                "stream.experiences=2", "training.epochs=null", "training.steps=2", "tracking=none", "progress=false",
            ],
        )  # fmt: skip
    train(cfg, tmp_path / "run", Names("split_digits", name, "finetune"))
    assert bool(runs[0].results.R.isfinite().all())
    if precision == "64-true":
        assert not narrow(runs[0].learner)
