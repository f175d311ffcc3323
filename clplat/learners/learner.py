"""Learner: a net with its objective, its strategies, and the recipe that trains it. Nothing here knows Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clplat import checks
from clplat.composition import Composite
from clplat.learners.handover import Handover
from clplat.learners.modes import evaluating
from clplat.learners.nets.net import Net, Output
from clplat.learners.objective import Objective
from clplat.learners.schedules import Schedule, constant
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience


class Learner(nn.Module):
    """Net, objective and strategies, with optimiser, schedule, logit mask and clipping.

    Args:
        net: embedding, blocks, pooling and head.
        objective: what is minimised and how answers are scored.
        strategy: how forgetting is fought: one, or a `Composite` of several; None is finetuning.
        optimizer: makes the optimiser from parameter groups.
        schedule: makes a `Schedule` from the number of steps of an experience; None: constant.
        logit_mask: classes that compete in training: "all", those "seen" so far, or those of the example's own
            "experience".
        clip_norm: the gradient's norm is clipped to this, None: never.
        optimizer_state: "fresh" in every experience, or "kept".

    Attributes:
        seen: [C] bool, the classes met so far.
        same_experience: [C, C] bool, the classes of one experience.
        steps: optimiser steps taken in the whole run.
        planned: optimiser steps of the experience in training, in all; 0 before the first.
        experience: the one being learned, or learned last; None before the first.
        log: takes values by name, at the number of steps taken; goes nowhere outside a run.
    """

    seen: Tensor
    same_experience: Tensor

    def __init__(
        self,
        net: Net,
        objective: Objective,
        strategy: Strategy | None = None,
        optimizer: Callable[[Iterable], Optimizer] = torch.optim.Adam,
        schedule: Callable[[int], Schedule] | None = None,
        logit_mask: str = "all",
        clip_norm: float | None = None,
        optimizer_state: str = "fresh",
    ) -> None:
        super().__init__()
        checks.one_of("logit_mask", logit_mask, ("all", "seen", "experience"))
        checks.one_of("optimizer_state", optimizer_state, ("fresh", "kept"))
        checks.above(0, "null for no clipping", clip_norm=clip_norm)
        self.net, self.objective, self.strategy = net, objective, Composite.of(strategy)
        self.make_schedule: Callable[[int], Schedule] = constant if schedule is None else schedule
        self.logit_mask, self.clip_norm, self.optimizer_state = logit_mask, clip_norm, optimizer_state
        self.handover = Handover(optimizer, optimizer_state == "kept")
        classes = net.head.outputs
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("same_experience", torch.eye(classes, dtype=torch.bool))
        self.steps = self.planned = 0
        self.experience: Experience | None = None
        self.log: Callable[[Mapping[str, float]], None] = lambda values: None

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.seen.device

    @property
    def optimizer(self) -> Optimizer | None:
        """Optimiser of the experience in training; None before the first step."""
        return self.handover.optimizer

    def forward(self, batch: Batch) -> Output:
        """The net's output, with the logits of classes that do not compete set to the lowest value."""
        output = self.net(batch)
        if self.logit_mask == "all" or not self.objective.one_class:
            return output
        allowed = self.seen if self.logit_mask == "seen" else self.same_experience[batch.y]
        lowest = torch.finfo(output.logits.dtype).min
        return replace(output, logits=output.logits.masked_fill(~allowed, lowest))

    def features(self, batch: Batch) -> Tensor:
        """Input of the head, [B, H] or [B, T, H]."""
        return self.net(batch).features

    def weights(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the net by name; the strategies' own are not among them."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimiser: the net's trainable parameters, and what strategies add."""
        net = [p for p in self.net.parameters() if p.requires_grad]
        return [{"params": net}, *self.strategy.parameter_groups()]

    def shape_for(self, experience: Experience) -> None:
        """Let the head grow for an experience, and note its classes."""
        self.net.head.adapt(experience)
        if experience.classes:
            classes = torch.tensor(experience.classes, device=self.seen.device)
            self.seen[classes] = True
            self.same_experience[classes[:, None], classes] = True

    def begin(self, experience: Experience) -> None:
        """Do all that comes before the first step on an experience."""
        self.shape_for(experience)
        self.enter(experience)
        with torch.no_grad():
            self.strategy.before_experience(self, experience)

    def enter(self, experience: Experience) -> None:
        """Note which experience is being learned, as `begin` does, for a run that goes on inside it."""
        self.experience = experience
        self.strategy.enter(self, experience)

    def end(self, experience: Experience) -> None:
        """Do all that comes after the last step on an experience; averaged iterates become the weights first."""
        self.handover.end(self.parameter_groups)
        with torch.no_grad():
            self.strategy.after_experience(self, experience)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with averaged weights where the optimiser averages.

        Each module's mode, the weights and the random state are afterwards what they were.
        """
        with evaluating(self), self.handover.averaged():
            yield
