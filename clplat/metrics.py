"""Every metric of continual learning, as a pure function of the scores.

R is a float64 tensor [K, K]: `R[i, j]` is the score on experience j after training on experience i, NaN where it was
not evaluated. The functions expect that higher is better; `summary` is the one place that turns losses round. What is
undefined is NaN, never 0. A metric after experience i only needs the corner `R[:i + 1, :i + 1]`; see `after_each`.

Papers: Lopez-Paz & Ranzato 2017 (Gradient Episodic Memory), Chaudhry et al. 2018 (Riemannian Walk),
Diaz-Rodriguez et al. 2018 (Don't forget, there is more than forgetting), Rebuffi et al. 2017 (iCaRL),
Hayes et al. 2020 (REMIND), De Lange et al. 2023 (Continual evaluation: the stability gap).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")

SUMMARY: tuple[str, ...] = (
    "average",
    "average_incremental",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
    "omega",
    "minimum",
    "worst_case",
)
"""The names that `summary` returns, in the order of tables."""


class ScoreTable:
    """All scores of one run: the source of R, of the untrained learner's scores, and of the rows in between.

    Attributes:
        experiences: K, the number of experiences in the stream.
        score: what a score is, for tables and MLflow keys ("accuracy", "bits_per_token").
        higher_is_better: False for losses.
        masked: the scores were taken with unseen classes masked out; forward transfer is then undefined, since an
            unseen class cannot win.
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
    def seen(self) -> int:
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


def average_accuracy(r: Tensor, examples: Tensor | None = None) -> float:
    """Mean of the last row of R [T, T] (Lopez-Paz & Ranzato 2017, ACC).

    Args:
        r: [T, T].
        examples: [T] sizes of the test sets, for the mean over examples instead of over experiences.
    """
    if examples is None:
        return float(r[-1].mean())
    weight = examples.to(r.dtype)
    return float((r[-1] * weight).sum() / weight.sum())


def average_incremental_accuracy(r: Tensor) -> float:
    """Mean over i of the average accuracy on experiences 0..i after experience i (Rebuffi et al. 2017)."""
    return float(after_each(average_accuracy, r).mean())


def forgetting_per_experience(r: Tensor) -> Tensor:
    """[T] best score before the last experience minus the last: `max_{i < T-1} R[i, j] - R[T-1, j]`.

    Rows where j was not evaluated do not take part in the maximum. The last experience cannot be forgotten yet: NaN.
    Negative where an experience got better (Chaudhry et al. 2018, f_j).
    """
    forgotten = torch.full_like(r[-1], NAN)
    if len(r) > 1:
        earlier = r[:-1, :-1]
        best = torch.where(earlier.isnan(), -torch.inf, earlier).amax(0)
        forgotten[:-1] = torch.where(earlier.isnan().all(0), NAN, best) - r[-1, :-1]
    return forgotten


def forgetting(r: Tensor) -> float:
    """Mean over j < T-1 of `forgetting_per_experience` (Chaudhry et al. 2018, F); NaN for T = 1."""
    return float(forgetting_per_experience(r)[:-1].mean())


def backward_transfer(r: Tensor) -> float:
    """Mean over j < T-1 of `R[T-1, j] - R[j, j]` (Lopez-Paz & Ranzato 2017, BWT); NaN for T = 1."""
    return float((r[-1] - r.diagonal())[:-1].mean())


def backward_transfer_diaz(r: Tensor) -> float:
    """Mean over all i > j of `R[i, j] - R[j, j]` (Diaz-Rodriguez et al. 2018, BWT); NaN for T = 1."""
    i, j = torch.tril_indices(len(r), len(r), offset=-1)
    return float((r[i, j] - r[j, j]).mean())


def average_accuracy_diaz(r: Tensor) -> float:
    """Mean of R's lower triangle with the diagonal (Diaz-Rodriguez et al. 2018, A)."""
    i, j = torch.tril_indices(len(r), len(r))
    return float(r[i, j].mean())


def forward_transfer(r: Tensor, baseline: Tensor) -> float:
    """Mean over j >= 1 of `R[j-1, j] - baseline[j]` (Lopez-Paz & Ranzato 2017, FWT); NaN for T = 1.

    Args:
        r: [T, T].
        baseline: [T] scores of the untrained learner.
    """
    return float((r.diagonal(offset=1) - baseline[1:]).mean())


def intransigence(r: Tensor, joint: Tensor) -> float:
    """Mean over j of `joint[j] - R[j, j]`: what was not learned (Chaudhry et al. 2018, I).

    Args:
        r: [T, T].
        joint: [T], `joint[j]` the score on j of a reference trained on experiences 0..j together.
    """
    return float((joint.to(r.dtype) - r.diagonal()).mean())


def omega(r: Tensor, offline: Tensor) -> float:
    """Mean over i of the average accuracy after experience i over that of an offline learner (Hayes et al. 2020).

    Args:
        r: [T, T].
        offline: [T], `offline[i]` the average accuracy on experiences 0..i of a learner trained offline on them.
    """
    return float((after_each(average_accuracy, r) / offline.to(r.dtype)).mean())


def minimum_accuracy(rows: Tensor, trained: list[int], last: int) -> float:
    """min-ACC after experience `last` = T-1: mean over j < T-1 of the lowest score on j in any row after j was trained.

    Evaluations where j is NaN do not take part (De Lange et al. 2023, with rows between as fine as they were asked
    for). NaN for T = 1.

    Args:
        rows: [rows, K] every evaluation, rows in between included.
        trained: for each row, the experience in training then.
        last: index of the experience just finished.
    """
    during = torch.tensor(trained)
    worst = torch.full((last,), NAN, dtype=torch.float64)
    for j in range(last):
        scores = rows[(during > j) & (during <= last), j]
        scores = scores[~scores.isnan()]
        if len(scores):
            worst[j] = scores.min()
    return float(worst.mean())


def worst_case_accuracy(rows: Tensor, trained: list[int], last: int, now: float) -> float:
    """WC-ACC after experience `last` = T-1: `now / T + (1 - 1/T) min-ACC` (De Lange et al. 2023).

    Args:
        rows: [rows, K] as in `minimum_accuracy`.
        trained: as in `minimum_accuracy`.
        last: index of the experience just finished.
        now: score on it at its end.
    """
    if last == 0:
        return now
    return now / (last + 1) + (1 - 1 / (last + 1)) * minimum_accuracy(rows, trained, last)


def after_each(metric: Callable[[Tensor], float], r: Tensor) -> Tensor:
    """[T] a metric of R as it stood after each experience: `metric(R[:i + 1, :i + 1])`."""
    return torch.tensor([metric(r[: i + 1, : i + 1]) for i in range(len(r))], dtype=torch.float64)


def summary(table: ScoreTable, joint: Tensor | None = None, offline: Tensor | None = None) -> dict[str, float]:
    """Every metric over the experiences trained so far, in the score's own sign.

    `average`, `average_incremental`, `minimum` and `worst_case` are levels of the score: for a loss, lower is better
    and `minimum` is the highest loss. `forgetting` and `intransigence` are positive when something was lost, the
    transfers positive when something was gained, whatever the score.

    Args:
        table: the scores of a run, finished or not.
        joint: [K] joint reference for `intransigence`, in the score's own sign.
        offline: [K] offline reference for `omega`; a ratio of accuracies, NaN for losses.

    Returns:
        The metrics by name, NaN where undefined: `minimum` and `worst_case` need rows in between.
    """
    metrics = dict.fromkeys(SUMMARY, NAN)
    n = table.seen
    if n == 0:
        return metrics
    sign = 1.0 if table.higher_is_better else -1.0
    r = sign * table.R[:n, :n]
    metrics["average"] = sign * average_accuracy(r)
    metrics["average_incremental"] = sign * average_incremental_accuracy(r)
    metrics["forgetting"] = forgetting(r)
    metrics["backward_transfer"] = backward_transfer(r)
    if not table.masked:
        metrics["forward_transfer"] = forward_transfer(r, sign * table.baseline[:n])
    if joint is not None:
        metrics["intransigence"] = intransigence(r, sign * joint[:n])
    if offline is not None and table.higher_is_better:
        metrics["omega"] = omega(r, offline[:n])
    if table.has_between:
        rows = sign * table.rows
        metrics["minimum"] = sign * minimum_accuracy(rows, table.trained, n - 1)
        metrics["worst_case"] = sign * worst_case_accuracy(rows, table.trained, n - 1, float(r[-1, -1]))
    return metrics


def forgetting_so_far(table: ScoreTable) -> float:
    """Average forgetting after the last finished experience, positive when something was lost; NaN before the second.

    The same as `summary(table)["forgetting"]`, without the rest.
    """
    n = table.seen
    sign = 1.0 if table.higher_is_better else -1.0
    return forgetting(sign * table.R[:n, :n]) if n else NAN
