"""mLSTM (Beck et al. 2024, xLSTM): an LSTM with a matrix for a memory and an exponential input gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.matrix_state import mlstm
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import HeadNorm, head_width
from clplat.learners.mixers.shift import CausalConv


class MLSTM(Mixer):
    """Inside of an mLSTM block, projections included; the residual and the norm before it are the net's.

    Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024, arXiv 2405.04517), section 2.3 and the figure of the
    mLSTM block in the appendix. With E = expansion * H:

        [u, z] = W_up x,      c = swish(conv(u)),      q = W_q c,  k = W_k c / sqrt(K),  v = W_v u
        i, f = w_i [q, k, v] + b_i,  w_f [q, k, v] + b_f        one of each a head; k here without the 1 / sqrt(K)
        C_t = sigmoid(f) C_{t-1} + exp(i) k v^T,   n_t = sigmoid(f) n_{t-1} + exp(i) k
        h_t = C_t^T q / max(|n_t . q|, 1)
        y = W_down ( swish(z) * ( GroupNorm(h) + skip * c ) )

    W_q, W_k and W_v are block-diagonal. The input gate is exponential, the forget gate a sigmoid (the paper allows
    either for the latter). As in the authors' code: the scale of the group normalisation is learnt, a shift there is
    none; gates start without weights, b_f evenly spread over the heads, b_i normal with deviation 0.1;
    W_up, W_q, W_k, W_v start normal with variance 2 / (5 H), W_down with deviation 2 / (depth sqrt(H)).

    The state is (C [B, N, K, K], n [B, N, K], m [B, N], inputs of the convolution [B, conv - 1, E]), C and n divided by
    exp(m); see `clplat.kernels.matrix_state.mlstm`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs.
        heads: N; expansion * hidden must be a multiple of it.
        expansion: of the inner width, in units of H.
        conv: steps that the convolution sees.
        block: width of the blocks of W_q, W_k and W_v; expansion * hidden must be a multiple of it.
        forget_bias: b_f of the first and of the last head.
        input_bias: added to b_i; -10 is the start of later, larger xLSTM.
        depth: number of blocks of the net, for the initialisation only.

    Raises:
        ValueError: widths that do not fit, or a size below 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        heads: int = 4,
        expansion: int = 2,
        conv: int = 4,
        block: int = 4,
        forget_bias: tuple[float, float] = (3.0, 6.0),
        input_bias: float = 0.0,
        depth: int = 2,
    ) -> None:
        super().__init__()
        checks.at_least(1, expansion=expansion, conv=conv, block=block, depth=depth)
        inner = expansion * hidden
        head_width(inner, heads, name="expansion * hidden")
        if inner % block:
            raise ValueError(f"block: got {block} with expansion * hidden={inner}; it must divide that: change either.")
        self.width, self.heads, self.block = hidden, heads, block
        self.up = nn.Linear(features, 2 * inner, bias=False)
        self.conv = CausalConv(inner, conv)
        self.queries, self.keys, self.values = (
            nn.Parameter(torch.empty(inner // block, block, block)) for _ in range(3)
        )
        self.gates = nn.Linear(3 * inner, 2 * heads)  # input gates, forget gates
        self.norm = HeadNorm(heads, inner // heads, bias=False)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, hidden, bias=False)
        for weight in (self.up.weight, self.queries, self.keys, self.values):
            nn.init.normal_(weight, std=(2 / (5 * hidden)) ** 0.5)
        nn.init.normal_(self.down.weight, std=2 / depth / hidden**0.5)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[:heads].normal_(input_bias, 0.1)
            self.gates.bias[heads:] = torch.linspace(*forget_bias, heads)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        u, z = self.up(x).chunk(2, -1)
        seen, last = self.conv(u, None if state is None else state[3], reset)
        c = F.silu(seen)
        q, k, v = self._blocks(c, self.queries), self._blocks(c, self.keys), self._blocks(u, self.values)
        i, f = self.gates(torch.cat([q, k, v], -1)).chunk(2, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in (q, k, v))
        h, memory = mlstm(q, k * k.shape[-1] ** -0.5, v, i, f, None if state is None else state[:3], reset)
        h = self.norm(h).flatten(2) + self.skip * c
        return self.down(F.silu(z) * h), (*memory, last)

    def _blocks(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("btgi,goi->btgo", x.unflatten(-1, (-1, self.block)), weight).flatten(2)
