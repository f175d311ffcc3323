"""Objectives: what is minimised, what the likelihood of an example is, and how an answer is scored.

Letters: B batch, T time, C classes, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.streams.experience import UNSCORED, Batch, Target


class Objective:
    """Base of the objectives: a loss per scored step, its mean, its sum per example, and a score.

    Args:
        reduction: "mean" over all scored steps of the batch, or "sum" over the steps of an example and mean over
            examples (Ehret et al. 2021).

    Attributes:
        kind: of the targets it is for (`Batch.y`).
        score_name: what `score` is called in tables and metrics.
        higher_is_better: False for losses.
        sequence: True if a target at every step is scored.

    Raises:
        ValueError: an unknown reduction.
    """

    kind: Target
    score_name: str = "accuracy"
    higher_is_better: bool = True

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"objective.reduction: got {reduction!r}, allowed are 'mean' and 'sum'.")
        self.reduction = reduction

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss [B] or [B, T] of every step, in nats; 0 where nothing is scored."""
        raise TypeError(f"{type(self).__name__} does not define losses(logits, batch).")

    def scored(self, batch: Batch) -> Tensor | None:
        """[B, T] bool, True where a step is scored; None: everywhere (or there is no time axis)."""
        if batch.y.ndim < 3:  # one target a sequence
            return None
        return _within(batch)

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
        raise TypeError(f"{type(self).__name__} does not define score(logits, batch).")


class Classification(Objective):
    """One class a sequence: cross-entropy, accuracy. Logits [B, C], targets [B]."""

    kind = "class"

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [B]."""
        return F.cross_entropy(logits, batch.y, reduction="none")

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """The (weighted) mean cross-entropy; without weights, in one fused call."""
        return F.cross_entropy(logits, batch.y) if batch.weight is None else super().__call__(logits, batch)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of correct answers and of examples."""
        correct = (logits.argmax(-1) == batch.y).sum()
        return correct, torch.full_like(correct, len(batch))


class Tagging(Objective):
    """A class at every scored step: cross-entropy, accuracy over scored steps. Logits [B, T, C], targets [B, T]."""

    kind = "tag"

    def scored(self, batch: Batch) -> Tensor:
        """[B, T] bool: within the lengths and the mask, and not `UNSCORED`."""
        scored, within = batch.y != UNSCORED, _within(batch)
        return scored if within is None else scored & within

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [B, T], 0 on unscored steps."""
        y = batch.y.masked_fill(~self.scored(batch), UNSCORED)
        logits = _zeroed(logits, _within(batch))
        return F.cross_entropy(logits.transpose(1, 2), y, reduction="none", ignore_index=UNSCORED)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of correct scored steps and of scored steps."""
        scored = self.scored(batch)
        return ((logits.argmax(-1) == batch.y) & scored).sum(), scored.sum()


class NextToken(Tagging):
    """Language modelling: cross-entropy of the next token, scored in bits a token (lower is better).

    The data give the targets already shifted: y[:, t] is the token after x[:, t].
    """

    kind = "token"
    score_name = "bits_per_token"
    higher_is_better = False

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bits of all scored steps, and their number."""
        return self.losses(logits, batch).sum() / math.log(2), self.scored(batch).sum()


class Bits(Objective):
    """Several independent bits at every scored step: binary cross-entropy summed over the bits of a step, accuracy
    over bits (Ehret et al. 2021). Logits and targets [B, T, O]."""

    kind = "bits"

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy [B, T], summed over O; 0 on unscored steps."""
        scored = self.scored(batch)
        logits, y = _zeroed(logits, scored), _zeroed(batch.y, scored)
        return _zeroed(F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(-1), scored)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of correct bits and of scored bits."""
        correct = ((logits >= 0) == (batch.y > 0.5)).sum(-1)
        scored = self.scored(batch)
        if scored is None:
            return correct.sum(), torch.tensor(batch.y.numel())
        return (correct * scored).sum(), scored.sum() * batch.y.shape[-1]


class Regression(Objective):
    """Real values: half the squared error, the likelihood of a unit Gaussian; scored by the mean squared error (lower
    is better). Predictions and targets [B, O] or [B, T, O]."""

    kind = "value"
    score_name = "mse"
    higher_is_better = False

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Half the squared error summed over O: [B], or [B, T] with 0 on unscored steps."""
        scored = self.scored(batch)
        return 0.5 * (_zeroed(logits, scored) - _zeroed(batch.y, scored)).square().sum(-1)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of squared errors and the number of scored values."""
        scored = self.scored(batch)
        steps = torch.tensor(batch.y.shape[:-1].numel()) if scored is None else scored.sum()
        return 2 * self.losses(logits, batch).sum(), steps * batch.y.shape[-1]


def _within(batch: Batch) -> Tensor | None:
    valid = batch.valid()
    if batch.mask is None or valid is None:
        return valid if batch.mask is None else batch.mask
    return batch.mask & valid


def _zeroed(values: Tensor, scored: Tensor | None) -> Tensor:
    # [B, T] or [B, T, O], 0 where nothing is scored. On padding there may be anything, and the gradient of an infinite
    # or undefined loss would be NaN even where a factor 0 follows: so what goes into the loss is replaced, by a choice.
    if scored is None:
        return values
    return values.masked_fill(~(scored if values.ndim == 2 else scored[..., None]), 0)


def objective_for(target: Target) -> Objective:
    """The usual objective for a kind of target."""
    return {o.kind: o for o in (Classification, Tagging, NextToken, Bits, Regression)}[target]()
