"""Settings of a run as plain values: how long it trains, how it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clplat.checks import at_least, one_of
from clplat.strategy import Session
from clplat.streams.loader import batches_per_pass


@dataclass(frozen=True)
class Training:
    """How long, and in what portions, an experience is trained.

    Attributes:
        batch_size: B.
        epochs: passes over the training set of each experience; give either this or `steps`.
        steps: optimiser steps in each experience.
        seed: of the order of the examples.
        chunk: optimiser steps in one call of Lightning's training step, at most.
        log_every_n_steps: training curves get a point this often.
        checkpoint_every_n_steps: an exact checkpoint this often, besides the one before every experience; None: only
            that one.
        carry_state: streams in segments (text) only: segments are read in order and the state goes from each to the
            next (truncated back-propagation through time), in training and in evaluation. False: they are examples
            like any others, in random order, each from a fresh state.
        vary_segments: with `carry_state`, training segments of random length around the stream's own, the learning
            rate scaled by it (Merity et al. 2018, see `clplat.streams.segments.random_ends`).

    Raises:
        ValueError: a number below 1; not exactly one of epochs and steps; `vary_segments` without `carry_state`.
    """

    batch_size: int = 32
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    chunk: int = 32
    log_every_n_steps: int = 50
    checkpoint_every_n_steps: int | None = None
    carry_state: bool = True
    vary_segments: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"training: give either epochs or steps, got epochs={self.epochs} and steps={self.steps}: "
                "set the other one to null."
            )
        for name in ("batch_size", "epochs", "steps", "chunk", "log_every_n_steps", "checkpoint_every_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"training.{name}: got {value}, it must be at least 1.")
        if self.vary_segments and not self.carry_state:
            raise ValueError(
                "training.vary_segments: got true with carry_state=false, which reads segments of one length in random "
                "order: set one of the two the other way."
            )

    def length(self, session: Session) -> int:
        """Optimiser steps spent on a session."""
        if session.data is None:
            return 0
        if self.steps is not None:
            return round(self.steps * session.budget)
        assert self.epochs is not None
        return self.epochs * batches_per_pass(len(session.data), self.batch_size)


@dataclass(frozen=True)
class Evaluation:
    """How scores are taken.

    Attributes:
        batch_size: examples a forward pass.
        every_n_steps: rows between those after each experience, for the stability gap; None: no such rows.
        examples: those rows take this many examples of each test set, evenly spaced; None: all. Of sets in segments
            whose state is carried, the first ones: so many, rounded down to whole rows of them, and one at least.
        on: score the `test` sets, or the sets that the stream holds out (`valid`), to search hyperparameters on.

    Raises:
        ValueError: a number below 1; `on` is something else.
    """

    batch_size: int = 1000
    every_n_steps: int | None = None
    examples: int | None = None
    on: Literal["test", "valid"] = "test"

    def __post_init__(self) -> None:
        one_of("on", self.on, ("test", "valid"))
        at_least(1, batch_size=self.batch_size, every_n_steps=self.every_n_steps, examples=self.examples)
