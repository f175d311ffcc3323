"""HGRN2 (Qin et al. 2024): a gated linear recurrence whose forget gate is also its key."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.matrix_state import matrix_state
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width


class HGRN2(Mixer):
    """HGRN with a matrix state of outer products, and no more weights: the key is one minus the forget gate.

    Qin et al., "HGRN2: Gated Linear RNNs with State Expansion" (2024, arXiv 2404.07904), section 3:

        f_t = b + (1 - b) sigmoid(W_f x_t),    i_t = W_i x_t,    q_t = swish(W_q x_t)
        S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T,    o_t = S_t^T q_t,    y_t = W_o RMSNorm(o_t)

    K = V = H / heads; the normalisation is over all heads together. In the paper the lower bounds b are learnt and grow
    from layer to layer, from 0 in the first, as a cumulative softmax over all layers of the net; here b is one constant.
    That swish is on the queries alone follows public code; it was not confirmed in the paper.

    The state is (S [B, N, K, V],).

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        heads: N; `hidden` must be a multiple of it.
        lower_bound: b, in 0..1 without 1. The memory lasts longer the larger it is.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`; a bound outside 0..1.
    """

    def __init__(self, features: int, hidden: int, heads: int = 4, lower_bound: float = 0.0) -> None:
        super().__init__()
        head_width(hidden, heads)
        checks.within(0, 1, below=True, lower_bound=lower_bound)
        self.width, self.heads, self.lower_bound = hidden, heads, lower_bound
        self.project = nn.Linear(features, 3 * hidden, bias=False)  # queries, forget gates, inputs
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        q, f, i = (p.unflatten(-1, (self.heads, -1)) for p in self.project(x).chunk(3, -1))
        bound = self.lower_bound
        # 1 - f and log f, each without a difference of nearly equal numbers.
        key = (1 - bound) * torch.sigmoid(-f)
        gate = F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32)))
        if bound:
            gate = torch.logaddexp(gate + math.log1p(-bound), gate.new_tensor(math.log(bound)))
        o, state = matrix_state(F.silu(q), key, i, gate, state, reset)
        return self.out(self.norm(o.flatten(2))), state
