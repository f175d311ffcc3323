"""Metrics of continual learning, as pure functions of R.

R is a float64 tensor [T, T]: `R[i, j]` is the score on experience j after training on experience i, NaN where it was
not evaluated. The functions expect that higher is better; `summary` is the one place that turns losses round. What is
undefined is NaN, never 0. `METRICS` names them all: a metric is a function and a row there.

Papers: Lopez-Paz & Ranzato 2017 (Gradient Episodic Memory), Chaudhry et al. 2018 (Riemannian Walk),
Rebuffi et al. 2017 (iCaRL), Hayes et al. 2020 (REMIND), De Lange et al. 2023 (Continual evaluation: the stability gap).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clplat.scores import NAN, ScoreTable


def average_accuracy(r: Tensor) -> float:
    """Mean over j < T of `R[T-1, j]`."""
    return float(r[-1].mean())


def average_incremental_accuracy(r: Tensor) -> float:
    """Mean over i < T of the average over experiences 0..i after experience i."""
    return float(after_each(average_accuracy, r).mean())


def forgetting_per_experience(r: Tensor) -> Tensor:
    """[T] best score before the last experience minus the last: `max_{i < T-1} R[i, j] - R[T-1, j]`.

    Rows where j was not evaluated do not take part in the maximum. The last experience cannot be forgotten yet: NaN.
    Negative where an experience got better.
    """
    forgotten = torch.full_like(r[-1], NAN)
    if len(r) > 1:
        earlier = r[:-1, :-1]
        best = torch.where(earlier.isnan(), -torch.inf, earlier).amax(0)
        forgotten[:-1] = torch.where(earlier.isnan().all(0), NAN, best) - r[-1, :-1]
    return forgotten


def forgetting(r: Tensor) -> float:
    """Mean over j < T-1 of `max_{i < T-1} R[i, j] - R[T-1, j]`; undefined for T = 1."""
    return float(forgetting_per_experience(r)[:-1].mean())


def backward_transfer(r: Tensor) -> float:
    """Mean over j < T-1 of `R[T-1, j] - R[j, j]`; undefined for T = 1."""
    return float((r[-1] - r.diagonal())[:-1].mean())


def forward_transfer(r: Tensor, baseline: Tensor) -> float:
    """Mean over 0 < j < T of `R[j-1, j]` less the untrained learner's score on j; undefined for T = 1.

    Args:
        r: [T, T].
        baseline: [T] scores of the untrained learner.
    """
    return float((r.diagonal(offset=1) - baseline[1:]).mean())


def intransigence(r: Tensor, joint: Tensor) -> float:
    """Mean over j < T of the score on j of a learner trained on 0..j together, less `R[j, j]`.

    Args:
        r: [T, T].
        joint: [T], `joint[j]` that learner's score on j.
    """
    return float((joint.to(r.dtype) - r.diagonal()).mean())


def omega(r: Tensor, offline: Tensor) -> float:
    """Mean over i < T of the average after experience i, divided by that of a learner trained on 0..i together.

    Args:
        r: [T, T].
        offline: [T], `offline[i]` that learner's average over 0..i.
    """
    return float((after_each(average_accuracy, r) / offline.to(r.dtype)).mean())


def minimum_accuracy(r: Tensor, rows: Tensor, trained: list[int]) -> float:
    """Mean over j < T-1 of the lowest score on j in any row after j was trained; undefined for T = 1.

    Evaluations where j is NaN do not take part.

    Args:
        r: [T, T], for T.
        rows: [rows, K] every evaluation, rows inside experiences included.
        trained: for each row, the experience in training then.
    """
    last = len(r) - 1
    during = torch.tensor(trained)
    worst = torch.full((last,), NAN, dtype=torch.float64)
    for j in range(last):
        scores = rows[(during > j) & (during <= last), j]
        scores = scores[~scores.isnan()]
        if len(scores):
            worst[j] = scores.min()
    return float(worst.mean())


def worst_case_accuracy(r: Tensor, rows: Tensor, trained: list[int]) -> float:
    """`R[T-1, T-1] / T + (1 - 1/T) minimum`.

    Args:
        r: [T, T].
        rows: [rows, K] as in `minimum_accuracy`.
        trained: as in `minimum_accuracy`.
    """
    last, now = len(r) - 1, float(r[-1, -1])
    if last == 0:
        return now
    return now / (last + 1) + (1 - 1 / (last + 1)) * minimum_accuracy(r, rows, trained)


def after_each(metric: Callable[[Tensor], float], r: Tensor) -> Tensor:
    """[T] a metric of R as it stood after each experience: `metric(R[:i + 1, :i + 1])`."""
    return torch.tensor([metric(r[: i + 1, : i + 1]) for i in range(len(r))], dtype=torch.float64)


@dataclass(frozen=True)
class Metric:
    """One metric, as summaries, tables and docs know it.

    Attributes:
        function: of what it needs, in that order, where higher is better. Its docstring begins with the definition.
        title: its column's heading, "{score}" stands for what is scored.
        paper: where it comes from.
        priority: where a terminal is narrow, columns of low priority are left out first.
        needs: among R, baseline (of the untrained learner), rows and trained (inside experiences), joint and offline
            (of a reference run). The metric is NaN where one of them is missing.
        level: it is in the score's own unit, so that losses get their sign back.
    """

    function: Callable[..., float]
    title: str
    paper: str
    priority: int
    needs: tuple[str, ...] = ("R",)
    level: bool = False


METRICS = {
    "average": Metric(average_accuracy, "average {score}", "Lopez-Paz & Ranzato 2017 (ACC)", 9, level=True),
    "average_incremental": Metric(
        average_incremental_accuracy, "incremental {score}", "Rebuffi et al. 2017", 1, level=True
    ),
    "forgetting": Metric(forgetting, "forgetting", "Chaudhry et al. 2018 (F)", 8),
    "backward_transfer": Metric(backward_transfer, "backward transfer", "Lopez-Paz & Ranzato 2017 (BWT)", 5),
    "forward_transfer": Metric(
        forward_transfer, "forward transfer", "Lopez-Paz & Ranzato 2017 (FWT)", 2, ("R", "baseline")
    ),
    "intransigence": Metric(intransigence, "intransigence", "Chaudhry et al. 2018 (I)", 7, ("R", "joint")),
    "omega": Metric(omega, "omega", "Hayes et al. 2020", 6, ("R", "offline")),
    "minimum": Metric(
        minimum_accuracy,
        "worst {score} since learned",
        "De Lange et al. 2023 (min-ACC)",
        4,
        ("R", "rows", "trained"),
        level=True,
    ),
    "worst_case": Metric(
        worst_case_accuracy, "worst-case {score}", "De Lange et al. 2023 (WC-ACC)", 3, ("R", "rows", "trained"), True
    ),
}
"""Every metric by its name, in the order of tables; MLflow's keys are `summary/<name>`."""


def documented() -> list[str]:
    """Rows of the table in `docs/semantics.md`: name, definition, paper."""
    definitions = {
        name: str(metric.function.__doc__).partition("\n")[0].rstrip(".") for name, metric in METRICS.items()
    }
    return [f"| `{name}` | {definitions[name]} | {metric.paper} |" for name, metric in METRICS.items()]


def summary(table: ScoreTable, reference: Tensor | None = None) -> dict[str, float]:
    """Every metric over the experiences trained so far, in the score's own sign.

    `average`, `average_incremental`, `minimum` and `worst_case` are levels of the score: for a loss, lower is better
    and `minimum` is the highest loss. `forgetting` and `intransigence` are positive when something was lost, the
    transfers positive when something was gained, whatever the score.

    Args:
        table: the scores of a run, finished or not.
        reference: [K, K] R of a run that trains on experiences 0..j together in its j-th (strategy `cumulative`), in
            the score's own sign: for `intransigence`, and for `omega`, a ratio of accuracies that losses do not have.

    Returns:
        The metrics by name, NaN where undefined: `minimum` and `worst_case` need rows inside experiences.
    """
    found = dict.fromkeys(METRICS, NAN)
    n = table.finished
    if n == 0:
        return found
    sign = 1.0 if table.higher_is_better else -1.0
    known: dict[str, Any] = {"R": sign * table.R[:n, :n]}
    if not table.masked:
        known["baseline"] = sign * table.baseline[:n]
    if table.has_between:
        known |= {"rows": sign * table.rows, "trained": table.trained}
    if reference is not None:
        together = sign * reference[:n, :n]
        known["joint"] = together.diagonal()
        if table.higher_is_better:
            known["offline"] = after_each(average_accuracy, together)
    for name, metric in METRICS.items():
        if all(need in known for need in metric.needs):
            value = metric.function(*(known[need] for need in metric.needs))
            found[name] = sign * value if metric.level else value
    return found


def forgetting_so_far(table: ScoreTable) -> float:
    """Average forgetting after the last finished experience, as `summary(table)["forgetting"]`, without the rest."""
    n = table.finished
    sign = 1.0 if table.higher_is_better else -1.0
    return forgetting(sign * table.R[:n, :n]) if n else NAN
