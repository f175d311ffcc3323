"""What all tests share: one thread each, since they run side by side, and a tiny stream with a tiny learner."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

# Read where functions of Triton's own and ours are defined, and Lightning imports Triton: so before any other import.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import objective_for
from clplat.lightning import pl
from clplat.run import Run
from clplat.settings import Training
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    root = os.environ.get("CLPLAT_DATA_ROOT")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST under CLPLAT_DATA_ROOT")
    return Path(root)


@pytest.fixture
def trainer() -> Callable[..., pl.Trainer]:
    """Makes a silent Trainer on the CPU."""
    return partial(
        pl.Trainer,
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Tiny:
    """A stream of vectors [5], two classes an experience, and an MLP that learns it in a moment."""

    def stream(self, tasks: bool = False, experiences: int = 3, examples: int = 40) -> Stream:
        generator = torch.Generator().manual_seed(5)
        parts = []
        for k in range(experiences):
            y = torch.randint(2 * k, 2 * k + 2, (examples,), generator=generator)
            x = torch.randn(examples, 5, generator=generator) + 0.5 * y[:, None]
            data, label = TensorData(x, y, task=k if tasks else None), k if tasks else None
            parts.append(Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data, task_label=label))
        scenario = "task_incremental" if tasks else "class_incremental"
        return Stream("tiny", tuple(parts), scenario, "class", 2 * experiences, features=5, length=0)

    def learner(
        self, strategy: Strategy | None = None, stream: Stream | None = None, lr: float = 1e-2, **options: Any
    ) -> Learner:
        stream = self.stream() if stream is None else stream
        torch.manual_seed(1)
        head: Callable[[int], Head] = partial(Head, outputs=stream.outputs)
        if stream.scenario == "task_incremental":
            head = partial(TaskHead, outputs=stream.outputs, tasks=[e.classes for e in stream])
        net = mlp(Inputs(features=5, length=0), head, hidden=[7])
        options = {"optimizer": partial(torch.optim.SGD, lr=lr)} | options
        return Learner(net, objective_for("class"), strategy, **options)

    def trained(
        self, strategy: Strategy | None, stream: Stream | None = None, epochs: int = 1, **options: Any
    ) -> Learner:
        stream = self.stream() if stream is None else stream
        learner = self.learner(strategy, stream, **options)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            max_epochs=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        Run(stream, learner, trainer, Training(batch_size=8, epochs=epochs)).go()
        return learner


@pytest.fixture
def tiny() -> Tiny:
    """Makes tiny streams and learners."""
    return Tiny()
