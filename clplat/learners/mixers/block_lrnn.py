"""Block-diagonal linear RNN (Fan, Chi & Rudnicky 2024, arXiv 2309.07412): its transition depends on the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.kernels.block_diagonal import LARGEST, block_scan
from clplat.learners.mixers.mixer import Mixer, State

TINY = 1e-12
"""Below every column norm that a block of weights drawn at random has: a block of zeros stays one."""


class BlockLRNN(Mixer):
    """Linear recurrence h_t = A_t h_{t-1} + value(x_t) with A_t block-diagonal and made from x_t.

    The output is h (section 4 of "Advancing Regular Language Reasoning in Linear Recurrent Neural Networks").

    Each block is divided by the largest p-norm of its columns, which bounds its powers for p near 1; the paper takes
    p = 1.2. From the authors' code, not the paper: blocks and values are made by nets of two layers with a ReLU in
    between, and every column of a block has its mean taken out first. There the state of a fresh sequence is a weight;
    here it is zero. The state is (h,), [B, H].

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs, a multiple of `block`.
        block: b, rows and columns of a block, at most 8.
        norm: p, at least 1.
        centred: False leaves the means of the columns in.

    Raises:
        ValueError: `hidden` is not a multiple of `block`; `block` outside 1..8, or 1 while `centred`; p below 1.
    """

    def __init__(self, features: int, hidden: int, block: int = 8, norm: float = 1.2, centred: bool = True) -> None:
        super().__init__()
        if not 1 <= block <= LARGEST or hidden % block:
            raise ValueError(f"block: got {block} with hidden={hidden}; it must lie in 1..{LARGEST} and divide hidden.")
        if block == 1 and centred:
            raise ValueError("block: got 1 with centred=true, which leaves only zeros: set centred=false.")
        checks.at_least(1, "below it is no norm", norm=norm)
        self.width, self.block, self.norm, self.centred = hidden, block, norm, centred
        size = hidden * block
        self.transition = nn.Sequential(nn.Linear(features, size), nn.ReLU(), nn.Linear(size, size))
        self.value = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        blocks = self.transition(x).unflatten(-1, (-1, self.block, self.block))
        if self.centred:
            blocks = blocks - blocks.mean(-2, keepdim=True)
        norms = torch.linalg.vector_norm(blocks, self.norm, -2, keepdim=True)
        blocks = blocks / norms.amax(-1, keepdim=True).clamp(min=TINY)
        u = self.value(x).unflatten(-1, (-1, self.block))
        memory = None if state is None else (state[0].unflatten(-1, (-1, self.block)),)
        y, (h,) = block_scan(blocks, u, memory, reset)
        return y.flatten(2), (h.flatten(1),)
