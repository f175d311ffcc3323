"""GDumb: greedy sampler and dumb learner (Prabhu, Torr & Dokania 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.rehearsal.buffer import Buffer
from clplat.rehearsal.rows import in_order
from clplat.strategy import Session, Strategy
from clplat.streams.data import BatchData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.weights.named import NamedTensors


class GDumb(Strategy):
    """Training from scratch, in every experience, on nothing but a class-balanced memory.

    The memory takes a row while its class holds less than capacity / classes met; when it is full, a random row of
    the largest class makes room (algorithm 1). Each experience then starts from the learner's initial weights and
    trains on the memory for as long as `training` says. The paper's CutMix, and its warm restarts, which are a
    schedule, are not part of it.

    Args:
        capacity: rows held, at least 1.
        seed: of the evictions.
    """

    needs = frozenset({"boundaries", "classes"})
    claims = frozenset({"data", "raw_rows"})

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, "without a memory it cannot learn", capacity=capacity)
        self.memory = Greedy(capacity, seed)
        self.initial = NamedTensors()
        self.offered = 0
        """Experiences offered to the memory."""

    def setup(self, learner: Learner, stream: Stream) -> None:
        self.initial.keep(learner.weights())

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        if index >= self.offered:
            for batch in in_order(stream[index].train):
                self.memory.insert(batch)
            self.offered = index + 1
        return Session(BatchData(self.memory.contents()), 1.0, session.also_classes)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        initial = self.initial.views()
        for name, weight in learner.weights().items():  # weights that another strategy has frozen stay
            weight.copy_(initial[name])

    def stored_bytes(self) -> int:
        return self.memory.stored_bytes()  # the initial weights need not be stored, a seed would do

    def get_extra_state(self) -> dict[str, int]:
        return {"offered": self.offered}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.offered = state["offered"]


class Greedy(Buffer):
    """Greedy sampler: a class that has less than its share gets the room of a random row of the largest one."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self.held: dict[int, list[int]] = {}
        """The slots of each class."""

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        owner: dict[int, int] = {}  # slot -> row of this batch
        used = sum(map(len, self.held.values()))
        for row, label in enumerate(batch.y.tolist()):
            own = self.held.setdefault(label, [])
            if len(own) * len(self.held) >= self.capacity:
                continue
            if used < self.capacity:
                slot, used = used, used + 1
            else:
                largest = max(self.held.values(), key=len)
                slot = largest.pop(int(torch.randint(len(largest), (1,), generator=self._generator)))
            own.append(slot)
            owner[slot] = row
        self._filled = torch.arange(used)
        slots = sorted(owner)
        return torch.tensor([owner[s] for s in slots], dtype=torch.int64), torch.tensor(slots, dtype=torch.int64)

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"held": {label: list(slots) for label, slots in self.held.items()}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.held = {label: list(slots) for label, slots in state["held"].items()}
