"""GRU (Cho et al. 2014) on fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.compiled import compiled
from clplat.learners.mixers.dropout import drop_recurrent
from clplat.learners.mixers.mixer import Mixer, State


class GRU(Mixer):
    """GRU layer: h = (1 - z) * n + z * h, the output is h, with one of two forms of the candidate n.

        n = tanh(W x_t + b + r * (U h + b'))     reset_after=True: cuDNN's and torch's
        n = tanh(W x_t + b + U (r * h) + b')     reset_after=False: the paper's (arXiv 1406.1078, equation 8)

    (That of the paper has no biases; here both forms have them.) The state is (h,), [B, H], after the last of the T
    steps, padding included; padding at the end changes no output at a valid step. Weights are those of `nn.GRU`, gates
    in the order r, z, n.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        reset_after: whether the reset gate r acts after the recurrent product.
        weight_drop: the fraction of U set to zero in training, one mask a call; see `LSTM`.
    """

    def __init__(self, features: int, hidden: int, reset_after: bool = True, weight_drop: float = 0.0) -> None:
        super().__init__()
        checks.within(0, 1, below=True, weight_drop=weight_drop)
        self.width, self.reset_after, self.weight_drop = hidden, reset_after, weight_drop
        self.rnn = nn.GRU(features, hidden, batch_first=True)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] for x [B, T, D] and the state (h,) after step T; arguments as for `Mixer.forward`.

        In training on a CPU, and wherever there are resets, `clplat.kernels.cells` runs, which takes some 0.6 of
        the time there. Elsewhere it is torch's own kernel: fast per-example gradients (`clplat.importance.per_example`, always in
        evaluation mode) know that one only.
        """
        (h,) = self._fresh(x) if state is None else (state[0].to(x.dtype),)
        if reset is not None or not self.reset_after or compiled(self, x):
            return self._fused(x, h, reset)
        # As in LSTM: cuDNN's inference mode has no backward, and eval mode must not ask for it.
        y, h = torch.gru(x, h[None].contiguous(), self._weights(), True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return y, (h[0],)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        (h,) = self._fresh(x) if state is None else (state[0].to(x.dtype),)
        if not self.reset_after:
            y, state = self._fused(x[:, None], h, None)
            return y[:, 0], state
        h = torch.gru_cell(x, h, *self._weights())
        return h, (h,)

    def _fused(self, x: Tensor, h: Tensor, reset: Tensor | None) -> tuple[Tensor, State]:
        w, u, bw, bu = self._weights()
        # The bias of U h + b' only stays apart where r multiplies it.
        bias = bw + torch.cat([bu[: 2 * self.width], torch.zeros_like(bu[2 * self.width :])])
        gates = F.linear(x, w, bias).unflatten(-1, (1, 3, self.width))
        recurrent = u.view(1, 3, self.width, self.width).transpose(2, 3)
        y, (h,) = cells.gru(
            gates, recurrent, bu[None, 2 * self.width :], (h[:, None],), reset, reset_after=self.reset_after
        )
        return y[:, :, 0], (h[:, 0],)

    def _weights(self) -> list[Tensor]:
        return drop_recurrent(self.rnn.all_weights[0], self.weight_drop if self.training else 0.0)

    def _fresh(self, x: Tensor) -> State:
        return (x.new_zeros(x.shape[0], self.width),)
