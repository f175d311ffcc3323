"""How forgetting is fought: the contract. The base class fights nothing, it is finetuning.

A strategy transforms values; each hook has one law of composition, so that a list of strategies means one thing.
Strategies are modules: what they register with `register_buffer` (None until it is known, any shape later) is
checkpointed and moved with the learner. What is not a tensor goes through `get_extra_state` / `set_extra_state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clplat.state import StateModule
from clplat.streams.experience import Batch, Data, Experience, Stream, StreamError

if TYPE_CHECKING:
    from clplat.learners.learner import Learner
    from clplat.learners.nets.net import Output

Closure = Callable[[], "Output"]
"""Clears the gradients, then computes the objective of the step's batch and its gradients at the current weights."""

Update = Callable[[Closure], "Output"]
"""Runs the rest of a step with the given closure: inner strategies first, the optimiser last."""

NEEDS = {
    "boundaries": "experiences with known boundaries (any scenario but boundary_free)",
    "task_labels": "task labels (stream.task_incremental=true)",
    "classes": "one class a sequence (streams with target 'class')",
}
"""What a strategy may declare that it needs of a stream, and what that is called in an error."""


@dataclass(frozen=True)
class Session:
    """What is trained during one experience.

    Attributes:
        data: the training set; None to train on nothing.
        share: how many experiences' worth of optimiser steps are spent on it.
        covers: experiences besides the current one whose classes occur in it, so that the head makes room for them.
    """

    data: Data | None
    share: float = 1.0
    covers: tuple[Experience, ...] = ()


class Strategy(StateModule):
    """Plain finetuning, and the base of every other strategy.

    Attributes:
        needs: keys of `NEEDS` that a stream must offer.
        replaces_objective: True if `objective` takes the place of the learner's own; at most one in a list may.
        edits_layers: True if it freezes, copies or rewrites the layers' own weights, or calls the head itself, and so
            cannot go with a strategy that lets the net run with other weights (hypernetworks, masks).
        not_carried: why it cannot go with segments whose state is carried (`Training.carry_state`); empty: it can. It
            can where it leaves the training set and the order of the batch's rows as they are, and compares no output
            of a carried state with one of a fresh state.
        passes: forward and backward passes a step, relative to finetuning on the same batch size; logged, since
            comparisons are only fair at equal cost.
    """

    needs: frozenset[str] = frozenset()
    replaces_objective: bool = False
    edits_layers: bool = False
    not_carried: str = ""
    passes: float = 1.0

    def wrap(self, learner: Learner) -> None:
        """Change the learner's net, once, before anything is trained. Law: function composition."""

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """What is trained during experience `index`. Law: left fold."""
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        """Set up what is not a tensor (which weights are frozen, which task is active) for training on an experience.

        Called before `before_experience`, again when the experience's training begins, and when a run goes on from a
        checkpoint inside it: calling it twice must be the same as once. Law: in order.
        """

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Prepare for an experience; the head has already grown. Law: in order."""

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Consolidate what was learned; gradients are off unless asked for. Law: in order."""

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch to train on instead of `batch`. Law: left fold."""
        return batch

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        """A scalar in place of the learner's objective; used only where `replaces_objective`."""
        return learner.objective(output.logits, batch)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Named scalars to add to the objective; each is logged. Law: union, a name twice is an error."""
        return {}

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Edit the parameters' `.grad` after the backward pass. Law: left fold."""

    def step(self, learner: Learner, closure: Closure, update: Update) -> Output:
        """How often and where gradients are taken. Law: onion, the first in the list is outermost."""
        return update(closure)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Update the strategy's own state after the weights moved; gradients are off. Law: in order."""

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """Logits to answer with at test time. Law: left fold."""
        return logits

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser. Law: left fold."""
        return groups

    def schedule(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        """The learning rate's factor at each step of an experience. Law: function composition."""
        return factor

    def report(self) -> dict[str, Tensor]:
        """What it found, by name, for a person to look at: saved as `strategy.npz` in the run's folder. Law: union,
        each name behind that of its strategy."""
        return {}

    def stored_bytes(self) -> int:
        """Bytes kept for old experiences: here, all tensors of the strategy's own state."""
        own = chain(self.named_parameters(), self.named_buffers())
        return sum(t.numel() * t.element_size() for _, t in own)


class Composite(Strategy):
    """Several strategies as one, by the law of each hook.

    Args:
        parts: the strategies by name, in order.

    Raises:
        ValueError: two of them replace the objective.
    """

    def __init__(self, parts: Mapping[str, Strategy]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        replacing = [name for name, part in parts.items() if part.replaces_objective]
        if len(replacing) > 1:
            raise ValueError(
                f"At most one strategy may replace the objective, got {' and '.join(replacing)}: drop one."
            )
        self.replaces_objective = bool(replacing)
        self.needs = frozenset().union(*(p.needs for p in parts.values()))
        self._count_passes()

    def _count_passes(self) -> None:
        self.passes = math.prod(part.passes for part in self.strategies)

    @property
    def named(self) -> dict[str, Strategy]:
        """The parts by name, in order."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Strategy)}

    @property
    def strategies(self) -> list[Strategy]:
        """The parts in order."""
        return list(self.named.values())

    def wrap(self, learner: Learner) -> None:
        for part in self.strategies:
            part.wrap(learner)

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        for part in self.strategies:
            session = part.session(stream, index, session)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        for part in self.strategies:
            part.enter(learner, experience)
        self._count_passes()  # those of GEM grow with the experiences

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        for part in self.strategies:
            part.before_experience(learner, experience)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        for part in self.strategies:
            part.after_experience(learner, experience)

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        for part in self.strategies:
            batch = part.batch(learner, batch)
        return batch

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        part = next(p for p in self.strategies if p.replaces_objective)
        return part.objective(learner, batch, output)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, part in self.named.items():
            for key, value in part.loss(learner, batch, output).items():
                if key in terms:
                    raise ValueError(
                        f"Strategy {name!r} adds a loss {key!r} that another one already adds: rename one."
                    )
                terms[key] = value
        return terms

    def gradients(self, learner: Learner, batch: Batch) -> None:
        for part in self.strategies:
            part.gradients(learner, batch)

    def step(self, learner: Learner, closure: Closure, update: Update) -> Output:
        for part in reversed(self.strategies):
            update = _inside(part, learner, update)
        return update(closure)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        for part in self.strategies:
            part.after_step(learner, batch, output)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        for part in self.strategies:
            logits = part.predict(learner, batch, logits, features)
        return logits

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for part in self.strategies:
            groups = part.parameter_groups(groups)
        return groups

    def schedule(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        for part in self.strategies:
            factor = part.schedule(factor)
        return factor

    def report(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, part in self.named.items() for key, value in part.report().items()}

    def stored_bytes(self) -> int:
        return sum(p.stored_bytes() for p in self.strategies)


def _inside(part: Strategy, learner: Learner, update: Update) -> Update:
    return lambda closure: part.step(learner, closure, update)


def check_needs(strategy: Strategy, stream: Stream, carries: bool = False) -> None:
    """Refuse a strategy that needs what the stream lacks, before any training.

    Args:
        strategy: one, or several.
        stream: what is to be learned.
        carries: whether its examples are segments whose state is carried.

    Raises:
        StreamError: names the strategy, what it needs, and what the stream is.
    """
    offered = {
        "boundaries": stream.scenario != "boundary_free",
        "task_labels": stream.scenario == "task_incremental",
        "classes": stream.target == "class",
    }
    parts = strategy.named if isinstance(strategy, Composite) else {type(strategy).__name__: strategy}
    for name, part in parts.items():
        if carries and part.not_carried:
            raise StreamError(
                f"Strategy {name!r} does not go with a state that is carried from segment to segment: "
                f"{part.not_carried}. Set training.carry_state=false, or choose another strategy."
            )
        for need in sorted(part.needs):
            if not offered[need]:
                raise StreamError(
                    f"Strategy {name!r} needs {NEEDS[need]}; stream {stream.name!r} is {stream.scenario} with target "
                    f"{stream.target!r}. Choose another stream or another strategy."
                )
