"""Mamba (Gu & Dao 2023, "Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.selective import selective_scan
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.shift import CausalConv


class Mamba(Mixer):
    """Mamba's block without norm and residual: projection, convolution, selective scan, gate, projection.

    With E = expand * H channels and S states a channel (section 3.4, figure 3; algorithm 2):

        u, z = W_in x,      u = silu(conv(u)),      (r, b, c) = W_x u,      dt = softplus(W_dt r + bias)
        y = W_out (scan(u, dt, b, c; -exp(log_rate), skip) * silu(z))

    The state is (the convolution's [B, size - 1, E], h [B, E, S]). Initialisation: the rates are 1..S in every channel
    (S4D-Real, section 3.6), `skip` is 1, and the steps dt at a zero input are log-uniform in dt_min..dt_max; W_dt is
    uniform within rank^-0.5.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        states: S.
        expand: E / H.
        conv: steps that the convolution sees.
        rank: of the projection to dt; 0 takes H / 16, rounded up.
        dt_min: the smallest step at initialisation.
        dt_max: the largest.

    Raises:
        ValueError: a size below 1; steps that are not 0 < dt_min <= dt_max.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        rank: int = 0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        checks.at_least(1, states=states, expand=expand, conv=conv)
        checks.at_least(0, "0 chooses it", rank=rank)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min: got {dt_min} with dt_max={dt_max}; allowed is 0 < dt_min <= dt_max.")
        inner = expand * hidden
        self.width, self.inner, self.states, self.rank = hidden, inner, states, rank or math.ceil(hidden / 16)
        self.project = nn.Linear(features, 2 * inner, bias=False)  # u, z
        self.conv = CausalConv(inner, conv)
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.step_size = nn.Linear(self.rank, inner)
        self.log_rate = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, hidden, bias=False)
        nn.init.uniform_(self.step_size.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.empty(inner).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=min(1e-4, dt_min))
        with torch.no_grad():
            self.step_size.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        seen, memory = (None, None) if state is None else (state[0], state[1:])
        u, z = self.project(x).chunk(2, -1)
        u, seen = self.conv(u, seen, reset)
        u = F.silu(u)
        r, b, c = self.select(u).split([self.rank, self.states, self.states], -1)
        dt = F.softplus(self.step_size(r))
        y, memory = selective_scan(u, dt, b, c, -self.log_rate.exp(), self.skip, memory, reset)
        return self.out(y * F.silu(z)), (seen, *memory)
