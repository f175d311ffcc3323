"""Uses of parameters in a forward pass. Letters: B batch, N columns of a weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

Kind = Literal["matrix", "rows", "scale", "shift"]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a parameter.

    Attributes:
        kind: what the parameter does: matrix (of a linear layer), rows (of an embedding), scale, shift.
        edge: where the gradient by the layer's output arrives, [B, ...].
        factor: what it is multiplied with: inputs [B, ..., N], ids [B, ...], normalised inputs; None for shifts.
        skip: an embedding that gets no gradient, or -1.
    """

    kind: Kind
    edge: GradientEdge
    factor: Tensor | None
    skip: int = -1


def seeded(x: Tensor) -> Tensor:
    """`x`, so that a gradient arrives at what is computed from it."""
    return x if x.requires_grad else x.detach().requires_grad_()


def reached(logits: Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """The parameters that the graph of the logits ends in: those that no tap has cut off."""
    names = {id(p): name for name, p in weights.items()}
    found, seen, todo = set(), set(), [logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only the nodes of leaves have one
        if id(leaf) in names:
            found.add(names[id(leaf)])
        todo.extend(after for after, _ in node.next_functions)
    return found
