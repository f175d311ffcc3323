"""Linear recurrent unit (Orvieto et al. 2023): a diagonal complex recurrence, initialised on a ring.

Letters: B batch, T time, D features, H hidden, N complex states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.backend import state_dtype
from clplat.kernels.diagonal import constant_scan
from clplat.learners.mixers.mixer import Mixer, State


class LRU(Mixer):
    """Linear recurrence h = lambda * h + gamma * (B u), y = Re(C h) + skip * u, then glu(W gelu(y)).

    u is the input, or linear in it.

    Antonio Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", 2023, arXiv 2303.06349, section
    3 and appendix A: lambda = exp(-exp(nu) + i exp(theta)) is stable by construction and starts uniform on the ring
    slowest..fastest within the given phase; gamma starts at sqrt(1 - |lambda|^2), so that states are of the size of
    inputs, and is learned (its logarithm is); B starts normal with variance 1 / (2 H) in each part, C with 1 / N, the
    skip weights as standard normal.

    The state is (h,), [B, N, 2], real and imaginary part, after the last of the T steps, padding included.

    Args:
        features: D, width of the inputs; where it is not H, a linear layer comes first.
        hidden: H, width of the outputs.
        states: N, None for H.
        r_min: smallest |lambda| at initialisation.
        r_max: largest |lambda| at initialisation; close to 1 for long memories.
        max_phase: largest phase at initialisation; small for long memories.
        glu: False leaves out the nonlinearity after the recurrence: y is the output.

    Raises:
        ValueError: not 0 <= r_min < r_max <= 1; a phase outside 0..2 pi, 0 excluded; states below 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        states: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        glu: bool = True,
    ) -> None:
        super().__init__()
        states = hidden if states is None else states
        checks.at_least(1, "null is hidden", states=states)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min: got {r_min} with r_max={r_max}; allowed is 0 <= r_min < r_max <= 1.")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase: got {max_phase}, it must be above 0 and at most 2 pi.")
        self.width = hidden
        self.enter = nn.Linear(features, hidden) if features != hidden else None
        # Uniform on the ring, by area. Neither end is drawn: log log 1 and log 0 are infinite.
        area = torch.rand(states).clamp(1e-6, 1 - 1e-6) * (r_max**2 - r_min**2) + r_min**2
        self.nu = nn.Parameter((-0.5 * area.log()).log())
        self.theta = nn.Parameter((max_phase * torch.rand(states).clamp(min=1e-6)).log())
        self.log_gamma = nn.Parameter(0.5 * torch.log1p(-area))
        self.b = nn.Parameter(torch.randn(states, 2, hidden) / math.sqrt(2 * hidden))
        self.c = nn.Parameter(torch.randn(hidden, states, 2) / math.sqrt(states))
        self.skip = nn.Parameter(torch.randn(hidden))
        self.mix = nn.Linear(hidden, 2 * hidden) if glu else None

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        u = x if self.enter is None else self.enter(x)
        wide = state_dtype(x)
        decay = torch.polar(torch.exp(-torch.exp(self.nu.to(wide))), torch.exp(self.theta.to(wide)))
        b = self.log_gamma.exp()[:, None, None] * self.b
        given = F.linear(u, b.flatten(0, 1)).unflatten(-1, (-1, 2)).to(wide)
        initial = None if state is None else (torch.view_as_complex(state[0].contiguous()),)
        h, (last,) = constant_scan(torch.view_as_complex(given.contiguous()), decay, initial, reset)
        # Re(C h) = Re C Re h - Im C Im h
        c = torch.stack([self.c[..., 0], -self.c[..., 1]], -1)
        y = F.linear(torch.view_as_real(h).flatten(-2).to(u.dtype), c.flatten(1)) + self.skip * u
        return (y if self.mix is None else F.glu(self.mix(F.gelu(y)))), (torch.view_as_real(last),)
