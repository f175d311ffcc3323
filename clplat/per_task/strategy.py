"""Helpers for strategies with per-task weights, and their base where a hypernetwork generates these."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.learners.objective import Unsupported
from clplat.per_task.generated import GeneratedNet, TaskEmbeddings
from clplat.per_task.generators import Generator, Piece
from clplat.per_task.net import PerTaskNet, label_of, lowest_entropy
from clplat.per_task.regularizer import OutputRegularizer
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream

if TYPE_CHECKING:
    from clplat.learners.learner import Learner

log = logging.getLogger(__name__)


class GeneratedWeights(Strategy):
    """Base of strategies with one hypernetwork for the weights W_t = h(e_t, Theta) of every task.

    Args:
        tasks: the embeddings e_t.
        past: the regularisation of learned tasks.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"net"})

    def __init__(self, tasks: TaskEmbeddings, past: OutputRegularizer) -> None:
        super().__init__()
        self.tasks, self.past = tasks, past

    def generator(self, pieces: Sequence[Piece]) -> Generator:
        """Make the hypernetwork for the tensors of a net."""
        raise TypeError(f"{type(self).__name__} does not define generator(pieces).")

    def setup(self, learner: Learner, stream: Stream) -> None:
        check_answer(learner, stream)
        self.tasks.plan(stream)
        learner.net = net = GeneratedNet(learner.net, self.tasks, self.generator)
        size = sum(p.numel() for p in net.generator.parameters())
        log.info("%s: %d parameters generate %d weights", type(self).__name__, size, net.size)

    def enter(self, learner: Learner, experience: Experience) -> None:
        self.tasks.active = label_of(experience)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.tasks.start(label_of(experience))
        assert isinstance(learner.net, GeneratedNet)
        self.past.remember(learner.net)

    def gradients(self, learner: Learner, batch: Batch) -> None:
        assert isinstance(learner.net, GeneratedNet) and learner.optimizer is not None
        self.past.add_gradients(learner.net, learner.optimizer)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        return surest(learner, batch, logits)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.tasks.finish()


def check_answer(learner: Learner, stream: Stream) -> None:
    """Refuse a stream without task labels whose task could not be inferred.

    Raises:
        ValueError: the objective's predictions have no entropy.
    """
    if all(e.task_label is not None for e in stream):
        return
    try:
        learner.objective.entropy(torch.zeros(1, 1))
    except Unsupported as error:
        raise ValueError(
            "without task labels the task is inferred by the entropy of predictions, and "
            f"{type(learner.objective).__name__} has none: use a task-incremental stream."
        ) from error


def surest(learner: Learner, batch: Batch, logits: Tensor) -> Tensor:
    """Logits under the task with the lowest predictive entropy, by row; `logits` where the batch tells its tasks."""
    net = learner.net
    if batch.task is not None or not isinstance(net, PerTaskNet) or len(net.tasks.known) < 2:
        return logits
    return lowest_entropy(net, batch, learner.objective)[0]
