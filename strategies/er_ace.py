"""Experience replay with asymmetric cross-entropy (Caccia et al. 2022, arXiv 2104.05025)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.policies import Reservoir
from clplat.rehearsal.rows import current_rows, draw
from clplat.strategy import Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch


class ERACE(Strategy):
    """Replay with a cross-entropy in which current and replayed rows compete among different classes (eq. 3):

        CE(current | classes in the batch) + CE(replayed | classes met so far)

    Each is a mean over its rows; both share one forward pass.

    Args:
        capacity: rows held by a reservoir; 0 is finetuning.
        rows: replayed rows a step, null: as many as the batch has. Never more than are held.
        seed: of the buffer's random numbers.
    """

    needs = frozenset({"classes"})

    def __init__(self, capacity: int, rows: int | None = None, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, "capacity=0 replays nothing", rows=rows)
        self.buffer, self.rows = Reservoir(capacity, seed), rows
        self.claims = frozenset({"raw_rows", *(["objective"] if capacity else [])})
        self.passes = 2.0 if capacity else 1.0
        self._new: Batch | None = None  # rows of this step to insert

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        drawn = draw(self.buffer, batch, self.rows)
        # Taken here, since to pick them out of the joined rows would wait for the device.
        self._new = current_rows(batch) if self.buffer.capacity else None
        return batch if drawn is None else concatenate([batch, drawn])

    def before_step(self, learner: Learner, batch: Batch) -> None:
        if self._new is not None:
            self.buffer.insert(self._new)

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        lowest = torch.finfo(output.logits.dtype).min
        replayed = torch.zeros(len(batch), device=batch.x.device) if batch.source is None else batch.source.float()
        current = 1 - replayed
        present = torch.zeros_like(learner.seen, dtype=replayed.dtype).index_add_(0, batch.y, current) > 0  # [C]
        allowed = torch.where(replayed[:, None] > 0, learner.seen, present)
        # A row's own class always competes: a finite loss whatever a strategy before this one put into the batch.
        allowed = allowed | F.one_hot(batch.y, len(present)).bool()
        losses = F.cross_entropy(output.logits.masked_fill(~allowed, lowest), batch.y, reduction="none")
        if batch.weight is not None:
            losses = losses * batch.weight
        parts = [(losses * share).sum() / share.sum().clamp_min(1) for share in (current, replayed)]
        return parts[0] + parts[1]

    def stored_bytes(self) -> int:
        return self.buffer.stored_bytes()
