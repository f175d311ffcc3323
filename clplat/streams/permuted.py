"""Permuted inputs: the same examples in every experience, their pixels or time steps in another order each time.

Goodfellow et al. 2013 (pixels, arXiv 1312.6211); Cossu et al. 2021 (time steps, arXiv 2103.07492).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.examples import FixedTransform
from clplat.streams.experience import Stream
from clplat.streams.labelled import Labelled, Layout, hold_out, make_experience, make_stream, scenario_of
from clplat.streams.loader import stable_seed


@dataclass(frozen=True)
class Permutation(FixedTransform):
    """Reorders the values of each example: [B, ...] -> [B, ...].

    Attributes:
        index: the value at flat place i comes from place index[i].
    """

    index: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The batch x with each example's values reordered."""
        return x.flatten(1).index_select(1, self.index).view_as(x)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index,)


def permuted(
    source: Labelled,
    experiences: int = 5,
    permute: Literal["pixels", "rows", "steps"] = "pixels",
    first_identity: bool = True,
    order_seed: int = 0,
    task_incremental: bool = False,
    layout: Layout = "rows",
    valid_fraction: float = 0.0,
    data_seed: int = 0,
) -> Stream:
    """A data set seen through one fixed permutation an experience, applied batch by batch.

    Args:
        source: the data set.
        experiences: K.
        permute: what changes places: all "pixels" (values) of an example, its "rows" (the first axis of an image or
            sequence, whatever the layout), or the time "steps" of the layout.
        first_identity: leave the first experience in its natural order.
        order_seed: of the permutations; not the training seed.
        task_incremental: tell the learner which experience an example is from.
        layout: of the inputs (see `lay_out`).
        valid_fraction: share of every class's training examples to hold out, 0..1.
        data_seed: of that choice.

    Raises:
        ValueError: steps or rows of inputs that have none.
        StreamError: a source whose sequences have lengths of their own.
    """
    checks.within(1, checks.EXPERIENCES, experiences=experiences)
    checks.one_of("permute", permute, ("pixels", "rows", "steps"))
    source.need_one_length("a permutation")
    laid = source.laid_out(layout)
    values = laid.train_x[0].numel()
    blocks = _blocks(source, laid, permute)
    generator = torch.Generator().manual_seed(stable_seed(order_seed, "permutations"))
    train, valid = hold_out(source.train_y, valid_fraction, data_seed)
    test = torch.arange(len(source.test_y))
    parts = []
    for index in range(experiences):
        identity = first_identity and index == 0
        order = torch.arange(blocks) if identity else torch.randperm(blocks, generator=generator)
        places = torch.arange(values).view(blocks, -1)[order].flatten()
        transform = None if identity else Permutation(places)
        name = f"{source.name} natural" if identity else f"{source.name} permutation {index}"
        task = index if task_incremental else None
        parts.append(make_experience(laid, index, name, train, valid, test, transform, task))
    return make_stream(f"permuted_{source.name}", parts, scenario_of(task_incremental, "domain_incremental"), laid)


def _blocks(source: Labelled, laid: Labelled, permute: str) -> int:
    """How many pieces, equal in size and each in one run, change places."""
    if permute == "pixels":
        return laid.train_x[0].numel()
    x = source.train_x if permute == "rows" else laid.train_x
    if x.ndim == 2:
        raise ValueError(
            f"permute: got {permute!r}, and inputs [N, {x.shape[1]}] have none; use permute=pixels, or layout=rows."
        )
    return x.shape[1]
