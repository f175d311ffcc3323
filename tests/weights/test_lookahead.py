"""The proposed step is the optimiser's own, bit for bit, and leaves everything as it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clplat.learners.optimizers import NTASGD
from clplat.weights.lookahead import proposed

OPTIMIZERS = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.9)}),
    (torch.optim.Adam, {"maximize": True, "eps": 1e-3, "foreach": True}),
    (torch.optim.AdamW, {"weight_decay": 0.3}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adagrad, {}),
    (NTASGD, {}),
]


class Restless(torch.optim.Optimizer):
    """An optimiser of somebody's own that writes to gradients, state and groups."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": torch.tensor(lr), "steps": 0, "rates": []})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # overloaded there
        for group in self.param_groups:
            group["lr"].mul_(0.5)
            group["steps"] += 1
            group["rates"].append(float(group["lr"]))
            group["last"] = group["steps"]
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.sub_(p.grad.mean())
                    self.state[p].setdefault("past", []).append(p.grad.clone())
                    self.state[p]["past"][0].add_(1)
                    p.sub_(group["lr"] * sum(self.state[p]["past"]))


def everything(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    """Copies of all that a step may touch."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    grads = [w.grad for w in weights]
    return deepcopy(([w.data for w in weights], grads, [dict(optimizer.state.get(w, {})) for w in weights], groups))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, (Restless, {})])
def test_the_proposed_step_is_the_real_one_and_changes_nothing(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(s)) for s in ((3, 4), (5,), (2,))]  # the last never has a gradient
    optimizer = kind([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.3}], lr=0.1, **options)
    if kind is Restless:
        optimizer.param_groups[1]["lr"] = torch.tensor(0.3)
    for step in range(5):
        for w in weights[:2]:
            w.grad = torch.randn_like(w)
        if kind is NTASGD and step == 2:
            optimizer.begin()
        before, places = everything(weights, optimizer), [w.data_ptr() for w in weights]
        found = proposed(optimizer)
        assert same(everything(weights, optimizer), before)
        assert [w.data_ptr() for w in weights] == places
        optimizer.step()
        assert set(found) == set(weights[:2])
        for w, old in zip(weights[:2], before[0], strict=False):
            assert torch.equal(found[w], w)
            assert not torch.equal(w, old)


def test_what_fails_inside_leaves_everything_too() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.LBFGS(weights)  # needs a closure
    weights[0].grad = torch.ones(2)
    before = everything(weights, optimizer)
    with pytest.raises(TypeError, match="closure"):
        proposed(optimizer)
    assert same(everything(weights, optimizer), before)
