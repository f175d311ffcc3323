"""Simple recurrent network (Elman 1990) on fused kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.compiled import compiled
from clplat.learners.mixers.dropout import drop_recurrent
from clplat.learners.mixers.mixer import Mixer, State


class Elman(Mixer):
    """Elman layer: h = tanh(W x_t + U h + b), or relu in place of tanh; the output is h.

    The state is (h,), [B, H], after the last of the T steps, padding included; padding at the end changes no output at
    a valid step. Weights are those of `nn.RNN`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        nonlinearity: "tanh" or "relu".
        init: of the recurrent matrix U: "torch" as torch does, whose gradients vanish over some ten steps; "orthogonal"
            (Saxe, McClelland & Ganguli 2014); "identity", with biases of zero, which together with relu hands the state
            on as it is (Le, Jaitly & Hinton 2015, arXiv 1504.00941; they start W smaller, with deviation 0.001).
        orthogonality: lambda of the penalty lambda ||U^T U - I||_F^2 that keeps U near the orthogonal matrices in
            training (Vorontsov, Trabelsi, Kadoury & Pal 2017, arXiv 1702.00071); logged as `orthogonality`.
        weight_drop: the fraction of U set to zero in training, one mask a call; see `LSTM`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        nonlinearity: str = "tanh",
        init: str = "torch",
        orthogonality: float = 0.0,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__()
        checks.one_of("nonlinearity", nonlinearity, ("tanh", "relu"))
        checks.one_of("init", init, ("torch", "orthogonal", "identity"))
        checks.at_least(0, "0 is no penalty", orthogonality=orthogonality)
        checks.within(0, 1, below=True, weight_drop=weight_drop)
        self.width, self.orthogonality, self.weight_drop = hidden, orthogonality, weight_drop
        self.relu = nonlinearity == "relu"
        self.rnn = nn.RNN(features, hidden, nonlinearity=nonlinearity, batch_first=True)
        self._run, self._cell = {
            "tanh": (torch.rnn_tanh, torch.rnn_tanh_cell),
            "relu": (torch.rnn_relu, torch.rnn_relu_cell),
        }[nonlinearity]
        _, u, *biases = self.rnn.all_weights[0]
        if init == "orthogonal":
            nn.init.orthogonal_(u)
        elif init == "identity":
            nn.init.eye_(u)
            for bias in biases:
                nn.init.zeros_(bias)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] for x [B, T, D] and the state (h,) after step T; arguments as for `Mixer.forward`.

        In training on a CPU, and wherever there are resets, `clplat.kernels.cells` runs; elsewhere torch's own kernel,
        for the reason that `GRU` gives.
        """
        (h,) = self._fresh(x) if state is None else (state[0].to(x.dtype),)
        if reset is not None or compiled(self, x):
            w, u, bw, bu = self._weights()
            gates = F.linear(x, w, bw + bu)[:, :, None]
            y, (h,) = cells.elman(gates, u.t()[None], (h[:, None],), reset, relu=self.relu)
            return y[:, :, 0], (h[:, 0],)
        # As in LSTM: cuDNN's inference mode has no backward, and eval mode must not ask for it.
        y, h = self._run(x, h[None].contiguous(), self._weights(), True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return y, (h[0],)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        (h,) = self._fresh(x) if state is None else (state[0].to(x.dtype),)
        h = self._cell(x, h, *self._weights())
        return h, (h,)

    def penalties(self) -> Mapping[str, Tensor]:
        """Orthogonality of U, where it is asked for."""
        if not self.orthogonality:
            return {}
        u = self.rnn.all_weights[0][1]
        apart = u.t() @ u - torch.eye(self.width, dtype=u.dtype, device=u.device)
        return {"orthogonality": self.orthogonality * apart.square().sum()}

    def _weights(self) -> list[Tensor]:
        return drop_recurrent(self.rnn.all_weights[0], self.weight_drop if self.training else 0.0)

    def _fresh(self, x: Tensor) -> State:
        return (x.new_zeros(x.shape[0], self.width),)
