"""Replay of the examples forgotten most while they were trained (events: Toneva et al. 2019, arXiv 1812.05159)."""

from __future__ import annotations

import torch

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.example_forgetting import MostForgotten, Presentations, answered_right
from clplat.rehearsal.rows import READ, draw, in_order
from clplat.strategy import Session, Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch, Experience, Stream


class ForgettingReplay(Strategy):
    """Replay from a buffer that keeps the examples of each class with the most forgetting events.

    Each class has an equal share. Examples never learned count as often as they were shown, as the authors rank them.

    The events of an experience are known when it ends; then its whole training set is offered. The paper removes the
    least forgotten examples from a fixed training set; a buffer in a stream is not among its experiments.

    Args:
        capacity: examples held in all; give either this or `capacity_per_class`. 0 is finetuning.
        capacity_per_class: examples held of each class.
        rows: replayed rows a step, null: as many as the batch has. Never more than are held.
        keep: "most" or, for comparison, "least" forgotten.
        seed: of the choice among equals, and of what is replayed.
    """

    needs = frozenset({"boundaries", "classes"})
    claims = frozenset({"raw_rows"})

    def __init__(
        self,
        capacity: int | None = 200,
        capacity_per_class: int | None = None,
        rows: int | None = None,
        keep: str = "most",
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.one_of("keep", keep, ("most", "least"))
        checks.at_least(1, "capacity=0 replays nothing", rows=rows)
        checks.exactly_one(capacity=capacity, capacity_per_class=capacity_per_class)
        checks.at_least(0, "0 is finetuning", capacity=capacity, capacity_per_class=capacity_per_class)
        self.buffer = MostForgotten(capacity, capacity_per_class, keep == "most", seed)
        self.now = Presentations()
        self.rows = rows
        self.passes = 2.0 if self.buffer.capacity else 1.0
        self._examples = 0  # of the session

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        self._examples = 0 if session.data is None else len(session.data)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        if self.buffer.capacity and self._examples:
            self.now.begin(self._examples, learner.device)

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        drawn = draw(self.buffer, batch, self.rows)
        return batch if drawn is None else concatenate([batch, drawn])

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        if len(self.now):
            self.now.observe(batch, answered_right(learner.objective, output.logits, batch))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self._examples = 0
        if self.buffer.capacity == 0:
            return
        data = experience.train
        # An example that was not presented has no event: score 0.
        found = self.now.scores().cpu() if len(self.now) else torch.zeros(0, dtype=torch.int32)
        scores = torch.zeros(len(data), dtype=torch.int32)
        known = min(len(found), len(data))
        scores[:known] = found[:known]
        for batch, own in zip(in_order(data, learner.device), scores.split(READ), strict=True):
            self.buffer.insert_scored(batch, own)
        self.now.clear()

    def stored_bytes(self) -> int:
        return self.buffer.stored_bytes()  # the counts of the current experience are scratch
