"""Dark experience replay, DER and DER++ (Buzzega et al. 2020, arXiv 2004.07211)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.policies import Reservoir
from clplat.rehearsal.rows import current_rows, draw
from clplat.strategy import Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch


class DER(Strategy):
    """Replay of stored logits z', and of labels in DER++; DER is beta = 0 (eq. 6). It adds

        alpha * MSE(z, z') + beta * CE(z'', y'')

    Both terms are on draws of their own from a reservoir. z' are the logits at the time a row was stored, in the training pass of its own step. The mean squared error goes
    over all logits of a row, those of classes not met yet included (where the head offers them), as in the paper's
    code. Both draws share one forward pass beside the current batch's.

    Args:
        capacity: rows held; 0 is finetuning.
        alpha: of the logits' distance, at least 0.
        beta: of the cross-entropy on replayed rows, at least 0; 0 is DER.
        rows: rows of each draw, null: as many as the batch has. Never more than are held.
        seed: of the buffer's random numbers.
    """

    not_carried = "it stores answers from a carried state and would compare them with those from a fresh one"
    claims = frozenset({"raw_rows"})

    def __init__(
        self, capacity: int, alpha: float = 0.5, beta: float = 0.5, rows: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        checks.at_least(0, alpha=alpha, beta=beta)
        checks.at_least(1, "capacity=0 replays nothing", rows=rows)
        self.buffer = Reservoir(capacity, seed, fields=["logits"])
        self.alpha, self.beta, self.rows = alpha, beta, rows
        self.off = capacity == 0 or alpha == beta == 0
        self.passes = 1.0 if self.off else 1.0 + (alpha > 0) + (beta > 0)
        self._drawn: list[Batch] = []  # in this step: for the logits, for the classes

    def before_step(self, learner: Learner, batch: Batch) -> None:
        draws = 0 if self.off else (self.alpha > 0) + (self.beta > 0)
        drawn = [draw(self.buffer, batch, self.rows) for _ in range(draws)]
        self._drawn = [rows for rows in drawn if rows is not None]

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        if not self._drawn:
            return {}
        count, logits = len(self._drawn[0]), learner(concatenate(self._drawn)).logits
        terms = {}
        if self.alpha > 0:
            terms["der_logits"] = self.alpha * _distance(learner, logits[:count], self._drawn[0])
        if self.beta > 0:
            terms["der_classes"] = self.beta * learner.objective(logits[-count:], self._drawn[-1])
        return terms

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        if not self.off:
            self.buffer.insert(current_rows(replace(batch, extra={"logits": output.logits.detach()})))

    def stored_bytes(self) -> int:
        return self.buffer.stored_bytes()


def _distance(learner: Learner, logits: Tensor, batch: Batch) -> Tensor:
    """Mean squared distance to the stored logits, over the logits offered then, on scored steps."""
    stored, logits = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (batch.extra["logits"], logits))
    if logits.ndim == 3:
        logits, stored = logits[:, : stored.shape[1]], stored[:, : logits.shape[1]]
    counted = (stored > torch.finfo(torch.float32).min / 2) & torch.isfinite(stored)
    scored = learner.objective.scored(batch)
    if scored is not None:
        counted = counted & scored[:, : stored.shape[1], None]
    apart = (logits - stored).masked_fill(~counted, 0).square()
    return apart.sum() / counted.sum()
