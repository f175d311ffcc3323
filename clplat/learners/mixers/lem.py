"""Long Expressive Memory (Rusch, Mishra, Erichson & Mahoney 2022, arXiv 2110.04744)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.mixer import Mixer, State


class LEM(Mixer):
    """Long expressive memory: two states with learned time steps, from a system of ODEs (equation 3):

        g = dt sigmoid(W_1 y + V_1 x + b_1)         z' = (1 - g) z + g tanh(W_z y + V_z x + b_z)
        k = dt sigmoid(W_2 y + V_2 x + b_2)         y' = (1 - k) y + k tanh(W_y z' + V_y x + b_y)

    The output is y, the state (y, z), both [B, H]. All weights start uniform within 1 / sqrt(H), as in the authors'
    code (tk-rusch/LEM); the paper does not say.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the states and of the outputs.
        dt: the largest time step, above 0; a hyperparameter of the paper, at most 1 there.
    """

    def __init__(self, features: int, hidden: int, dt: float = 1.0) -> None:
        super().__init__()
        checks.above(0, "at most 1 in the paper", dt=dt)
        self.width, self.dt = hidden, dt
        self.input = nn.Linear(features, 4 * hidden)
        self.recurrent = nn.Parameter(torch.empty(4, hidden, hidden))  # [gate, in, out]: 1, 2, z, y
        for p in self.parameters():
            nn.init.uniform_(p, -(hidden**-0.5), hidden**-0.5)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, last = cells.lem(
            self.input(x).unflatten(-1, (1, 4, self.width)),
            self.recurrent[None],
            None if state is None else tuple(s[:, None] for s in state),
            reset,
            dt=self.dt,
        )
        return y[:, :, 0], tuple(s[:, 0] for s in last)
