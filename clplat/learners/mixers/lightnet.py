"""LightNet's additive recurrence (Qin et al. 2024): softmax weights over the past, one softmax a key feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.matrix_state import matrix_state
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width

EMPTY = -1e30
"""Logarithm of a sum of nothing: finite, so that no difference of two of them is NaN."""


def running_logsumexp(x: Tensor, before: Tensor, reset: Tensor) -> Tensor:
    """Running log(exp(before) + sum_{s <= t} exp(x_s)), [B, T, D], over the steps since the latest reset.

    Doubles the span log2(T) times, each time over the whole sequence: differences of sums, which cancel, do not occur.

    Args:
        x: [B, T, D].
        before: [B, D] of the steps before this call.
        reset: [B, T] bool, True where the sum starts anew.
    """
    total = torch.cat([before[:, None], x], 1)
    # Whether the span summed so far reaches back to a start: then nothing earlier belongs to it.
    whole = F.pad(reset, (1, 0), value=True)[..., None]
    span = 1
    while span < total.shape[1]:
        earlier = total[:, :-span].masked_fill(whole[:, span:], EMPTY)
        total = torch.cat([total[:, :span], torch.logaddexp(total[:, span:], earlier)], 1)
        whole = torch.cat([whole[:, :span], whole[:, span:] | whole[:, :-span]], 1)
        span *= 2
    return total[:, 1:]


class LightNet(Mixer):
    """Linear attention with an additive decay: the memory is a mean of the past, weighted by exp(k).

    Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet" (2024,
    arXiv 2405.21022), for sequences of one dimension. With q = swish(W_q x), k = W_k x, v = W_v x:

        z_t = log sum_{s <= t} exp(k_s)                                  each key feature on its own
        S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T,   o_t = S_t^T q_t
        y_t = W_o ( swish(W_2 W_1 x_t) * RMSNorm(o_t) )

    The two factors of a step add up to 1 and are computed as sigmoids of z_{t-1} - k_t and its negative. K = V =
    H / heads; the normalisation is over all heads together; both it and the gate of low rank follow public code
    and were not confirmed in the paper. Positions of several dimensions (MD-TPE) are left out.

    The state is (S [B, N, K, V], z [B, N, K]).

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        heads: N; `hidden` must be a multiple of it.
        gate_rank: rank of W_2 W_1.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`; a rank below 1.
    """

    def __init__(self, features: int, hidden: int, heads: int = 4, gate_rank: int = 32) -> None:
        super().__init__()
        head_width(hidden, heads)
        checks.at_least(1, gate_rank=gate_rank)
        self.width, self.heads = hidden, heads
        self.project = nn.Linear(features, 3 * hidden, bias=False)  # queries, keys, values
        self.gate = nn.Sequential(nn.Linear(features, gate_rank, bias=False), nn.Linear(gate_rank, hidden, bias=False))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        q, k, v = self.project(x).chunk(3, -1)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        if reset is None:
            reset = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if state is None:
            memory, before = None, torch.zeros_like(k[:, 0])
            # A start in place of a z of -inf: the factors of the first step are then 0 and 1 without a special case.
            reset = torch.cat([torch.ones_like(reset[:, :1]), reset[:, 1:]], 1)
        else:
            memory, before = state[:1], state[1].flatten(1).to(k.dtype)
        z = running_logsumexp(k, before, reset)
        apart = torch.cat([before[:, None], z[:, :-1]], 1) - k
        # 0, not the -inf of an empty sum: the memory before a start is not read, and its decay must stay finite.
        decay = F.logsigmoid(apart).masked_fill(reset[..., None], 0)
        weight = torch.sigmoid(-apart).masked_fill(reset[..., None], 1).to(q.dtype)
        q, weight, v, decay = (p.unflatten(-1, (self.heads, -1)) for p in (F.silu(q), weight, v, decay))
        o, (s,) = matrix_state(q, weight, v, decay, memory, reset)
        y = self.out(F.silu(self.gate(x)) * self.norm(o.flatten(2)))
        return y, (s, z[:, -1].unflatten(-1, (self.heads, -1)))
