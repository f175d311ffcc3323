"""Scores of a run: R, the untrained learner's row, and rows inside experiences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")


class ScoreTable:
    """Every evaluation of one run, in order.

    Attributes:
        experiences: K, the number of experiences in the stream.
        score: what a score is, for tables and MLflow keys ("accuracy", "bits_per_token").
        higher_is_better: False for losses.
        masked: unseen classes were masked out. Forward transfer is then undefined: an unseen class cannot win.
        rows: float64 [rows, K] in the order of evaluation, NaN where an experience was not evaluated.
        trained: for each row, the experience in training then; -1 for the untrained learner.
        step: for each row, the global step.
        final: for each row, True at the end of an experience, False for a row in between.
    """

    def __init__(
        self, experiences: int, score: str = "accuracy", higher_is_better: bool = True, masked: bool = False
    ) -> None:
        if experiences < 1:
            raise ValueError(f"A table of scores needs at least 1 experience, got {experiences}.")
        self.experiences = experiences
        self.score = score
        self.higher_is_better = higher_is_better
        self.masked = masked
        self.rows = torch.empty(0, experiences, dtype=torch.float64)
        self.trained: list[int] = []
        self.step: list[int] = []
        self.final: list[bool] = []

    def append(self, scores: Tensor | list[float], trained: int, step: int, final: bool = True) -> None:
        """Add one evaluation.

        Args:
            scores: [K], NaN where an experience was not evaluated.
            trained: the experience in training, -1 for the untrained learner.
            step: global step, not below that of the row before.
            final: at the end of experience `trained`; for the untrained learner it has no meaning.

        Raises:
            ValueError: wrong length, `trained` out of range or going backwards, a step going backwards, or a second
                final row for one experience.
        """
        row = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
        if row.shape != (self.experiences,):
            raise ValueError(f"A row of scores must have K = {self.experiences} entries, got shape {list(row.shape)}.")
        if not -1 <= trained < self.experiences:
            raise ValueError(f"trained must lie in -1..{self.experiences - 1}, got {trained}.")
        if self.trained and (trained < self.trained[-1] or step < self.step[-1]):
            raise ValueError(
                f"Rows must come in the order of training: got experience {trained}, step {step} "
                f"after experience {self.trained[-1]}, step {self.step[-1]}."
            )
        if trained in self.trained and (trained == -1 or self.final[-1]):
            raise ValueError(f"Experience {trained} already has its final row.")
        self.rows = torch.cat([self.rows, row[None]])
        self.trained.append(trained)
        self.step.append(int(step))
        self.final.append(bool(final))

    @property
    def R(self) -> Tensor:
        """[K, K] scores at the end of each experience; rows not reached yet are NaN."""
        r = torch.full((self.experiences, self.experiences), NAN, dtype=torch.float64)
        for row, trained, final in zip(self.rows, self.trained, self.final, strict=True):
            if final and trained >= 0:
                r[trained] = row
        return r

    @property
    def baseline(self) -> Tensor:
        """[K] scores of the untrained learner; NaN if it was not evaluated."""
        if -1 in self.trained:
            return self.rows[self.trained.index(-1)].clone()
        return torch.full((self.experiences,), NAN, dtype=torch.float64)

    @property
    def finished(self) -> int:
        """The number of experiences trained to their end, 0..K."""
        return 1 + max((i for i, final in zip(self.trained, self.final, strict=True) if final), default=-1)

    @property
    def has_between(self) -> bool:
        """Whether the learner was evaluated inside an experience, as min-ACC and WC-ACC need it."""
        return any(i >= 0 and not final for i, final in zip(self.trained, self.final, strict=True))

    def arrays(self) -> dict[str, Any]:
        """NumPy arrays and lists by name, for `numpy.savez`: R, baseline, rows, trained, step, final."""
        return {
            "R": self.R.numpy(),
            "baseline": self.baseline.numpy(),
            "rows": self.rows.numpy(),
            "trained": self.trained,
            "step": self.step,
            "final": self.final,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, lists, strings and bools, to be stored in a checkpoint."""
        return {
            "score": self.score,
            "higher_is_better": self.higher_is_better,
            "masked": self.masked,
            "rows": self.rows.clone(),
            "trained": list(self.trained),
            "step": list(self.step),
            "final": list(self.final),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it belongs to a stream with another number of experiences.
        """
        if state["rows"].shape[1] != self.experiences:
            raise ValueError(
                f"These scores are of {state['rows'].shape[1]} experiences, this stream has {self.experiences}."
            )
        self.score, self.higher_is_better, self.masked = state["score"], state["higher_is_better"], state["masked"]
        self.rows = state["rows"].clone()
        self.trained, self.step, self.final = list(state["trained"]), list(state["step"]), list(state["final"])


@dataclass
class Results:
    """Scores of one run, twice: over all classes, and over the classes seen so far.

    Attributes:
        all: every class may win.
        seen: unseen classes are masked out; NaN where targets are not classes.
        on: the sets that were scored, "test" or "valid".
    """

    all: ScoreTable
    seen: ScoreTable
    on: str = "test"

    @classmethod
    def empty(
        cls, experiences: int, score: str = "accuracy", higher_is_better: bool = True, on: str = "test"
    ) -> Results:
        """Two tables without rows, for a run that begins."""
        tables = [ScoreTable(experiences, score, higher_is_better, masked) for masked in (False, True)]
        return cls(*tables, on=on)

    @property
    def R(self) -> Tensor:
        """[K, K] scores over all classes, `all.R`."""
        return self.all.R

    def append(self, scores: list[float], seen: list[float], trained: int, step: int, final: bool = True) -> None:
        """Add one evaluation to both tables; arguments as in `ScoreTable.append`."""
        self.all.append(scores, trained, step, final)
        self.seen.append(seen, trained, step, final)

    def arrays(self) -> dict[str, Any]:
        """The arrays of both tables for `numpy.savez`; the names of the second begin with "seen_"."""
        return self.all.arrays() | {f"seen_{name}": array for name, array in self.seen.arrays().items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values of both tables, to be stored in a checkpoint."""
        return {"all": self.all.state_dict(), "seen": self.seen.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.all.load_state_dict(state["all"])
        self.seen.load_state_dict(state["seen"])
