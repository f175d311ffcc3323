"""Carried state of truncated back-propagation through time: from each segment of a text to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from clplat.learners.nets.net import Output, State
from clplat.streams.experience import Batch

if TYPE_CHECKING:
    from clplat.learners.learner import Learner


class Carry:
    """State of the rows of the next batch, without gradients.

    Attributes:
        state: one entry a block; None: the next batch starts fresh.
    """

    def __init__(self) -> None:
        self.state: tuple[State | None, ...] | None = None

    def forward(self, learner: Learner, segment: Batch, batch: Batch) -> Output:
        """Output for `batch`, whose first rows are those of `segment` and go on from the carried state.

        Rows behind them are replayed, and start fresh.

        Raises:
            ValueError: rows of the segment are missing, or rows behind them are not marked as replayed.
        """
        rows, length = segment.x.shape[:2]
        if len(batch) < rows or (len(batch) > rows and batch.source is None):
            raise ValueError(
                f"The state is carried for {rows} rows, and the strategy gave {len(batch)} rows of which none is marked "
                "as replayed: keep the rows of the batch, add others behind them, and mark those with source 1."
            )
        # Rows that were padded to the length of replayed ones are cut back: their state is that of their last step.
        task = None if batch.task is None else batch.task[:rows]
        own = Batch(batch.x[:rows, :length], batch.y[:rows, :length], task=task, reset=segment.reset)
        output = learner.net(own, self.state)
        if len(batch) == rows:
            return output
        others = learner.net(batch.rows(torch.arange(rows, len(batch), device=batch.x.device)))
        more = [0, 0, 0, batch.x.shape[1] - length]
        return Output(
            torch.cat([F.pad(output.logits, more), others.logits]),
            torch.cat([F.pad(output.features, more), others.features]),
            output.state,
            output.penalties,
        )

    def keep(self, state: tuple[State | None, ...]) -> None:
        """Carry a state on, cut off from what came before."""
        # Copies: a state may be a view of all steps, which would be kept alive and written to every checkpoint.
        self.state = tuple(None if s is None else tuple(t.detach().clone() for t in s) for s in state)

    def to(self, device: torch.device) -> None:
        """Move the state to a device."""
        if self.state is not None:
            self.state = tuple(None if s is None else tuple(t.to(device) for t in s) for s in self.state)
