"""Every strategy in conf/strategy obeys the contract: each is trained in a list of one, as a configuration makes it.

Its row stands beside its oracle: `CASES` of the strategy's own test file, of the type `cases.Case`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import collected
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tiny import killed_and_resumed
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import clplat.loop
from clplat.composition import Composite
from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.rehearsal.buffer import Buffer
from clplat.settings import Training
from clplat.strategy import Strategy
from clplat.streams.data import Examples, TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.tracking.base import NoTracker

CONF = Path(__file__).parents[2] / "conf" / "strategy"
TRAINING = Training(batch_size=16, epochs=1, chunk=3, log_every_n_steps=2)
CASES = collected()
PARTNERS = {"replay": {"capacity": 20, "rows": 8}, "refresh": {"rate": 1e-3, "examples": 20}}


def named(names: Iterable[str]) -> list[Any]:
    """One parameter a strategy; what is cached for it stays in one process."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in sorted(names)]


every = pytest.mark.parametrize("name", named(CASES))
both = pytest.mark.parametrize("net", ["lstm", "transformer"])
slow = pytest.mark.slow


class Guarded(Examples):
    """Test data that count how often they are read outside evaluation."""

    evaluating = False
    leaks = 0

    def __init__(self, data: TensorData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> Batch:
        Guarded.leaks += not Guarded.evaluating
        return self.data.batch(index)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        Guarded.leaks += not Guarded.evaluating
        return self.data.batches(indices)

    def targets(self) -> Tensor | None:
        return self.data.targets()


def make_stream(tasks: bool = False) -> Stream:
    """Two classes an experience, sequences [5, 4] whose mean tells the class."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for k in range(3):
        label = k if tasks else None
        train, test = (_examples(k, n, generator, label) for n in (50, 30))
        parts.append(Experience(k, f"pair {k}", (2 * k, 2 * k + 1), train, Guarded(test), task_label=label))
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


def alone(name: str) -> Composite:
    return Composite({name: make_strategy(name, CASES[name].options)})


def weights(learner: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.state_dict().items() if torch.is_tensor(v)}


def different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of tensors that differ; what is no tensor is not looked at."""
    assert a.keys() == b.keys()
    return [k for k in a if torch.is_tensor(a[k]) and not torch.equal(a[k], b[k])]


class Terms(NoTracker):
    """Keeps the names of what is logged in training."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.names |= {name for name in metrics if name.startswith("train/")}


@dataclass
class Trained:
    """A finished run, how often it read test data outside evaluation, and the loss terms that it logged."""

    run: Run
    leaks: int
    terms: set[str]
    learner: Learner = field(init=False)

    def __post_init__(self) -> None:
        self.learner = self.run.learner


def train(strategy: Strategy | None, net: str, tasks: bool = False, **options: Any) -> Trained:
    stream, tracker = make_stream(tasks), Terms()
    learner = make_learner(stream, strategy, net)

    def watched(*args: Any) -> Any:
        Guarded.evaluating = True
        try:
            return evaluate(*args)
        finally:
            Guarded.evaluating = False

    run = Run(stream, learner, quiet_trainer(**options), TRAINING, tracker=tracker)
    torch.manual_seed(0)
    Guarded.leaks = 0  # the shapes are looked at before training
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clplat.loop, "evaluate", watched)
        run.go()
    return Trained(run, Guarded.leaks, tracker.names)


@cache
def trained(name: str, net: str) -> Trained:
    """The run of one strategy, shared by the tests that only look at it."""
    return train(alone(name), net, CASES[name].tasks)


@cache
def finetuned(net: str, tasks: bool) -> Trained:
    """The run without any strategy."""
    return train(None, net, tasks)


def test_every_strategy_has_its_row():
    assert set(CASES) == {path.stem for path in CONF.glob("*.yaml")} - {"custom"}


@every
@pytest.mark.parametrize("net", [pytest.param("lstm", marks=slow), "transformer"])  # the killed runs are LSTMs, too
def test_two_seeded_runs_are_equal_and_finite(name, net):
    one, two = trained(name, net), train(alone(name), net, CASES[name].tasks)
    assert not different(weights(one.learner), weights(two.learner))
    assert torch.equal(one.run.results.R, two.run.results.R)
    assert all(bool(torch.isfinite(p).all()) for p in one.learner.net.parameters())


@pytest.mark.parametrize("name", named(name for name, case in CASES.items() if case.off is not None))
@pytest.mark.parametrize("net", ["lstm", pytest.param("transformer", marks=slow)])
def test_off_is_finetuning_bit_for_bit(name, net):
    case = CASES[name]
    off, plain = Composite({name: make_strategy(name, case.options | (case.off or {}))}), finetuned(net, case.tasks)
    found = train(off, net, case.tasks)
    expected, states = dict(plain.learner.net.state_dict()), dict(found.learner.net.state_dict())
    assert not different(expected, {k: v for k, v in states.items() if torch.is_tensor(v)})
    assert torch.equal(found.run.results.R, plain.run.results.R)


@every
@pytest.mark.parametrize(
    "kill",  # the last step of an experience is 5, the boundary after it 6, and 9 lies in the middle of the next
    [*(pytest.param(kill, marks=slow) for kill in (2, 5, 6)), 9],
)
def test_killed_and_resumed_equals_uninterrupted(name, kill, tmp_path):
    """A checkpoint after every step changes nothing either: the run to compare with writes none."""
    case, often = CASES[name], Training(batch_size=16, epochs=1, chunk=3, checkpoint_every_n_steps=1)

    def start(folder: Path) -> Run:
        stream = make_stream(case.tasks)
        run = Run(stream, make_learner(stream, alone(name), "lstm"), quiet_trainer(), often, folder=folder)
        torch.manual_seed(0)
        return run

    whole, resumed = trained(name, "lstm"), killed_and_resumed(start, tmp_path, min(kill, case.saves))
    assert not different(weights(resumed.learner), weights(whole.learner))
    assert torch.equal(resumed.results.R, whole.run.results.R)


@every
@both
def test_state_survives_a_save_and_a_load(name, net):
    stream, learner = make_stream(CASES[name].tasks), trained(name, net).learner
    torch.save(learner.state_dict(), file := io.BytesIO())
    file.seek(0)
    fresh = make_learner(stream, alone(name), net)
    fresh.strategy.setup(fresh, stream)
    for experience in stream:
        fresh.shape_for(experience)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert not different(weights(learner), weights(fresh))
    assert learner.strategy.stored_bytes() == fresh.strategy.stored_bytes()
    batch = stream[1].test.batch(torch.arange(10))
    for one in (learner, fresh):
        one.eval()
        one.enter(stream[2])
    with torch.no_grad():
        assert torch.equal(learner(batch).logits, fresh(batch).logits)


@every
def test_stored_bytes_are_what_is_stored(name):
    strategy, counted = trained(name, "lstm").learner.strategy, {}
    for prefix, module in strategy.named_modules():
        for key, t in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            if not any(re.search(p, f"{prefix}.{key}") for p in CASES[name].not_counted):
                # Slots of a buffer that are not filled yet do not count.
                counted[f"{prefix}.{key}"] = t[: len(module)] if isinstance(module, Buffer) else t
    stored = sum(t.numel() * t.element_size() for t in counted.values())
    if CASES[name].borrows:  # how much exactly is checked in the strategy's own tests
        assert strategy.stored_bytes() > stored
        return
    assert strategy.stored_bytes() == stored, {k: list(t.shape) for k, t in counted.items()}


@every
@both
def test_test_data_are_never_trained_on(name, net):
    assert trained(name, net).run.experience == 3
    assert trained(name, net).leaks == 0


@every
@pytest.mark.parametrize("net", ["lstm", pytest.param("transformer", marks=slow)])
def test_trains_in_bfloat16_where_the_trainer_says_so(name, net):
    dtypes: set[torch.dtype] = set()

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, Head) and torch.is_grad_enabled():  # evaluation takes no gradients
            dtypes.add(output.dtype)

    hook = register_module_forward_hook(note)
    try:
        learner = train(alone(name), net, CASES[name].tasks, precision="bf16-mixed").learner
    finally:
        hook.remove()
    assert torch.bfloat16 in dtypes
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in learner.net.parameters())


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        pytest.param(name, partner, marks=pytest.mark.xdist_group(name))
        for name in sorted(CASES)
        for partner in sorted(PARTNERS.keys() - {name})
    ],
)
@pytest.mark.filterwarnings("ignore:Per-example gradients go example by example")  # of nets with weights for each task
@pytest.mark.parametrize("outermost", [False, pytest.param(True, marks=slow)])
def test_composes_with_replay_and_refresh_or_says_why_not(name, partner, outermost):
    case = CASES[name]
    parts = {name: make_strategy(name, case.options), partner: make_strategy(partner, PARTNERS[partner])}
    if outermost:
        parts = dict(reversed(parts.items()))
    if partner in case.refused:
        with pytest.raises(ValueError, match=case.refused[partner]):
            train(Composite(parts), "lstm", case.tasks)
        return
    found, mine, other = train(Composite(parts), "lstm", case.tasks), trained(name, "lstm"), beside(partner, case.tasks)
    assert found.terms == mine.terms | other.terms
    for part, one in ((name, mine), (partner, other)):
        kept = found.learner.strategy.named[part].stored_bytes()
        assert (kept > 0) == (one.learner.strategy.stored_bytes() > 0), part
    state, ours = found.learner.net.state_dict(), mine.learner.net.state_dict()
    assert bool(different(state, ours)) == (partner not in case.hides)
    theirs = other.learner.net.state_dict()
    if state.keys() == theirs.keys():  # a strategy that changed the net has acted
        assert bool(different(state, theirs)) == (case.off != {} and partner not in case.hidden_by)


@cache
def beside(partner: str, tasks: bool) -> Trained:
    """The run of a partner alone, on the stream of the strategy that it accompanies."""
    return train(Composite({partner: make_strategy(partner, PARTNERS[partner])}), "lstm", tasks)


def test_several_processes_are_refused_in_one_line(trainer):
    """Data-parallel runs: one statement for all strategies."""
    stream = make_stream()
    many = trainer(devices=2, strategy="ddp")
    with pytest.raises(ValueError, match="one is supported so far: set it to 1"):
        Run(stream, make_learner(stream, None, "lstm"), many, TRAINING)
