"""Every strategy in conf/strategy obeys the contract: one row of `CASES` each, trained with an LSTM and a transformer.

To add a strategy, add its row: options small enough for the tiny stream, what switches it off, what it is refused with.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import clplat.run
from clplat import checkpoint
from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.rehearsal.buffer import Buffer
from clplat.run import Run
from clplat.settings import Training
from clplat.strategy import Composite, Strategy
from clplat.streams.data import Examples, TensorData
from clplat.streams.experience import Batch, Experience, Stream

CONF = Path(__file__).parents[2] / "conf" / "strategy"
TRAINING = Training(batch_size=16, epochs=1, chunk=3, log_every_n_steps=2)


@dataclass(frozen=True)
class Case:
    """How a strategy is tested.

    Attributes:
        options: what differs from its yaml, so that it acts on 3 experiences of 50 sequences.
        off: further options with which it must equal finetuning bit for bit; None where the method has no such switch.
        tasks: True if it needs task labels.
        refused: what it cannot be combined with, and a pattern of the reason that is given: {"replay": "..."}.
        not_counted: patterns of state keys that are no store of the past (scratch of the current experience).
        borrows: True if it reads old training sets from the stream: stored_bytes counts them, and no state holds them.
        saves: checkpoints that a run writes with one after every step, if fewer than 9: it may train nothing for a while.
    """

    options: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = None
    tasks: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    not_counted: tuple[str, ...] = ()
    saves: int = 9
    borrows: bool = False


CASES = {
    "finetune": Case(off={}),
    "joint": Case(),
    "cumulative": Case(),
    "ewc": Case({"strength": 50.0, "examples": 20}, off={"strength": 0.0}),
    "replay": Case({"capacity": 20, "rows": 8}, off={"capacity": 0}),
    "relevance_maps": Case({"prunings": 2}, not_counted=("tasks._extra_state",)),
    "packnet": Case(tasks=True, not_counted=("tasks._extra_state",)),
    "hypernetwork": Case({"hidden": [6], "embedding": 4, "beta": 1.0}, not_counted=("tasks._extra_state",)),
    "chunked_hypernetwork": Case(
        {"hidden": [8, 8], "embedding": 4, "chunk": 100, "code": 4, "beta": 1.0, "subset": 1, "targets": "outputs"},
        tasks=True,
        not_counted=("tasks._extra_state",),
    ),
    "recurrent_hypernetwork": Case(
        {"hidden": 8, "embedding": 4, "chunk": 100, "code": 4, "beta": 1.0, "beta_state": 0.1, "grow": 2},
        tasks=True,
        refused={"refresh": "keeps a value for each weight"},
        not_counted=("tasks._extra_state",),
    ),
    "remind": Case({"capacity": 40, "rows": 8, "parts": 4, "every": 5}, refused={"replay": "keeps raw rows"}),
    "icl": Case({"batch_size": 16, "random_features": 12}, saves=7),
    "slda": Case({"batch_size": 16}, saves=7),
    "gpm": Case({"energy": 0.8, "examples": 20}, off={"energy": 0.0}),
    "ogd": Case({"examples": 5, "capacity": 12}, off={"capacity": 0}),
    "lagrangian": Case({"capacity": 20, "rows": 4}, off={"capacity": 0}),
    "cwr_star": Case(),
    "si": Case({"strength": 5.0}, off={"strength": 0.0}),
    "der": Case({"capacity": 20, "rows": 8}, off={"capacity": 0}),
    "derpp": Case({"capacity": 20, "rows": 8}, off={"alpha": 0.0, "beta": 0.0}),
    "er_ace": Case({"capacity": 20, "rows": 8}, off={"capacity": 0}),
    "agem": Case({"capacity_per_experience": 10, "rows": 8}, off={"capacity_per_experience": 0}),
    "gem": Case({"capacity_per_experience": 10}, off={"capacity_per_experience": 0}),
    "mir": Case({"capacity": 20, "rows": 4, "candidates": 8}, off={"capacity": 0}),
    "refresh": Case({"rate": 1e-3, "examples": 20}, off={"rate": 0.0}),
    "gdumb": Case({"capacity": 30}, not_counted=("initial",)),
    "icarl": Case({"capacity": 12}, refused={}),
    "generative_replay": Case({"rows": 8, "hidden": 8, "latent": 3}, off={"rows": 0}),
    "lwf": Case(off={"strength": 0.0}, not_counted=("known",)),
    "center_loss": Case({"strength": 0.5}, off={"strength": 0.0, "freeze_head": False}),
    "lfl": Case({"strength": 0.5}, off={"strength": 0.0, "freeze_head": False}),
    "distillation": Case(off={"feature": "none", "prediction": "none"}, not_counted=("known",)),
    "mas": Case({"strength": 5.0, "examples": 20}, off={"strength": 0.0}),
    "rwalk": Case({"strength": 5.0, "interval": 2}, off={"strength": 0.0}),
    "rehearsal_environment": Case({"fraction": 0.5, "min_examples": 0}, off={"fraction": 0.0}, borrows=True),
    "rehearsal_budget": Case({"examples": 10}, off={"examples": 0}, borrows=True),
    "rewarming": Case({"warmup": 0.5}, off={"warmup": 0.0, "final": 1.0}),
    "freeze": Case(off={"blocks": 0, "embedding": False}),
    "selective_init": Case({"examples": 10, "steps": 2}),
    "time_vectors": Case(off={"merge": "none"}),
    "example_forgetting": Case(off={}),
    "forgetting_replay": Case({"capacity": 12, "rows": 8}, off={"capacity": 0}),
}
PARTNERS = {"replay": {"capacity": 20, "rows": 8}, "refresh": {"rate": 1e-3, "examples": 20}}

every = pytest.mark.parametrize("name", sorted(CASES))
both = pytest.mark.parametrize("net", ["lstm", "transformer"])


class Guarded(Examples):
    """Test data that may be read in evaluation only."""

    evaluating = False

    def __init__(self, data: TensorData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> Batch:
        assert Guarded.evaluating, "test data were read outside evaluation"
        return self.data.batch(index)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        assert Guarded.evaluating, "test data were read outside evaluation"
        return self.data.batches(indices)

    def targets(self) -> Tensor | None:
        return self.data.targets()


def make_stream(tasks: bool = False, guarded: bool = False) -> Stream:
    """Two classes an experience, sequences [5, 4] whose mean tells the class."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for k in range(3):
        train, test = (_examples(k, n, generator, k if tasks else None) for n in (50, 30))
        part = Experience(
            k,
            f"pair {k}",
            (2 * k, 2 * k + 1),
            train,
            Guarded(test) if guarded else test,
            task_label=k if tasks else None,
        )
        parts.append(part)
    scenario = "task_incremental" if tasks else "class_incremental"
    return Stream("tiny", tuple(parts), scenario, "class", 6, features=4, length=5)


def _examples(k: int, n: int, generator: torch.Generator, task: int | None) -> TensorData:
    y = torch.randint(2 * k, 2 * k + 2, (n,), generator=generator)
    return TensorData(torch.randn(n, 5, 4, generator=generator) + y[:, None, None] * 0.7, y, task=task)


def make_learner(stream: Stream, strategy: Strategy | None, net: str) -> Learner:
    torch.manual_seed(1)
    inputs = stream.inputs
    head: Callable[[int], Head] = partial(Head, outputs=stream.outputs)
    if stream.scenario == "task_incremental":
        head = partial(TaskHead, outputs=stream.outputs, tasks=[e.classes for e in stream])
    if net == "lstm":
        made = recurrent(inputs, head, mixer=LSTM, hidden=8, layers=2, dropout=0.2)
    else:
        made = transformer(inputs, head, hidden=8, layers=1, heads=2, dropout=0.2)
    return Learner(made, objective_for(stream.target), strategy, partial(torch.optim.Adam, lr=1e-2))


def make_strategy(name: str, options: dict[str, Any]) -> Strategy:
    given = OmegaConf.load(CONF / f"{name}.yaml")
    config = OmegaConf.create({"seed": 0, "strategy": {name: OmegaConf.merge(given, options)}})
    assert isinstance(config, DictConfig)
    return instantiate(config.strategy[name], _convert_="all")


def weights(learner: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.state_dict().items() if torch.is_tensor(v)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


def train(trainer: Callable, name: str, net: str, off: bool = False, **options: Any) -> tuple[Learner, Run]:
    case = CASES[name]
    stream = make_stream(case.tasks)
    strategy = Composite({name: make_strategy(name, case.options | (case.off or {} if off else {}))})
    learner = make_learner(stream, strategy, net)
    run = Run(stream, learner, trainer(**options), TRAINING)
    run.go()
    return learner, run


_trained: dict[tuple[str, str], tuple[Learner, Run]] = {}


def trained(trainer: Callable, name: str, net: str) -> tuple[Learner, Run]:
    """One finished run, shared by the tests that only look at it."""
    if (name, net) not in _trained:
        torch.manual_seed(0)
        _trained[name, net] = train(trainer, name, net)
    return _trained[name, net]


def test_every_strategy_has_its_row():
    assert set(CASES) == {path.stem for path in CONF.glob("*.yaml")} - {"custom"}


@every
@both
def test_two_seeded_runs_are_equal_and_finite(trainer, name, net):
    (one, run), (two, again) = trained(trainer, name, net), train(trainer, name, net)
    assert_same(weights(one), weights(two))
    assert torch.equal(run.results.R, again.results.R)
    assert all(bool(torch.isfinite(p).all()) for p in one.net.parameters())


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.off is not None))
@both
def test_off_is_finetuning_bit_for_bit(trainer, name, net):
    case = CASES[name]
    learner, run = train(trainer, name, net, off=True)
    stream = make_stream(case.tasks)
    plain = make_learner(stream, None, net)
    expected = Run(stream, plain, trainer(), TRAINING).go()
    assert_same(dict(plain.net.state_dict()), {k: v for k, v in learner.net.state_dict().items() if torch.is_tensor(v)})
    assert torch.equal(run.results.R, expected.R)


@every
@pytest.mark.parametrize("kill", [2, 5, 6, 9])  # 5 and 6: the last step of an experience, and the boundary after it
def test_killed_and_resumed_equals_uninterrupted(trainer, name, kill, tmp_path, monkeypatch):
    """Killed inside an experience (a checkpoint after every step), at three places of the run."""
    case = CASES[name]

    def start(folder: Path) -> Run:
        stream = make_stream(case.tasks)
        learner = make_learner(stream, Composite({name: make_strategy(name, case.options)}), "lstm")
        often = Training(batch_size=16, epochs=1, chunk=3, checkpoint_every_n_steps=1)
        return Run(stream, learner, trainer(), often, folder=folder)

    whole = start(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.go()
    broken, kill = start(tmp_path / "broken"), min(kill, case.saves)
    (tmp_path / "broken").mkdir()
    saves, save = 0, Run.save

    class Killed(BaseException):
        pass

    def dying(self: Run) -> None:
        nonlocal saves
        save(self)
        saves += 1
        if saves == kill:
            raise Killed

    monkeypatch.setattr(Run, "save", dying)
    with pytest.raises(Killed):
        broken.go()
    monkeypatch.setattr(Run, "save", save)
    resumed = start(tmp_path / "broken")
    torch.manual_seed(99)
    resumed.resume(checkpoint.load(tmp_path / "broken" / "last.ckpt"))
    resumed.go()
    assert_same(weights(resumed.learner), weights(whole.learner))
    assert torch.equal(resumed.results.R, whole.results.R)


@every
@both
def test_state_survives_a_save_and_a_load(trainer, name, net):
    case = CASES[name]
    learner, _ = trained(trainer, name, net)
    torch.save(learner.state_dict(), file := io.BytesIO())
    file.seek(0)
    fresh = make_learner(make_stream(case.tasks), Composite({name: make_strategy(name, case.options)}), net)
    fresh.strategy.wrap(fresh)
    for experience in make_stream(case.tasks):
        fresh.shape_for(experience)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(weights(learner), weights(fresh))
    assert learner.strategy.stored_bytes() == fresh.strategy.stored_bytes()
    batch = make_stream(case.tasks)[1].test.batch(torch.arange(10))
    for one in (learner, fresh):
        one.eval()
        one.enter(make_stream(case.tasks)[2])
    with torch.no_grad():
        assert torch.equal(learner(batch).logits, fresh(batch).logits)


@every
def test_stored_bytes_are_what_is_stored(trainer, name):
    learner, _ = trained(trainer, name, "lstm")
    strategy, counted = learner.strategy, {}
    for prefix, module in strategy.named_modules():
        for key, t in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            if not any(re.search(p, f"{prefix}.{key}") for p in CASES[name].not_counted):
                # Slots of a buffer that are not filled yet do not count.
                counted[f"{prefix}.{key}"] = t[: len(module)] if isinstance(module, Buffer) else t
    stored = sum(t.numel() * t.element_size() for t in counted.values())
    if CASES[name].borrows:  # how much exactly is checked in the strategy's own tests
        assert learner.strategy.stored_bytes() > stored
        return
    assert learner.strategy.stored_bytes() == stored, {k: list(t.shape) for k, t in counted.items()}


@every
@both
def test_test_data_are_never_trained_on(trainer, name, net, monkeypatch):
    case = CASES[name]
    stream = make_stream(case.tasks, guarded=True)
    learner = make_learner(stream, Composite({name: make_strategy(name, case.options)}), net)
    Guarded.evaluating = True  # the shapes are looked at before training
    run = Run(stream, learner, trainer(), TRAINING)
    Guarded.evaluating = False

    def watched(*args: Any) -> Any:
        Guarded.evaluating = True
        try:
            return evaluate(*args)
        finally:
            Guarded.evaluating = False

    monkeypatch.setattr(clplat.run, "evaluate", watched)
    run.go()
    assert run.experience == len(stream)


@every
@both
def test_runs_in_bfloat16(trainer, name, net):
    learner, _ = train(trainer, name, net, precision="bf16-mixed")
    assert all(bool(torch.isfinite(p).all()) for p in learner.net.parameters())


@every
@pytest.mark.parametrize("partner", sorted(PARTNERS))
@pytest.mark.parametrize("outermost", [False, True])
def test_composes_with_replay_and_refresh_or_says_why_not(trainer, name, partner, outermost):
    if name == partner:
        return
    case = CASES[name]
    parts = {name: make_strategy(name, case.options), partner: make_strategy(partner, PARTNERS[partner])}
    if outermost:
        parts = dict(reversed(parts.items()))

    def go() -> Learner:
        stream = make_stream(case.tasks)
        learner = make_learner(stream, Composite(parts), "lstm")
        Run(stream, learner, trainer(), TRAINING).go()
        return learner

    if partner in case.refused:
        with pytest.raises(ValueError, match=case.refused[partner]):
            go()
        return
    learner = go()
    assert all(bool(torch.isfinite(p).all()) for p in learner.net.parameters())


def test_several_processes_are_refused_in_one_line(trainer):
    """Data-parallel runs: one statement for all strategies."""
    stream = make_stream()
    many = trainer(devices=2, strategy="ddp")
    with pytest.raises(ValueError, match="one is supported so far: set it to 1"):
        Run(stream, make_learner(stream, None, "lstm"), many, TRAINING)
