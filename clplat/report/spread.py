"""Choice of some of many, evenly, where all cannot be shown."""

from __future__ import annotations


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` of the numbers 0..count - 1, evenly, the first and the last among them; None: all."""
    if most is None or count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})
