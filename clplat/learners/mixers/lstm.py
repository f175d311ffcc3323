"""LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000) on fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.dropout import drop_recurrent
from clplat.learners.mixers.mixer import Mixer, State


class LSTM(Mixer):
    """LSTM layer: c = f * c + i * g, h = o * tanh(c), gates from W x_t + U h + b; the output is h.

    The state is (h, c), both [B, H], after the last of the T steps, padding included; padding at the end changes no
    output at a valid step. Weights are those of `nn.LSTM`, gates in the order i, f, g, o.

    With `weight_drop` single weights of U are set to zero in training and the rest scaled up (DropConnect on the
    recurrent weights: Merity, Keskar & Socher 2018, arXiv 1708.02182, section 2): one mask a call of `forward`, for all
    its rows and steps. Every `step` is a call of its own, so in training mode it draws a mask of its own.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        forget_bias: added to the bias of the forget gate at initialisation. 0 is torch's own initialisation; 1 keeps
            the memory longer at the start of training (Gers et al. 2000; Jozefowicz et al. 2015).
        weight_drop: the fraction of U set to zero, in 0..1 without 1.
    """

    def __init__(self, features: int, hidden: int, forget_bias: float = 0.0, weight_drop: float = 0.0) -> None:
        super().__init__()
        checks.within(0, 1, below=True, weight_drop=weight_drop)
        self.width, self.weight_drop = hidden, weight_drop
        self.rnn = nn.LSTM(features, hidden, batch_first=True)
        bias = self.rnn.all_weights[0][2]  # weights in the order W, U, b of W, b of U
        with torch.no_grad():
            bias[hidden : 2 * hidden] += forget_bias

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        h, c = self._fresh(x) if state is None else (s.to(x.dtype) for s in state)
        if reset is not None:
            w, u, bw, bu = self._weights()
            gates = F.linear(x, w, bw + bu).unflatten(-1, (1, 4, self.width))
            recurrent = u.view(1, 4, self.width, self.width).transpose(2, 3)
            y, (h, c) = cells.lstm(gates, recurrent, (h[:, None], c[:, None]), reset)
            return y[:, :, 0], (h[:, 0], c[:, 0])
        y, h, c = fused_lstm(x, h, c, self._weights())
        return y, (h, c)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        h, c = self._fresh(x) if state is None else (s.to(x.dtype) for s in state)
        h, c = torch.lstm_cell(x, (h, c), *self._weights())
        return h, (h, c)

    def _weights(self) -> list[Tensor]:
        return drop_recurrent(self.rnn.all_weights[0], self.weight_drop if self.training else 0.0)

    def _fresh(self, x: Tensor) -> State:
        zeros = x.new_zeros(x.shape[0], self.width)
        return zeros, zeros


def fused_lstm(x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, T, H] and the last h and c [B, H] by torch's kernel, for weights in the order W, U, b of W, b of U.

    In half precision on CPUs for which oneDNN has no such kernel (bf16 needs AVX-512), it computes in float32.
    """
    # nn.LSTM itself would ask for cuDNN's inference mode in eval mode, which has no backward: the exact Fisher
    # needs one. The flag means nothing else here (there is no dropout inside).
    options = (True, 1, 0.0, torch.is_grad_enabled(), False, True)
    try:
        y, h, c = torch.lstm(x, (h[None].contiguous(), c[None].contiguous()), list(weights), *options)
        return y, h[0], c[0]
    except RuntimeError:
        cast = x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not (cast or x.dtype in (torch.bfloat16, torch.float16)):
            raise
    # Tried at each call: a refusal takes 0.4 ms, and depends on more than this function could ask for beforehand.
    hx = (h[None].float().contiguous(), c[None].float().contiguous())
    with torch.autocast("cpu", enabled=False):
        y, h, c = torch.lstm(x.float(), hx, [w.float() for w in weights], *options)
    return y.to(x.dtype), h[0].to(x.dtype), c[0].to(x.dtype)
