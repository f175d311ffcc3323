"""Buffer that drops from its largest class, the store of REMIND (Hayes et al. 2020, arXiv 1910.02509)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat.rehearsal.buffer import Buffer
from clplat.streams.experience import Batch


class LargestFirst(Buffer):
    """A store that, when full, drops a random row of the class that holds most, the new row counted among them.

    So it is always full once it was, and small classes are kept whole while larger ones shrink. That is another law
    than that of `clplat.rehearsal.policies.ClassBalanced`, whose classes have equal shares and leave room empty that they do not
    need. Among equally large classes the one met first loses a row.

    Args:
        capacity: rows held.
        seed: of the choice of what is dropped, and of what is sampled.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self.slots: dict[int, list[int]] = {}
        """The slots of each class held, in the order in which the classes came."""
        self._labels: Tensor | None = None

    def insert(self, batch: Batch, labels: Tensor | None = None) -> None:
        """Offer all rows, in order; `labels` [B] on the CPU, without which targets on a GPU are waited for."""
        self._labels = batch.y.cpu() if labels is None else labels
        super().insert(batch)

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._labels is not None
        held, kept = len(self), dict[int, int]()  # slot -> row
        draws = torch.rand(len(batch), generator=self._generator, dtype=torch.float64).tolist()
        for row, (label, draw) in enumerate(zip(self._labels.tolist(), draws, strict=True)):
            own = self.slots.setdefault(label, [])
            if held < self.capacity:
                slot, held = held, held + 1
            else:
                sizes = {c: len(slots) + (c == label) for c, slots in self.slots.items()}
                largest = max(sizes, key=sizes.__getitem__)
                dropped, at = self.slots[largest], int(draw * sizes[largest])
                if at == len(dropped):
                    continue  # the new row itself
                slot, last = dropped[at], dropped.pop()
                if at < len(dropped):
                    dropped[at] = last
            own.append(slot)
            kept[slot] = row
        self._filled = torch.arange(held)
        return torch.tensor(list(kept.values()), dtype=torch.int64), torch.tensor(list(kept), dtype=torch.int64)

    def get_extra_state(self) -> dict[str, Any]:
        """What every buffer has, and the slots of each class."""
        slots = {label: torch.tensor(slots, dtype=torch.int64) for label, slots in self.slots.items()}
        return super().get_extra_state() | {"slots": slots}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        super().set_extra_state(state)
        self.slots = {label: slots.tolist() for label, slots in state["slots"].items()}
