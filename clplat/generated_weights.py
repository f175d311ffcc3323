"""What strategies share whose hypernetwork generates the weights of each task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from clplat.learners.nets.hyper import GeneratedNet, Generator, Piece, TaskEmbeddings
from clplat.learners.nets.per_task import label_of
from clplat.output_regularizer import OutputRegularizer
from clplat.proposed_step import check_known
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.task_strategies import check_answer, check_company, surest

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
