"""Check that a stream still holds the data that a run began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clplat.streams.batch import StreamError
from clplat.streams.experience import Stream


def check_unchanged(stream: Stream, begun: Mapping[str, Any] | None) -> None:
    """Refuse to go on with data that are not those of the beginning.

    Args:
        stream: as it is made now.
        begun: its `fingerprint` when the run began; None in checkpoints of 0.2, which have none.

    Raises:
        StreamError: says what differs first, and what to do.
    """
    difference = None if begun is None else _difference(begun, stream.fingerprint())
    if difference is not None:
        raise StreamError(
            f"resume: the data are not those that the run began with: {difference}. Put them back as they were (paths "
            "may differ, contents may not), or begin a new run without resume."
        )


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if len(then["sets"]) != len(now["sets"]):
        return f"{len(then['sets'])} sets of examples then, {len(now['sets'])} now"
    for (was, before, first), (name, examples, digest) in zip(then["sets"], now["sets"], strict=True):
        if was != name:
            return f"{was} then, {name} now"
        if before != examples:
            return f"{name}: {before} examples then, {examples} now"
        if first != digest:
            return f"{name}: as many examples ({examples}), other contents"
    for name, was, value in zip(
        ("target", "outputs", "features", "vocabulary", "symbols"), then["stream"], now["stream"], strict=True
    ):
        if was != value:
            return f"the stream's {name}: {was!r:.60} then, {value!r:.60} now"
    return None
