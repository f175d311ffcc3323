"""The learner: a LightningModule that takes many optimiser steps in one training step, by way of its strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clplat.errors import UserError
from clplat.learners.nets.net import Net, Output
from clplat.learners.objectives import Objective
from clplat.lightning import pl
from clplat.strategy import Closure, Strategy
from clplat.streams.experience import Batch, Experience

Schedule = Callable[[int], float]
"""The learning rate's factor at each optimiser step of an experience, from 0."""


class NonFiniteLoss(UserError, ArithmeticError):
    """A loss term became NaN or infinite; the message names the term, the step and the experience."""

    code = 1


class Learner(pl.LightningModule):
    """Net, objective, optimiser, schedule and strategy.

    One call of `training_step` takes one optimiser step for each batch of a chunk: Lightning's cost a call (about
    0.4 ms) is paid once a chunk. Nothing in a step waits for the device, but what a strategy says does (GEM; two that
    replay in one list, which pick out the current rows).

    Args:
        net: embedding, blocks, readout and head.
        objective: what is minimised and how answers are scored.
        strategy: how forgetting is fought; the base class is finetuning.
        optimizer: makes the optimiser from parameter groups.
        schedule: makes a `Schedule` from the number of steps of an experience; None: constant.
        logit_mask: which classes compete in training: "all", those "seen" so far, or those of the example's own
            "experience".
        clip_norm: the gradient's norm is clipped to this, None: never.
        optimizer_state: "fresh" in every experience, or "kept".

    Raises:
        ValueError: an option that is not allowed.
    """

    seen: Tensor
    together: Tensor

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
        if logit_mask not in ("all", "seen", "experience"):
            raise ValueError(f"logit_mask: got {logit_mask!r}, allowed are 'all', 'seen' and 'experience'.")
        if optimizer_state not in ("fresh", "kept"):
            raise ValueError(f"optimizer_state: got {optimizer_state!r}, allowed are 'fresh' and 'kept'.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: got {clip_norm}, it must be above 0, or null for no clipping.")
        self.automatic_optimization = False
        self.net, self.objective = net, objective
        self.strategy = Strategy() if strategy is None else strategy
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.logit_mask, self.clip_norm, self.optimizer_state = logit_mask, clip_norm, optimizer_state
        classes = net.head.outputs
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))  # [C]
        self.register_buffer("together", torch.eye(classes, dtype=torch.bool))  # [C, C] classes of one experience
        self.steps = 0
        """Optimiser steps taken in the whole run."""
        self.experience: Experience | None = None
        self.resume_optimizer: dict[str, Any] | None = None
        self.before_first_step: Callable[[], None] | None = None
        self.optimizer: Optimizer | None = None
        self._factor: Schedule | None = None
        self._done = 0
        self._rates: list[float] = []
        self._terms: list[dict[str, Tensor]] = []

    def forward(self, batch: Batch) -> Output:
        """The net's output, with the logits of classes that do not compete set to the lowest value."""
        output = self.net(batch)
        if self.logit_mask == "all" or self.objective.kind != "class":
            return output
        allowed = self.seen if self.logit_mask == "seen" else self.together[batch.y]
        lowest = torch.finfo(output.logits.dtype).min
        return Output(output.logits.masked_fill(~allowed, lowest), output.features, output.state)

    def features(self, batch: Batch) -> Tensor:
        """The head's input, [B, H] or [B, T, H]."""
        return self.net(batch).features

    def weights(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the net by name; the strategy's own are not among them."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def shape_for(self, experience: Experience) -> None:
        """Let the head grow for an experience, and note its classes."""
        self.net.head.adapt(experience)
        if experience.classes:
            classes = torch.tensor(experience.classes, device=self.seen.device)
            self.seen[classes] = True
            self.together[classes[:, None], classes] = True

    def begin(self, experience: Experience) -> None:
        """Everything that happens before the first step on an experience."""
        self.shape_for(experience)
        self.enter(experience)
        with torch.no_grad():
            self.strategy.before_experience(self, experience)

    def enter(self, experience: Experience) -> None:
        """Note which experience is being learned, as `begin` does, for a run that goes on inside it."""
        self.experience = experience
        self.strategy.enter(self, experience)

    def end(self, experience: Experience) -> None:
        """Everything that happens after the last step on an experience."""
        if self.optimizer_state == "fresh":
            self.resume_optimizer = None  # a run that was resumed after its last step has not used it
        elif self.optimizer is not None:
            self.resume_optimizer = self.optimizer.state_dict()
        with torch.no_grad():
            self.strategy.after_experience(self, experience)

    def plan(self, steps: int, start: int) -> None:
        """Set the schedule for `steps` optimiser steps, of which `start` are done."""
        factor = self.make_schedule(steps) if self.make_schedule is not None else unchanged
        factor = self.strategy.schedule(factor)
        self._factor, self._done = (None if factor is unchanged else factor), start

    def schedule_factor(self) -> float:
        """The learning rate's factor at the next step of the planned experience."""
        return 1.0 if self._factor is None else self._factor(self._done)

    def configure_optimizers(self) -> Optimizer:
        """The optimiser of this experience, with its old state if there is one to go on from."""
        groups = [{"params": [p for p in self.parameters() if p.requires_grad]}]
        self.optimizer = self.make_optimizer(self.strategy.parameter_groups(groups))
        self._rates = [g["lr"] for g in self.optimizer.param_groups]
        if self.resume_optimizer is not None:
            self.optimizer.load_state_dict(self.resume_optimizer)
            self.resume_optimizer = None
        return self.optimizer

    def transfer_batch_to_device(
        self, batch: Iterator[Batch], device: torch.device, dataloader_idx: int
    ) -> Iterator[Batch]:
        """The chunk as it is: each batch goes to the device when its turn comes."""
        return batch

    def training_step(self, batch: Iterator[Batch], batch_idx: int) -> None:
        """One optimiser step for each batch of the chunk.

        Raises:
            NonFiniteLoss: a term of the loss is NaN or infinite; found at the end of the chunk, before anything of it
                is kept.
        """
        if self.before_first_step is not None:  # Lightning's own set-up may have drawn random numbers until here
            self.before_first_step()
            self.before_first_step = None
        self._terms.clear()
        for one in batch:
            self._learn(one.to(self.device))
        # Where Lightning and its callbacks look for the number of optimiser steps.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.ready = progress.total.completed = self.steps
        self._check_finite()

    def mean_terms(self) -> dict[str, float]:
        """The mean of each loss term over the last chunk; waits for the device."""
        return {k: float(torch.stack([t[k] for t in self._terms if k in t]).mean()) for k in self._terms[-1]}

    def _learn(self, batch: Batch) -> None:
        strategy, optimizer = self.strategy, self.optimizer
        assert optimizer is not None
        if self._factor is not None:
            factor = self.schedule_factor()
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        batch = strategy.batch(self, batch)
        terms: dict[str, Tensor] = {}

        def closure() -> Output:
            optimizer.zero_grad(set_to_none=True)
            output = self(batch)
            if strategy.replaces_objective:
                total = strategy.objective(self, batch, output)
            else:
                total = self.objective(output.logits, batch)
            terms["objective"] = total.detach()
            for name, term in strategy.loss(self, batch, output).items():
                terms[name] = term.detach()
                total = total + term
            terms["loss"] = total.detach()
            total.backward()
            return output

        def update(closure: Closure) -> Output:
            output = closure()
            strategy.gradients(self, batch)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
            optimizer.step()
            return output

        output = strategy.step(self, closure, update)
        self._terms.append(terms)
        self.steps += 1
        self._done += 1
        with torch.no_grad():
            strategy.after_step(self, batch, output)

    def _check_finite(self) -> None:
        losses = torch.stack([t["loss"] for t in self._terms])
        if bool(torch.isfinite(losses).all()):  # the only wait for the device, once a chunk
            return
        at = int((~torch.isfinite(losses)).nonzero()[0])
        terms = {name: float(value) for name, value in self._terms[at].items()}
        bad = next((n for n, v in terms.items() if n != "loss" and not math.isfinite(v)), "loss")
        step = self.steps - len(self._terms) + at + 1
        name = "?" if self.experience is None else f"{self.experience.index} ({self.experience.name})"
        raise NonFiniteLoss(
            f"The loss term {bad!r} became {terms[bad]} at step {step}, experience {name}; all terms: {terms}. "
            "Lower optimizer.lr, set learner.clip_norm, or lower the strategy's strength."
        )


def unchanged(step: int) -> float:
    """The factor of a constant learning rate."""
    return 1.0
