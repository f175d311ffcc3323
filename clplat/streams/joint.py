"""Joint training as a stream: all experiences at once, the usual upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clplat.streams.data import TensorData
from clplat.streams.experience import Data, Experience, Stream, StreamError
from clplat.streams.union import UnionData


def joint(stream: Stream) -> Stream:
    """One experience whose training, validation and test sets are all of a stream's.

    To be tested on each experience's test set apart, as the other strategies are, train a stream of many experiences
    with a strategy that keeps all data instead.

    Args:
        stream: any but a task-incremental one.

    Raises:
        StreamError: the stream is empty or task-incremental: one experience cannot have several task labels.
    """
    if not stream.experiences:
        raise StreamError(f"Stream {stream.name!r} has no experience to join.")
    if stream.scenario == "task_incremental":
        raise StreamError(
            f"joint: stream {stream.name!r} is task-incremental, but one experience has one task label. Make it "
            "with task_incremental=false, or train it with a strategy that keeps all data."
        )
    every = stream.experiences
    valid = [e.valid for e in every if e.valid is not None]
    whole = Experience(
        index=0,
        name="all",
        classes=stream.seen_classes(len(every) - 1),
        train=_union([e.train for e in every]),
        test=_union([e.test for e in every]),
        valid=_union(valid) if valid else None,
    )
    return replace(stream, name=f"joint_{stream.name}", experiences=(whole,))


def _union(parts: Sequence[Data]) -> Data:
    first = parts[0]
    if isinstance(first, TensorData) and all(_same_tensors(first, p) for p in parts):
        rows = torch.cat([p.rows for p in parts if isinstance(p, TensorData)])
        return TensorData(first.x, first.y, rows, first.transform, first.task, first.mask, first.lengths)
    return UnionData(parts)


def _same_tensors(a: TensorData, b: Data) -> bool:
    """Whether both read the same tensors in the same way, so that one gather serves both."""
    return (
        isinstance(b, TensorData)
        and a.x is b.x
        and a.y is b.y
        and a.mask is b.mask
        and a.lengths is b.lengths
        and a.transform is b.transform
        and a.task == b.task
    )
