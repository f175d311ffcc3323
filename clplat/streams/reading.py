"""Reading under seeds: what is random in a transform follows from the run's seed and the batch's place in the run.

Draws come from the global generators of torch (on the CPU), NumPy and Python, as transforms make them. Each batch is
read after these were seeded for it, in whichever process, and in this one they are put back afterwards: so the training
does not notice, a batch is the same with any number of workers, and a resumed run reads what it would have read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

import numpy as np
import torch

from clplat.streams.batch import Batch, StreamError
from clplat.streams.seeds import stable_seed


class BadValues(StreamError):
    """Values that are not finite, met in reading: what a transform draws is known only then."""

    code = 1


def finite_only(batch: Batch) -> Batch:
    """The batch, if all its inputs are finite.

    Raises:
        BadValues: names the first example whose inputs are not.
    """
    x = batch.x
    if x.is_floating_point() and x.numel():
        low, high = (float(v) for v in x.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            row = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            number = row if batch.index is None else int(batch.index[row])
            value = float(x[row][~x[row].isfinite()][0])
            raise BadValues(f"row {number}: inputs must be finite, got {value}: mend the data, or its transform.")
    return batch


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (on the CPU), NumPy and Python."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of all devices, too
    np.random.seed(seed % 2**32)
    random.seed(seed)


@cache
def _spare() -> np.random.MT19937:
    """A generator that stands in for NumPy's global one while a batch is read; it is always seeded first."""
    return np.random.MT19937()


def _use(generator: np.random.BitGenerator) -> None:
    """Let NumPy's global functions draw from a generator."""
    np.random.set_bit_generator(generator)  # type: ignore[attr-defined]  # missing in NumPy's stubs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from newly seeded global generators, and put them back as they were."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    # NumPy's generator is put aside whole: to read and set its state would take five times as long as all else.
    numpy_generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in NumPy's stubs
    _use(np.random.MT19937() if numpy_generator is _spare() else _spare())
    seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        _use(numpy_generator)
        random.setstate(python_state)


def seeded_each(batches: Iterator[Batch], seeds: Iterable[int]) -> Iterator[Batch]:
    """The batches, each read under its seed; they must be read when they are asked for."""
    for seed in seeds:
        with seeded(seed):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def seeds_of(*place: object) -> Iterator[int]:
    """A seed for each batch of a pass, one after the other without end."""
    return (stable_seed(*place, number) for number in count())
