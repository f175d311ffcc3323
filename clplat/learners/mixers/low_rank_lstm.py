"""LSTM with recurrent matrices of low rank (low-rank passthrough networks, Barone 2016, arXiv 1603.03116)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.kernels import cells
from clplat.learners.mixers.mixer import Mixer, State


class LowRankLSTM(Mixer):
    """LSTM layer with recurrent matrices U_g V_g + diag(s_g), of rank r plus a diagonal; see `LSTM`.

    2 r H + H weights a gate in place of H^2: the state can be wide where weights are few. The matrices are formed once
    a call, so a step costs what it costs in an LSTM of the same width. The state is (h, c), both [B, H].

    The paper's initial values could not be confirmed. Here U and V are normal with the variances that give the entries
    of U V the variance 1 / (3 H) of `nn.LSTM`'s, the diagonal starts at 0, and W and b as those of `nn.Linear`.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the state and of the outputs.
        rank: r; from about H / 2 on there are more weights than in an LSTM.
        diagonal: False leaves out s.
        forget_bias: added to the bias of the forget gate at initialisation.
        weight_drop: the fraction of the entries of the matrices set to zero in training, one mask a call; see `LSTM`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        rank: int = 16,
        diagonal: bool = True,
        forget_bias: float = 1.0,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__()
        checks.at_least(1, rank=rank)
        checks.within(0, 1, below=True, weight_drop=weight_drop)
        self.width = hidden
        self.drop = nn.Dropout(weight_drop)
        self.input = nn.Linear(features, 4 * hidden)
        std = (3 * hidden * rank) ** -0.25
        self.left = nn.Parameter(torch.empty(4, hidden, rank).normal_(std=std))  # U, gates i, f, u, o
        self.right = nn.Parameter(torch.empty(4, rank, hidden).normal_(std=std))  # V
        self.diagonal = nn.Parameter(torch.zeros(4, hidden)) if diagonal else None
        with torch.no_grad():
            self.input.bias[hidden : 2 * hidden] += forget_bias

    def matrices(self) -> Tensor:
        """Recurrent matrices [4, H, H], as [gate, out, in]."""
        product = self.left @ self.right
        return product if self.diagonal is None else product + torch.diag_embed(self.diagonal)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, last = cells.lstm(
            self.input(x).unflatten(-1, (1, 4, self.width)),
            self.drop(self.matrices()).transpose(1, 2)[None],
            None if state is None else tuple(s[:, None] for s in state),
            reset,
        )
        return y[:, :, 0], tuple(s[:, 0] for s in last)
