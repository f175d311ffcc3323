"""Contract of an objective: loss, likelihood, score, and the verbs that strategies ask for.

A strategy never asks of what kind an objective is. It asks for what it needs (a draw of targets, an entropy, the factors
of the exact Fisher), and an objective that lacks it says so in one sentence. Letters: B batch, T time, C classes,
O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from clplat import checks
from clplat.errors import UserError
from clplat.streams.experience import Batch


class Unsupported(UserError, ValueError):
    """A verb that an objective does not have; the message names both."""


class Objective:
    """Base of the objectives: a loss per scored step, its mean, its sum per example, and a score.

    Args:
        reduction: "mean" over all scored steps of the batch, or "sum" over the steps of an example and mean over
            examples (Ehret et al. 2021).

    Attributes:
        targets: the kinds of a stream's targets that it is for (`Stream.target`).
        score_name: the score as tables and metrics call it.
        higher_is_better: False for losses.
        classes: the answer is one of C classes, by a softmax over the logits.
        per_step: there is a target at every step, not one a sequence.
        by_probability: the score needs probabilities, so that an answer alone does not do.
    """

    targets: tuple[str, ...] = ()
    score_name: str = "accuracy"
    higher_is_better: bool = True
    classes: bool = False
    per_step: bool = False
    by_probability: bool = False

    def __init__(self, reduction: str = "mean") -> None:
        checks.one_of("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss [B] or [B, T] of every step, in nats; 0 where nothing is scored."""
        self._lacks("losses(logits, batch)")

    @property
    def one_class(self) -> bool:
        """One class a sequence."""
        return self.classes and not self.per_step

    def scored(self, batch: Batch) -> Tensor | None:
        """[B, T] bool, True where a step is scored; None: everywhere (or there is no time axis)."""
        if batch.y.ndim < 3:  # one target a sequence
            return None
        return scored_steps(batch)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """The scalar to minimise: the weighted mean of the losses of a batch."""
        losses = self.losses(logits, batch)
        scored = self.scored(batch)
        if losses.ndim == 1:
            counts = torch.ones_like(losses)
        elif scored is None:
            counts = torch.full_like(losses[:, 0], losses.shape[1])
            losses = losses.sum(1)
        else:
            counts, losses = scored.sum(1).to(losses.dtype), losses.sum(1)
        if self.reduction == "sum":
            counts = torch.ones_like(counts)
        if batch.weight is not None:
            losses, counts = losses * batch.weight, counts * batch.weight
        return losses.sum() / counts.sum()

    def log_likelihood(self, logits: Tensor, batch: Batch) -> Tensor:
        """log p(y | x) of each example [B] in nats, summed over its scored steps (up to a constant)."""
        losses = self.losses(logits, batch)
        return -(losses if losses.ndim == 1 else losses.sum(1))

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the scores of all scored steps, and their number, as scalars; their ratio is the score."""
        self._lacks("score(logits, batch)")

    def answer(self, logits: Tensor, like: Tensor) -> Tensor:
        """Most likely targets, in the form of `like`."""
        self._lacks("an answer: answer(logits, like)")

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        """Share of each target [B] or [B, T] that is answered right: 0 or 1, or of its bits; a step not scored is any."""
        self._lacks("right and wrong answers: right(logits, batch)")

    def sample(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Targets drawn from the model, in the form of `batch.y`; steps that are not scored stay so."""
        self._lacks("a draw of targets: sample(logits, batch, generator)")

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of the predictive distribution in nats, [...] of logits [..., C]."""
        self._lacks("an entropy: entropy(logits)")

    def fisher_factors(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Vectors v_k like `logits` with sum_k v_k v_k^T the Fisher information of an example by its logits."""
        self._lacks("an exact Fisher: fisher_factors(logits, batch)")

    def coded(self, y: Tensor, outputs: int) -> Tensor:
        """Targets as real vectors [..., O] for a least-squares solution."""
        self._lacks("targets for least squares: coded(y, outputs)")

    def _lacks(self, what: str) -> NoReturn:
        raise Unsupported(
            f"objective: {type(self).__name__} does not define {what}. Choose an option or a strategy that does not need "
            "it, or another objective."
        )


def scored_steps(batch: Batch) -> Tensor | None:
    """[B, T] bool, True within the lengths and the mask; None: everywhere."""
    valid = batch.valid()
    if batch.mask is None or valid is None:
        return valid if batch.mask is None else batch.mask
    return batch.mask & valid
