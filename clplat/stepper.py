"""Stepper: the LightningModule that trains a learner, many optimiser steps in one of Lightning's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clplat.errors import UserError
from clplat.learners.carry import Carry
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.learners.optimizers import Averaging
from clplat.learners.schedules import Schedule, constant
from clplat.lightning import pl, tell_steps
from clplat.strategy import Closure
from clplat.streams.experience import Batch

HELD_OUT_BATCH = 256
"""Examples a forward pass, where an optimiser asks for the loss on held-out data."""


class NonFiniteLoss(UserError, ArithmeticError):
    """A loss term became NaN or infinite; the message names the term, the step and the experience."""

    code = 1


class Stepper(pl.LightningModule):
    """Training of a learner by Lightning's Trainer.

    One call of `training_step` takes one optimiser step for each batch of a chunk, so that Lightning's cost a call
    (about 0.4 ms) is paid once a chunk. No step waits for the device, but where a strategy does.

    Args:
        learner: what is trained.
        carry: state of segments that follow one another; None: every batch starts fresh.
        stops: asked after each step whether the chunk ends here.
    """

    def __init__(self, learner: Learner, carry: Carry | None = None, stops: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner, self.carry, self.stops = learner, carry, stops
        self._schedule: Schedule = constant(0)
        self._done = 0
        self._nominal: int | None = None
        self._before_first: Callable[[], None] | None = None
        self._terms: list[dict[str, Tensor]] = []
        self._earlier: list[dict[str, Tensor]] = []

    def plan(
        self,
        steps: int,
        start: int = 0,
        nominal: int | None = None,
        before_first: Callable[[], None] | None = None,
        earlier: Sequence[dict[str, Tensor]] = (),
    ) -> None:
        """Plan the training on an experience.

        Args:
            steps: optimiser steps in all.
            start: of these, done already.
            nominal: segment length that the learning rate is meant for, and scaled by; None: it is not scaled.
            before_first: called just before the first step, when Lightning's own set-up may have drawn random numbers.
            earlier: terms of the steps that were taken of the first chunk, by a run that goes on inside it.
        """
        self._schedule = self.learner.make_schedule(steps)
        self.learner.planned = steps
        self._done, self._nominal, self._before_first = start, nominal, before_first
        self._earlier = [{name: term.to(self.learner.device) for name, term in terms.items()} for terms in earlier]

    def configure_optimizers(self) -> Optimizer:
        """Optimiser of the experience, with its old state if there is one to go on from."""
        return self.learner.handover.begin(self.learner.parameter_groups())

    def transfer_batch_to_device(
        self, batch: Iterator[Batch], device: torch.device, dataloader_idx: int
    ) -> Iterator[Batch]:
        """The chunk as it is: each batch goes to the device when its turn comes."""
        return batch

    def training_step(self, batch: Iterator[Batch], batch_idx: int) -> None:
        """Take one optimiser step for each batch of the chunk.

        Raises:
            NonFiniteLoss: a term of the loss is NaN or infinite; found at the end of the chunk, before anything of it
                is kept.
        """
        if self._before_first is not None:
            self._before_first()
            self._before_first = None
        self._terms, self._earlier = self._earlier, []
        for one in batch:
            self._learn(one)
            if self.stops():
                break
        tell_steps(self.trainer, self.learner.steps)
        self._check_finite()

    def terms(self) -> list[dict[str, Tensor]]:
        """Loss terms of each step of the last chunk."""
        return self._terms

    def mean_terms(self) -> dict[str, float]:
        """Mean of each loss term over the last chunk; waits for the device."""
        return {k: float(torch.stack([t[k] for t in self._terms if k in t]).mean()) for k in self._terms[-1]}

    def held_out_loss(self) -> Tensor | None:
        """Objective on what the experience holds out, mean over its examples' batches; None if it holds out nothing."""
        learner = self.learner
        data = None if learner.experience is None else learner.experience.valid
        if data is None:
            return None
        total = torch.zeros((), device=learner.device)
        with learner.evaluating():
            for batch in data.batches(torch.arange(len(data)).split(HELD_OUT_BATCH)):
                batch = batch.to(learner.device)
                total += learner.objective(learner(batch).logits, batch) * (len(batch) / len(data))
        return total

    def _learn(self, read: Batch) -> None:
        learner, strategy, optimizer = self.learner, self.learner.strategy, self.learner.optimizer
        assert optimizer is not None
        factor = strategy.rate(self._done, learner.planned, read, self._schedule(self._done))
        if self._nominal is not None:
            factor *= read.x.shape[1] / self._nominal
        learner.handover.set_rate(factor)
        segment = read.to(learner.device)
        batch = strategy.batch(learner, segment)
        strategy.before_step(learner, batch)
        terms: dict[str, Tensor] = {}

        def closure() -> Output:
            optimizer.zero_grad(set_to_none=True)
            output = learner(batch) if self.carry is None else self.carry.forward(learner, segment, batch)
            total = strategy.objective(learner, batch, output)
            terms["objective"] = total.detach()
            for name, term in (*output.penalties.items(), *strategy.loss(learner, batch, output).items()):
                terms[name] = term.detach()
                total = total + term
            terms["loss"] = total.detach()
            with torch.autocast(learner.device.type, enabled=False):  # its products have the forward pass's precisions
                total.backward()
            return output

        def update(closure: Closure) -> Output:
            output = closure()
            strategy.gradients(learner, batch)
            if learner.clip_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, learner.clip_norm)
            optimizer.step()
            if isinstance(optimizer, Averaging):
                optimizer.observe(terms["objective"], self.held_out_loss)
            return output

        output = strategy.step(learner, closure, update)
        if self.carry is not None:
            self.carry.keep(output.state)
        self._terms.append(terms)
        learner.steps += 1
        self._done += 1
        with torch.no_grad():
            strategy.after_step(learner, batch, output)

    def _check_finite(self) -> None:
        losses = torch.stack([t["loss"] for t in self._terms])
        if bool(torch.isfinite(losses).all()):  # the only wait for the device, once a chunk
            return
        at = int((~torch.isfinite(losses)).nonzero()[0])
        terms = {name: float(value) for name, value in self._terms[at].items()}
        bad = next((n for n, v in terms.items() if n != "loss" and not math.isfinite(v)), "loss")
        step = self.learner.steps - len(self._terms) + at + 1
        experience = self.learner.experience
        name = "?" if experience is None else f"{experience.index} ({experience.name})"
        raise NonFiniteLoss(
            f"The loss term {bad!r} became {terms[bad]} at step {step}, experience {name}; all terms: {terms}. "
            "Lower optimizer.lr, set learner.clip_norm, or lower the strategy's strength."
        )
