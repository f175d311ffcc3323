"""Helpers for strategies with per-task weights, and their base where a hypernetwork generates these."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from clplat.per_task.generated import GeneratedNet, TaskEmbeddings
from clplat.per_task.generators import Generator, Piece
from clplat.per_task.net import PerTaskNet, label_of, lowest_entropy
from clplat.per_task.regularizer import OutputRegularizer
from clplat.strategy import Composite, Strategy
from clplat.streams.experience import Batch, Experience
from clplat.streams.loader import ChunkLoader
from clplat.weights.lookahead import check_known
from clplat.weights.teacher import Teacher

if TYPE_CHECKING:
    from clplat.learners.learner import Learner

log = logging.getLogger(__name__)


class GeneratedWeights(Strategy):
    """Every task's weights W_t = h(e_t, Theta) come from one hypernetwork, which is held where it is for old tasks.

    Args:
        name: of the strategy in the configuration, for messages.
        tasks: the embeddings e_t.
        past: the regularisation of learned tasks.
    """

    needs = frozenset({"boundaries"})

    def __init__(self, name: str, tasks: TaskEmbeddings, past: OutputRegularizer) -> None:
        super().__init__()
        self.name, self.tasks, self.past = name, tasks, past

    def generator(self, pieces: Sequence[Piece]) -> Generator:
        """The hypernetwork for the tensors of a net."""
        raise TypeError(f"{type(self).__name__} does not define generator(pieces).")

    def wrap(self, learner: Learner) -> None:
        """Let the hypernetwork generate the weights of the learner's net."""
        check_company(self.name, learner)
        if self.past.lookahead and (self.past.beta or self.past.beta_state):
            check_known(f"{self.name}.lookahead", learner.make_optimizer)
        learner.net = net = GeneratedNet(learner.net, self.tasks, self.generator)
        size = sum(p.numel() for p in net.generator.parameters())
        log.info("%s: %d parameters generate %d weights", self.name, size, net.size)

    def enter(self, learner: Learner, experience: Experience) -> None:
        """The experience's task is the active one."""
        self.tasks.active = label_of(experience)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """A new embedding; what the learned ones give now is the target."""
        check_answer(self.name, learner, experience)
        self.tasks.start(label_of(experience))
        assert isinstance(learner.net, GeneratedNet)
        self.past.remember(learner.net)

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Add those of the regularisation."""
        assert isinstance(learner.net, GeneratedNet) and learner.optimizer is not None
        self.past.add_gradients(learner.net, learner.optimizer)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """Without task labels: the answer of the task that is surest."""
        return surest(learner, batch, logits)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """The embedding stays as it is from now on."""
        self.tasks.finish()


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
