"""LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000) on the fused kernels of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat.learners.mixers.loop import loop
from clplat.learners.mixers.mixer import Mixer, State


class LSTM(Mixer):
    """One LSTM layer: c = f * c + i * g, h = o * tanh(c), gates from W x_t + U h + b; the output is h.

    The state is (h, c), both [B, H], after the last of the T steps, padding included; padding at the end changes no
    output at a valid step. Weights are those of `nn.LSTM`, gates in the order i, f, g, o.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        forget_bias: added to the bias of the forget gate at initialisation. 0 is torch's own initialisation; 1 keeps
            the memory longer at the start of training (Gers et al. 2000; Jozefowicz et al. 2015).
    """

    def __init__(self, features: int, hidden: int, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.width = hidden
        self.rnn = nn.LSTM(features, hidden, batch_first=True)
        bias = self.rnn.all_weights[0][2]  # weights in the order W, U, b of W, b of U
        with torch.no_grad():
            bias[hidden : 2 * hidden] += forget_bias

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] for x [B, T, D] and the state (h, c) after step T; arguments as for `Mixer.forward`.

        With `reset` the same weights run in a loop over time, one kernel a step: slower, on a GPU by far.
        """
        h, c = self._fresh(x) if state is None else state
        if reset is not None:
            return loop(self.step, x, (h, c), reset)
        hx = (h[None].contiguous(), c[None].contiguous())
        # nn.LSTM itself would ask for cuDNN's inference mode in eval mode, which has no backward: the exact Fisher
        # needs one. The flag means nothing else here (there is no dropout inside).
        y, h, c = torch.lstm(x, hx, [*self.rnn.all_weights[0]], True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return y, (h[0], c[0])

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: output [B, H] for x [B, D] and the state (h, c), in constant memory."""
        h, c = self._fresh(x) if state is None else state
        h, c = torch.lstm_cell(x, (h, c), *self.rnn.all_weights[0])
        return h, (h, c)

    def _fresh(self, x: Tensor) -> State:
        zeros = x.new_zeros(x.shape[0], self.width)
        return zeros, zeros
