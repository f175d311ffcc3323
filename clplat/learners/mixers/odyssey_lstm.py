"""LSTM with peepholes and its eight variants of "LSTM: a search space odyssey" (Greff et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.mixer import Mixer, State


class OdysseyLSTM(Mixer):
    """LSTM layer in any variant of Greff, Srivastava, Koutnik, Steunebrink & Schmidhuber 2017.

        i = sigmoid(W_i x + R_i h + p_i * c + b_i)        f = sigmoid(W_f x + R_f h + p_f * c + b_f)
        z = tanh(W_z x + R_z h + b_z)                     c' = f * c + i * z
        o = sigmoid(W_o x + R_o h + p_o * c' + b_o)       h' = o * tanh(c')

    (arXiv 1503.04069, section II, without the bars that mark sums before activation.) Each variant of its section III
    is one option away from this: NP, CIFG, NIG, NFG, NOG, NIAF, NOAF, FGR. A variant has no weights that it does not
    use. The state is (h, c), both [B, H]; with full gate recurrence (h, c, i, f, o).

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        peepholes: False leaves out p (NP).
        coupled: f = 1 - i (CIFG).
        input_gate: False sets i = 1 (NIG).
        forget_gate: False sets f = 1 (NFG).
        output_gate: False sets o = 1 (NOG).
        input_activation: False drops the tanh of z (NIAF).
        output_activation: False drops the tanh of c' (NOAF).
        full_gate_recurrence: adds to the arguments of all gates the products of nine more matrices with the gates of
            the step before (FGR); for all three gates only, and slower: a plain loop over time.
        forget_bias: b_f at initialisation.
        init_std: standard deviation of all initial weights and biases; 0.1 is the paper's.

    Raises:
        ValueError: coupled, or full gate recurrence, where a gate is missing; a negative standard deviation.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        peepholes: bool = True,
        coupled: bool = False,
        input_gate: bool = True,
        forget_gate: bool = True,
        output_gate: bool = True,
        input_activation: bool = True,
        output_activation: bool = True,
        full_gate_recurrence: bool = False,
        forget_bias: float = 0.0,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        if coupled and not (input_gate and forget_gate):
            raise ValueError("coupled: got true with a missing gate; f = 1 - i needs input_gate and forget_gate.")
        if full_gate_recurrence and (coupled or not (input_gate and forget_gate and output_gate)):
            raise ValueError(
                "full_gate_recurrence: got true with a missing or coupled gate; it needs all three: change either."
            )
        checks.at_least(0, init_std=init_std)
        self.width, self.coupled = hidden, coupled
        self.input_gate, self.forget_gate, self.output_gate = input_gate, forget_gate, output_gate
        self.input_activation, self.output_activation = input_activation, output_activation
        has = (input_gate, forget_gate and not coupled, True, output_gate)  # i, f, z, o
        self.rows = _places(has)
        self.peephole_rows = _places((has[0], has[1], has[3]))
        count = sum(has)
        self.input = nn.Linear(features, count * hidden)
        self.recurrent = nn.Parameter(torch.empty(count, hidden, hidden))  # [gate, in, out]
        self.peepholes = nn.Parameter(torch.empty(count - 1, hidden)) if peepholes and count > 1 else None
        self.full = nn.Parameter(torch.empty(3, 3, hidden, hidden)) if full_gate_recurrence else None
        for p in self.parameters():
            nn.init.normal_(p, std=init_std)
        if has[1]:
            with torch.no_grad():
                self.input.bias.view(count, hidden)[self.rows[1]] += forget_bias

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        gates = _spread(self.input(x).unflatten(-1, (-1, self.width)), self.rows)
        y, last = cells.lstm(
            gates[:, :, None],
            _spread(self.recurrent.flatten(1), self.rows).unflatten(1, (self.width, self.width))[None],
            None if state is None else tuple(s[:, None] for s in state),
            reset,
            peepholes=None if self.peepholes is None else _spread(self.peepholes, self.peephole_rows)[:, None],
            coupled=self.coupled,
            input_gate=self.input_gate,
            forget_gate=self.forget_gate,
            output_gate=self.output_gate,
            input_activation=self.input_activation,
            output_activation=self.output_activation,
            full_gate_recurrence=None if self.full is None else self.full[None],
        )
        return y[:, :, 0], tuple(s[:, 0] for s in last)


def _places(has: tuple[bool, ...]) -> list[int]:
    """For each gate its row among those that exist; -1 where it does not."""
    return [sum(has[:k]) if there else -1 for k, there in enumerate(has)]


def _spread(rows: Tensor, places: list[int]) -> Tensor:
    """Rows [.., gates that exist, H] as [.., all gates, H], zeros for those that do not: the kernel ignores these."""
    if -1 not in places:
        return rows
    every = F.pad(rows, [0, 0, 0, 1])  # what -1 picks
    return torch.stack([every[..., place, :] for place in places], -2)
