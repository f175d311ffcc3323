"""The path that weights take under the task's own gradient, for SI and its kin."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, _foreach_addcmul_, _foreach_sub, nn  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim

from clplat.importance.penalty import Quadratic

Before = dict[str, tuple[Tensor, Tensor]]
"""By name: a weight before the optimiser's step, and the gradient of everything but the penalty there."""


def before_step(
    weights: Mapping[str, nn.Parameter], known: Mapping[str, Tensor], past: Quadratic, strength: float
) -> Before:
    """Copies of the weights that have a gradient, and their gradients without that of strength / 2 * past.

    Args:
        weights: after the backward pass.
        known: names of those to look at.
        past: the penalty in the loss.
        strength: its factor, as in `Quadratic.penalty`.
    """
    found = {n: p for n, p in weights.items() if p.grad is not None and n in known}
    grads = {n: p.grad.clone() for n, p in found.items() if p.grad is not None}
    importance, anchor = past.importances(), past.anchors()
    own = [n for n in grads if n in importance]
    if own:
        drift = _foreach_sub([found[n].detach() for n in own], [anchor[n] for n in own])
        _foreach_addcmul_([grads[n] for n in own], [importance[n] for n in own], drift, value=-strength)
    return {n: (p.detach().clone(), grads[n]) for n, p in found.items()}


def after_step(path: Mapping[str, Tensor], before: Before, weights: Mapping[str, Tensor]) -> list[str]:
    """Subtract gradient times change of this step from `path`, in place; returns the names of what moved."""
    names = [n for n in before if n in weights]
    change = _foreach_sub([weights[n].detach() for n in names], [before[n][0] for n in names])
    _foreach_addcmul_([path[n] for n in names], [before[n][1] for n in names], change, value=-1)
    return names
