"""The contract of a net: embedding, blocks, readout and head, cut-able before any block.

Letters: B batch, T time, D input features, H hidden, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clplat.learners.nets.heads import Head
from clplat.streams.experience import Batch

State = tuple[Tensor, ...] | None
"""What a block carries over time, every tensor [B, ...]; None before the first step, and for blocks without memory."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a learner computes for a batch.

    Attributes:
        logits: [B, C], or [B, T, C] where there is a target at every step.
        features: [B, H] or [B, T, H], the head's input.
        state: one entry a block, to go on from where this batch ended.
        penalties: scalars by name that the net asks to have added to what is minimised; none in evaluation mode.
    """

    logits: Tensor
    features: Tensor
    state: tuple[State, ...]
    penalties: Mapping[str, Tensor] = field(default_factory=dict)


def check_sizes(least: int = 1, **sizes: int | None) -> None:
    """Refuse sizes below `least`; None stands for a default that is found elsewhere.

    Args:
        least: the smallest that is allowed.
        sizes: by their key in `learner.net`.

    Raises:
        ValueError: names the key of the first that is too small.
    """
    for name, size in sizes.items():
        if size is not None and size < least:
            raise ValueError(f"learner.net.{name}: got {size}, it must be at least {least}.")


class Block(nn.Module):
    """One layer of a net. Subclasses map [B, T, H] (or [B, H] where there is no time) to the same shape."""

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The block's output and its state after the last step.

        Args:
            hidden: [B, T, H].
            state: what an earlier call returned, None for a new sequence.
            reset: [B, T] bool, True where a new sequence starts: nothing before that step may be seen from it.
            lengths: [B] valid steps. Only blocks that look ahead need it; outputs on padding are never read.
        """
        raise TypeError(f"{type(self).__name__} does not define forward(hidden, state, reset, lengths).")

    def penalties(self) -> Mapping[str, Tensor]:
        """Scalars by name to add to what is minimised, of the weights alone; those of several blocks are summed."""
        return {}


class Net(nn.Module):
    """Embedding, blocks, readout and head, as one plain module.

    Args:
        embedding: maps `Batch.x` to the first hidden sequence.
        blocks: in order.
        head: maps features to logits.
        per_step: True keeps one feature vector a step, False reads the sequence out as one vector.
        readout: how a sequence becomes one vector: "last" valid step, or "mean" over valid steps. Ignored where
            there is no time axis.

    Raises:
        ValueError: an unknown readout.
    """

    def __init__(
        self, embedding: nn.Module, blocks: Sequence[Block], head: Head, per_step: bool = False, readout: str = "last"
    ) -> None:
        super().__init__()
        if readout not in ("last", "mean"):
            raise ValueError(f"readout: got {readout!r}, allowed are 'last' and 'mean'.")
        self.embedding, self.blocks, self.head = embedding, nn.ModuleList(blocks), head
        self.per_step, self.readout = per_step, readout

    def forward(self, batch: Batch, state: Sequence[State] | None = None, reset: Tensor | None = None) -> Output:
        """Logits, features and state of a batch; `state` and `reset` (None: the batch's own) as for `Block.forward`, one
        state a block."""
        hidden, new = self.lower(batch, len(self.blocks), state, reset)
        features = self.read(hidden, batch.lengths)
        return Output(self.head(features, batch.task), features, new, self.penalties())

    def lower(
        self, batch: Batch, cut: int, state: Sequence[State] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """The hidden sequence [B, T, H] that enters block `cut` (0..number of blocks), and the states below it."""
        hidden = self.embedding(batch.x)
        return self._through(hidden, 0, cut, state, batch.reset if reset is None else reset, batch.lengths)

    def upper(
        self,
        hidden: Tensor,
        cut: int,
        batch: Batch,
        state: Sequence[State] | None = None,
        reset: Tensor | None = None,
    ) -> Output:
        """What `forward` gives, from the hidden sequence that enters block `cut`; `batch` gives lengths, task, reset."""
        reset = batch.reset if reset is None else reset
        hidden, new = self._through(hidden, cut, len(self.blocks), state, reset, batch.lengths)
        features = self.read(hidden, batch.lengths)
        return Output(self.head(features, batch.task), features, new, self.penalties())

    def penalties(self) -> dict[str, Tensor]:
        """The sums of the blocks' penalties; none in evaluation mode."""
        total: dict[str, Tensor] = {}
        if self.training:
            for block in self.blocks:
                assert isinstance(block, Block)
                for name, term in block.penalties().items():
                    total[name] = total[name] + term if name in total else term
        return total

    def read(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """Features [B, H] (or [B, T, H] with `per_step`) from the last hidden sequence."""
        if self.per_step or hidden.ndim == 2:
            return hidden
        if self.readout == "mean":
            if lengths is None:
                return hidden.mean(1)
            valid = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            return (hidden * valid[..., None]).sum(1) / lengths[:, None]
        if lengths is None:
            return hidden[:, -1]
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]

    def _through(
        self,
        hidden: Tensor,
        first: int,
        last: int,
        state: Sequence[State] | None,
        reset: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, tuple[State, ...]]:
        new: list[State] = []
        for i in range(first, last):
            hidden, after = self.blocks[i](hidden, None if state is None else state[i - first], reset, lengths)
            new.append(after)
        return hidden, tuple(new)
