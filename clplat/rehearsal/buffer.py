"""Fixed-capacity stores of past examples, as tensors.

Which examples stay is decided on the CPU from random numbers of the buffer's own generator; the examples themselves
sit where the first ones came from, and move with the module. Letters: B batch, T time, N capacity, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clplat.state import StateModule
from clplat.streams.experience import UNSCORED, Batch

FIELDS = ("lengths", "mask", "task", "index", "reset", "x", "y")
"""What is stored of a batch. Lengths come first: what they are for older rows is read off the width of x."""


class Buffer(StateModule):
    """Base of the buffers: storage, sampling, state. A subclass decides which rows are kept, and where.

    Sequences of different lengths are stored padded to the longest one met. `weight` and `source` of a batch are not
    kept.

    Args:
        capacity: N, the most examples held.
        seed: of the buffer's own random numbers.
        fields: names of `Batch.extra` that are stored too.

    Raises:
        ValueError: a negative capacity.
    """

    x: Tensor | None
    y: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    task: Tensor | None
    index: Tensor | None
    reset: Tensor | None

    def __init__(self, capacity: int, seed: int, fields: Sequence[str] = ()) -> None:
        super().__init__()
        if capacity < 0:
            raise ValueError(f"capacity: got {capacity}, it must be at least 0 (0 stores nothing).")
        self.capacity, self.fields = capacity, tuple(fields)
        self.seen = 0
        """Examples offered so far."""
        self._generator = torch.Generator().manual_seed(seed)
        self._filled = torch.empty(0, dtype=torch.int64)  # [len] the slots in use
        for name in (*FIELDS, *map(_extra, self.fields)):
            self.register_buffer(name, None)

    def __len__(self) -> int:
        """The number of examples held."""
        return len(self._filled)

    def __bool__(self) -> bool:
        """True, filled or not: a buffer is not a list."""
        return True

    @torch.no_grad()
    def insert(self, batch: Batch) -> None:
        """Offer all rows of a batch, in order. Which rows are wanted is the caller's choice (say, source 0 only).

        Raises:
            ValueError: an extra field is missing; rows with and without task labels; shapes that differ in more than
                the time axis.
        """
        if self.capacity == 0 or len(batch) == 0:
            return
        rows, slots = self._place(batch)
        self.seen += len(batch)
        if len(rows) > 0:
            self._write(batch, rows, slots)

    def sample(self, count: int) -> Batch:
        """`count` examples drawn at random, marked as replayed: without replacement if as many are held, else with.

        Raises:
            ValueError: nothing is held.
        """
        self._need_some()
        again = count > len(self)
        at = torch.randint(len(self), (count,), generator=self._generator) if again else self._distinct(count)
        return self._read(self._filled[at])

    def contents(self) -> Batch:
        """All examples held, marked as replayed, in an order of the buffer's own; draws no random number.

        Raises:
            ValueError: nothing is held.
        """
        self._need_some()
        return self._read(self._filled)

    def stored_bytes(self) -> int:
        """Bytes of the examples held, each at its padded size; slots not filled yet do not count."""
        rows = [t for t in self._buffers.values() if t is not None and len(self)]
        return len(self) * sum(t[0].numel() * t.element_size() for t in rows)

    def get_extra_state(self) -> dict[str, Any]:
        """Counters and the generator's state."""
        return {
            "seen": torch.tensor(self.seen),
            "filled": self._filled.clone(),
            "generator": self._generator.get_state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        self.seen, self._filled = int(state["seen"]), state["filled"].cpu().clone()
        self._generator.set_state(state["generator"].cpu())

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows of the batch to keep and their slots, each slot once, [M] on the CPU; updates what is filled."""
        raise TypeError(f"{type(self).__name__} does not define _place(batch).")

    def _distinct(self, count: int) -> Tensor:
        """[count] different numbers below the number of examples held, in random order."""
        held = len(self)
        if 4 * count <= held:
            # Independent draws without the repeated ones are a sample without replacement, at a cost that does not
            # grow with the buffer.
            draws, order = torch.randint(held, (2 * count,), generator=self._generator).sort(stable=True)
            first = torch.ones_like(draws, dtype=torch.bool)
            first[1:] = draws[1:] != draws[:-1]
            chosen = torch.empty_like(draws).scatter_(0, order, draws)[order[first].sort().values[:count]]
            if len(chosen) == count:
                return chosen
        return torch.randperm(held, generator=self._generator)[:count]

    def _need_some(self) -> None:
        if len(self) == 0:
            raise ValueError("The buffer holds no example to sample: ask len(buffer) first.")

    def _read(self, slots: Tensor) -> Batch:
        assert self.x is not None
        assert self.y is not None
        slots = slots.to(self.x.device, non_blocking=True)
        rows = {n: None if (t := self._buffers[n]) is None else t.index_select(0, slots) for n in FIELDS[:-2]}
        extra = {}
        for name in self.fields:
            stored = self._buffers[_extra(name)]
            assert stored is not None
            extra[name] = stored.index_select(0, slots)
        return Batch(
            x=self.x.index_select(0, slots),
            y=self.y.index_select(0, slots),
            source=torch.ones(len(slots), dtype=torch.uint8, device=self.x.device),
            extra=extra,
            **rows,
        )

    def _write(self, batch: Batch, rows: Tensor, slots: Tensor) -> None:
        offered = self._offered(batch)
        device = batch.x.device if self.x is None else self.x.device
        rows, at = rows.to(batch.x.device, non_blocking=True), slots.to(device, non_blocking=True)
        size = int(slots.max()) + 1
        for name, values in offered.items():
            values = values.index_select(0, rows).to(device, non_blocking=True)
            stored = self._fitted(name, values, size)
            if stored.shape[1:] != values.shape[1:]:
                values = _padded(values, stored.shape[1], _fill(name, values))
            stored.index_copy_(0, at, values.to(stored.dtype))  # floats have the precision of the run

    def _offered(self, batch: Batch) -> dict[str, Tensor]:
        """The fields to store of a batch; one that earlier or later batches lack gets what its absence means."""
        missing = [name for name in self.fields if name not in batch.extra]
        if missing:
            raise ValueError(
                f"The buffer stores {', '.join(self.fields)}, and the batch has no extra field {missing[0]!r}, only "
                f"{sorted(batch.extra)}: put it there before inserting."
            )
        found = {name: getattr(batch, name) for name in FIELDS}
        if self.x is not None and (self.task is None) != (found["task"] is None):
            raise ValueError(
                "Cannot store rows with task labels and rows without: give all rows a task label, or none."
            )
        rows, steps = len(batch), batch.x.shape[1] if batch.x.ndim > 1 else 0
        ragged = self.x is not None and batch.x.ndim > 1 and self.x.shape[1] != steps
        if found["lengths"] is None and (self.lengths is not None or ragged):
            found["lengths"] = torch.full((rows,), steps, device=batch.x.device)
        if found["mask"] is None and self.mask is not None:
            valid = batch.valid()
            whole = torch.ones(rows, steps, dtype=torch.bool, device=batch.x.device)
            found["mask"] = whole if valid is None else valid
        if found["index"] is None and self.index is not None:
            found["index"] = torch.full((rows,), -1, device=batch.x.device)
        if found["reset"] is None and self.reset is not None:
            found["reset"] = torch.zeros(rows, steps, dtype=torch.bool, device=batch.x.device)
        offered = {name: value for name, value in found.items() if value is not None}
        return offered | {_extra(name): batch.extra[name].detach() for name in self.fields}

    def _fitted(self, name: str, values: Tensor, size: int) -> Tensor:
        """The storage of a field, made or grown so that `values` fit in at `size` slots."""
        stored = self._buffers[name]
        if stored is None:
            stored = self._absent(name, values)
        if len(stored) < size:
            more = min(max(size, 2 * len(stored)), self.capacity) - len(stored)
            stored = torch.cat([stored, stored.new_zeros(more, *stored.shape[1:])])
        if stored.shape[1:] != values.shape[1:]:
            if stored.ndim < 2 or stored.shape[2:] != values.shape[2:]:
                raise ValueError(
                    f"Field {name!r} was stored with shape {list(stored.shape[1:])} a row and now has "
                    f"{list(values.shape[1:])}: only the time axis, the first one, may differ."
                )
            stored = _padded(stored, max(stored.shape[1], values.shape[1]), _fill(name, stored))
        self._buffers[name] = stored
        return stored

    def _absent(self, name: str, values: Tensor) -> Tensor:
        """Storage of a field that rows stored so far did not have, [slots, ...]."""
        slots = 0 if self.x is None else len(self.x)
        stored = values.new_zeros(slots, *values.shape[1:])
        if slots and self.x is not None:
            if name == "lengths":
                stored.fill_(self.x.shape[1])
            elif name == "mask":
                stored = _padded(stored, max(stored.shape[1], self.x.shape[1]), 0)
                steps = torch.arange(stored.shape[1], device=stored.device)
                valid = self.x.shape[1] if self.lengths is None else self.lengths[:slots, None]
                stored = (steps < valid).expand(slots, -1).clone()
            elif name == "index":
                stored.fill_(-1)
        return stored


def _extra(name: str) -> str:
    return f"extra_{name}"


def _fill(name: str, values: Tensor) -> int:
    return UNSCORED if name == "y" and values.dtype == torch.int64 else 0


def _padded(values: Tensor, steps: int, fill: int) -> Tensor:
    """[rows, steps, ...] from [rows, fewer, ...]."""
    more = steps - values.shape[1]
    return (
        values if more <= 0 else torch.cat([values, values.new_full((len(values), more, *values.shape[2:]), fill)], 1)
    )
