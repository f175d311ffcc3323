"""What several test files need: small streams, learners and looks into a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clplat import checkpoint
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import objective_for
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream


def stream(
    tasks: bool = False,
    experiences: int = 3,
    examples: int = 40,
    features: int = 5,
    shift: float = 0.5,
    alternating: bool = False,
) -> Stream:
    """Vectors [D] of two classes an experience, that lie `shift` apart; drawn at random, or in turn (`alternating`)."""
    generator, parts = torch.Generator().manual_seed(5), []
    for k in range(experiences):
        if alternating:
            y = 2 * k + torch.arange(examples) % 2
        else:
            y = torch.randint(2 * k, 2 * k + 2, (examples,), generator=generator)
        x = torch.randn(examples, features, generator=generator) + shift * y[:, None]
        parts.append(_experience(k, x, y, tasks))
    return _classes(parts, tasks, features, 0)


def sequences(tasks: bool = True, experiences: int = 3, examples: int = 48) -> Stream:
    """Sequences [5, 4] of two classes an experience, one around -1 and one around 1."""
    generator, parts = torch.Generator().manual_seed(5), []
    for k in range(experiences):
        y = torch.randint(2 * k, 2 * k + 2, (examples,), generator=generator)
        x = torch.randn(examples, 5, 4, generator=generator) + (y % 2 * 2.0 - 1)[:, None, None]
        parts.append(_experience(k, x, y, tasks))
    return _classes(parts, tasks, 4, 5)


def _experience(k: int, x: Tensor, y: Tensor, tasks: bool) -> Experience:
    label = k if tasks else None
    data = TensorData(x, y, task=label)
    return Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data, task_label=label)


def _classes(parts: Sequence[Experience], tasks: bool, features: int, length: int) -> Stream:
    scenario = "task_incremental" if tasks else "class_incremental"
    return Stream("tiny", tuple(parts), scenario, "class", 2 * len(parts), features=features, length=length)


def head_for(of: Stream) -> Callable[[int], Head]:
    """Makes the head of a stream: one for all classes, or one a task."""
    if of.scenario == "task_incremental":
        return partial(TaskHead, outputs=of.outputs, tasks=[e.classes for e in of])
    return partial(Head, outputs=of.outputs)


def learner(
    strategy: Strategy | None = None,
    of: Stream | None = None,
    lr: float = 1e-2,
    head: Callable[..., Head] | None = None,
    hidden: Sequence[int] = (7,),
    dropout: float = 0.0,
    **options: Any,
) -> Learner:
    """An MLP that learns a stream of vectors by SGD, from the same weights each time."""
    of = stream() if of is None else of
    torch.manual_seed(1)
    net = mlp(of.inputs, head or head_for(of), hidden=list(hidden), dropout=dropout)
    options = {"optimizer": partial(torch.optim.SGD, lr=lr)} | options
    return Learner(net, objective_for(of.target), strategy, **options)


def trained(
    strategy: Strategy | Learner | None = None, of: Stream | None = None, epochs: int = 1, **options: Any
) -> Learner:
    """A learner, of that strategy or as it is given, after a run over a stream."""
    of = stream() if of is None else of
    made = strategy if isinstance(strategy, Learner) else learner(strategy, of, **options)
    Run(of, made, quiet_trainer(), Training(batch_size=8, epochs=epochs)).go()
    return made


def only(learner: Learner) -> Any:
    """The one strategy in a learner's list."""
    (part,) = learner.strategy.strategies
    return part


def flat(made: Learner) -> Tensor:
    """The trainable weights as one vector."""
    return torch.cat([p.detach().flatten() for p in made.weights().values()])


def shaken(made: Learner, scale: float = 0.1) -> None:
    """Move all weights at random."""
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(scale * torch.randn_like(p))


class Killed(BaseException):
    """Stands for the signal that ends a process."""


def killed_and_resumed(start: Callable[[Path], Run], folder: Path, saves: int) -> Run:
    """A finished run that was killed after a number of checkpoints and went on in a new one.

    Args:
        start: makes the run from its folder.
        folder: an empty one.
        saves: checkpoints that it writes, the one before the first step included.
    """
    broken, save, left = start(folder), Run.save, saves

    def dying(self: Run) -> None:
        nonlocal left
        save(self)
        left -= 1
        if left == 0:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", dying)
        with pytest.raises(Killed):
            broken.go()
    resumed = start(folder)
    torch.manual_seed(99)  # the checkpoint's own random state counts
    resumed.resume(checkpoint.load(folder / "last.ckpt"))
    resumed.go()
    return resumed
