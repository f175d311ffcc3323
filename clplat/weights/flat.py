"""Flat vectors: all floating values of a net as one vector, and its gradients as one.

P is the number of values: of a state, buffers included (`flatten`, `unflatten`, `load_flat`), or of some weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flatten(net: nn.Module) -> Tensor:
    """[P] all floating values of a net's state, a copy."""
    return torch.cat([t.detach().flatten() for t in _floating(net).values()]).clone()


def unflatten(net: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """The state [P] by name, as views of `vector`; what is not floating is not in it.

    Raises:
        ValueError: another number of values than the net has.
    """
    tensors = _floating(net)
    total = sum(t.numel() for t in tensors.values())
    if vector.shape != (total,):
        raise ValueError(
            f"A state of {list(vector.shape)} values does not fit a net of {total}: give one of the same net."
        )
    parts = vector.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}


@torch.no_grad()
def load_flat(net: nn.Module, vector: Tensor) -> None:
    """Set a net's floating values to the state [P], in place; all else in it stays.

    Raises:
        ValueError: another number of values than the net has.
    """
    for tensor, part in zip(_floating(net).values(), unflatten(net, vector).values(), strict=True):
        tensor.copy_(part)


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


def _floating(net: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in net.state_dict().items() if torch.is_tensor(t) and t.is_floating_point()}
