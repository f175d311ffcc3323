"""Policies of a buffer: which examples stay. Letters: B batch, N capacity, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clplat.rehearsal.buffer import Buffer
from clplat.streams.experience import Batch

KEYS = 2**40
"""Keys of grouped buffers are below this: more rows than are ever offered, and random ones that hardly ever tie."""


class Reservoir(Buffer):
    """A uniform sample of everything offered (algorithm R, Vitter 1985): each of n examples is held with probability
    N / n. All slots of a batch are drawn at once; where two rows fall into one slot the later one stays, as it would
    row by row. Nothing waits for the device."""

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(batch))
        number = rows + self.seen
        # 53 random bits: the distance from a uniform integer is below n / 2^53.
        drawn = (torch.rand(len(batch), generator=self._generator, dtype=torch.float64) * (number + 1)).long()
        slots = torch.where(number < self.capacity, number, drawn)
        rows = rows[slots < self.capacity]
        order = slots[rows].sort(stable=True)
        last = torch.ones_like(order.values, dtype=torch.bool)
        last[:-1] = order.values[1:] != order.values[:-1]
        self._filled = torch.arange(min(self.seen + len(batch), self.capacity))
        return rows[order.indices[last]], order.values[last]


class Grouped(Buffer):
    """Base of the buffers that share their room among groups: each group keeps the rows with the lowest keys.

    The share of a group is capacity // groups met so far, the remainder going to the groups met first; or
    `capacity_per_group`, whatever their number. A share never grows, so that the rows a group keeps are those that it
    would have kept with that share from the start. A group with fewer rows leaves its room empty.

    Targets on a GPU are read by the CPU at each insertion, which waits for the device.

    Args:
        capacity: N over all groups; give either this or `capacity_per_group`.
        capacity_per_group: rows of each group.
        by: what makes a group: "class" (one class a sequence), "task", "all" (one group), or "extra" (integers [B] in
            the first of `fields`).
        seed: of the buffer's own random numbers.
        fields: names of `Batch.extra` that are stored too.

    Raises:
        ValueError: not exactly one capacity; an unknown `by`.
    """

    def __init__(
        self,
        capacity: int | None = None,
        capacity_per_group: int | None = None,
        by: str = "class",
        seed: int = 0,
        fields: Sequence[str] = (),
    ) -> None:
        if (capacity is None) == (capacity_per_group is None):
            raise ValueError(
                f"Give either capacity or capacity_per_group, got {capacity} and {capacity_per_group}: "
                "set the other one to null."
            )
        if by not in ("class", "task", "all", "extra"):
            raise ValueError(f"by: got {by!r}, allowed are 'class', 'task', 'all' and 'extra'.")
        if by == "extra" and not fields:
            raise ValueError("by: got 'extra' without fields: give the field that makes the groups first.")
        if capacity_per_group is not None and capacity_per_group < 0:
            raise ValueError(f"capacity_per_group: got {capacity_per_group}, it must be at least 0.")
        unlimited = 0 if capacity_per_group == 0 else 2**62
        super().__init__(unlimited if capacity is None else capacity, seed, fields)
        self.capacity_per_group, self.by = capacity_per_group, by
        self.groups = torch.empty(0, dtype=torch.int64)
        """[groups] the groups met so far, in the order in which they came."""
        # [len] place in `groups` * KEYS + key of each row held, ascending, in the order of `_filled`.
        self._codes = torch.empty(0, dtype=torch.int64)

    def sample_per_group(self, count: int) -> Batch:
        """`count` examples of every group drawn at random without replacement (all of a group that has fewer).

        Raises:
            ValueError: nothing is held.
        """
        self._need_some()
        place = self._codes // KEYS
        drawn = torch.randint(KEYS, (len(self),), generator=self._generator)
        order = (place * KEYS + drawn).argsort()
        return self._read(self._filled[order[_rank(place) < count]])

    def get_extra_state(self) -> dict[str, Any]:
        """Counters, groups, keys and the generator's state."""
        return super().get_extra_state() | {"groups": self.groups.clone(), "codes": self._codes.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        super().set_extra_state(state)
        self.groups, self._codes = state["groups"].cpu().clone(), state["codes"].cpu().clone()

    def _keys(self, count: int) -> Tensor:
        """[count] the keys of the next rows, in 0..KEYS - 1."""
        raise TypeError(f"{type(self).__name__} does not define _keys(count).")

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        offered = self._places(self._labels(batch)) * KEYS + self._keys(len(batch))
        codes, order = torch.cat([self._codes, offered]).sort(stable=True)
        place = codes // KEYS
        kept = _rank(place) < self._shares()[place]
        codes, order, held = codes[kept], order[kept], len(self._filled)
        stay = order < held
        slots = torch.empty_like(order)
        slots[stay] = self._filled[order[stay]]
        # Among as many slots as rows are kept, at least one is free for each row that enters.
        free = torch.ones(max(len(order), int(self._filled.max()) + 1 if held else 0), dtype=torch.bool)
        free[slots[stay]] = False
        slots[~stay] = free.nonzero().squeeze(1)[: len(order) - int(stay.sum())]
        self._filled, self._codes = slots, codes
        return order[~stay] - held, slots[~stay]

    def _places(self, labels: Tensor) -> Tensor:
        """[B] the place of each label among the groups; new ones are added."""
        new = labels[~torch.isin(labels, self.groups)]
        if len(new):
            values, at = new.unique(return_inverse=True)
            first = torch.full_like(values, len(new)).scatter_reduce_(0, at, torch.arange(len(new)), "amin")
            self.groups = torch.cat([self.groups, values[first.argsort()]])
        known, order = self.groups.sort()
        return order[torch.searchsorted(known, labels)]

    def _labels(self, batch: Batch) -> Tensor:
        if self.by == "all":
            return torch.zeros(len(batch), dtype=torch.int64)
        labels = (
            {"class": batch.y, "task": batch.task}.get(self.by) if self.by != "extra" else batch.extra[self.fields[0]]
        )
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            given = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(
                f"A buffer by {self.by!r} needs one {self.by} a row, [B] integers, got {given}: use by: all."
            )
        return labels.cpu()

    def _shares(self) -> Tensor:
        """[groups] rows that each group may keep."""
        place = torch.arange(len(self.groups))
        if self.capacity_per_group is not None:
            return torch.full_like(place, self.capacity_per_group)
        share, left = divmod(self.capacity, len(self.groups))
        return share + (place < left).long()


class ClassBalanced(Grouped):
    """An equal share for each class met so far, and within a class a uniform sample of all its examples.

    Each example gets a random key once and for all; the lowest keys of a class are a uniform sample without
    replacement, whatever its share is by then.
    """

    def _keys(self, count: int) -> Tensor:
        return torch.randint(KEYS, (count,), generator=self._generator)


class Ring(Grouped):
    """The latest examples of each class (or task, or of all), an equal share for each met so far: the memory of GEM
    (Lopez-Paz & Ranzato 2017, by task there) and of tiny episodic memories (Chaudhry et al. 2019, by class)."""

    def _keys(self, count: int) -> Tensor:
        return KEYS - 1 - self.seen - torch.arange(count)


class Ranked(Grouped):
    """The rows of each group that come first in an order that the caller gives: herding (Rebuffi et al. 2017)."""

    def insert_ranked(self, batch: Batch, rank: Tensor) -> None:
        """Offer the rows of a batch with their ranks [B], from 0, within their group; see `insert`."""
        self._given = rank.cpu()
        self.insert(batch)

    def _keys(self, count: int) -> Tensor:
        return self._given


def _rank(place: Tensor) -> Tensor:
    """[len] the number of each row within its group, from 0; `place` is ascending."""
    counts = place.bincount()
    return torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
