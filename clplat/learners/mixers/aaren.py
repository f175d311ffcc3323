"""Aaren: attention of one learned query as a recurrence (Feng et al. 2024, arXiv 2405.13956)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.kernels.softmax_scan import softmax_scan
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width


class Aaren(Mixer):
    """Causal attention of one learned query, with many heads and constant memory a step.

    At every step the query attends to all inputs so far (sections 3.1 and 3.3):

        q = W_q token,  k_t = W_k x_t,  v_t = W_v x_t,      y_t = W_o concat_n softmax_{s<=t}(q_n . k_s,n / sqrt(d)) v_s,n

    From "Attention as an RNN". The state is (l, o) of `clplat.kernels.softmax_scan`: [B, N] and [B, N, d], d = H / N. The paper gives neither the
    token's initialisation nor biases: the token is drawn from a normal distribution, and there are no biases. The
    paper's blocks are those of a transformer, with a dense branch.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs, a multiple of heads.
        heads: N.
        query_std: standard deviation of the token at initialisation; 1 is the size of normalised inputs.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`; a negative `query_std`.
    """

    def __init__(self, features: int, hidden: int, heads: int = 4, query_std: float = 1.0) -> None:
        super().__init__()
        head_width(hidden, heads)
        checks.at_least(0, query_std=query_std)
        self.width, self.heads = hidden, heads
        self.token = nn.Parameter(query_std * torch.randn(features))
        self.query = nn.Linear(features, hidden, bias=False)
        self.project = nn.Linear(features, 2 * hidden, bias=False)  # keys, values
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        k, v = self.project(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.query(self.token).view(self.heads, -1)
        scores = (k * q).sum(-1) * q.shape[-1] ** -0.5
        y, state = softmax_scan(scores, v, state, reset)
        return self.out(y.flatten(2)), state
