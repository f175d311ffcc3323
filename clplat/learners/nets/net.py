"""Contract of a net: embedding, blocks, pooling and head; it can be cut before any block.

Letters: B batch, T time, D input features, H hidden, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.learners.mixers.mixer import State as State
from clplat.learners.nets.heads import Head
from clplat.streams.experience import Batch
from clplat.streams.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Output:
    """Output of a learner for a batch.

    Attributes:
        logits: [B, C], or [B, T, C] where there is a target at every step.
        features: [B, H] or [B, T, H], the head's input.
        state: one entry a block, to go on from where this batch ended.
        penalties: scalars by name that the net asks to have added to what is minimised; none in evaluation mode.
    """

    logits: Tensor
    features: Tensor
    state: tuple[State | None, ...]
    penalties: Mapping[str, Tensor] = field(default_factory=dict)


def embedding_for(inputs: Inputs, width: int) -> nn.Module:
    """Map from what a stream gives to hidden sequences: a table for tokens, a linear layer for floats.

    Args:
        inputs: what the stream gives.
        width: H.
    """
    if inputs.vocabulary is not None:
        return nn.Embedding(inputs.vocabulary, width)
    assert inputs.features is not None  # one of the two, by Inputs
    return nn.Linear(inputs.features, width)


def dropout_of(p: float) -> nn.Module:
    """Dropout of a fraction of the features; without a fraction, nothing."""
    return nn.Dropout(p) if p else nn.Identity()


class Block(nn.Module):
    """One layer of a net. Subclasses map [B, T, H] (or [B, H] where there is no time) to the same shape."""

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Output of the block and its state after the last step.

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
    """Embedding, blocks, pooling and head, as one plain module.

    Args:
        embedding: maps `Batch.x` to the first hidden sequence.
        blocks: in order.
        head: maps features to logits.
        per_step: True keeps one feature vector a step, False pools the sequence to one vector.
        pooling: how a sequence becomes one vector: "last" valid step, or "mean" over valid steps. Ignored where
            there is no time axis.

    Raises:
        ValueError: an unknown pooling.
    """

    def __init__(
        self, embedding: nn.Module, blocks: Sequence[Block], head: Head, per_step: bool = False, pooling: str = "last"
    ) -> None:
        super().__init__()
        checks.one_of("pooling", pooling, ("last", "mean"))
        self.embedding, self.blocks, self.head = embedding, nn.ModuleList(blocks), head
        self.per_step, self.pooling = per_step, pooling

    def forward(self, batch: Batch, state: Sequence[State | None] | None = None, reset: Tensor | None = None) -> Output:
        """Logits, features and state of a batch.

        Args:
            batch: x, lengths, task and reset are read.
            state: one entry a block, each as for `Block.forward`.
            reset: as for `Block.forward`, None for the batch's own.
        """
        hidden, new = self.lower(batch, len(self.blocks), state, reset)
        features = self.read(hidden, batch.lengths)
        return Output(self.head(features, batch.task), features, new, self.penalties())

    def embed(self, batch: Batch) -> Tensor:
        """First hidden sequence; floats come in the precision of the weights, token ids may be integers of any kind."""
        x = batch.x
        return self.embedding(x.to(self.head.linear.weight.dtype) if x.is_floating_point() else x.long())

    def lower(
        self, batch: Batch, cut: int, state: Sequence[State | None] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State | None, ...]]:
        """Hidden sequence [B, T, H] that enters block `cut` (0..number of blocks), and the states below it."""
        hidden = self.embed(batch)
        return self._through(hidden, 0, cut, state, batch.reset if reset is None else reset, batch.lengths)

    def upper(
        self,
        hidden: Tensor,
        cut: int,
        batch: Batch,
        state: Sequence[State | None] | None = None,
        reset: Tensor | None = None,
    ) -> Output:
        """Output from the hidden sequence that enters block `cut`; `batch` gives lengths, task and reset."""
        reset = batch.reset if reset is None else reset
        hidden, new = self._through(hidden, cut, len(self.blocks), state, reset, batch.lengths)
        features = self.read(hidden, batch.lengths)
        return Output(self.head(features, batch.task), features, new, self.penalties())

    def penalties(self) -> dict[str, Tensor]:
        """Sums of the blocks' penalties; none in evaluation mode."""
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
        if self.pooling == "mean":
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
        state: Sequence[State | None] | None,
        reset: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, tuple[State | None, ...]]:
        new: list[State | None] = []
        for i in range(first, last):
            hidden, after = self.blocks[i](hidden, None if state is None else state[i - first], reset, lengths)
            new.append(after)
        return hidden, tuple(new)
