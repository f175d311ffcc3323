"""Diagonal state space model S4D (Gu et al. 2022), of the family of LSSL and S4, as a recurrence and by chunks.

Letters: B batch, T time, D features, H hidden, N complex states a channel, L steps a chunk.
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

INITIALISATIONS = ("lin", "inv", "real")
DISCRETISATIONS = ("zoh", "bilinear")
CHUNK = 32
"""Chunk length L: within a chunk the convolution is a matrix product with L^2 / 2 useful products a channel."""


class S4D(Mixer):
    """State space of N complex oscillators a channel: s' = A s + u, y = 2 Re(C s) + skip * u, glu.

    Albert Gu, Ankit Gupta, Karan Goel, Christopher Re, "On the Parameterization and Initialization of Diagonal State
    Space Models", 2022, arXiv 2206.11893. Sampled with the channel's step dt, s_t = a s_{t-1} + b u_t with

        zoh (zero-order hold):  a = exp(dt A),                       b = (a - 1) / A
        bilinear:               a = (1 + dt A / 2) / (1 - dt A / 2), b = dt / (1 - dt A / 2)

    B is 1 (the paper's choice where C is learned); real parts of A are -exp of a parameter, so negative. At
    initialisation (section 4) A_n = -1/2 + i pi n ("lin"), -1/2 + i N'/pi (N'/(2n + 1) - 1) with N' = 2 N ("inv"), or
    -(n + 1) ("real": no oscillation, and an imaginary part that starts at 0); dt is log-uniform in dt_min..dt_max, C
    standard normal in each part with variance 1/2, the skip weights standard normal.

    Without resets the outputs are computed by chunks of L steps: a convolution (a matrix product with the kernel)
    within a chunk, and a recurrence from chunk to chunk; one state a chunk is stored. With resets it is a recurrence
    over all steps, which costs about ten times as much and stores one state a step. There is no FFT, by which later
    inputs would leak into earlier outputs by rounding.

    The state is (s,), [B, H N, 2], real and imaginary part, after the last of the T steps, padding included.

    Args:
        features: D, width of the inputs; where it is not H, a linear layer comes first.
        hidden: H, width of the outputs, and number of channels.
        states: N complex states a channel: half of the paper's N, whose states come in conjugate pairs.
        init: "lin", "inv" or "real".
        discretisation: "zoh" or "bilinear".
        dt_min: smallest step at initialisation.
        dt_max: largest step at initialisation.
        glu: False leaves out the nonlinearity after the recurrence: y is the output.

    Raises:
        ValueError: an unknown initialisation or discretisation; states below 1; not 0 < dt_min <= dt_max.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        states: int = 32,
        init: str = "lin",
        discretisation: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        glu: bool = True,
    ) -> None:
        super().__init__()
        checks.one_of("init", init, INITIALISATIONS)
        checks.one_of("discretisation", discretisation, DISCRETISATIONS)
        checks.at_least(1, states=states)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min: got {dt_min} with dt_max={dt_max}; allowed is 0 < dt_min <= dt_max.")
        self.width, self.states, self.discretisation = hidden, states, discretisation
        self.enter = nn.Linear(features, hidden) if features != hidden else None
        n = torch.arange(states, dtype=torch.float64)
        real = n + 1 if init == "real" else torch.full_like(n, 0.5)
        imaginary = {
            "lin": math.pi * n,
            "inv": 2 * states / math.pi * (2 * states / (2 * n + 1) - 1),
            "real": torch.zeros_like(n),
        }[init]
        self.log_decay = nn.Parameter(real.log().float().repeat(hidden, 1))
        self.frequency = nn.Parameter(imaginary.float().repeat(hidden, 1))
        self.log_dt = nn.Parameter(torch.empty(hidden).uniform_(math.log(dt_min), math.log(dt_max)))
        self.c = nn.Parameter(torch.randn(hidden, states, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(hidden))
        self.mix = nn.Linear(hidden, 2 * hidden) if glu else None

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        u = x if self.enter is None else self.enter(x)
        wide = state_dtype(x)
        v, (log_a, b), c = u.to(wide), self._sampled(wide), 2 * torch.view_as_complex(self.c.to(wide))
        s = None if state is None else torch.view_as_complex(state[0].contiguous())
        with torch.autocast(x.device.type, enabled=False):
            y, s = self._recur(v, log_a, b, c, s, reset)
        y = y.to(u.dtype) + self.skip * u
        return (y if self.mix is None else F.glu(self.mix(F.gelu(y)))), (torch.view_as_real(s),)

    def _recur(
        self, v: Tensor, log_a: Tensor, b: Tensor, c: Tensor, s: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs y [B, T, H] and the last states [B, H N], of inputs in single precision at least."""
        if reset is not None:
            y, s = self._by_step(v, log_a, b, c, s, reset)
        elif v.shape[1] <= CHUNK:
            y, s = self._by_chunk(v, v.shape[1], log_a, b, c, s)
        else:
            rest = v.shape[1] % CHUNK
            y, s = self._by_chunk(v[:, : v.shape[1] - rest], CHUNK, log_a, b, c, s)
            if rest:
                late, s = self._by_chunk(v[:, -rest:], rest, log_a, b, c, s)
                y = torch.cat([y, late], 1)
        return y, s

    def _sampled(self, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Complex log a and b [H, N]."""
        exponent = torch.complex(-self.log_decay.to(wide).exp(), self.frequency.to(wide))
        dt = self.log_dt.to(wide).exp()[:, None]
        if self.discretisation == "zoh":
            return dt * exponent, torch.expm1(dt * exponent) / exponent
        half = dt * exponent / 2
        # Where 1 + half is 0 the state lasts one step; the logarithm of 0 would make NaN of its power 0.
        above = torch.where(half == -1, 1e-20, 1 + half)
        return torch.log(above / (1 - half)), dt / (1 - half)

    def _by_step(
        self, u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over all steps: y [B, T, H] and the last states [B, H N]."""
        given = (u[..., None] * b).flatten(-2)
        s, (last,) = constant_scan(given, log_a.exp().flatten(), None if initial is None else (initial,), reset)
        return (s.unflatten(-1, c.shape) * c).sum(-1).real, last

    def _by_chunk(
        self, u: Tensor, size: int, log_a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same without resets, T being a multiple of `size`: y [B, T, H] and the last states [B, H N]."""
        rows, steps, hidden = u.shape
        chunks = steps // size
        powers = torch.exp(log_a[..., None] * torch.arange(size + 1, device=u.device))  # [H, N, size + 1]
        within = u.reshape(rows * chunks, size, hidden).permute(2, 1, 0)  # [H, size, B chunks]

        # What a chunk adds to the states, and the states after each chunk.
        add = _parts(powers[..., :size].flip(-1) * b[..., None], 1)
        given = (add @ within).unflatten(1, (-1, 2)).permute(3, 0, 1, 2).contiguous()
        given = torch.view_as_complex(given).reshape(rows, chunks, -1)
        decay = powers[..., size].flatten()
        s, (last,) = constant_scan(given, decay, None if initial is None else (initial,))
        first = torch.zeros_like(s[:, :1]) if initial is None else initial[:, None]
        before = torch.cat([first, s[:, :-1]], 1).reshape(rows * chunks, hidden, -1).permute(1, 2, 0)

        # The convolution within a chunk, and what the states before it give.
        kernel = torch.einsum("hn,hnt->ht", c * b, powers[..., :size]).real
        lag = torch.arange(size, device=u.device)[:, None] - torch.arange(size, device=u.device)
        convolve = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0)  # [H, size, size]
        read = _parts((c[..., None] * powers[..., 1:]).conj(), 1).mT
        y = torch.cat([convolve, read], -1) @ torch.cat([within, _parts(before, 1)], 1)
        return y.permute(2, 1, 0).reshape(rows, steps, hidden), last


def _parts(z: Tensor, dim: int) -> Tensor:
    """Real and imaginary parts of a complex tensor in turn along `dim`, which becomes twice as long."""
    return torch.stack([z.real, z.imag], dim + 1).flatten(dim, dim + 1)
