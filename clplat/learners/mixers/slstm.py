"""sLSTM (Beck et al. 2024, arXiv 2405.04517): exponential gates, a normaliser, memory mixing by heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.shift import CausalConv


class SLSTM(Mixer):
    """sLSTM of an xLSTM block: convolution, gates, recurrence, normalisation of each head.

        x' = swish(conv(x))
        i, f from W x' + R h + b, z, o from W x + R h + b             (R block-diagonal, one block a head)
        c = f c + exp(i) tanh(z),   n = f n + exp(i),   h = sigmoid(o) c / n,   y = weight * norm(h)

    (Equations 8 to 18 and figure 10, left; f is sigmoid(f).) The kernel keeps c and n finite by a log scale m. What
    follows in the paper's block, a gated dense layer, is the net's. The state is (h, c, n, m), each [B, H], and with
    the convolution its last inputs [B, S-1, D].

    Where the paper says nothing, initial values are those of the authors' code (NX-AI/xlstm): W from
    N(0, 2 / (5 D)), R = 0, biases 0 but for the forget gate's, which falls with the feature j = 0..d-1 of a head from 5
    to -7 as 5 - 12 (j / (d-1))^a, with a from 0.3 in the first block to 1.6 in the last. A mixer does not know its
    block: a is the option `forget_power`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs, a multiple of heads.
        heads: N; the state of a head is mixed within it only.
        conv: S, steps that the convolution before i and f sees; 0 for none.
        headwise: True projects each head's share of the inputs to its gates only, as the paper does; D must then be
            a multiple of heads too.
        norm: True normalises each head's output over its features, with a gain for each feature.
        forget_bias: of the first and the last feature of a head.
        forget_power: a.

    Raises:
        ValueError: widths that heads do not divide; a negative convolution; not two forget biases; a power not above 0.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        heads: int = 4,
        conv: int = 4,
        headwise: bool = False,
        norm: bool = True,
        forget_bias: Sequence[float] = (5.0, -7.0),
        forget_power: float = 0.3,
    ) -> None:
        super().__init__()
        if heads < 1 or hidden % heads or (headwise and features % heads):
            raise ValueError(
                f"heads: got {heads} with features={features}, hidden={hidden}, headwise={headwise}; hidden must be "
                "a multiple of heads, and features too with headwise: change one of them."
            )
        checks.at_least(0, "0 is no convolution", conv=conv)
        checks.above(0, forget_power=forget_power)
        if len(forget_bias) != 2:
            raise ValueError(
                f"forget_bias: got {[*forget_bias]}; give two, of the first and the last feature of a head."
            )
        self.width, self.heads = hidden, heads
        d, blocks = hidden // heads, heads if headwise else 1
        self.conv = CausalConv(features, conv) if conv else None
        # [block, from, gate, to]: i and f of the convolved inputs, u and o of the inputs as they are.
        self.early = nn.Parameter(torch.empty(blocks, features // blocks, 2 * hidden // blocks))
        self.late = nn.Parameter(torch.empty(blocks, features // blocks, 2 * hidden // blocks))
        for weight in (self.early, self.late):
            nn.init.normal_(weight, std=math.sqrt(2 / (5 * features)))
        self.recurrent = nn.Parameter(torch.zeros(heads, 4, d, d))  # [head, gate, in, out], gates i, f, u, o
        self.bias = nn.Parameter(torch.zeros(heads, 4, d))
        first, last = forget_bias
        with torch.no_grad():
            self.bias[:, 1] = first + (last - first) * torch.linspace(0, 1, d) ** forget_power
        self.norm = nn.Parameter(torch.ones(heads, d)) if norm else None

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        cell = None if state is None else tuple(s.unflatten(1, (self.heads, -1)) for s in state[:4])
        convolved, seen = x, ()
        if self.conv is not None:
            convolved, last_inputs = self.conv(x, None if state is None else state[4], reset)
            convolved, seen = F.silu(convolved), (last_inputs,)
        gates = torch.cat([self._project(convolved, self.early), self._project(x, self.late)], 3) + self.bias
        y, cell = cells.slstm(gates, self.recurrent, cell, reset)
        if self.norm is not None:
            y = F.layer_norm(y, y.shape[-1:]) * self.norm
        return y.flatten(2), (*(s.flatten(1) for s in cell), *seen)

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        """Two gates of each head, [B, T, N, 2, d]."""
        blocks, _, outputs = weight.shape
        made = torch.einsum("btkf,kfo->btko", x.unflatten(2, (blocks, -1)), weight)
        per_head = blocks * outputs // self.heads
        return made.flatten(2).unflatten(2, (self.heads, per_head)).unflatten(3, (2, per_head // 2))
