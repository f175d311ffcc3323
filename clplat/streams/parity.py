"""N-parity: is the number of ones among the last N bits odd? N grows (Khajehabdollahi et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clplat import checks
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.labelled import scenario_of
from clplat.streams.synthetic import Draws, generated_sets


@dataclass(frozen=True)
class Parity:
    """Makes batches of N-parity.

    x [B, T, 1]: bits, 1 with a probability that is uniform in (0, 1) for each sequence. The length of each sequence
    is uniform in N + 2..4 N + 1 (the paper draws one length a batch), the rest is padding.
    y [B]: the sum of the last N valid bits, modulo 2.

    100 % can be reached. A constant answer gets 1/2 for odd N and (N + 2) / (2 N + 2), "even", for even N: an even
    number of equal bits is even. Where N is small there are few sequences, and some occur in both training and test.

    Attributes:
        window: N.
    """

    window: int

    def __call__(self, draws: Draws) -> Batch:
        """The batch of all examples of `draws`, as wide as its longest sequence."""
        n = self.window
        lengths = n + 2 + draws.integers("length", 3 * n)
        bits = draws.uniform("bits", 4 * n + 1) < draws.uniform("probability", 1)
        time = torch.arange(int(lengths.max()))
        bits = bits[:, : len(time)] & (time < lengths[:, None])
        y = (bits & (time >= lengths[:, None] - n)).sum(1) % 2
        return Batch(x=bits.float().unsqueeze(-1), y=y, lengths=lengths)


def parity(
    first: int = 2,
    experiences: int = 5,
    step: int = 1,
    task_incremental: bool = True,
    train_size: int = 20_000,
    valid_size: int = 0,
    test_size: int = 1_000,
    data_seed: int = 0,
) -> Stream:
    """N-parity with a larger N in each experience: the curriculum of the paper as a stream.

    Told the task, the learner can keep one head an N; not told, the same bits ask for another answer each time and
    only one N can be right.

    Args:
        first: N of the first experience, at least 1.
        experiences: K.
        step: by how much N grows.
        task_incremental: tell the learner which N an example is of.
        train_size: sequences to train on, in each experience.
        valid_size: sequences to validate on; 0 for no such set.
        test_size: sequences to test on.
        data_seed: of the sequences.
    """
    checks.within(1, checks.EXPERIENCES, experiences=experiences)
    checks.at_least(1, first=first)
    checks.at_least(0, step=step)
    parts = []
    for index in range(experiences):
        n = first + index * step
        task = index if task_incremental else None
        train, valid, test = generated_sets(
            Parity(n), f"parity {index}", data_seed, train_size, test_size, valid_size, task
        )
        parts.append(Experience(index, f"parity of {n} bits", (0, 1), train, test, valid, task))
    return Stream(
        name="parity",
        experiences=tuple(parts),
        scenario=scenario_of(task_incremental, "domain_incremental"),
        target="class",
        outputs=2,
        features=1,
    )
