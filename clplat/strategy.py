"""Strategies against forgetting: the contract of one. Its base class is plain finetuning.

A strategy transforms values. Each hook has one law of composition, so that a list of strategies means one thing (see
`clplat.composition`). Strategies are modules: a tensor registered with `register_buffer` (None until it is known, any
shape later) is checkpointed and moved with the learner. Other state goes through `get_extra_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clplat.state import StateModule
from clplat.streams.experience import Batch, Data, Experience, Stream

if TYPE_CHECKING:
    from clplat.learners.learner import Learner
    from clplat.learners.nets.net import Output

Closure = Callable[[], "Output"]
"""Clears the gradients, then computes the objective of the step's batch and its gradients at the current weights."""

Update = Callable[[Closure], "Output"]
"""Runs the rest of a step with the given closure: inner strategies first, the optimiser last."""

FIRST_EDITION = {
    "wrap": "is called setup(learner, stream)",
    "schedule": "is called rate(step, steps, batch, factor), and returns the factor of one step",
    "replaces_objective": 'is declared as claims = frozenset({"objective"})',
    "edits_layers": 'is declared as claims = frozenset({"layers"})',
}
"""What a strategy could define before version 0.2, and what became of it."""


@dataclass(frozen=True)
class Session:
    """Training data of one experience.

    Attributes:
        data: the training set; None to train on nothing.
        budget: optimiser steps spent on it, in units of one experience's.
        also_classes: experiences besides the current one whose classes occur in it; the head makes room for them.
    """

    data: Data | None
    budget: float = 1.0
    also_classes: tuple[Experience, ...] = ()


class Strategy(StateModule):
    """Plain finetuning, and the base of every other strategy.

    Attributes:
        needs: keys of `clplat.composition.NEEDS` that a stream must offer.
        claims: keys of `clplat.composition.CLAIMS`: what it takes for itself. They decide which strategies go together.
        not_carried: why it cannot go with segments whose state is carried (`Training.carry_state`); empty: it can. It
            can where it leaves the training set and the order of the batch's rows as they are, and compares no output
            of a carried state with one of a fresh state.
        passes: forward and backward passes a step, relative to finetuning on the same batch size. It is logged, since
            comparisons are only fair at equal cost.

    Raises:
        TypeError: a subclass defines a hook of the first edition; the message names its successor.
    """

    needs: frozenset[str] = frozenset()
    claims: frozenset[str] = frozenset()
    not_carried: str = ""
    passes: float = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, instead in FIRST_EDITION.items():
            if name in vars(cls):
                raise TypeError(f"{cls.__name__}.{name} {instead} since clplat 0.2: rename it (docs/extending.md).")

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Change the net, size the own state, refuse what cannot be; once, before anything is trained.

        Law: in order, those that claim the net first.
        """

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """Training data of experience `index`. Law: left fold."""
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        """Set what is not a tensor (frozen weights, the active task) for training on an experience.

        Called before `before_experience`, when the training begins, and when a run goes on from a checkpoint inside the
        experience: twice must be the same as once. Law: in order.
        """

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Prepare for an experience; the head has already grown. Law: in order."""

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Consolidate what was learned; gradients are off unless asked for. Law: in order."""

    def rate(self, step: int, steps: int, batch: Batch, factor: float) -> float:
        """Factor of the learning rate at one optimiser step. Law: left fold.

        Args:
            step: of the experience, from 0.
            steps: of the experience in all.
            batch: as it was read, on the data's device, before `batch` of any strategy.
            factor: so far.
        """
        return factor

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """Batch to train on instead of `batch`. Law: left fold."""
        return batch

    def before_step(self, learner: Learner, batch: Batch) -> None:
        """Update the own state for a step, once its batch is complete. Law: in order."""

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        """Scalar in place of the learner's objective; used only with the claim "objective"."""
        return learner.objective(output.logits, batch)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Named scalars to add to the objective; each is logged. Law: union, a name twice is an error."""
        return {}

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Edit the parameters' `.grad` after the backward pass. Law: in order."""

    def step(self, learner: Learner, closure: Closure, update: Update) -> Output:
        """Decide how often and where gradients are taken. Law: onion, the first in the list is outermost."""
        return update(closure)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Update the own state after the weights moved; gradients are off. Law: in order."""

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """Logits to answer with at test time. Law: left fold."""
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the strategy's own parameters for the learner's optimiser, beside the net's. Law: union."""
        return []

    def report(self) -> dict[str, Tensor]:
        """Findings by name for a person to look at, saved as `strategy.npz` in the run's folder.

        Law: union, each name behind that of its strategy.
        """
        return {}

    def stored_bytes(self) -> int:
        """Bytes kept for old experiences; by default all tensors of the strategy's own state. Law: sum."""
        own = chain(self.named_parameters(), self.named_buffers())
        return sum(t.numel() * t.element_size() for _, t in own)
