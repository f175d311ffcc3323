"""Minimal LSTM (Feng et al. 2024): gates do not see the state, so all steps are one linear recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat.kernels.diagonal import min_lstm
from clplat.learners.mixers.min_gru import positive
from clplat.learners.mixers.mixer import Mixer, State


class MinLSTM(Mixer):
    """MinLSTM layer: h = f / (f + i) * h + i / (f + i) * candidate, f and i sigmoids, linear in x_t.

    Leo Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201, section 3.2, with the gates normalised to sum
    to one; the output is h. The state is (h,), [B, H], after the last of the T steps, padding included; a fresh one is
    zero. Weights start as those of `nn.Linear`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        positive: True passes the candidate through `clplat.learners.mixers.min_gru.positive`, as the paper's form in
            log space does (appendix B). The paper also passes a given initial state through it; here a state is what
            an earlier call returned, and is positive already.
        forget_bias: added to the bias of f at initialisation; above 0 keeps the memory longer at the start of
            training.
    """

    def __init__(self, features: int, hidden: int, positive: bool = False, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.width, self.positive = hidden, positive
        self.project = nn.Linear(features, 3 * hidden)  # forget gate, input gate, candidate
        with torch.no_grad():
            self.project.bias[:hidden] += forget_bias

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        forget, admit, candidate = self.project(x).chunk(3, -1)
        candidate = positive(candidate) if self.positive else candidate
        return min_lstm(forget, admit, candidate, state, reset)
