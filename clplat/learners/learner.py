"""The learner: a LightningModule that takes many optimiser steps in one training step, by way of its strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from clplat.errors import UserError
from clplat.learners.nets.net import Net, Output, State
from clplat.learners.objectives import Objective
from clplat.learners.optimizers import NTASGD
from clplat.lightning import pl
from clplat.strategy import Closure, Strategy
from clplat.streams.experience import Batch, Experience

HELD_OUT_BATCH = 256
"""Examples a forward pass, where an optimiser asks for the loss on held-out data."""

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
        self.carries = False
        """Whether batches are segments that follow one another: the state goes from each to the next."""
        self.nominal: int | None = None
        """The learning rate is meant for segments of this many steps and scaled by their length; None: never."""
        self.carried: tuple[State, ...] | None = None
        """The state of the rows of the next batch, one entry a block, without gradients; None: fresh."""
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
        return replace(output, logits=output.logits.masked_fill(~allowed, lowest))

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
        self.carried = None
        self.shape_for(experience)
        self.enter(experience)
        with torch.no_grad():
            self.strategy.before_experience(self, experience)

    def enter(self, experience: Experience) -> None:
        """Note which experience is being learned, as `begin` does, for a run that goes on inside it."""
        self.experience = experience
        self.strategy.enter(self, experience)

    def end(self, experience: Experience) -> None:
        """Everything that happens after the last step on an experience.

        An optimiser that averages leaves the mean of its iterates behind, before the strategy sees the weights.
        """
        if self.optimizer is None and self.resume_optimizer is not None:  # resumed after the last step
            self.configure_optimizers()
        if isinstance(self.optimizer, NTASGD):
            self.optimizer.finish()
        if self.optimizer_state == "fresh":
            self.resume_optimizer = None  # a run that was resumed after its last step has not used it
        elif self.optimizer is not None:
            self.resume_optimizer = self.optimizer.state_dict()
        with torch.no_grad():
            self.strategy.after_experience(self, experience)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with averaged weights where the optimiser averages; each module's mode,
        the weights and the random state are afterwards what they were."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                if isinstance(self.optimizer, NTASGD):
                    with self.optimizer.averaged():
                        yield
                else:
                    yield
        finally:
            for module, mode in modes:
                module.training = mode

    def held_out_loss(self) -> Tensor | None:
        """The objective on what the experience holds out, as the mean over its examples' batches; None if it holds
        out nothing."""
        data = None if self.experience is None else self.experience.valid
        if data is None:
            return None
        total = torch.zeros((), device=self.device)
        with self.evaluating():
            for batch in data.batches(torch.arange(len(data)).split(HELD_OUT_BATCH)):
                batch = batch.to(self.device)
                total += self.objective(self(batch).logits, batch) * (len(batch) / len(data))
        return total

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
        if self._factor is not None or self.nominal is not None:
            factor = self.schedule_factor() * (1.0 if self.nominal is None else batch.x.shape[1] / self.nominal)
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        segment, batch = batch, strategy.batch(self, batch)
        terms: dict[str, Tensor] = {}

        def closure() -> Output:
            optimizer.zero_grad(set_to_none=True)
            output = self._after(segment, batch) if self.carries else self(batch)
            if strategy.replaces_objective:
                total = strategy.objective(self, batch, output)
            else:
                total = self.objective(output.logits, batch)
            terms["objective"] = total.detach()
            for name, term in (*output.penalties.items(), *strategy.loss(self, batch, output).items()):
                terms[name] = term.detach()
                total = total + term
            terms["loss"] = total.detach()
            with torch.autocast(self.device.type, enabled=False):  # its products have the forward pass's precisions
                total.backward()
            return output

        def update(closure: Closure) -> Output:
            output = closure()
            strategy.gradients(self, batch)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
            optimizer.step()
            if isinstance(optimizer, NTASGD):
                optimizer.observe(terms["objective"], self.held_out_loss)
            return output

        output = strategy.step(self, closure, update)
        if self.carries:
            self.carried = _cut(output.state)
        self._terms.append(terms)
        self.steps += 1
        self._done += 1
        with torch.no_grad():
            strategy.after_step(self, batch, output)

    def _after(self, segment: Batch, batch: Batch) -> Output:
        """The output for `batch`, whose first rows are those of `segment` and start from the carried state; all rows
        behind them are replayed, and start fresh."""
        rows, steps = segment.x.shape[:2]
        if len(batch) < rows or (len(batch) > rows and batch.source is None):
            raise ValueError(
                f"The state is carried for {rows} rows, and the strategy gave {len(batch)} rows of which none is marked "
                "as replayed: keep the rows of the batch, add others behind them, and mark those with source 1."
            )
        # Rows that were padded to the length of replayed ones are cut back: their state is that of their last step.
        task = None if batch.task is None else batch.task[:rows]
        own = Batch(batch.x[:rows, :steps], batch.y[:rows, :steps], task=task, reset=segment.reset)
        output = self.net(own, self.carried)
        if len(batch) == rows:
            return output
        others = self.net(batch.rows(torch.arange(rows, len(batch), device=batch.x.device)))
        more = [0, 0, 0, batch.x.shape[1] - steps]
        return Output(
            torch.cat([F.pad(output.logits, more), others.logits]),
            torch.cat([F.pad(output.features, more), others.features]),
            output.state,
            output.penalties,
        )

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


def _cut(state: tuple[State, ...]) -> tuple[State, ...]:
    # Copies: a state may be a view of all steps, which would be kept alive and written to every checkpoint.
    return tuple(None if s is None else tuple(t.detach().clone() for t in s) for s in state)


def unchanged(step: int) -> float:
    """The factor of a constant learning rate."""
    return 1.0
