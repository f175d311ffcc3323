"""Experience replay (Ratcliff 1990; Chaudhry et al. 2019, arXiv 1902.10486)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.buffer import Buffer
from clplat.rehearsal.herding import herd
from clplat.rehearsal.policies import ClassBalanced, Grouped, Ranked, Reservoir, Ring
from clplat.rehearsal.rows import current_rows, draw, in_order
from clplat.strategy import Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch, Experience


class Replay(Strategy):
    """Trains on each batch together with examples of a buffer.

    Args:
        capacity: examples held in all; give either this or `capacity_per_class`. 0 is finetuning.
        capacity_per_class: examples held of each class (all policies but reservoir).
        policy: "reservoir" (a uniform sample of all), "class_balanced" (equal shares, uniform within a class),
            "ring" (equal shares, the latest of each class) or "herding" (equal shares, those whose mean features are
            nearest to their class's; inserted after an experience only).
        rows: replayed rows a step, null: as many as the batch has. Never more than are held.
        rows_per_class: instead of `rows`, for policies by class: rows of every class held.
        insert: "during" the experience, each batch after it was drawn for (Mammoth), or "after" it, the whole training
            set at once (Avalanche). Only rows of the current experience (source 0) are offered.
        forward: "joint" (one forward pass on all rows) or "separate" (one for each part: BatchNorm and other
            strategies then see the two apart). Separate replaces the objective.
        weighting: "rows" (all rows count the same) or "experiences" (1/t on the current rows and 1 - 1/t on the
            replayed ones in experience t = 1, 2, ...; van de Ven & Tolias 2019). The latter replays nothing in the
            first experience, where it would count 0.
        seed: of the buffer's random numbers.
    """

    def __init__(
        self,
        capacity: int | None = None,
        capacity_per_class: int | None = None,
        policy: str = "reservoir",
        rows: int | None = None,
        rows_per_class: int | None = None,
        insert: str = "during",
        forward: str = "joint",
        weighting: str = "rows",
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.one_of("insert", insert, ("during", "after"))
        checks.one_of("forward", forward, ("joint", "separate"))
        checks.one_of("weighting", weighting, ("rows", "experiences"))
        checks.at_least(1, "capacity 0 replays nothing", rows=rows, rows_per_class=rows_per_class)
        if rows is not None and rows_per_class is not None:
            raise ValueError("rows: got rows and rows_per_class, only one can be: set the other one to null.")
        if policy == "herding" and insert != "after":
            raise ValueError(f"insert: got {insert!r}, policy 'herding' needs the whole experience: use 'after'.")
        self.buffer = _buffer(policy, capacity, capacity_per_class, seed)
        if rows_per_class is not None and not isinstance(self.buffer, Grouped):
            raise ValueError(f"rows_per_class: policy {policy!r} knows no classes, use class_balanced or ring.")
        self.rows, self.rows_per_class = rows, rows_per_class
        self.insert, self.joint, self.weighting = insert, forward == "joint", weighting
        off = self.buffer.capacity == 0
        self.claims = frozenset({"raw_rows", *([] if self.joint or off else ["objective"])})
        self.passes = 1.0 if off else 2.0
        by_boundary = insert == "after" or weighting == "experiences"
        self.needs = frozenset(
            [*(["classes"] if isinstance(self.buffer, Grouped) else []), *(["boundaries"] if by_boundary else [])]
        )
        self._number = 0  # of the experience, from 1
        self._current: Batch | None = None  # rows of the step's batch that are to be inserted
        self._replayed: Batch | None = None  # of the current step, with separate passes

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self._number = experience.index + 1

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and, behind it, the replayed rows; with separate passes the batch alone."""
        replayed = self._draw(batch)
        if self.insert == "during" and self.buffer.capacity:
            self._current = current_rows(batch)
        self._replayed = None if self.joint else replayed
        if replayed is None or not self.joint:
            return batch
        joined = concatenate([batch, replayed])
        if self.weighting == "rows":
            return joined
        current, past = self._shares(len(batch), len(replayed))
        dtype = batch.x.dtype if batch.x.is_floating_point() else None  # token ids are integers, weights are not
        share = torch.full((len(joined),), current, dtype=dtype, device=batch.x.device)
        share[len(batch) :] = past
        return replace(joined, weight=share if joined.weight is None else share * joined.weight)

    def before_step(self, learner: Learner, batch: Batch) -> None:
        if self._current is not None:
            self.buffer.insert(self._current)

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        """With separate passes: the mean of the two objectives, by rows or by experiences."""
        own = learner.objective(output.logits, batch)
        if self._replayed is None:
            return own
        current, past = self._shares(len(batch), len(self._replayed))
        other = learner.objective(learner(self._replayed).logits, self._replayed)
        whole = len(batch) + len(self._replayed)
        return (current * len(batch) / whole) * own + (past * len(self._replayed) / whole) * other

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Offer the whole training set to the buffer, if that is when rows are inserted."""
        if isinstance(self.buffer, Ranked) and self.buffer.capacity:
            classes = {*self.buffer.groups.tolist(), *experience.classes}  # more than its share never stays
            share = self.buffer.capacity_per_group or -(-self.buffer.capacity // max(len(classes), 1))
            rows, ranks = herd(learner, experience.train, share)
            self.buffer.insert_ranked(rows.to(learner.device), ranks)
        elif self.insert == "after" and self.buffer.capacity:
            for batch in in_order(experience.train, learner.device):
                self.buffer.insert(batch)

    def stored_bytes(self) -> int:
        return self.buffer.stored_bytes()

    def get_extra_state(self) -> dict[str, Any]:
        return {"number": self._number}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._number = state["number"]

    def _draw(self, batch: Batch) -> Batch | None:
        if len(self.buffer) == 0 or (self.weighting == "experiences" and self._number <= 1):
            return None
        if self.rows_per_class is not None and isinstance(self.buffer, Grouped):
            return self.buffer.sample_per_group(self.rows_per_class).to(batch.x.device)
        return draw(self.buffer, batch, self.rows)

    def _shares(self, rows: int, replayed: int) -> tuple[float, float]:
        """Weight of each current and of each replayed row; 1 on average over all rows."""
        if self.weighting == "rows":
            return 1.0, 1.0
        now, whole = 1 / self._number, rows + replayed
        return now * whole / rows, (1 - now) * whole / replayed


def _buffer(policy: str, capacity: int | None, capacity_per_class: int | None, seed: int) -> Buffer:
    if policy == "reservoir":
        if capacity is None or capacity_per_class is not None:
            raise ValueError(
                f"capacity: policy 'reservoir' needs capacity and knows no classes, got capacity={capacity}, "
                f"capacity_per_class={capacity_per_class}: set capacity, or use policy class_balanced or ring."
            )
        return Reservoir(capacity, seed)
    kinds = {"class_balanced": ClassBalanced, "ring": Ring, "herding": Ranked}
    checks.one_of("policy", policy, ("reservoir", *kinds))
    return kinds[policy](capacity, capacity_per_class, "class", seed)
