"""HyperLSTM (Ha, Dai & Le 2017, arXiv 1609.09106): a small LSTM rescales the weights of a large one at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.learners.mixers.loop import loop
from clplat.learners.mixers.mixer import Mixer, State

EPS = 1e-3
"""Of the layer normalisations, added to the variance, as in the author's code."""


class HyperLSTM(Mixer):
    """Layer-normalised LSTM with rows of weights scaled at every step by a second, smaller LSTM.

    With hhat the small LSTM's output on [x_t; h_{t-1}], for each gate g of i, j, f, o (section 3.2 and appendix A.2):

        alpha_x, alpha_h, beta = A_x z_x, A_h z_h, A_b z_b       z = W hhat + b, of width E (z_b without b)
        pre_g = LN( alpha_x * (W_x x_t) + alpha_h * (W_h h_{t-1}) + beta + b_g )
        c = sigmoid(f + 1) c + sigmoid(i) tanh(j),    h = sigmoid(o) tanh(LN(c))

    At initialisation all alpha are 0.1 and all beta 0, whatever the input. The state is (h, c, hhat, chat), the first
    two [B, H], the others [B, S]. The author's code drops out tanh(j) in training; this does not.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        size: S, width of the small LSTM.
        embedding: E, width of z.
        normalize: False leaves out all layer normalisations.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, features: int, hidden: int, size: int = 64, embedding: int = 4, normalize: bool = True) -> None:
        super().__init__()
        checks.at_least(1, size=size, embedding=embedding)
        self.width, self.size, self.embedding = hidden, size, embedding
        self.input = nn.Linear(features, 4 * hidden)  # its bias is b
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        self.small_input = nn.Linear(features, 4 * size)
        self.small_recurrent = nn.Linear(hidden + size, 4 * size, bias=False)
        self.scale_codes = nn.Linear(size, 8 * embedding)  # z_x of the four gates, then z_h
        self.shift_codes = nn.Linear(size, 4 * embedding, bias=False)
        self.scales = nn.Parameter(torch.full((8, embedding, hidden), 0.1 / embedding))
        self.shifts = nn.Parameter(torch.zeros(4, embedding, hidden))
        self.gate_norm = GateNorm(hidden) if normalize else None
        self.cell_norm = nn.LayerNorm(hidden, eps=EPS) if normalize else None
        self.small_gate_norm = GateNorm(size) if normalize else None
        self.small_cell_norm = nn.LayerNorm(size, eps=EPS) if normalize else None
        for one, rows in ((self.recurrent, hidden), (self.small_recurrent, size)):
            for gate in one.weight.detach().split(rows):
                nn.init.orthogonal_(gate)
        for one in (self.input, self.small_input):
            nn.init.xavier_uniform_(one.weight)
            nn.init.zeros_(one.bias)
        nn.init.zeros_(self.scale_codes.weight)
        nn.init.ones_(self.scale_codes.bias)
        nn.init.normal_(self.shift_codes.weight, std=0.01)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] for x [B, T, D] and the state after step T; arguments as for `Mixer.forward`.

        Always a loop over time; only the products with the inputs are taken for all steps at once.
        """
        given = torch.cat([F.linear(x, self.input.weight), self.small_input(x)], -1)
        reset = x.new_zeros(x.shape[:2], dtype=torch.bool) if reset is None else reset
        return loop(self._step, given, self._fresh(x) if state is None else state, reset)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        given = torch.cat([F.linear(x, self.input.weight), self.small_input(x)], -1)
        return self._step(given, self._fresh(x) if state is None else state)

    def _step(self, given: Tensor, state: State) -> tuple[Tensor, State]:
        h, c, small_h, small_c = state
        own, small = given.split([4 * self.width, 4 * self.size], -1)
        small = small + self.small_recurrent(torch.cat([h, small_h], -1))
        small_h, small_c = _cell(
            small.unflatten(-1, (4, self.size)), small_c, self.small_gate_norm, self.small_cell_norm
        )

        codes = self.scale_codes(small_h).unflatten(-1, (8, self.embedding))
        scales = torch.einsum("bge,geh->bgh", codes, self.scales)
        shift_codes = self.shift_codes(small_h).unflatten(-1, (4, self.embedding))
        shifts = torch.einsum("bge,geh->bgh", shift_codes, self.shifts) + self.input.bias.view(4, self.width)
        of_x, of_h = (v.unflatten(-1, (4, self.width)) for v in (own, self.recurrent(h)))
        h, c = _cell(scales[:, :4] * of_x + scales[:, 4:] * of_h + shifts, c, self.gate_norm, self.cell_norm)
        return h, (h, c, small_h, small_c)

    def _fresh(self, x: Tensor) -> State:
        rows = x.shape[0]
        return (*(x.new_zeros(rows, self.width) for _ in range(2)), *(x.new_zeros(rows, self.size) for _ in range(2)))


class GateNorm(nn.Module):
    """Layer normalisation of each gate on its own, [B, 4, H] to the same shape.

    Args:
        width: H.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, width)), nn.Parameter(torch.zeros(4, width))

    def forward(self, gates: Tensor) -> Tensor:
        """The normalised gates."""
        return F.layer_norm(gates, gates.shape[-1:], eps=EPS) * self.weight + self.bias


def _cell(gates: Tensor, c: Tensor, gate_norm: GateNorm | None, cell_norm: nn.LayerNorm | None) -> State:
    i, j, f, o = (gates if gate_norm is None else gate_norm(gates)).unbind(1)
    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(j)
    return torch.sigmoid(o) * torch.tanh(c if cell_norm is None else cell_norm(c)), c
