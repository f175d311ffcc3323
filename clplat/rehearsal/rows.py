"""Rows for rehearsal: those of a whole training set, those to replay in a step, those of the current experience."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from clplat.rehearsal.buffer import Buffer
from clplat.streams.experience import Batch, Data, Experience

READ = 1024
"""Examples read at once."""


def in_order(data: Data, device: torch.device | None = None) -> Iterator[Batch]:
    """All examples of a data set, in order; None leaves them on the data's device."""
    for batch in data.batches(torch.arange(len(data)).split(READ)):
        yield batch if device is None else batch.to(device)


def insert_experience(buffer: Buffer, experience: Experience, device: torch.device) -> None:
    """Offer an experience's training set to a buffer that keeps the extra field "experience", its index."""
    for batch in in_order(experience.train, device):
        label = torch.full((len(batch),), experience.index, device=device)
        buffer.insert(replace(batch, extra={"experience": label}))


def draw(buffer: Buffer, batch: Batch, rows: int | None = None) -> Batch | None:
    """Rows of a buffer to go with a batch, on its device; None if nothing is held.

    Args:
        buffer: draws from its own generator.
        batch: of the step.
        rows: how many, None: as many as the batch has. Never more than are held.
    """
    count = min(len(batch) if rows is None else rows, len(buffer))
    return buffer.sample(count).to(batch.x.device) if count else None


def current_rows(batch: Batch) -> Batch:
    """The rows of the current experience (source 0)."""
    return batch if batch.source is None else batch.rows(batch.source == 0)
