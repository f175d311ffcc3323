"""RWKV-6 time mixing (Peng et al. 2024, "Finch"): a matrix memory that forgets each key feature by the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.matrix_state import matrix_state
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import HeadNorm, head_width
from clplat.learners.mixers.shift import shifted


class RWKV6(Mixer):
    """Time mixing of Finch: token shift by the input, a decay for every key feature, a bonus for now.

    Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (2024, arXiv 2404.05892),
    section 4. With d_t = x_{t-1} - x_t (x_0 is 0), for each of w, k, v, r, g:

        z = x_t + d_t * mu_x
        x_t^w = x_t + d_t * (mu_w + B_w tanh(A_w z))            likewise x^k, x^v, x^r, x^g
        w_t = exp(-exp(mu_decay + B tanh(A x_t^w)))             in 0..1, [N, K]
        r, k, v, g = W_r x_t^r, W_k x_t^k, W_v x_t^v, W_g x_t^g
        o_t = (S_{t-1} + diag(u) k v^T)^T r,      S_t = diag(w_t) S_{t-1} + k v^T
        y_t = W_o ( swish(g) * GroupNorm(o_t) )

    mu, mu_decay, u and the two-step maps start as those of a layer in the authors' code (A at 0, B within 0.01, eps of
    the normalisation 64e-5); W start as torch's linear maps do, which is not theirs (some of theirs start at 0). The
    paper's channel mixing is not part of this: the net's dense branch takes its place. K = V = H / heads.

    The state is (S [B, N, K, V], x_T [B, D]).

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        heads: N; `hidden` must be a multiple of it.
        mix_rank: width of tanh(A z).
        decay_rank: width within the decay's map.
        place: of this layer in the net, from 0, the first, to nearly 1, the last, for the initialisation only. The layers of a net
            are made alike here, in the paper each starts from its own place.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`; a rank below 1; a place outside 0..1 or equal to 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        heads: int = 4,
        mix_rank: int = 32,
        decay_rank: int = 64,
        place: float = 0.0,
    ) -> None:
        super().__init__()
        key = head_width(hidden, heads)
        checks.at_least(1, mix_rank=mix_rank, decay_rank=decay_rank)
        checks.within(0, 1, "from the first layer to the last", below=True, place=place)
        self.width, self.heads = hidden, heads
        self.receptance, self.key, self.value, self.gate = (nn.Linear(features, hidden, bias=False) for _ in range(4))
        self.norm = HeadNorm(heads, key, eps=64e-5)
        self.out = nn.Linear(hidden, hidden, bias=False)

        channel = torch.arange(features) / features
        early = 1 - channel ** (1 - place)
        half = 1 - channel ** (0.5 * (1 - place))
        self.mix = nn.Parameter(early.clone())
        self.mixes = nn.Parameter(torch.stack([early, early, early - 0.3 * place, half, half]))  # w, k, v, r, g
        self.mix_down = nn.Parameter(torch.zeros(features, 5 * mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, features).uniform_(-0.01, 0.01))
        along = torch.arange(hidden) / max(hidden - 1, 1)
        self.decay = nn.Parameter(-6 + 5 * along ** (0.7 + 1.3 * place))
        self.decay_down = nn.Parameter(torch.zeros(features, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, hidden).uniform_(-0.01, 0.01))
        zigzag = 0.1 * ((torch.arange(hidden) + 1) % 3 - 1)
        self.bonus = nn.Parameter((place * (1 - along) + zigzag).view(heads, key))

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        previous, last = shifted(x, None if state is None else state[1], reset)
        apart = previous - x
        low = torch.tanh((x + apart * self.mix) @ self.mix_down).unflatten(-1, (5, -1))
        more = torch.einsum("btsr,srd->sbtd", low, self.mix_up)
        for_w, for_k, for_v, for_r, for_g = x + apart * (self.mixes[:, None, None] + more)
        # exp(decay) in at least single precision: exponents of half precision lose the slow decays.
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = -(self.decay + torch.tanh(for_w @ self.decay_down) @ self.decay_up).to(wide).exp()
        r, k, v, decay = (
            p.unflatten(-1, (self.heads, -1))
            for p in (self.receptance(for_r), self.key(for_k), self.value(for_v), decay)
        )
        memory = None if state is None else state[:1]
        o, (s,) = matrix_state(r, k, v, decay, memory, reset, bonus=self.bonus)
        return self.out(F.silu(self.gate(for_g)) * self.norm(o).flatten(2)), (s, last)
