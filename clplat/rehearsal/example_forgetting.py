"""Example forgetting (Toneva et al. 2019, arXiv 1812.05159): which examples are unlearned while they are trained.

Letters: B batch, T time, C classes, N examples of an experience.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.learners.objective import Objective
from clplat.rehearsal.policies import Grouped
from clplat.state import StateModule
from clplat.streams.experience import Batch

NEVER = 2**16 - 1
"""First learned presentation of an example that was never learned; also the largest count that is kept."""


class Presentations(StateModule):
    """For each example of the set in training: how often it was shown, answered right, and forgotten.

    With a_k = 1 if the example is answered right at its own k-th presentation (k from 0), in the forward pass of that
    training step, before the update: a forgetting event is a_{k-1} = 1 and a_k = 0 (definition of the paper,
    section 3). Between two of its presentations an example may be lost and found again unseen.

    Nothing here waits for the device: rows that do not count are written to a slot behind the last example.
    """

    events: Tensor | None
    first: Tensor | None
    shown: Tensor | None
    last: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("events", "first", "shown", "last"):
            self.register_buffer(name, None)

    def __len__(self) -> int:
        """N, 0 while no set is followed."""
        return 0 if self.events is None else len(self.events) - 1

    def __bool__(self) -> bool:
        """True, filled or not."""
        return True

    def begin(self, examples: int, device: torch.device | str = "cpu") -> None:
        """Follow a set of N examples; nothing happens if one of that size is followed already."""
        if self.events is not None and len(self) == examples:
            return
        self.events, self.shown = (torch.zeros(examples + 1, dtype=torch.int32, device=device) for _ in range(2))
        self.first = torch.full((examples + 1,), NEVER, dtype=torch.int32, device=device)
        self.last = torch.zeros(examples + 1, dtype=torch.bool, device=device)

    def observe(self, batch: Batch, right: Tensor) -> None:
        """Note one presentation of each current row of a batch.

        Args:
            batch: rows with source 1, and numbers outside 0..N - 1, do not count; nor does a batch without numbers.
            right: [B] bool, whether each row was answered right.
        """
        if self.events is None or batch.index is None:
            return
        assert self.first is not None
        assert self.shown is not None
        assert self.last is not None
        none = len(self)
        counts = (batch.index >= 0) & (batch.index < none)
        if batch.source is not None:
            counts = counts & (batch.source == 0)
        slot = torch.where(counts, batch.index, none)
        shown, first = self.shown[slot], self.first[slot]
        self.events.index_add_(0, slot, (self.last[slot] & ~right).int())
        self.first.index_copy_(0, slot, torch.where(right & (first == NEVER), shown.clamp(max=NEVER - 1), first))
        self.shown.index_add_(0, slot, torch.ones_like(shown))
        self.last.index_copy_(0, slot, right)

    def scores(self) -> Tensor:
        """[N] int32: forgetting events, and for an example never learned the number of its presentations, as the
        authors rank them."""
        return forgetting_scores(*(t[: len(self)] for t in self._tensors()))

    def compact(self) -> dict[str, Tensor]:
        """[N] each: events, first, shown as uint16 (65535: never learned, or as many or more), last as bool."""
        values = dict(zip(("events", "first", "shown", "last"), (t[: len(self)] for t in self._tensors()), strict=True))
        narrow = {n: t.clamp(max=NEVER).to(torch.uint16) for n, t in values.items() if n != "last"}
        return narrow | {"last": values["last"].clone()}

    def clear(self) -> None:
        """Follow nothing."""
        self.events = self.first = self.shown = self.last = None

    def _tensors(self) -> list[Tensor]:
        if self.events is None or self.first is None or self.shown is None or self.last is None:
            raise ValueError("No set is followed: call begin(examples) first.")
        return [self.events, self.first, self.shown, self.last]


class MostForgotten(Grouped):
    """Of each class met so far the examples with the highest (or lowest) forgetting scores, an equal share for each;
    ties are broken at random. Use `insert_scored`.

    Args:
        capacity: N over all classes; give either this or `capacity_per_group`.
        capacity_per_group: examples of each class.
        most: False keeps the lowest scores.
        seed: of the ties and of what is sampled.
    """

    def __init__(
        self, capacity: int | None = None, capacity_per_group: int | None = None, most: bool = True, seed: int = 0
    ) -> None:
        super().__init__(capacity, capacity_per_group, "class", seed)
        self.most = most
        self._scores = torch.empty(0, dtype=torch.int64)

    def insert_scored(self, batch: Batch, scores: Tensor) -> None:
        """Offer all rows of a batch with their scores [B], integers from 0."""
        self._scores = scores.cpu().long().clamp(max=NEVER)
        self.insert(batch)

    def _keys(self, count: int) -> Tensor:
        # 16 bits of score above 24 random ones: together just below buffers.KEYS.
        rank = NEVER - self._scores if self.most else self._scores
        return rank * 2**24 + torch.randint(2**24, (count,), generator=self._generator)


def forgetting_scores(events: Tensor, first: Tensor, shown: Tensor, last: Tensor | None = None) -> Tensor:
    """[N] forgetting events, and the number of presentations where an example was never learned (`last` is not read)."""
    return torch.where(first.int() == NEVER, shown.int(), events.int())


def answered_right(objective: Objective, logits: Tensor, batch: Batch, fraction: float = 1.0) -> Tensor:
    """[B] bool: whether each row is answered right.

    Args:
        objective: with answers that are right or wrong.
        logits: [B, C], or [B, T, C] (bits: [B, T, O]).
        batch: with the targets.
        fraction: a row with a target at every step is right if at least this share of its scored steps is (of its
            scored bits, for bits); rows without a scored step are right.

    Raises:
        Unsupported: an answer is neither right nor wrong.
    """
    right, scored = objective.right(logits, batch), objective.scored(batch)
    if right.ndim == 1:
        return right >= 1
    scored = torch.ones_like(right) if scored is None else scored.double()
    return (right * scored).sum(1) >= fraction * scored.sum(1)
