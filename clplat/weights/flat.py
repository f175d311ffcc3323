"""Gradients of all weights as one vector [P], for strategies that compare or project them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flat_gradient(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """[P] of all gradients in order; zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(gradients, weights, strict=True)]
    ).detach()


def set_gradient(weights: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """Write [P] into the `.grad` of the weights that have one; the others stay without."""
    for weight, piece in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
        if weight.grad is not None:
            weight.grad.copy_(piece.view_as(weight))
