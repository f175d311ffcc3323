"""Lookahead: where an optimiser's next step would lead, without taking it."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def proposed(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """The value that each parameter with a gradient would have after `optimizer.step()`.

    The step is taken, on copies that stand in the places of weights, gradients and optimiser state, and these are put
    back. So it is the optimiser's own step, bit for bit, whatever it is.

    Args:
        optimizer: with all that a step changes in `state` and `param_groups`, as torch's own and those of `state_dict`.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    held, gradients = [p.data for p in weights], [p.grad for p in weights]
    state, groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    try:
        for p in weights:
            p.data, p.grad = p.data.clone(), None if p.grad is None else p.grad.clone()
        # Of the keys, which are the parameters, no copies.
        optimizer.state = defaultdict(dict, {p: deepcopy(own) for p, own in state.items()})
        for group in optimizer.param_groups:
            group.update({name: deepcopy(value) for name, value in group.items() if name != "params"})
        optimizer.step()
        return {p: p.data for p in weights}
    finally:
        for p, value, gradient in zip(weights, held, gradients, strict=True):
            p.data, p.grad = value, gradient
        optimizer.state = state
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)
