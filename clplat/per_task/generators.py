"""Hypernetworks: nets that generate the weights of another net, once per forward pass, from an embedding of the task.

Letters: J task embeddings, E their width, P width of chunk codes, N chunks, S values a chunk, L steps of a recurrent
generator (one a chunk), G its hidden width, W weights of the target net.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.lstm import fused_lstm
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


class Recurrent(Generator):
    """An LSTM that generates one chunk a step, so that each depends on those before it (Chandra et al. 2023).

        s_l, c_l = LSTM([e_t; p_l], (s_{l-1}, c_{l-1})),   chunk_l = U s_l + b

    Every tensor of the target begins a new chunk; the last one of a tensor is cut off. p_l are learned codes, U and b
    are shared by all chunks. U starts with the variance that gives the chunks the mean variance of the target's
    matrices.

    Args:
        pieces: what is generated, in this order.
        embedding: E.
        std: of the embeddings.
        hidden: G.
        chunk: S, values a step.
        code: P, width of the codes.
        code_std: standard deviation of the initial codes.
        generator: of the initial weights.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        embedding: int,
        std: float,
        hidden: int,
        chunk: int,
        code: int,
        code_std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.sizes = [p.size for p in pieces]
        self.chunk, self.hidden = chunk, hidden
        steps = sum(-(-size // chunk) for size in self.sizes)
        self.codes = nn.Parameter(code_std * torch.randn(steps, code, generator=generator))  # [L, P]
        bound = 1 / math.sqrt(hidden)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.w_in, self.w_state = uniform(4 * hidden, embedding + code), uniform(4 * hidden, hidden)
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.out_weight, self.out_bias = uniform(chunk, hidden), nn.Parameter(torch.zeros(chunk))
        with torch.no_grad():
            states = self.states(std * torch.randn(DRAWS, embedding, generator=generator))
            matrices = [(p.size, p.std**2) for p in pieces if p.std]
            variance = sum(n * v for n, v in matrices) / max(1, sum(n for n, _ in matrices))
            self.out_weight.normal_(0, math.sqrt(variance / float(states.square().sum(-1).mean())), generator=generator)

    def states(self, embeddings: Tensor) -> Tensor:
        """Hidden states [J, L, G] of embeddings [J, E]."""
        j, steps = len(embeddings), len(self.codes)
        x = torch.cat([embeddings[:, None].expand(-1, steps, -1), self.codes.expand(j, -1, -1)], -1)
        zero = x.new_zeros(j, self.hidden)
        weights = [self.w_in, self.w_state, self.bias, torch.zeros_like(self.bias)]
        return fused_lstm(x, zero, zero, weights)[0]

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights [J, W] and states [J, L * G] of embeddings [J, E]."""
        states = self.states(embeddings)
        chunks = F.linear(states, self.out_weight, self.out_bias)  # [J, L, S]
        counts = [-(-size // self.chunk) for size in self.sizes]
        flat = [part.flatten(1)[:, :size] for part, size in zip(chunks.split(counts, 1), self.sizes, strict=True)]
        return torch.cat(flat, 1), states.flatten(1)

    @torch.no_grad()
    def grow(self, units: int, generator: torch.Generator) -> None:
        """Add hidden units; what is generated stays the same.

        The old units and the outputs do not see the new ones at first (zero columns), the new ones see all.

        Args:
            units: how many.
            generator: of the new rows of weights.
        """
        old, new = self.hidden, self.hidden + units
        bound = 1 / math.sqrt(new)

        def rows(weight: Tensor, columns: int) -> Tensor:
            more = torch.empty(4, units, columns).uniform_(-bound, bound, generator=generator).to(weight)
            return torch.cat([weight.view(4, old, columns), more], 1).flatten(0, 1)

        w_in = rows(self.w_in, self.w_in.shape[1])
        w_state = rows(F.pad(self.w_state, [0, units]), new)
        bias = F.pad(self.bias.view(4, old), [0, units]).flatten()
        out_weight = F.pad(self.out_weight, [0, units])
        self._resize(new)
        for parameter, value in (
            (self.w_in, w_in),
            (self.w_state, w_state),
            (self.bias, bias),
            (self.out_weight, out_weight),
        ):
            parameter.copy_(value)

    def _resize(self, hidden: int) -> None:
        like, self.hidden = self.w_in, hidden

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_zeros(shape, requires_grad=False))

        self.w_in, self.w_state = empty(4 * hidden, like.shape[1]), empty(4 * hidden, hidden)
        self.bias, self.out_weight = empty(4 * hidden), empty(self.chunk, hidden)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}w_state")
        if saved is not None and saved.shape[1] != self.hidden:  # it had grown
            self._resize(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)
