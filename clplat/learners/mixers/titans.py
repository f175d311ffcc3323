"""Neural memory of Titans (Behrouz et al. 2024), one matrix a head: gradient descent with momentum as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.delta import titans
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width, unit
from clplat.learners.mixers.shift import CausalConv


class Titans(Mixer):
    """Memory M, fitted to k -> v at test time by gradient descent with momentum and weight decay.

    Behrouz, Zhong & Mirrokni, "Titans: Learning to Memorize at Test Time" (2024, arXiv 2501.00663), section 3.1
    for a linear memory, and section 4.4 for the convolutions, normalisations and gate:

        q, k, v = swish(conv(W_q x)), swish(conv(W_k x)), swish(conv(W_v x));   q and k then to length 1
        alpha, eta, theta = sigmoid(W_a x_t + b_a), sigmoid(W_e x_t + b_e), sigmoid(W_t x_t + b_t)    a head
        P_t = eta P_{t-1} - theta k_t (M_{t-1}^T k_t - v_t)^T         momentum; gradient of |M^T k - v|^2 / 2
        M_t = (1 - alpha) M_{t-1} + P_t,     o_t = M_t^T q_t
        y_t = W_o ( swish(W_g x_t) * RMSNorm(o_t) )                                       the normalisation per head

    Left out: memories of more than one layer (the paper's main ones), persistent tokens, and the three ways to join
    the memory with attention (MAC, MAG, MAL): this is the memory module alone, the paper's "LMM". The gradient is
    taken at the memory of every step, not of the start of a chunk, so that cut and whole sequences are one and the
    same. The paper does not say what makes alpha, eta and theta of x: one linear map and a sigmoid here, with biases
    that let the memory last at first.

    The state is (M [B, N, K, V], P [B, N, K, V], inputs of the convolution [B, conv - 1, 3 H]). K = V = H / heads.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        heads: N; `hidden` must be a multiple of it. The paper has one memory, heads=1.
        conv: steps that the convolution sees; 1 sees the current one alone.
        forget_bias: b_a at the start.
        momentum_bias: b_e at the start.
        rate_bias: b_t at the start.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`; a convolution over less than one step.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        heads: int = 4,
        conv: int = 4,
        forget_bias: float = -4.0,
        momentum_bias: float = 0.0,
        rate_bias: float = 0.0,
    ) -> None:
        super().__init__()
        key = head_width(hidden, heads)
        checks.at_least(1, conv=conv)
        self.width, self.heads = hidden, heads
        self.project = nn.Linear(features, 3 * hidden, bias=False)  # queries, keys, values
        self.conv = CausalConv(3 * hidden, conv, bias=False)
        self.rates = nn.Linear(features, 3 * heads)  # alpha, eta, theta
        self.gate = nn.Linear(features, hidden, bias=False)
        self.norm = nn.RMSNorm(key, eps=1e-5)
        self.out = nn.Linear(hidden, hidden, bias=False)
        with torch.no_grad():
            for part, start in zip(self.rates.bias.split(heads), (forget_bias, momentum_bias, rate_bias), strict=True):
                part.fill_(start)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        seen, last = self.conv(self.project(x), None if state is None else state[2], reset)
        q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in F.silu(seen).chunk(3, -1))
        alpha, eta, theta = torch.sigmoid(self.rates(x)).chunk(3, -1)
        memory = None if state is None else state[:2]
        o, memory = titans(unit(q), unit(k), v, alpha, eta, theta, memory, reset)
        return self.out(F.silu(self.gate(x)) * self.norm(o).flatten(2)), (*memory, last)
