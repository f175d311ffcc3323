"""Minimal GRU (Feng et al. 2024): gates do not see the state, so all steps are one linear recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat.kernels.diagonal import min_gru
from clplat.learners.mixers.mixer import Mixer, State


class MinGRU(Mixer):
    """MinGRU layer: h = (1 - z) * h + z * candidate, z = sigmoid(W_z x_t + b_z), candidate = W_h x_t + b_h.

    Leo Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201, section 3.1; the output is h. The state is
    (h,), [B, H], after the last of the T steps, padding included; a fresh one is zero. Weights start as those of
    `nn.Linear`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        positive: True passes the candidate through `positive`, as the paper's form in log space does (appendix B).
            The paper also passes a given initial state through it; here a state is what an earlier call returned, and
            is positive already.
    """

    def __init__(self, features: int, hidden: int, positive: bool = False) -> None:
        super().__init__()
        self.width, self.positive = hidden, positive
        self.project = nn.Linear(features, 2 * hidden)  # gate, candidate

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        gate, candidate = self.project(x).chunk(2, -1)
        candidate = positive(candidate) if self.positive else candidate
        return min_gru(gate, candidate, state, reset)


def positive(x: Tensor) -> Tensor:
    """Positive map: x + 0.5 where x >= 0, sigmoid(x) elsewhere; continuous, increasing (appendix B.3)."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))
