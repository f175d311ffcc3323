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
from clplat.weights.lookahead import check_known

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
    claims = frozenset({"net"})

    def __init__(self, name: str, tasks: TaskEmbeddings, past: OutputRegularizer) -> None:
        super().__init__()
        self.name, self.tasks, self.past = name, tasks, past

    def generator(self, pieces: Sequence[Piece]) -> Generator:
        """The hypernetwork for the tensors of a net."""
        raise TypeError(f"{type(self).__name__} does not define generator(pieces).")

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Let the hypernetwork generate the weights of the learner's net."""
        if self.past.lookahead and (self.past.beta or self.past.beta_state):
            check_known(f"{self.name}.lookahead", learner.handover.make)
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


def check_answer(name: str, learner: Learner, experience: Experience) -> None:
    """Refuse a stream without task labels whose task could not be inferred.

    Raises:
        ValueError: the objective's predictions have no entropy.
    """
    if experience.task_label is not None:
        return
    try:
        learner.objective.entropy(torch.zeros(1, 1))
    except Unsupported as error:
        raise ValueError(
            f"{name}: without task labels the task is inferred by the entropy of predictions, and "
            f"{type(learner.objective).__name__} has none: use a task-incremental stream."
        ) from error


def surest(learner: Learner, batch: Batch, logits: Tensor) -> Tensor:
    """`logits` where the batch tells its tasks; else those of the task with the lowest predictive entropy, by row."""
    net = learner.net
    if batch.task is not None or not isinstance(net, PerTaskNet) or len(net.tasks.known) < 2:
        return logits
    return lowest_entropy(net, batch, learner.objective)[0]
