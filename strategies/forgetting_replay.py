"""Replay of the examples that were forgotten most while they were trained (forgetting events: Toneva et al. 2019,
arXiv 1812.05159)."""

from __future__ import annotations

import torch

from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.example_forgetting import MostForgotten, Presentations, answered_right
from clplat.strategy import Session, Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch, Experience, Stream

READ = 1024
"""Examples read at once when an experience is offered to the buffer."""


class ForgettingReplay(Strategy):
    """Trains on each batch together with examples of a buffer, which keeps of every class those with the most
    forgetting events, an equal share for each class. Examples never learned count as often as they were shown, as the
    authors rank them.

    The events of an experience are known when it ends; then its whole training set is offered. The paper removes the
    least forgotten examples from a fixed training set; a buffer in a stream is not among its experiments.

    Args:
        capacity: examples held in all; give either this or `capacity_per_class`. 0 is finetuning.
        capacity_per_class: examples held of each class.
        rows: replayed rows a step, null: as many as the batch has. Never more than are held.
        keep: "most" or, for comparison, "least" forgotten.
        seed: of the choice among equals, and of what is replayed.

    Raises:
        ValueError: options that are not allowed, or not together.
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
        if keep not in ("most", "least"):
            raise ValueError(f"forgetting_replay.keep: got {keep!r}, allowed are 'most' and 'least'.")
        if rows is not None and rows < 1:
            raise ValueError(f"forgetting_replay.rows: got {rows}, it must be at least 1 (capacity 0 replays nothing).")
        for name, value in (("capacity", capacity), ("capacity_per_class", capacity_per_class)):
            if value is not None and value < 0:
                raise ValueError(f"forgetting_replay.{name}: got {value}, it must be at least 0 (0 stores nothing).")
        if (capacity is None) == (capacity_per_class is None):
            raise ValueError(
                f"forgetting_replay.capacity: got {capacity}, with capacity_per_class={capacity_per_class}; exactly one "
                "of the two is allowed: set the other one to null."
            )
        self.buffer = MostForgotten(capacity, capacity_per_class, keep == "most", seed)
        self.now = Presentations()
        self.rows = rows
        self.passes = 2.0 if self.buffer.capacity else 1.0
        self._examples = 0  # of the session

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """The session as it is; note its size."""
        self._examples = 0 if session.data is None else len(session.data)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        """Follow what is trained, once that is known."""
        if self.buffer.capacity and self._examples:
            self.now.begin(self._examples, learner.device)

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and, behind it, the replayed rows."""
        if len(self.buffer) == 0:
            return batch
        wanted = min(len(batch) if self.rows is None else self.rows, len(self.buffer))
        return concatenate([batch, self.buffer.sample(wanted).to(batch.x.device)])

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Note what was answered right."""
        if len(self.now):
            self.now.observe(batch, answered_right(learner.objective, output.logits, batch))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Offer the experience's training set to the buffer, with its scores."""
        self._examples = 0
        if self.buffer.capacity == 0:
            return
        data = experience.train
        # An example that was not presented has no event: score 0.
        found = self.now.scores().cpu() if len(self.now) else torch.zeros(0, dtype=torch.int32)
        scores = torch.zeros(len(data), dtype=torch.int32)
        known = min(len(found), len(data))
        scores[:known] = found[:known]
        for index in torch.arange(len(data)).split(READ):
            self.buffer.insert_scored(data.batch(index).to(learner.device), scores[index])
        self.now.clear()

    def stored_bytes(self) -> int:
        """Bytes of the examples held; the counts of the current experience are scratch."""
        return self.buffer.stored_bytes()
