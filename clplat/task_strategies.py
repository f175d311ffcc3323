"""What strategies share that give every task weights of its own (see `clplat.learners.nets.per_task`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from clplat.learners.nets.per_task import PerTaskNet, lowest_entropy
from clplat.strategy import Composite, Strategy
from clplat.streams.experience import Batch, Experience
from clplat.streams.loader import ChunkLoader
from clplat.teacher import Teacher

if TYPE_CHECKING:
    from clplat.learners.learner import Learner


def check_company(name: str, learner: Learner) -> None:
    """Refuse, before the net is wrapped, what a strategy with weights a task cannot be combined with.

    Args:
        name: of the strategy that is about to wrap the net.
        learner: with its list of strategies.

    Raises:
        ValueError: another strategy gave the net weights a task already, keeps a copy of the net as it was before
            wrapping, trains on several tasks at a time, or edits layers.
    """
    if isinstance(learner.net, PerTaskNet):
        raise ValueError(f"{name}: another strategy in the list already gives each task its own weights: drop one.")
    parts = learner.strategy.named if isinstance(learner.strategy, Composite) else {}
    names = list(parts)
    for other, part in parts.items():
        if type(part).session is not Strategy.session:
            raise ValueError(
                f"{name}: {other} changes what is trained in an experience, and each task must be learned alone, "
                f"on its own data: drop {other}."
            )
        if part.edits_layers:
            raise ValueError(
                f"{name}: {other} works on the layers' own weights, which are not what the net of {name} runs "
                f"with: drop {other}."
            )
        before = name in parts and names.index(other) < names.index(name)
        if before and any(isinstance(module, Teacher) for module in part.modules()):
            raise ValueError(
                f"{name}: {other} has copied the net before {name} replaced it: put {name} first in the list."
            )


def check_answer(name: str, learner: Learner, experience: Experience) -> None:
    """Refuse a stream without task labels whose task could not be inferred.

    Raises:
        ValueError: targets are real values, so predictions have no entropy.
    """
    if experience.task_label is None and learner.objective.kind == "value":
        raise ValueError(
            f"{name}: without task labels the task is inferred by the entropy of predictions, and real values have "
            "none: use a task-incremental stream."
        )


def surest(learner: Learner, batch: Batch, logits: Tensor) -> Tensor:
    """`logits` where the batch tells its tasks; else those of the task with the lowest predictive entropy, by row."""
    net = learner.net
    if batch.task is not None or not isinstance(net, PerTaskNet) or len(net.tasks.known) < 2:
        return logits
    return lowest_entropy(net, batch, learner.objective.kind, learner.objective.scored(batch))[0]


def planned_steps(learner: Learner) -> int | None:
    """Optimiser steps planned for the experience in training; None outside of a run."""
    loader = learner.trainer.train_dataloader
    return loader.steps if isinstance(loader, ChunkLoader) else None


def log_values(learner: Learner, values: Mapping[str, float]) -> None:
    """Give values to the run's loggers, at the number of optimiser steps done; nothing where there are none."""
    try:
        loggers = learner.trainer.loggers
    except RuntimeError:  # not attached to a trainer
        return
    for logger in loggers:
        logger.log_metrics(dict(values), step=learner.steps)
