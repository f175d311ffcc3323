"""Environments in which old tasks come back: by a power law of time, or by another schedule (Gandhi, Shah, Marupudi &
Varma 2024, arXiv 2401.10393)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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

SCHEDULES = ("uniform", "powerlaw", "exponential", "kernel")

log = logging.getLogger(__name__)


class RehearsalEnvironment(Strategy):
    """Experience i trains on its own N examples and on M[j, i] raw examples of each earlier experience j, see
    `environment`. Which ones is drawn anew in each experience, without replacement, and at most all of a set.

    This is an environment that repeats itself, not a memory: it goes back to the whole old training sets.
    `stored_bytes` says so: it counts every training set met so far.

    Deviations: network, optimiser and accuracies of the paper could not be confirmed. Its arithmetic (floors, and the
    powers of 0.01 * (10 + k)) is that of a script that matches the paper; "kernel" is a general power law of the lag,
    which is not in that script but fits the list of counts in it.

    Args:
        schedule: "uniform", "powerlaw", "exponential" or "kernel".
        fraction: the rehearsal budget R is floor(N * fraction); 0 is finetuning. null, with "kernel" only: no budget,
            see `environment`.
        exponent: a of "powerlaw", above 2; b of "kernel", at least 0.
        scale: b of "exponential", in experiences, above 0.
        offset: c of "kernel", in experiences, above 0.
        keep_steps: False: the experience gets more optimiser steps, in proportion. True: rehearsed examples take the
            place of as many current ones, drawn at random, so that it costs as much as in finetuning.
        min_examples: a warning where fewer examples of an old experience come back.
        seed: of the choice of examples.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"mixture"})
    not_carried = "it trains on another set than the experience's own, in which segments do not follow one another"

    def __init__(
        self,
        schedule: str = "powerlaw",
        fraction: float | None = 0.5,
        exponent: float = 5.0,
        scale: float = 2.0,
        offset: float = 20.0,
        keep_steps: bool = False,
        min_examples: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        environment([1], schedule, fraction, exponent, scale, offset)
        if keep_steps and (fraction is None or fraction >= 1):
            raise ValueError(
                f"keep_steps: got true with fraction {fraction}, which leaves no current example "
                "for sure: set fraction below 1, or keep_steps to false."
            )
        checks.at_least(0, min_examples=min_examples)
        self.schedule_name, self.fraction, self.exponent, self.scale = schedule, fraction, exponent, scale
        self.offset, self.keep_steps, self.min_examples, self.seed = offset, keep_steps, min_examples, seed
        self._bytes = 0  # of the training sets met so far

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """The current set with what comes back of the earlier ones."""
        if index == 0 or session.data is None or self.fraction == 0:
            return session
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "environment", index))
        new = len(session.data)
        wanted = environment(
            [new] * (index + 1), self.schedule_name, self.fraction, self.exponent, self.scale, self.offset
        )[:index, index].tolist()
        if min(wanted) < self.min_examples:
            log.warning(
                "rehearsal_environment: experience %d gets %s examples of the earlier ones, fewer than min_examples=%d. "
                "Raise fraction, or lower exponent.",
                index,
                wanted,
                self.min_examples,
            )
        past = [stream[j].train for j in range(index)]
        rows = [
            torch.randperm(len(data), generator=generator)[:count] for data, count in zip(past, wanted, strict=True)
        ]
        old = sum(len(r) for r in rows)
        own = torch.randperm(new, generator=generator)[: new - old] if self.keep_steps else None
        mixed = MixedData([session.data, *past], [own, *rows])
        return replace(session, data=mixed, budget=session.budget * len(mixed) / new)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """From now on its training set is needed too."""
        if self.fraction != 0:
            self._bytes += data_bytes(experience.train)

    def stored_bytes(self) -> int:
        """Bytes of all training sets met so far: any example of them may come back."""
        return self._bytes

    def get_extra_state(self) -> dict[str, Any]:
        return {"bytes": self._bytes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._bytes = state["bytes"]


def environment(
    new: Sequence[int],
    schedule: str,
    fraction: float | None = 0.5,
    exponent: float = 5.0,
    scale: float = 2.0,
    offset: float = 20.0,
) -> Tensor:
    """M [K, K] int64: examples of experience j (row) trained on in experience i (column); the diagonal is `new`.

    With the budget R_i = floor(new_i * fraction) and j < i:

    - uniform: R_i // i
    - powerlaw (a = exponent): int((R_i // sum s) s_j), s_j = a x_j^(a - 1), x_j = 0.01 (10 + j)
    - exponential (b = scale): int((R_i // sum s) s_j), s_j = exp(-(i - j) / b) / b
    - kernel (b = exponent, c = offset): int(R_i w_j / sum w), w_j = (i - j + c)^-b; without a budget the nearest
      integer to new_i ((i - j + c) / c)^-b, so that lag 0 would be the current experience itself.

    So a column sums to at most new_i + R_i. All but uniform give more to later experiences.

    Args:
        new: [K] training examples of each experience.
        schedule: see above.
        fraction: of `new`, at least 0; None for a kernel without a budget.
        exponent: a > 2, or b >= 0.
        scale: above 0.
        offset: above 0.
    """
    checks.one_of("schedule", schedule, SCHEDULES)
    if fraction is None and schedule != "kernel":
        raise ValueError(
            f"fraction: got null with schedule {schedule!r}, only 'kernel' goes without a budget: "
            "set a fraction of the experience's examples."
        )
    checks.at_least(0, "0 is finetuning", fraction=fraction)
    if (schedule == "powerlaw" and not exponent > 2) or (schedule == "kernel" and not exponent >= 0):
        least = "above 2 for 'powerlaw'" if schedule == "powerlaw" else "at least 0 for 'kernel'"
        raise ValueError(f"exponent: got {exponent}, it must be {least}.")
    checks.above(0, scale=scale, offset=offset)
    counts = torch.diag(torch.tensor(new, dtype=torch.int64))
    for i in range(1, len(new)):
        budget = None if fraction is None else math.floor(new[i] * fraction)
        counts[:i, i] = torch.tensor(_rehearsed(i, new[i], budget, schedule, exponent, scale, offset))
    return counts


def _rehearsed(
    i: int, new: int, budget: int | None, schedule: str, exponent: float, scale: float, offset: float
) -> list[int]:
    if budget is None:
        return [round(new * ((i - j + offset) / offset) ** -exponent) for j in range(i)]
    if schedule == "uniform":
        return [budget // i] * i
    if schedule == "kernel":
        parts = [(i - j + offset) ** -exponent for j in range(i)]
        return [int(budget * part / sum(parts)) for part in parts]
    if schedule == "powerlaw":
        parts = [exponent * (0.01 * (10 + j)) ** (exponent - 1) for j in range(i)]
    else:
        parts = [math.exp(-(i - j) / scale) / scale for j in range(i)]
    return [int((budget // sum(parts)) * part) for part in parts]
