"""Gated linear attention (Yang et al. 2023): linear attention whose key features forget by the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.matrix_state import matrix_state
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width


class GLA(Mixer):
    """Linear attention with a decay for every key feature and step, made by a map of low rank.

    Yang, Wang, Shen, Panda & Kim, "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023,
    arXiv 2312.06635), section 4.4:

        alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau)
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t / sqrt(K)
        y_t = W_o ( swish(W_r x_t + b_r) * LayerNorm(o_t) )             the normalisation per head

    K = H / (2 heads), V = H / heads. Weights start as torch's linear maps do. The state is (S [B, N, K, V],).

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        heads: N; `hidden` must be a multiple of 2 * heads.
        gate_rank: rank of W_2 W_1 (16 in the paper).
        temperature: tau; 16 in the paper, for a slow decay.

    Raises:
        ValueError: `hidden` is not a multiple of 2 * heads; a rank below 1; a temperature not above 0.
    """

    def __init__(
        self, features: int, hidden: int, heads: int = 4, gate_rank: int = 16, temperature: float = 16.0
    ) -> None:
        super().__init__()
        value = head_width(hidden, heads, parts=2)
        checks.at_least(1, gate_rank=gate_rank)
        checks.above(0, temperature=temperature)
        self.width, self.heads, self.temperature = hidden, heads, temperature
        self.sizes = [hidden // 2, hidden // 2, hidden]
        self.project = nn.Linear(features, 2 * hidden, bias=False)  # queries, keys, values
        self.decay = nn.Sequential(nn.Linear(features, gate_rank, bias=False), nn.Linear(gate_rank, hidden // 2))
        self.gate = nn.Linear(features, hidden)
        self.norm = nn.LayerNorm(value)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        decay = self.decay(x)
        decay = F.logsigmoid(decay.to(torch.promote_types(decay.dtype, torch.float32))) / self.temperature
        parts = (*self.project(x).split(self.sizes, -1), decay)
        q, k, v, decay = (p.unflatten(-1, (self.heads, -1)) for p in parts)
        o, state = matrix_state(q * q.shape[-1] ** -0.5, k, v, decay, state, reset)
        return self.out(F.silu(self.gate(x)) * self.norm(o).flatten(2)), state
