"""A source of text whose entropy is known: a hidden regime and a Markov chain of letters.

Letters: V letters, R regimes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.loader import stable_seed


@dataclass(frozen=True)
class MarkovSource:
    """Documents whose first letter is uniform and names a regime; what follows is a Markov chain of that regime.

        p(c_1) = 1 / V,    p(c_t | c_1..c_{t-1}) = P[c_1 mod R, c_{t-1}, c_t]

    With R > 1 the first letter matters to the last one: a state that is cut off loses bits. With R = 1 it is a plain
    chain. The entropy is known in closed form (Shannon 1948, section 7: the mean of the rows' entropies).

    Attributes:
        transitions: [R, V, V] float64, rows sum to 1.
    """

    transitions: Tensor

    def sample(self, documents: int, length: int, generator: torch.Generator) -> Tensor:
        """[documents, length] int64 letters, by inverse distribution functions."""
        regimes, letters = self.transitions.shape[:2]
        drawn = torch.rand(documents, length, generator=generator, dtype=torch.float64)
        columns = [(drawn[:, 0] * letters).long()]
        regime, below = columns[0] % regimes, self.transitions.cumsum(-1)[..., :-1]
        for u in drawn.unbind(1)[1:]:
            columns.append((u[:, None] >= below[regime, columns[-1]]).sum(1))
        return torch.stack(columns, 1)

    def bits(self, tokens: Tensor) -> Tensor:
        """-log2 p of each letter, [documents, length], for the letters of whole documents."""
        regimes, letters = self.transitions.shape[:2]
        first = torch.full(tokens[:, :1].shape, math.log2(letters), dtype=torch.float64)
        p = self.transitions[(tokens[:, 0] % regimes)[:, None], tokens[:, :-1], tokens[:, 1:]]
        return torch.cat([first, -p.log2()], 1)

    def entropy(self, length: int) -> float:
        """The expected bits a letter over a whole document of this length: H(document) / length."""
        regimes, letters = self.transitions.shape[:2]
        rows = torch.special.entr(self.transitions).sum(-1) / math.log(2)  # [R, V]
        at = torch.zeros(regimes, letters, dtype=torch.float64)  # [R, V] p(regime, c_t)
        at[torch.arange(letters) % regimes, torch.arange(letters)] = 1 / letters
        total = math.log2(letters)
        for _ in range(length - 1):
            total += float((at * rows).sum())
            at = torch.einsum("ri,rij->rj", at, self.transitions)
        return total / length


def markov_source(letters: int, regimes: int, sharpness: float, seed: int) -> MarkovSource:
    """A source with random transitions: each row is a softmax of V numbers from N(0, sharpness^2).

    Args:
        letters: V, at least 2.
        regimes: R, 1..V.
        sharpness: 0 makes all letters alike; the larger, the fewer bits.
        seed: of the transitions.
    """
    checks.at_least(2, letters=letters)
    checks.within(1, letters, "letters", regimes=regimes)
    checks.at_least(0, sharpness=sharpness)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(regimes, letters, letters, generator=generator, dtype=torch.float64)
    return MarkovSource((sharpness * numbers).softmax(-1))


def markov_seed(order_seed: int, index: int) -> int:
    """The seed of the source of experience `index`."""
    return stable_seed(order_seed, "markov source", index)
