"""Helpers of mixers with heads: their width, vectors of length 1, normalisation of each head.

Letters: B batch, T time, N heads, V features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def head_width(hidden: int, heads: int, parts: int = 1, name: str = "hidden") -> int:
    """Width of a head, hidden / heads.

    Args:
        hidden: width to divide.
        heads: N.
        parts: what the width of a head has to be a multiple of.
        name: of the width, for the message.

    Raises:
        ValueError: `hidden` is not a positive multiple of parts * heads.
    """
    if heads < 1 or hidden < 1 or hidden % (parts * heads):
        factor = f"{parts} * heads" if parts > 1 else "heads"
        raise ValueError(
            f"heads: got {heads} with {name}={hidden}; {name} must be a multiple of {factor}: change either."
        )
    return hidden // heads


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors of length 1: x / sqrt(|x|^2 + eps) over the last dimension, smooth at 0, where x / |x| is not."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class HeadNorm(nn.Module):
    """Group normalisation with one group a head: mean 0 and variance 1 of its features, [..., N, V] to itself.

    Args:
        heads: N.
        width: V.
        weight: False leaves out the scale [N, V].
        bias: False leaves out the shift [N, V].
        eps: added to the variance.
    """

    def __init__(self, heads: int, width: int, weight: bool = True, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, width)) if weight else None
        self.bias = nn.Parameter(torch.zeros(heads, width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The normalised heads, in the dtype of x."""
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)
