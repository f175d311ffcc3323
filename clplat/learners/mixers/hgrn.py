"""HGRN's token mixer (Qin et al. 2023): forget gates with a learned lower bound, which grows from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels.backend import state_dtype
from clplat.kernels.diagonal import hgrn, scan
from clplat.learners.mixers.mixer import Mixer, State


class LowerBounds(nn.Module):
    """Lower bounds of each layer's forget gates: 0 in the first layer, growing from layer to layer, below 1.

    With P the softmax over layers of a learned matrix [layers, H], the bound of layer k (from 0) is P_1 + ... + P_k
    (Qin et al. 2023, section 3.2: the cumulative sum without its first term). The matrix starts at zero, so that bounds
    start at k / layers.

    Args:
        layers: number of layers.
        width: H.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        checks.at_least(1, layers=layers, width=width)
        self.layers = layers
        self.logits = nn.Parameter(torch.zeros(layers, width))

    def forward(self, layer: int) -> Tensor:
        """Bound [H] of a layer, 0 <= layer < layers."""
        return self.logits.softmax(0)[1 : layer + 1].sum(0)


class HGRN(Mixer):
    """Gated linear recurrence with lower bounds of its forget gates.

        h = f e^{i theta} h + (1 - f) c,     f = bound + (1 - bound) sigmoid(W_f x),     y = W_o( norm([Re h, Im h]) * g )

    The input c is complex, silu of two linear maps of x_t; theta is learned, one phase a channel; g = silu(W_g x).

    Zhen Qin, Songlin Yang, Yiran Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023,
    arXiv 2311.04823, section 3.2; the output (LayerNorm, then the gate, with silu) and the phases at initialisation,
    10000^(-2j/H), follow the authors' code. Weights start as those of `nn.Linear`.

    The state is (h,), [B, H, 2] real and imaginary part, or [B, H] without phases, after the last of the T steps,
    padding included.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs and of the state.
        bounds: shared by all layers of a net, None for a bound of 0.
        layer: which of the bounds is this layer's, from 0.
        phase: False keeps everything real, by one fused kernel (and half of the state).

    Raises:
        ValueError: a layer that `bounds` does not have, or bounds of another width.
    """

    def __init__(
        self, features: int, hidden: int, bounds: LowerBounds | None = None, layer: int = 0, phase: bool = True
    ) -> None:
        super().__init__()
        if bounds is not None and (not 0 <= layer < bounds.layers or bounds.logits.shape[1] != hidden):
            raise ValueError(
                f"layer: got {layer} with hidden={hidden} and bounds of {bounds.layers} layers, width "
                f"{bounds.logits.shape[1]}; it must be one of them (from 0), and the width be hidden."
            )
        self.width, self.layer = hidden, layer
        parts = 2 if phase else 1
        self.bounds = bounds
        self.forget = nn.Linear(features, hidden)
        self.input = nn.Linear(features, parts * hidden)
        self.gate = nn.Linear(features, parts * hidden)
        self.norm = nn.LayerNorm(parts * hidden)
        self.out = nn.Linear(parts * hidden, hidden)
        self.theta = nn.Parameter(10_000.0 ** (-2 / hidden * torch.arange(hidden))) if phase else None

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        bound = self.forget.weight.new_zeros(self.width) if self.bounds is None else self.bounds(self.layer)
        forget, candidate = self.forget(x), self.input(x)
        if self.theta is None:
            y, last = hgrn(forget, candidate, bound, state, reset)
        else:
            wide = state_dtype(x)
            bound, forget = bound.to(wide), forget.to(wide)
            # 1 - f, without the rounding of that difference where f is close to 1
            rest = (1 - bound) * torch.sigmoid(-forget)
            a = torch.polar(bound + (1 - bound) * torch.sigmoid(forget), self.theta.to(wide).expand_as(forget))
            real, imaginary = (rest * F.silu(c) for c in candidate.to(wide).chunk(2, -1))
            initial = None if state is None else (torch.view_as_complex(state[0].contiguous()),)
            h, (end,) = scan(a, torch.complex(real, imaginary), initial, reset)
            y, last = torch.cat([h.real, h.imag], -1).to(candidate.dtype), (torch.view_as_real(end),)
        return self.out(self.norm(y) * F.silu(self.gate(x))), last
