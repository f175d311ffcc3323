"""GateLoop (Katsch 2023): a linear recurrence whose complex decay is computed from the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.kernels.backend import state_dtype
from clplat.kernels.diagonal import scan
from clplat.learners.mixers.mixer import Mixer, State


class GateLoop(Mixer):
    """Linear recurrence with a complex decay from the input.

        h = a * h + k * v,     y = W_o( silu(W_g x) * Re(q * h) ),     a = sigmoid(alpha) exp(i beta), all linear in x_t

    Tobias Katsch, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling", 2023, arXiv 2311.01927, in
    the form with as many heads as channels, in which a head's state is one complex number. The magnitude's sigmoid and
    the phase as it is are the paper's choice of activations. The output gate follows the block's usual form (RetNet's);
    its exact place in the paper could not be confirmed: `gate` leaves it out.

    The state is (h,), [B, H, 2] real and imaginary part, or [B, H] without phases, after the last of the T steps,
    padding included. Weights start as those of `nn.Linear`, q, k, v and the gate without biases.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        phase: False leaves out beta: decay and state are real.
        gate: False leaves out silu(W_g x).
    """

    def __init__(self, features: int, hidden: int, phase: bool = True, gate: bool = True) -> None:
        super().__init__()
        self.width, self.phase = hidden, phase
        self.project = nn.Linear(features, 3 * hidden, bias=False)  # q, k, v
        self.decay = nn.Linear(features, (1 + phase) * hidden)  # alpha, beta
        self.gate = nn.Linear(features, hidden, bias=False) if gate else None
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        q, k, v = self.project(x).chunk(3, -1)
        wide = state_dtype(x)  # there are no complex numbers of half precision, nor decays
        decay, added = self.decay(x).to(wide), (k * v).to(wide)
        if self.phase:
            magnitude, angle = decay.chunk(2, -1)
            initial = None if state is None else (torch.view_as_complex(state[0].contiguous()),)
            a = torch.polar(torch.sigmoid(magnitude), angle)
            h, (last,) = scan(a, torch.complex(added, torch.zeros_like(added)), initial, reset)
            h, last = h.real, torch.view_as_real(last)
        else:
            h, (last,) = scan(torch.sigmoid(decay), added, state, reset)
        y = q * h.to(q.dtype)
        return self.out(y if self.gate is None else F.silu(self.gate(x)) * y), (last,)
