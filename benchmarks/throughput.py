"""Step times of a plain PyTorch loop, clplat and Avalanche 0.6, on the same tensors, alternating in one run.

    python benchmarks/throughput.py [--rounds 5] [--threads 2] [--write]

Every side trains the same net with the same optimiser and batch size over the same stream of experiences; the time is
that of the training loops alone, divided by the optimiser steps. A ratio is the median of the rounds' own ratios, so
that a machine that drifts moves both sides. Needs MNIST under CLPLAT_DATA_ROOT.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (Avalanche's annotations refuse the use that its documentation shows.)

from __future__ import annotations

import argparse
import datetime
import logging
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import Classification
from clplat.lightning import pl
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.ewc import EWC
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Stream
from clplat.streams.sources import mnist, resolve_data_root
from clplat.streams.split import split
from clplat.tracking.base import NoTracker

METHODS = ("finetune", "replay", "EWC")
READY, OWN = "Avalanche on ready tensors", "Avalanche's SplitMNIST"
BUFFER = 500


@dataclass(frozen=True)
class Setting:
    """One row group: a net, its batch size, and how many examples of each experience are used."""

    name: str
    batch_size: int
    examples: int
    hidden: tuple[int, ...] = ()


SETTINGS = (
    Setting("MLP 784-400-10, batch 128", 128, 12000, (400,)),
    Setting("MLP 784-100-100-10, batch 10", 10, 2000, (100, 100)),
    Setting("LSTM-128 on rows, batch 64", 64, 6000),
)


class PlainLSTM(nn.Module):
    """The LSTM learner's net, written plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of rows [B, 28, 28], or of Avalanche's images [B, 1, 28, 28]."""
        return self.head(self.lstm(x.flatten(1).view(-1, 28, 28))[0][:, -1])


def plain_net(setting: Setting) -> nn.Module:
    """The net of a setting in plain PyTorch."""
    torch.manual_seed(0)
    if not setting.hidden:
        return PlainLSTM()
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((784, *setting.hidden), setting.hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(setting.hidden[-1], 10))


def plain(setting: Setting, parts: list[TensorData], tests: list[TensorData]) -> tuple[float, float]:
    """ms a step of finetuning, and ms of one evaluation of all test sets, in plain PyTorch."""
    net, spent, steps = plain_net(setting), 0.0, 0
    for data in parts:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        start = time.perf_counter()
        for rows in data.rows[torch.randperm(len(data))].split(setting.batch_size):
            optimizer.zero_grad()
            x, y = data.x.index_select(0, rows), data.y.index_select(0, rows)
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            steps += 1
        spent += time.perf_counter() - start
    net.eval()
    start = time.perf_counter()
    with torch.no_grad():
        for data in tests:
            correct = torch.zeros(())
            for rows in data.rows.split(1000):
                correct += (net(data.x.index_select(0, rows)).argmax(1) == data.y.index_select(0, rows)).sum()
            correct.item()
    return spent / steps * 1e3, (time.perf_counter() - start) * 1e3


class Seconds(NoTracker):
    """Adds up what the run reports about its costs."""

    def __init__(self) -> None:
        super().__init__()
        self.total: dict[str, float] = {}

    def log(self, metrics, step) -> None:
        """Keep the sums of the costs."""
        for key, value in metrics.items():
            self.total[key] = self.total.get(key, 0.0) + value


def ours(setting: Setting, stream: Stream, method: str) -> tuple[float, float, float]:
    """ms a step, ms of one evaluation, and ms a step if consolidation (the Fisher) is counted in."""
    torch.manual_seed(0)
    strategies: dict[str, Callable[[], Strategy]] = {
        "finetune": Strategy,
        "replay": partial(Replay, capacity=BUFFER, insert="after"),
        "EWC": partial(EWC, strength=1.0, mode="separate"),
    }
    inputs = stream.inputs
    head = partial(Head, outputs=10)
    net = (
        mlp(inputs, head, hidden=setting.hidden) if setting.hidden else recurrent(inputs, head, mixer=LSTM, hidden=128)
    )
    learner = Learner(net, Classification(), strategies[method](), partial(torch.optim.Adam, lr=1e-3))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tracker = Seconds()
    Run(stream, learner, trainer, Training(batch_size=setting.batch_size, epochs=1), tracker=tracker).go()
    start = time.perf_counter()
    evaluate(learner, stream.experiences)
    scoring = (time.perf_counter() - start) * 1e3
    training, after = tracker.total["cost/training_seconds"], tracker.total["cost/consolidation_seconds"]
    return training / learner.steps * 1e3, scoring, (training + after) / learner.steps * 1e3


def avalanche_tensors(parts: list[TensorData], tests: list[TensorData]) -> Any:
    """An Avalanche benchmark on ready tensors: what its loops cost at best."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    def dataset(data: TensorData) -> AvalancheDataset:
        x, y = data.x[data.rows], data.y[data.rows]
        attributes = [
            DataAttribute(y.tolist(), "targets"),
            DataAttribute([0] * len(y), "targets_task_labels", use_in_getitem=True),
        ]
        return AvalancheDataset(torch.utils.data.TensorDataset(x, y), data_attributes=attributes)

    return benchmark_from_datasets(train=[dataset(d) for d in parts], test=[dataset(d) for d in tests])


def avalanche_own(examples: int, folder: Path) -> Any:
    """Avalanche's own SplitMNIST, as its users run it: every example is transformed when it is read."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.classic import SplitMNIST

    raw = folder / "MNIST" / "raw"
    if not raw.is_dir():
        # torchvision unpacks its files beside the packed ones, so it gets a copy.
        shutil.copytree(resolve_data_root() / "MNIST", folder / "MNIST")
    own = SplitMNIST(n_experiences=5, fixed_class_order=list(range(10)), dataset_root=folder)
    train = [e.dataset.subset(range(min(examples, len(e.dataset)))) for e in own.train_stream]
    return benchmark_from_datasets(train=train, test=[e.dataset for e in own.test_stream])


def avalanche(setting: Setting, streams: Any, method: str) -> tuple[float, float, float]:
    """As `ours`, by Avalanche."""
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin
    from avalanche.training.supervised import Naive

    class Clock(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.spent, self.steps, self.start = 0.0, 0, 0.0

        def before_training_epoch(self, strategy, **kwargs) -> None:
            self.start = time.perf_counter()

        def after_training_epoch(self, strategy, **kwargs) -> None:
            self.spent += time.perf_counter() - self.start

        def after_training_iteration(self, strategy, **kwargs) -> None:
            self.steps += 1

    net, clock = plain_net(setting), Clock()
    plugins = {"finetune": [], "replay": [ReplayPlugin(mem_size=BUFFER)], "EWC": [EWCPlugin(ewc_lambda=1.0)]}[method]
    strategy = Naive(
        model=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=setting.batch_size,
        train_epochs=1,
        eval_mb_size=1000,
        plugins=[*plugins, clock],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    whole = 0.0
    for experience in streams.train_stream:
        start = time.perf_counter()
        strategy.train(experience)
        whole += time.perf_counter() - start
    start = time.perf_counter()
    strategy.eval(streams.test_stream)
    scoring = (time.perf_counter() - start) * 1e3
    return clock.spent / clock.steps * 1e3, scoring, whole / clock.steps * 1e3


def cut(stream: Stream, examples: int) -> Stream:
    """The stream with the first `examples` training examples of each experience."""
    from dataclasses import replace

    parts = []
    for e in stream:
        assert isinstance(e.train, TensorData)
        parts.append(replace(e, train=TensorData(e.train.x, e.train.y, e.train.rows[:examples])))
    return replace(stream, experiences=tuple(parts))


def measure(setting: Setting, stream: Stream, rounds: int, folder: Path) -> list[list[str]]:
    """The rows of the table for one setting; `folder` is for Avalanche's copy of MNIST."""
    stream = cut(stream, setting.examples)
    parts = [e.train for e in stream if isinstance(e.train, TensorData)]
    tests = [e.test for e in stream if isinstance(e.test, TensorData)]
    ready, own = avalanche_tensors(parts, tests), avalanche_own(setting.examples, folder)
    base: list[tuple[float, float]] = []
    times: dict[str, dict[str, list[tuple[float, float, float]]]] = {
        side: {method: [] for method in METHODS} for side in ("clplat", READY, OWN)
    }
    for number in range(rounds + 1):
        results = [plain(setting, parts, tests)]
        for method in METHODS:
            round_ = {
                "clplat": ours(setting, stream, method),
                READY: avalanche(setting, ready, method),
                OWN: avalanche(setting, own, method),
            }
            results.append(plain(setting, parts, tests))
            if number:  # the first round warms up
                for side, measured in round_.items():
                    times[side][method].append(measured)
        if number:
            base.append((statistics.median(t for t, _ in results), statistics.median(s for _, s in results)))
    rows = [[setting.name, "plain loop, finetune", _spread([b[0] for b in base]), "1", "", "", ""]]
    for side, methods in times.items():
        for method, measured in methods.items():
            cells = [_spread([m[0] for m in measured])]
            cells.append(_spread([m[0] / b[0] for m, b in zip(measured, base, strict=True)]))
            for peer in (READY, OWN) if side == "clplat" else ():
                cells.append(_ratio(times[peer][method], measured, 0))
            if side == "clplat":
                cells.append(_ratio(times[OWN][method], measured, 2))
            rows.append([setting.name, f"{side}, {method}", *cells, *[""] * (5 - len(cells))])
    scoring = times["clplat"]["finetune"]
    cells = [_spread([m[1] for m in scoring]), _spread([m[1] / b[1] for m, b in zip(scoring, base, strict=True)])]
    cells += [_ratio(times[peer]["finetune"], scoring, 1) for peer in (READY, OWN)]
    return [*rows, [setting.name, "clplat, scoring 10 000 (ms a pass)", *cells, ""]]


def _ratio(a: list[tuple[float, float, float]], b: list[tuple[float, float, float]], part: int) -> str:
    return _spread([x[part] / y[part] for x, y in zip(a, b, strict=True)])


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure all settings and print, or append to RESULTS.md, one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    stream = split(mnist(), experiences=5)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = names[0].split(":")[1].strip() if names else platform.machine()
    lines = [
        f"\n## Throughput, {datetime.date.today()}\n",
        f"`python benchmarks/throughput.py --rounds {given.rounds} --threads {given.threads}`; {cpu}, {given.threads} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, Lightning {version('pytorch-lightning')}, "
        f"avalanche-lib {version('avalanche-lib')}. Median (minimum to maximum) of {given.rounds} rounds after one to warm up.\n",
        "| setting | what | ms a step | times the plain loop | faster than Avalanche on ready tensors "
        "| faster than Avalanche's SplitMNIST | the same, consolidation counted |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            for row in measure(setting, stream, given.rounds, Path(folder)):
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    if given.write:
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
