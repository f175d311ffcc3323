"""Multi-scale retention (Sun et al. 2023): linear attention whose memory fades at another rate in every head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.matrix_state import matrix_state
from clplat.learners.mixers.attention import rotate
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import HeadNorm, head_width


class RetNet(Mixer):
    """Gated multi-scale retention: linear attention with rotary positions and one fixed decay a head.

    Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (2023, arXiv 2307.08621),
    equations 5, 6 and 8, for head h = 0, 1, ...:

        gamma_h = 1 - 2^(-5-h)
        o_t = sum_{s <= t} gamma_h^(t-s) (rot_t q_t . rot_s k_s) v_s / sqrt(K)
        y_t = W_O ( swish(W_G x_t) * GroupNorm(o)_t )

    Every product depends on t - s alone, so the state (S [B, N, K, V],) has its keys turned as seen from the last
    step, and holds no position: it can go on for ever without large angles, and a reset changes none. The normalisation
    has no weights of its own, as in the authors' code. Weights start as there: Xavier with gain 2^-2.5, the output 2^-1.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs; queries and keys together have this width: K = H / heads.
        heads: N; `hidden` must be a multiple of 2 * heads.
        expansion: width of values and of the swish gate in units of H (2 in the paper): V = expansion * K.
        base: of the rotary positions.

    Raises:
        ValueError: `hidden` is not a multiple of 2 * heads; an expansion below 1.
    """

    exponent: Tensor

    def __init__(self, features: int, hidden: int, heads: int = 4, expansion: int = 2, base: float = 10_000.0) -> None:
        super().__init__()
        head_width(hidden, heads, parts=2)
        checks.at_least(1, expansion=expansion)
        checks.above(0, base=base)
        self.width, self.heads, self.base = hidden, heads, base
        self.sizes = [hidden, hidden, expansion * hidden, expansion * hidden]
        self.project = nn.Linear(features, sum(self.sizes), bias=False)  # queries, keys, values, gate
        self.norm = HeadNorm(heads, expansion * hidden // heads, weight=False, bias=False)
        self.out = nn.Linear(expansion * hidden, hidden, bias=False)
        # Integers: a module in half precision would round gammas of late heads to 1.
        self.register_buffer("exponent", 5 + torch.arange(heads), persistent=False)
        for part in self.project.weight.detach().split(self.sizes):
            nn.init.xavier_uniform_(part, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight, gain=0.5)

    @property
    def gamma(self) -> Tensor:
        """Decays [N], in single precision at least."""
        return 1 - 2.0 ** -self.exponent.to(torch.promote_types(self.out.weight.dtype, torch.float32))

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        steps = x.shape[1]
        q, k, v, gate = (p.unflatten(-1, (self.heads, -1)) for p in self.project(x).split(self.sizes, -1))
        position = torch.arange(1, steps + 1, device=x.device)[:, None]
        q, k = rotate(q, position, self.base) * q.shape[-1] ** -0.5, rotate(k, position, self.base)
        o, (s,) = matrix_state(q, k, v, self.gamma.log(), state, reset)
        seen = rotate(s.transpose(-1, -2), -position[-1], self.base).transpose(-1, -2)
        return self.out((F.silu(gate) * self.norm(o)).flatten(2)), (seen,)
