"""Causal depthwise convolution and token shift, with states and resets.

Letters: B batch, T time, D features, S steps that a convolution sees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import checks


class CausalConv(nn.Module):
    """Causal convolution of each feature on its own: y_t = b + sum_{j=0}^{S-1} w_{S-1-j} * x_{t-j}.

    Steps before the start of a sequence count as zeros. Weights start as those of `nn.Conv1d` do: uniform within
    1/sqrt(S). The weight is [D, S], its last column that of the current step.

    Args:
        width: D.
        size: S, the current step included.
        bias: False leaves out b.
    """

    def __init__(self, width: int, size: int = 4, bias: bool = True) -> None:
        super().__init__()
        checks.at_least(1, width=width, size=size)
        self.width, self.size = width, size
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(width, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, D] for x [B, T, D], and the state [B, S-1, D]: the last S-1 inputs, the latest one last.

        Args:
            x: [B, T, D].
            state: from an earlier call, None for a new sequence.
            reset: [B, T] bool, True where a fresh sequence starts: inputs before it count as zeros from there on, and
                are zeros in the state.
        """
        steps, before = x.shape[1], self.size - 1
        if state is None:
            state = x.new_zeros(len(x), before, x.shape[2])
        seen = torch.cat([state.to(x.dtype), x], 1)
        age = None
        if reset is not None:
            # [B, T] steps since the latest reset; where there was none in this call, more than a tap looks back.
            time = torch.arange(steps, device=x.device)
            age = time - torch.where(reset, time, -self.size).cummax(1).values
        # One product a tap: with resets a depthwise kernel cannot be used, and one form for both is worth its price.
        y: Tensor | None = None
        for j in range(self.size):
            tap = seen[:, before - j : before - j + steps]
            if age is not None and j:
                tap = torch.where((age >= j)[..., None], tap, 0)
            weight = self.weight[:, before - j]
            y = tap * weight if y is None else torch.addcmul(y, tap, weight)
        assert y is not None  # size is at least 1
        last = seen[:, steps:]
        if age is not None:
            back = torch.arange(before - 1, -1, -1, device=x.device)
            last = torch.where((back <= age[:, -1:])[..., None], last, 0)
        return (y if self.bias is None else y + self.bias), last


def shifted(x: Tensor, last: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token shift: x_{t-1} for every t, [B, T, D], zero where a sequence starts; and the last input [B, D].

    Args:
        x: [B, T, D].
        last: the last input of an earlier call [B, D], None for a new sequence.
        reset: [B, T] bool, True where a fresh sequence starts.
    """
    first = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    previous = torch.cat([first[:, None], x[:, :-1]], 1)
    if reset is not None:
        previous = previous.masked_fill(reset[..., None], 0)
    return previous, x[:, -1]
