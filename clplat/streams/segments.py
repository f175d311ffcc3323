"""Long sequences in segments that follow one another, for truncated back-propagation through time.

The state of a recurrent net goes from a segment to the next one, gradients do not (Williams & Peng 1990; the layout of
Mikolov et al. 2010 and Zaremba et al. 2014): one sequence is cut into R rows of equal length, the rows are read side by
side, and a batch is the next T steps of all of them.

Letters: N steps in all, R rows, L steps a row, T steps a segment, S segments a row, B batch, D features, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.dtypes import plain_inputs, plain_targets
from clplat.streams.examples import Examples, Stored
from clplat.streams.loader import ChunkLoader, stable_seed
from clplat.streams.order import Order

if TYPE_CHECKING:
    from clplat.streams.experience import Chunks, Stream

FULL = 0.95
"""Probability that a segment of random length is drawn around T, else around T / 2 (p of Merity et al. 2018)."""

SPREAD = 5.0
"""Standard deviation of that length (s of Merity et al. 2018)."""

SHORTEST = 5
"""No segment of random length is drawn shorter; from the authors' code, the paper names no bound."""


class SegmentData(Examples):
    """One long sequence of documents as R rows, each cut into S segments of T steps.

    Segment s of row r is example s * R + r. Read by `batch`, examples are independent: each is meant to start from a
    fresh state, and its first step is not marked. Read by `in_order`, they follow one another: the state is to be
    carried, and `Batch.reset` marks where it is not, at the starts of documents and of rows.

    Each row has L = N // R steps; the last N - R * L steps are left out, as is usual. Where T does not divide L the
    last segments are shorter: `in_order` gives them so, `batch` fills them up with steps that are not scored.

    Args:
        x: [N] token ids or [N, D] floats.
        y: [N] integer targets or [N, O] floats, one for each step.
        start: [N] bool, True where a document starts; rows start fresh whatever it says.
        rows: R.
        steps: T.
        task: the task label of all of it, None where the learner is not told.

    Raises:
        StreamError: sizes that do not fit each other, or fewer steps than rows.
    """

    draws = False

    def __init__(self, x: Tensor, y: Tensor, start: Tensor, rows: int, steps: int, task: int | None = None) -> None:
        if len(x) != len(y) or start.shape != x.shape[:1] or start.dtype != torch.bool:
            raise StreamError(
                f"Segments need a target and a bool mark for each of {len(x)} steps, got {len(y)} targets and marks "
                f"{start.dtype} {list(start.shape)}."
            )
        checks.at_least(1, rows=rows, steps=steps)
        if len(x) < rows:
            raise StreamError(
                f"Segments: {len(x)} steps cannot be laid out in {rows} rows, each needs at least one: "
                "use fewer rows, or more text."
            )
        self.rows, self.steps, self.task = rows, steps, task
        self.length = len(x) // rows
        kept = rows * self.length
        self.left_out = x[kept:], y[kept:]  # never read, and part of what the data are
        self.x, self.y, self.start = (t[:kept].unflatten(0, (rows, self.length)) for t in (x, y, start))
        self.segments = -(-self.length // steps)

    def __len__(self) -> int:
        return self.rows * self.segments

    def batch(self, index: Tensor) -> Batch:
        """The segments `index` [B] as examples that know nothing of one another, [B, T]."""
        row, column = index % self.rows, (index // self.rows)[:, None] * self.steps + torch.arange(self.steps)
        valid = column < self.length
        column = column.clamp_max(self.length - 1)
        x, y, reset = (t[row[:, None], column] for t in (self.x, self.y, self.start))
        x, y = plain_inputs(x), plain_targets(y)
        x = x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0)
        if y.is_floating_point():
            y, mask = y.masked_fill(~valid.view(*valid.shape, *[1] * (y.ndim - 2)), 0), valid
        else:
            y, mask = y.masked_fill(~valid, UNSCORED), None
        reset &= valid
        reset[:, 0] = False  # fresh anyway; mixers are faster where nothing is marked
        return Batch(x=x, y=y, mask=mask, task=self._task(len(index)), index=index, reset=_unless_none(reset))

    def in_order(self, ends: Sequence[int] | None = None) -> Iterator[Batch]:
        """One pass: the segments of all rows, [R, T], one after the other.

        Args:
            ends: where segments end, ascending up to L; None: every T steps, and at L.
        """
        if ends is None:
            ends = [*range(self.steps, self.length, self.steps), self.length]
            numbers = torch.arange(len(self)).view(self.segments, self.rows)
        else:
            numbers = [None] * len(ends)  # they are no examples of this set
        begin = 0
        for end, index in zip(ends, numbers, strict=True):
            reset = self.start[:, begin:end]
            if begin == 0:
                reset = torch.cat([torch.ones_like(reset[:, :1]), reset[:, 1:]], 1)
            yield Batch(
                x=plain_inputs(self.x[:, begin:end]),
                y=plain_targets(self.y[:, begin:end]),
                task=self._task(self.rows),
                index=index,
                reset=_unless_none(reset),
            )
            begin = end

    def stored(self) -> Stored:
        """All steps, their targets, and where documents start; those left out too, to tell whether a text changed."""
        return Stored(self.x, self.y, (self.start, *self.left_out))

    def training(self, order: Order) -> Chunks:
        if not order.carries:
            return super().training(order)
        if order.batch_size != self.rows:
            raise StreamError(
                f"training.batch_size: got {order.batch_size}, and the training text is laid out in {self.rows} rows, "
                "all of which make one batch: set stream.rows=${training.batch_size} (its default), or "
                "training.carry_state=false."
            )
        return SegmentLoader(self, order)

    def test_batches(
        self, batch_size: int, examples: int | None = None, carries: bool = False
    ) -> Iterator[tuple[Batch, bool]]:
        if not carries:
            return super().test_batches(batch_size, examples)
        count = len(self) if examples is None else min(examples, len(self))
        segments = islice(self.in_order(), max(count // self.rows, 1))
        return ((batch, number > 0) for number, batch in enumerate(segments))

    def _task(self, rows: int) -> Tensor | None:
        return None if self.task is None else torch.full((rows,), self.task)


class SegmentLoader(ChunkLoader):
    """Yields chunks of segments in order, pass after pass, until `order.steps` batches were given; see `ChunkLoader`.

    With `order.vary` a pass is cut into segments of random length. It then has other than S segments; the number of
    steps stays what it is, so the last pass may end early.

    Args:
        data: the training set of the experience.
        order: which batches.
    """

    def __init__(self, data: SegmentData, order: Order) -> None:
        super().__init__(data, order)
        self.segments = data
        self.nominal = data.steps if order.vary else None

    def _batches(self) -> Iterator[Batch]:
        order, given, number = self.order, 0, 0
        while True:
            ends = None
            if order.vary:
                generator = torch.Generator().manual_seed(stable_seed(order.seed, "segments", order.experience, number))
                ends = random_ends(self.segments.length, self.segments.steps, generator)
            for batch in self.segments.in_order(ends):
                if given >= order.start:
                    yield batch
                given += 1
            number += 1


def random_ends(length: int, steps: int, generator: torch.Generator) -> list[int]:
    """Where the segments of a row end, for segments of random length (Merity et al. 2018, arXiv 1708.02182).

    Each length is drawn from N(T, 5^2) with probability 0.95, else from N(T / 2, 5^2), rounded down, and at least 5 (or
    T where that is less; the paper names no bound). So that gradients are cut at other places in each pass; the
    learning rate is to be scaled by (length of the segment) / T, since short ones would count too much.

    Args:
        length: L; the last segment ends here and may be shorter than drawn.
        steps: T.
        generator: on the CPU.
    """
    ends: list[int] = []
    count = length // min(SHORTEST, steps) + 1  # more segments cannot be
    full = torch.rand(count, generator=generator) < FULL
    drawn = torch.where(full, float(steps), steps / 2) + SPREAD * torch.randn(count, generator=generator)
    for end in drawn.floor().long().clamp_min(min(SHORTEST, steps)).cumsum(0).tolist():
        ends.append(min(end, length))
        if end >= length:
            break
    return ends


def segmented(stream: Stream) -> bool:
    """Whether all sets of a stream are in segments, so that a state can be carried.

    Raises:
        StreamError: some are, and some are not.
    """
    kinds = {isinstance(d, SegmentData) for e in stream for d in (e.train, e.test)}
    if len(kinds) == 2:
        raise StreamError(
            f"Stream {stream.name!r} has sets in segments and sets of whole sequences: "
            "make all training and test sets SegmentData, or none."
        )
    return kinds == {True}


def _unless_none(reset: Tensor) -> Tensor | None:
    # Data are on the CPU: no device waits for this answer.
    return reset if bool(reset.any()) else None
