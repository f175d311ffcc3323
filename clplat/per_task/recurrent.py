"""Recurrent hypernetwork: an LSTM that generates a net's weights chunk by chunk, and can grow.

Letters: J task embeddings, E their width, P width of chunk codes, S values a chunk, L steps (one a chunk), G hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.lstm import fused_lstm
from clplat.per_task.generators import DRAWS, Generator, Piece


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
