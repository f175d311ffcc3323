"""Maximally interfered retrieval (Aljundi et al. 2019, arXiv 1908.04742)."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.rehearsal.policies import Reservoir
from clplat.rehearsal.rows import current_rows
from clplat.strategy import Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch
from clplat.weights import functional


class MIR(Strategy):
    """Replays those of some candidates whose loss a step on the current batch alone would raise most (section 3.1):

        theta' = theta - lr * gradient on the current batch
        score  = loss(x; theta') - loss(x; theta)        for candidates drawn from a reservoir

    The virtual step is plain SGD with the learning rate of the optimiser's first parameter group (or `lr`), whatever
    the optimiser. Scores are taken in the mode of training, as everything in a step.

    Args:
        capacity: rows held; 0 is finetuning.
        rows: replayed rows a step, null: as many as the batch has. Never more than are held.
        candidates: rows drawn to choose from.
        lr: of the virtual step, null: the optimiser's.
        seed: of the buffer's random numbers.
    """

    claims = frozenset({"raw_rows"})

    def __init__(
        self,
        capacity: int,
        rows: int | None = None,
        candidates: int = 50,
        lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(1, rows=rows, candidates=candidates)
        checks.above(0, "null for the optimiser's", lr=lr)
        self.buffer = Reservoir(capacity, seed)
        self.rows, self.candidates, self.lr = rows, candidates, lr
        self._current: Batch | None = None  # rows of the step's batch that are not replayed
        self.passes = 1.0 if capacity == 0 else 4.0  # two rows a step, one virtual step, two looks at candidates

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and, behind it, the rows that it would harm most."""
        self._current = current_rows(batch)
        return concatenate([batch, self._choose(learner, batch)]) if len(self.buffer) else batch

    def before_step(self, learner: Learner, batch: Batch) -> None:
        if self._current is not None:
            self.buffer.insert(self._current)

    def stored_bytes(self) -> int:
        return self.buffer.stored_bytes()

    def _choose(self, learner: Learner, batch: Batch) -> Batch:
        drawn = self.buffer.sample(min(self.candidates, len(self.buffer))).to(batch.x.device)
        count = min(len(batch) if self.rows is None else self.rows, len(drawn))
        if count == len(drawn):
            return drawn
        return drawn.rows(self.interference(learner, batch, drawn).topk(count).indices)

    def interference(self, learner: Learner, batch: Batch, candidates: Batch) -> Tensor:
        """How much a virtual step on `batch` raises the loss of each candidate, [candidates]."""
        weights = learner.weights()
        assert learner.optimizer is not None
        lr = learner.optimizer.param_groups[0]["lr"] if self.lr is None else self.lr
        with torch.enable_grad():
            loss = learner.objective(learner(batch).logits, batch)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        with torch.no_grad():
            moved = {
                f"net.{n}": w if g is None else w - lr * g for (n, w), g in zip(weights.items(), gradients, strict=True)
            }
            before = -learner.objective.log_likelihood(learner(candidates).logits, candidates)
            after = -learner.objective.log_likelihood(functional.call(learner, moved, candidates).logits, candidates)
        return after - before
