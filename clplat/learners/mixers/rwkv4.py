"""Time mixing of RWKV-4 (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.kernels.wkv import wkv
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.shift import shifted


class RWKV4(Mixer):
    """Time mixing: token shift, a mean of values with weights that decay, a gate ("receptance"), a projection.

    With x' the input one step before (sections 3.1.1 to 3.1.3):

        r, k, v = W_r (mu_r x + (1 - mu_r) x'),  W_k (mu_k x + (1 - mu_k) x'),  W_v (mu_v x + (1 - mu_v) x')
        y = W_o (sigmoid(r) * wkv(k, v; exp(decay), bonus))

    The state is (x', num, den, max): [B, D] and three of [B, H], see `clplat.kernels.wkv`. The paper's block has a
    second half, channel mixing, with a token shift of its own; here it is the residual net's dense branch instead,
    which sees no earlier step.

    Initialisation as in the authors' code, which depends on the layer: decays from exp(-5) to exp(3) over the
    channels, bonuses near log 0.3, mu from 0 to 1 over the features; W_r, W_k and W_o zero, W_v orthogonal. A block
    therefore starts as the identity.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the mean and of the outputs.
        depth: of the layer, 0 for the first to 1 for the last: sets decays and mu at initialisation. (The code divides
            by the number of layers for mu, by one less for decays; one number stands for both here.)
        zero: False draws W_r, W_k and W_o as `nn.Linear` does; needed where there is no residual branch around.
    """

    def __init__(self, features: int, hidden: int, depth: float = 0.0, zero: bool = True) -> None:
        super().__init__()
        checks.within(0, 1, "the layer's index over the last one's", depth=depth)
        self.width = hidden
        feature = torch.arange(features) / features
        channel = torch.arange(hidden)
        self.mix_r = nn.Parameter(feature ** (0.5 * (1 - depth)))
        self.mix_k = nn.Parameter(feature ** (1 - depth))
        self.mix_v = nn.Parameter(feature ** (1 - depth) + 0.3 * depth)
        self.decay = nn.Parameter(-5 + 8 * (channel / max(1, hidden - 1)) ** (0.7 + 1.3 * depth))
        self.bonus = nn.Parameter(torch.full((hidden,), 0.3).log() + 0.5 * ((channel + 1) % 3 - 1))
        self.receptance = nn.Linear(features, hidden, bias=False)
        self.key = nn.Linear(features, hidden, bias=False)
        self.value = nn.Linear(features, hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        nn.init.orthogonal_(self.value.weight)
        if zero:
            for one in (self.receptance, self.key, self.out):
                nn.init.zeros_(one.weight)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        last, memory = (None, None) if state is None else (state[0], state[1:])
        before, last = shifted(x, last, reset)
        r, k, v = (
            layer(torch.lerp(before, x, mix.to(x.dtype)))
            for layer, mix in ((self.receptance, self.mix_r), (self.key, self.mix_k), (self.value, self.mix_v))
        )
        # The weights are float32 where autocast makes k and v of less.
        y, memory = wkv(k, v, self.decay.exp(), self.bonus, memory, reset)
        return self.out(torch.sigmoid(r) * y), (last, *memory)
