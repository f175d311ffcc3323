"""Griffin's recurrent block (De et al. 2024): a short convolution and the RG-LRU, beside a gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.kernels.diagonal import rg_lru
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.shift import CausalConv


class RGLRU(Mixer):
    """Real-gated linear recurrent unit within its block: out( GeLU(W_1 x) * recurrence( conv(W_2 x) ) ).

    With u the output of the convolution, r = sigmoid(W_a u + b_a) and i = sigmoid(W_x u + b_x),

        log a = -8 * r * softplus(-Lambda),    h = a * h + sqrt(1 - a^2) * (i * u).

    Soham De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    2024, arXiv 2402.19427, sections 2.3 and 2.4. W_a and W_x are block-diagonal, as in the authors' code. The state is
    (h [B, R], the last inputs of the convolution [B, size - 1, R]). At the first step of a sequence the factor
    sqrt(1 - a^2) is left out, as in the authors' code and not in the paper: a state of zeros is not the same as none.

    At initialisation a at r = 1 is uniform in 0.9..0.999 in each channel (the paper) and gate biases are 0; weights
    of matrices are normal with variance 1 / inputs, those of the convolution as in `CausalConv`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        recurrent: R, width of the recurrence; None for the paper's 4/3 H, rounded up to a multiple of `blocks`.
        blocks: number of blocks on the diagonals of W_a and W_x.
        size: steps that the convolution sees.
        slowest: largest a at r = 1 at initialisation.
        fastest: smallest a at r = 1 at initialisation.

    Raises:
        ValueError: `recurrent` is not a multiple of `blocks`; not 0 < fastest < slowest < 1; a size below 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        recurrent: int | None = None,
        blocks: int = 16,
        size: int = 4,
        slowest: float = 0.999,
        fastest: float = 0.9,
    ) -> None:
        super().__init__()
        if recurrent is None and blocks >= 1:
            recurrent = -(-4 * hidden // (3 * blocks)) * blocks
        if recurrent is None or blocks < 1 or recurrent < 1 or recurrent % blocks:
            raise ValueError(
                f"blocks: got {blocks} with recurrent={recurrent}; recurrent must be a multiple of blocks, both at "
                "least 1: change either, or set recurrent to null."
            )
        if not 0 < fastest < slowest < 1:
            raise ValueError(f"fastest: got {fastest} with slowest={slowest}; allowed is 0 < fastest < slowest < 1.")
        self.width, self.blocks = hidden, blocks
        part = recurrent // blocks
        self.gate = nn.Linear(features, recurrent)
        self.enter = nn.Linear(features, recurrent)
        self.conv = CausalConv(recurrent, size)
        self.gates = nn.Parameter(torch.randn(blocks, part, 2 * part) / math.sqrt(part))  # W_a and W_x
        self.gate_biases = nn.Parameter(torch.zeros(blocks, 2 * part))
        # a = exp(-8 softplus(decay)) at r = 1, decay being -Lambda.
        rate = -torch.empty(recurrent).uniform_(fastest, slowest).log() / 8
        self.decay = nn.Parameter(rate.expm1().log())
        self.leave = nn.Linear(recurrent, hidden)
        for one in (self.gate, self.enter, self.leave):
            nn.init.normal_(one.weight, std=one.in_features**-0.5)
            nn.init.zeros_(one.bias)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        h, seen = (None, None) if state is None else state
        u, seen = self.conv(self.enter(x), seen, reset)
        gates = torch.einsum("btni,nij->btnj", u.unflatten(-1, (self.blocks, -1)), self.gates) + self.gate_biases
        recurrence, admit = (g.flatten(-2) for g in gates.chunk(2, -1))
        y, (h,) = rg_lru(recurrence, admit, u, self.decay, None if h is None else (h,), reset)
        return self.leave(F.gelu(self.gate(x)) * y), (h, seen)
