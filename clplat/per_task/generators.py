"""Hypernetworks: nets that generate the weights of another net, once per forward pass, from an embedding of the task.

Letters: J task embeddings, E their width, P width of chunk codes, N chunks, S values a chunk, L steps of a recurrent
generator (one a chunk), G its hidden width, W weights of the target net.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.state import StateModule

ACTS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, math.sqrt(2)),
    "elu": (nn.ELU, 1.25),
    "tanh": (nn.Tanh, 1.0),
    "sigmoid": (nn.Sigmoid, 1.0),
}
"""Activations by name, and the gain of a layer's initial weights that keeps the variance about the same."""

DRAWS = 64
"""Random embeddings over which the initial variance of a generator's last hidden layer is taken."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated tensor.

    Attributes:
        names: of the target's parameters that it becomes (several where the target ties them).
        shape: of these.
        std: of its entries at initialisation: the root mean square of the target's own initial values where these
            were drawn; 0 where they follow a rule: it is generated as a difference to them.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    std: float

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


class Generator(StateModule):
    """Base of the generators: maps embeddings [J, E] to weights [J, W] and, where there are any, states [J, ...]."""

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights [J, W], and the hidden states [J, L * G] of a recurrent generator (others: None)."""
        raise TypeError(f"{type(self).__name__} does not define forward(embeddings).")


def _trunk(width: int, hidden: Sequence[int], act: str, generator: torch.Generator) -> tuple[nn.Sequential, int]:
    make, gain = ACTS[act]
    layers: list[nn.Module] = []
    for size in hidden:
        linear = nn.Linear(width, size)
        with torch.no_grad():
            linear.weight.normal_(0, gain / math.sqrt(width), generator=generator)
            linear.bias.zero_()
        layers += [linear, make()]
        width = size
    return nn.Sequential(*layers), width


class Full(Generator):
    """An MLP on e_t whose output layer has a row for every weight of the target (a head for each tensor).

    Initialised by hyperfan-in (Chang, Flokas & Lipson 2020): the rows of a tensor have the variance with which its
    entries get the variance that they have in the target's own initialisation (there by their fan-in).

    Args:
        pieces: what is generated.
        embedding: E.
        std: of the embeddings.
        hidden: widths of the hidden layers; none: a linear map.
        act: an entry of `ACTS`.
        generator: of the initial weights.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        embedding: int,
        std: float,
        hidden: Sequence[int],
        act: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.trunk, width = _trunk(embedding, hidden, act, generator)
        self.out = nn.Linear(width, sum(p.size for p in pieces))
        with torch.no_grad():
            z = self.trunk(std * torch.randn(DRAWS, embedding, generator=generator))
            power = float(z.square().sum(1).mean())
            self.out.bias.zero_()
            for rows, piece in zip(self.out.weight.split([p.size for p in pieces]), pieces, strict=True):
                rows.normal_(0, piece.std / math.sqrt(power), generator=generator)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights [J, W] of embeddings [J, E]; no states."""
        return self.out(self.trunk(embeddings)), None


class Chunked(Generator):
    """An MLP on [e_t; c_i] that generates the weights chunk by chunk, all chunks as one batch (von Oswald et al. 2020).

    The tensors of the target, one after the other, are cut into N = ceil(W / S) chunks; c_i are learned codes.
    Initialised by hyperfan-in: where the target's variances differ, the variance of the code of a chunk is raised
    until the chunk's output has the mean variance of the matrix entries in it (exact for piecewise linear
    activations).

    Args:
        pieces: what is generated.
        embedding: E.
        std: of the embeddings.
        hidden: widths of the hidden layers; none: a linear map.
        act: an entry of `ACTS`.
        chunk: S.
        code: P, width of the codes.
        code_std: standard deviation of the smallest initial codes.
        generator: of the initial weights.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        embedding: int,
        std: float,
        hidden: Sequence[int],
        act: str,
        chunk: int,
        code: int,
        code_std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.size = sum(p.size for p in pieces)
        variances = _chunk_variances(pieces, chunk)  # [N]
        self.codes = nn.Parameter(code_std * torch.randn(len(variances), code, generator=generator))
        self.trunk, width = _trunk(embedding + code, hidden, act, generator)
        self.out = nn.Linear(width, chunk)
        smallest = float(variances[variances > 0].min())
        own, others = code * code_std**2, embedding * std**2
        with torch.no_grad():
            few = self.codes[:: max(1, len(self.codes) // DRAWS)]
            z = self.trunk(self._inputs(std * torch.randn(DRAWS, embedding, generator=generator), few))
            self.out.weight.normal_(0, math.sqrt(smallest / float(z.square().sum(1).mean())), generator=generator)
            self.out.bias.zero_()
            wanted = torch.where(variances > 0, variances, smallest) / smallest
            self.codes.mul_((((own + others) * wanted - others) / own).sqrt()[:, None])

    def _inputs(self, embeddings: Tensor, codes: Tensor) -> Tensor:
        """[J * N, E + P], every embedding with every code."""
        j, n = len(embeddings), len(codes)
        return torch.cat([embeddings[:, None].expand(-1, n, -1), codes.expand(j, -1, -1)], -1).flatten(0, 1)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights [J, W] of embeddings [J, E]; no states."""
        chunks = self.out(self.trunk(self._inputs(embeddings, self.codes)))
        return chunks.view(len(embeddings), -1)[:, : self.size], None


def _chunk_variances(pieces: Sequence[Piece], chunk: int) -> Tensor:
    entries = torch.cat([torch.full((p.size,), p.std**2) for p in pieces])
    count = -(-len(entries) // chunk)
    padded = F.pad(entries, [0, count * chunk - len(entries)]).view(count, chunk)
    return padded.sum(1) / (padded > 0).sum(1).clamp(min=1)
