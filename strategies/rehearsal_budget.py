"""Rehearsal with a fixed number of examples of every earlier source (CT0: Scialom, Chakrabarty & Muresan 2022,
arXiv 2205.12393)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.strategy import Session, Strategy
from clplat.streams.experience import Experience, Stream
from clplat.streams.loader import stable_seed
from clplat.streams.mixed import MixedData, data_bytes


class RehearsalBudget(Strategy):
    """Each experience trains on its own set and on n examples of every earlier experience, mixed before training.

    A source is an earlier experience. Its n examples are drawn once, by its number in the stream, and stay the same
    for the rest of the run; that is what `stored_bytes` counts.

    Deviations: CT0's sources are data sets and, for those learned later, each of their prompts; whether it draws anew
    for each new task could not be confirmed. Its budget does not lengthen training by itself; here the number of steps
    grows with the number of examples.

    Args:
        examples: n of each source; 0 is finetuning. CT0: 250 and 1000, that is 0.25 % and 1 % of a source.
        replacement: draw with replacement, as CT0 does; False: without, and at most the whole source.
        seed: of the draws.

    Raises:
        ValueError: a negative n.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"mixture"})
    not_carried = "it trains on another set than the experience's own, in which segments do not follow one another"

    def __init__(self, examples: int = 250, replacement: bool = True, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", examples=examples)
        self.examples, self.replacement, self.seed = examples, replacement, seed
        self._bytes = 0  # of the examples drawn from the sources met so far

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """The current set and n examples of each earlier one."""
        if index == 0 or session.data is None or self.examples == 0:
            return session
        past = [stream[j].train for j in range(index)]
        mixed = MixedData([session.data, *past], [None, *(self._drawn(j, len(p)) for j, p in enumerate(past))])
        return replace(session, data=mixed, budget=session.budget * len(mixed) / len(session.data))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """It is a source from now on."""
        self._bytes += data_bytes(experience.train, len(self._drawn(experience.index, len(experience.train))))

    def stored_bytes(self) -> int:
        """Bytes of n examples of each source met so far, repeated ones counted each time."""
        return self._bytes

    def get_extra_state(self) -> dict[str, Any]:
        return {"bytes": self._bytes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._bytes = state["bytes"]

    def _drawn(self, source: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "budget", source))
        if self.replacement:
            return torch.randint(size, (self.examples,), generator=generator)
        return torch.randperm(size, generator=generator)[: self.examples]
