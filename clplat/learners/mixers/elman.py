"""Simple recurrent network (Elman 1990) on the fused kernels of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat.learners.mixers.loop import loop
from clplat.learners.mixers.mixer import Mixer, State


class Elman(Mixer):
    """One Elman layer: h = tanh(W x_t + U h + b), or relu in place of tanh; the output is h.

    The state is (h,), [B, H], after the last of the T steps, padding included; padding at the end changes no output at
    a valid step. Weights are those of `nn.RNN`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        nonlinearity: "tanh" or "relu".
        orthogonal: True starts from an orthogonal recurrent matrix U (Saxe, McClelland & Ganguli 2014), which keeps
            the length of gradients over time; False is torch's own initialisation.

    Raises:
        ValueError: an unknown nonlinearity.
    """

    def __init__(self, features: int, hidden: int, nonlinearity: str = "tanh", orthogonal: bool = False) -> None:
        super().__init__()
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: got {nonlinearity!r}, allowed are 'tanh' and 'relu'.")
        self.width = hidden
        self.rnn = nn.RNN(features, hidden, nonlinearity=nonlinearity, batch_first=True)
        self._run, self._cell = {
            "tanh": (torch.rnn_tanh, torch.rnn_tanh_cell),
            "relu": (torch.rnn_relu, torch.rnn_relu_cell),
        }[nonlinearity]
        if orthogonal:
            nn.init.orthogonal_(self.rnn.all_weights[0][1])  # W, U, then the biases

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
        y, h = self._run(
            x, h[None].contiguous(), [*self.rnn.all_weights[0]], True, 1, 0.0, torch.is_grad_enabled(), False, True
        )
        return y, (h[0],)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: output [B, H] for x [B, D] and the state (h,), in constant memory."""
        (h,) = self._fresh(x) if state is None else state
        h = self._cell(x, h, *self.rnn.all_weights[0])
        return h, (h,)

    def _fresh(self, x: Tensor) -> State:
        return (x.new_zeros(x.shape[0], self.width),)
