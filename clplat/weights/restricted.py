"""Restricted updates: base of strategies that let only a part of each change of the weights happen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.strategy import Closure, Strategy, Update
from clplat.streams.experience import Batch


class RestrictedUpdates(Strategy):
    """Takes back the part of a change that is not allowed: of the gradient, or of what a whole step did.

    Args:
        apply_to: "update" takes back a part of the step, so that momentum, Adam's scales and weight decay are held to it
            too, and what strategies after this one in the list do in a step; "gradient" a part of the gradient.
    """

    def __init__(self, apply_to: str) -> None:
        super().__init__()
        checks.one_of("apply_to", apply_to, ("update", "gradient"))
        self.apply_to = apply_to

    def restricts(self) -> bool:
        """Whether anything is forbidden yet."""
        raise TypeError(f"{type(self).__name__} does not define restricts().")

    def allowed(self, learner: Learner, changes: Mapping[str, Tensor]) -> Mapping[str, Tensor | None]:
        """The part of each change that may happen, None for nothing.

        Args:
            learner: whose weights change.
            changes: by name, of some or all of `learner.weights()`.
        """
        raise TypeError(f"{type(self).__name__} does not define allowed(learner, changes).")

    def gradients(self, learner: Learner, batch: Batch) -> None:
        # A parameter that may not change is left without a gradient, so that no optimiser moves it.
        if self.apply_to == "update" or not self.restricts():
            return
        weights = learner.weights()
        allowed = self.allowed(learner, {n: p.grad for n, p in weights.items() if p.grad is not None})
        for name, gradient in allowed.items():
            weights[name].grad = gradient

    def step(self, learner: Learner, closure: Closure, update: Update) -> Output:
        if self.apply_to == "gradient" or not self.restricts():
            return update(closure)
        before = {name: p.detach().clone() for name, p in learner.weights().items()}
        output = update(closure)
        with torch.no_grad():
            weights = learner.weights()
            allowed = self.allowed(learner, {name: p - before[name] for name, p in weights.items()})
            for name, p in weights.items():
                change = allowed[name]
                p.copy_(before[name] if change is None else before[name] + change)
        return output
