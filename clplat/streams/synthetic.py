"""Generated examples: every one is a function of (seed, split, its number) alone.

Random numbers come from counter-based hashing and not from a generator with a state, so that an example is the same
in whichever batch, process or order it is asked for, and nothing touches a global random generator.

Letters: B batch, T time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.batch import Batch
from clplat.streams.examples import Examples
from clplat.streams.loader import stable_seed

_CHUNK = 4096


def splitmix64(counter: Tensor) -> Tensor:
    """64 well-mixed bits of each int64 counter (Steele, Lea & Flood 2014; the finaliser of SplitMix64)."""
    z = (counter ^ _shift(counter, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's int64 has a sign, which it would copy."""
    return (z >> by) & ((1 << (64 - by)) - 1)


class Draws:
    """Random numbers for the examples `index` of a set.

    Two names give independent numbers, the same name gives the same ones again.

    Args:
        key: of the set; sets with different keys are independent.
        index: [B] int64, which examples.
    """

    _STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the golden ratio: neighbouring counters differ in many bits

    def __init__(self, key: int, index: Tensor) -> None:
        self.key, self.index = key, index

    def bits64(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] int64, all 64 bits random."""
        start = splitmix64(self.index * self._STEP + stable_seed(self.key, name))
        place = torch.arange(1, math.prod(shape) + 1, device=self.index.device)
        return splitmix64(start[:, None] + place * self._STEP).view(-1, *shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] float64, uniform in the open interval (0, 1), 52 bits."""
        return (_shift(self.bits64(name, *shape), 12).double() + 0.5) * 2.0**-52

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        """[B, *shape] int64, uniform in 0..high-1."""
        return (self.uniform(name, *shape) * high).long()

    def coins(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] int64, 0 or 1 with equal chances."""
        return self.bits64(name, *shape) & 1

    def distinct(self, name: str, high: int, count: int) -> Tensor:
        """[B, count] different integers of 0..high-1 in random order, all choices equally likely.

        Floyd's algorithm (Bentley & Floyd 1987): `count` steps, whatever `high` is.
        """
        ends = torch.arange(high - count, high, device=self.index.device)
        tries = (self.uniform(name, count) * (ends + 1)).long()
        chosen = torch.full_like(tries, -1)
        for i in range(count):
            taken = (chosen[:, :i] == tries[:, i : i + 1]).any(1)
            chosen[:, i] = torch.where(taken, ends[i], tries[:, i])
        return chosen.gather(1, self.bits64(f"{name} order", count).argsort(1))


Generate = Callable[[Draws], Batch]
"""Makes a batch of all examples of `draws.index` at once; row b may depend on row b of the draws only."""


class GeneratedData(Examples):
    """Examples made when they are asked for, whole batches at a time.

    Args:
        generate: makes a batch.
        size: N.
        key: seed of the set (see `set_key`): the same key gives the same examples.
        task: the task label of every example, None where the learner is not told.
    """

    draws = False

    def __init__(self, generate: Generate, size: int, key: int, task: int | None = None) -> None:
        checks.at_least(1, size=size)
        self.generate, self.size, self.key, self.task = generate, size, key, task
        self._targets: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` [B] as one batch."""
        task = None if self.task is None else torch.full((len(index),), self.task)
        return replace(self.generate(Draws(self.key, index)), index=index, task=task)

    def targets(self) -> Tensor | None:
        """[N] classes, or None where the targets are not one class an example. Generates all examples once."""
        if self._targets is None:
            if self.batch(torch.zeros(1, dtype=torch.int64)).y.ndim != 1:
                return None
            self._targets = torch.cat([self.batch(part).y for part in torch.arange(self.size).split(_CHUNK)])
        return self._targets


def set_key(data_seed: int, generator: str, split: str) -> int:
    """The key of a set: train, valid and test of one generator and seed never share a key."""
    return stable_seed("generated", data_seed, generator, split)


def generated_sets(
    generate: Generate,
    name: str,
    data_seed: int,
    train_size: int,
    test_size: int,
    valid_size: int = 0,
    task: int | None = None,
) -> tuple[GeneratedData, GeneratedData | None, GeneratedData]:
    """Training, validation (None for size 0) and test set of one generator, with keys of their own.

    Raises:
        ValueError: a size below 1, or a validation set's below 0.
    """
    checks.at_least(1, train_size=train_size, test_size=test_size)
    checks.at_least(0, "0 for no such set", valid_size=valid_size)
    train, valid, test = (
        GeneratedData(generate, size, set_key(data_seed, name, split), task) if size or split != "valid" else None
        for split, size in (("train", train_size), ("valid", valid_size), ("test", test_size))
    )
    assert train is not None
    assert test is not None
    return train, valid, test


def relabelling(symbols: int, index: int, seed: int, name: str, first_identity: bool = True) -> Tensor:
    """[symbols] int64, the symbol that stands for each symbol in experience `index`."""
    if first_identity and index == 0:
        return torch.arange(symbols)
    generator = torch.Generator().manual_seed(stable_seed(seed, name, index))
    return torch.randperm(symbols, generator=generator)
