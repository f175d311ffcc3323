"""Multi-query associative recall: which value followed this key? (Arora et al. 2023, "Zoology", arXiv 2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.experience import UNSCORED, Batch, Experience, Stream
from clplat.streams.labelled import scenario_of
from clplat.streams.synthetic import Draws, generated_sets, relabelling


@dataclass(frozen=True)
class MQAR:
    """Makes batches of multi-query associative recall.

    In the natural vocabulary 0 is filler, keys are 1..V/2 - 1 and values V/2..V - 1.
    x [B, L]: P different keys, each followed by its value (all values differ), then L - 2 P positions in slots of
    two. Each key comes once more, at the first place of a slot; slot g = 1, 2, ... is drawn with probability
    proportional to g^(power - 1), without replacement. All other places hold filler, or random tokens.
    y [B, L]: at the second place of a key, its value; `UNSCORED` elsewhere.

    100 % can be reached. Chance is 1 / P for any value of the context and 2 / V blind.

    Attributes:
        names: [V] what stands for each token of the natural vocabulary.
        length: L.
        pairs: P.
        power: 1 spreads the queries evenly, smaller favours slots near the context.
        random_filler: random tokens of the whole vocabulary instead of filler: some are stray keys or values.
    """

    names: Tensor
    length: int
    pairs: int
    power: float
    random_filler: bool

    def __call__(self, draws: Draws) -> Batch:
        """The batch of all examples of `draws`."""
        half, p = len(self.names) // 2, self.pairs
        keys = 1 + draws.distinct("keys", half - 1, p)
        values = half + draws.distinct("values", half, p)
        query = 2 * p + 2 * self._slots(draws)  # [B, P] where each key is asked for
        if self.random_filler:
            x = draws.integers("filler", len(self.names), self.length)
        else:
            x = keys.new_zeros(len(keys), self.length)
        x[:, 0 : 2 * p : 2] = keys
        x[:, 1 : 2 * p : 2] = values
        x.scatter_(1, query, keys)
        y = torch.full_like(x, UNSCORED).scatter_(1, query, self.names[values])
        return Batch(x=self.names[x], y=y)

    def _slots(self, draws: Draws) -> Tensor:
        """[B, P] different slots, from 0. The largest of Gumbel noise + log weights are a weighted draw without
        replacement, in the order of drawing (Efraimidis & Spirakis 2006)."""
        count = (self.length - 2 * self.pairs) // 2
        weight = (self.power - 1) * torch.arange(1, count + 1, dtype=torch.float64).log()
        gumbel = -(-draws.uniform("slots", count).log()).log()
        return (weight + gumbel).topk(self.pairs, dim=1).indices


def mqar(
    experiences: int = 5,
    vocabulary: int = 256,
    length: int = 64,
    pairs: int = 4,
    power: float = 0.01,
    random_filler: bool = False,
    first_identity: bool = True,
    order_seed: int = 0,
    task_incremental: bool = False,
    train_size: int = 20_000,
    valid_size: int = 0,
    test_size: int = 1_000,
    data_seed: int = 0,
) -> Stream:
    """MQAR with the whole vocabulary relabelled in each experience: other tokens are keys, values and filler.

    One rule, "what followed this token before", solves all experiences. The paper's figure 2 has vocabulary 8192 and
    (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64), 100000 training and 3000 test sequences.

    Args:
        experiences: K.
        vocabulary: V, even.
        length: L, even, at least 4 * pairs.
        pairs: P, below V / 2.
        power: of the distance of the queries, above 0.
        random_filler: random tokens between the queries.
        first_identity: leave the first experience in the natural vocabulary.
        order_seed: of the permutations; not the training seed.
        task_incremental: tell the learner which experience a sequence is from.
        train_size: sequences to train on, in each experience.
        valid_size: sequences to validate on; 0 for no such set.
        test_size: sequences to test on.
        data_seed: of the sequences.

    Raises:
        ValueError: a vocabulary or a length that does not fit the pairs.
    """
    checks.within(1, checks.EXPERIENCES, experiences=experiences)
    checks.at_least(1, pairs=pairs)
    checks.above(0, power=power)
    if vocabulary % 2 or pairs >= vocabulary // 2:
        raise ValueError(f"vocabulary: got {vocabulary}, it must be even and above {2 * pairs} for {pairs} pairs.")
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length: got {length}, it must be even and at least 4 * pairs = {4 * pairs}.")
    parts = []
    for index in range(experiences):
        names = relabelling(vocabulary, index, order_seed, "mqar", first_identity)
        task = index if task_incremental else None
        generate = MQAR(names, length, pairs, power, random_filler)
        train, valid, test = generated_sets(generate, "mqar", data_seed, train_size, test_size, valid_size, task)
        classes = tuple(sorted(names[vocabulary // 2 :].tolist()))
        parts.append(Experience(index, f"mqar vocabulary {index}", classes, train, test, valid, task))
    return Stream(
        name="mqar",
        experiences=tuple(parts),
        scenario=scenario_of(task_incremental, "domain_incremental"),
        target="tag",
        outputs=vocabulary,
        vocabulary=vocabulary,
        length=length,
        per_step=True,
    )
