"""GRU (Cho et al. 2014) on the fused kernels of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat.learners.mixers.loop import loop
from clplat.learners.mixers.mixer import Mixer, State


class GRU(Mixer):
    """One GRU layer: h = (1 - z) * n + z * h with n = tanh(W x_t + b + r * (U h + b')); the output is h.

    The reset gate r acts after the recurrent product, as in cuDNN and torch; in the paper it acts before it. The state
    is (h,), [B, H], after the last of the T steps, padding included; padding at the end changes no output at a valid
    step. Weights are those of `nn.GRU`, gates in the order r, z, n.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.width = hidden
        self.rnn = nn.GRU(features, hidden, batch_first=True)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] for x [B, T, D] and the state (h,) after step T; arguments as for `Mixer.forward`.

        With `reset` the same weights run in a loop over time, one kernel a step: slower, on a GPU by far.
        """
        (h,) = self._fresh(x) if state is None else state
        if reset is not None:
            return loop(self.step, x, (h,), reset)
        # As in LSTM: cuDNN's inference mode has no backward, and eval mode must not ask for it.
        y, h = torch.gru(
            x, h[None].contiguous(), [*self.rnn.all_weights[0]], True, 1, 0.0, torch.is_grad_enabled(), False, True
        )
        return y, (h[0],)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: output [B, H] for x [B, D] and the state (h,), in constant memory."""
        (h,) = self._fresh(x) if state is None else state
        h = torch.gru_cell(x, h, *self.rnn.all_weights[0])
        return h, (h,)

    def _fresh(self, x: Tensor) -> State:
        return (x.new_zeros(x.shape[0], self.width),)
