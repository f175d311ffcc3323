"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024) and DeltaNet (Yang et al. 2024): memories that correct themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.delta import delta_rule
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width, unit
from clplat.learners.mixers.shift import CausalConv


class GatedDeltaNet(Mixer):
    """Linear memory with the delta rule: a new value for a key replaces the old one; decay by the input.

    Yang, Kautz & Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024, arXiv 2412.06464),
    equation 10 and section 3.4; with decay and output_gate off it is DeltaNet, Yang, Wang, Zhang, Shen & Kim,
    "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024, arXiv 2406.06484):

        q, k, v = swish(conv(W_q x)), swish(conv(W_k x)), swish(conv(W_v x));   q and k then to length 1
        beta_t = sigmoid(W_b x_t),     alpha_t = exp(-exp(a) softplus(W_a x_t + d))               one of each a head
        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,     o_t = S_t^T q_t / sqrt(K)
        y_t = W_o ( swish(W_g x_t) * RMSNorm(o_t) )                                       the normalisation per head

    a and d start as in Mamba-2, which the paper follows: exp(a) uniform in 0..16, softplus(d) log-uniform in
    0.001..0.1. The other weights start as torch's do. The convolution has no bias. K = H / heads.

    The state is (S [B, N, K, V], inputs of the convolution [B, conv - 1, 2 H + expansion * H]).

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs; queries and keys together have this width.
        heads: N; `hidden` must be a multiple of it.
        expansion: width of values in units of H: V = expansion * K. 2 in the paper, 1 in that of DeltaNet.
        conv: steps that the convolution sees; 1 sees the current one alone.
        decay: False sets alpha to 1.
        output_gate: False leaves out the swish gate.
        negative: True doubles beta, so that a memory can change its sign for a key (Grazzi et al. 2024,
            arXiv 2411.12537): needed to keep track of a parity.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`; a size below 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        heads: int = 4,
        expansion: int = 2,
        conv: int = 4,
        decay: bool = True,
        output_gate: bool = True,
        negative: bool = False,
    ) -> None:
        super().__init__()
        key = head_width(hidden, heads)
        checks.at_least(1, expansion=expansion, conv=conv)
        self.width, self.heads, self.largest = hidden, heads, 2.0 if negative else 1.0
        self.sizes = [hidden, hidden, expansion * hidden]
        self.project = nn.Linear(features, sum(self.sizes), bias=False)  # queries, keys, values
        self.conv = CausalConv(sum(self.sizes), conv, bias=False)
        self.beta = nn.Linear(features, heads, bias=False)
        self.alpha = nn.Linear(features, heads, bias=False) if decay else None
        if decay:
            # Not exactly 0, whose logarithm would never move.
            self.rate = nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log())
            start = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.rate_bias = nn.Parameter(start.expm1().log())  # softplus of it is `start`
        self.gate = nn.Linear(features, expansion * hidden, bias=False) if output_gate else None
        self.norm = nn.RMSNorm(expansion * key, eps=1e-5)
        self.out = nn.Linear(expansion * hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        seen, last = self.conv(self.project(x), None if state is None else state[1], reset)
        q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in F.silu(seen).split(self.sizes, -1))
        decay = None if self.alpha is None else -self.rate.exp() * F.softplus(self.alpha(x) + self.rate_bias)
        beta = self.largest * torch.sigmoid(self.beta(x))
        memory = None if state is None else state[:1]
        o, (s,) = delta_rule(unit(q) * q.shape[-1] ** -0.5, unit(k), v, beta, decay, memory, reset)
        y = self.norm(o).flatten(2)
        return self.out(y if self.gate is None else F.silu(self.gate(x)) * y), (s, last)
