"""Net cut before a block, whose features at the cut are quantised (Hayes et al. 2020, arXiv 1910.02509)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from clplat.learners.nets.net import Block, Net, Output, State
from clplat.rehearsal.product_quantizer import ProductQuantizer
from clplat.streams.experience import Batch

if TYPE_CHECKING:
    from clplat.learners.learner import Learner

DECODED = "remind_decoded"
"""A field of `Batch.extra`, [B] bool: the inputs are no inputs but the decoded features that enter block `cut`."""

OTHER_Y, OTHER_MASK = "remind_y", "remind_mask"
"""Fields of `Batch.extra`: targets and mask of the rows that were mixed into the batch's own."""


class Quantised(Net):
    """A net cut before block `cut`, whose features at the cut go through a quantiser as soon as that is fitted.

    It shares the modules of the net it is made of, under the same names. Inputs of a batch marked as `DECODED` enter at
    the cut.

    Args:
        net: what is cut.
        cut: the block before which.
        quantizer: shared with the strategy, and part of the net so that a copy of the net has one.
    """

    def __init__(self, net: Net, cut: int, quantizer: ProductQuantizer) -> None:
        super().__init__(net.embedding, cast(list[Block], list(net.blocks)), net.head, net.per_step, net.pooling)
        self.cut, self.quantizer, self.training = cut, quantizer, net.training

    def front(self) -> list[nn.Module]:
        """What lies below the cut."""
        return [self.embedding, *self.blocks[: self.cut]]

    def freeze(self) -> None:
        """No gradients below the cut, and evaluation mode, in which no module changes its buffers."""
        for module in self.front():
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Quantised:
        """As for any net; a frozen front stays in evaluation mode."""
        super().train(mode)
        if self.quantizer:
            self.freeze()
        return self

    def forward(self, batch: Batch, state: Sequence[State | None] | None = None, reset: Tensor | None = None) -> Output:
        """As for any net; `DECODED` batches have no states below the cut."""
        if not self.quantizer:
            return super().forward(batch, state, reset)
        hidden, below = batch.x, (None,) * self.cut
        if DECODED not in batch.extra:
            hidden, below = self.front_features(batch, state, reset)
            hidden = self.quantizer.decode(self.quantizer.encode(hidden))
        output = self.upper(hidden, self.cut, batch, None if state is None else state[self.cut :], reset)
        return replace(output, state=(*below, *output.state))

    @torch.no_grad()
    def front_features(
        self, batch: Batch, state: Sequence[State | None] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State | None, ...]]:
        """What enters block `cut`, [B, T, H] or [B, H], without gradients, and the states below."""
        return self.lower(batch, self.cut, None if state is None else state[: self.cut], reset)


def coded(net: Quantised, batch: Batch) -> Batch:
    """Batch with codes [B, T, M] for inputs."""
    codes = net.quantizer.encode(net.front_features(batch)[0])
    return replace(batch, x=codes, index=None, extra={})


def decoded(batch: Batch, hidden: Tensor, extra: dict[str, Tensor] | None = None) -> Batch:
    """Batch with features [B, T, H] for inputs, marked as `DECODED`."""
    marked = {DECODED: torch.ones(len(batch), dtype=torch.bool, device=hidden.device)}
    return replace(batch, x=hidden, extra=marked | (extra or {}))


def mixed(learner: Learner, joined: Batch, hidden: Tensor, pairs: int, share: float) -> Batch:
    """Current rows of `joined` and, behind them, `pairs` mixtures of the stored rows A and B at its end.

    A pair of different tasks, or of experiences that do not share their classes, stays A alone; one of different lengths
    is cropped to the steps that both have.

    Args:
        learner: tells which classes are of one experience.
        joined: current rows, then A, then B.
        hidden: their features [B, T, H].
        pairs: number of pairs.
        share: of A.
    """
    device, current = hidden.device, len(joined) - 2 * pairs
    first = torch.arange(current + pairs, device=device)
    second = torch.where(first < current, first, first + pairs)
    alone = torch.zeros_like(first, dtype=torch.bool)
    if joined.task is not None:
        alone |= joined.task[first] != joined.task[second]
    if learner.logit_mask == "experience" and learner.objective.one_class:
        alone |= ~learner.same_experience[joined.y[first], joined.y[second]]
    second = torch.where(alone, first, second)
    one, two = joined.rows(first), joined.rows(second)
    if one.lengths is not None and two.lengths is not None:
        one = replace(one, lengths=torch.minimum(one.lengths, two.lengths))
    features = torch.lerp(hidden[second[current:]], hidden[current : current + pairs], share)
    other = {OTHER_Y: two.y} | ({} if two.mask is None else {OTHER_MASK: two.mask})
    return decoded(one, torch.cat([hidden[:current], features]), other)
