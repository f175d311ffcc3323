"""Objectives for classes, tags, tokens, bits and real values. Letters: B batch, T time, C classes, O outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.learners.objective import Objective, Unsupported, scored_steps
from clplat.streams.experience import UNSCORED, Batch


class Softmax(Objective):
    """Base of objectives whose answer is one of C classes."""

    classes = True

    def answer(self, logits: Tensor, like: Tensor) -> Tensor:
        return logits.argmax(-1)

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        return (logits.argmax(-1) == batch.y).double()

    def sample(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        # A race: the class whose exponential clock of rate p_k rings first. Probability 0 never wins.
        clock = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=generator).to(logits.device)
        drawn = (logits.softmax(-1) / clock.clamp_min(torch.finfo(logits.dtype).tiny)).argmax(-1)
        return torch.where(batch.y == UNSCORED, batch.y, drawn)

    def entropy(self, logits: Tensor) -> Tensor:
        return torch.special.entr(logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)).sum(-1)

    def coded(self, y: Tensor, outputs: int) -> Tensor:
        return F.one_hot(y, outputs).double()


class Classification(Softmax):
    """One class a sequence: cross-entropy, accuracy. Logits [B, C], targets [B]."""

    targets = ("class",)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.y, reduction="none")

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """The (weighted) mean cross-entropy; without weights, in one fused call."""
        return F.cross_entropy(logits, batch.y) if batch.weight is None else super().__call__(logits, batch)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of correct answers and of examples."""
        correct = (logits.argmax(-1) == batch.y).sum()
        return correct, torch.full_like(correct, len(batch))

    def fisher_factors(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Vectors v_k [B, C] with sum_k v_k v_k^T = diag(p) - p p^T, the Fisher information of a softmax by its logits.

        Any such set gives the same Fisher as sqrt(p_k) (e_k - p) for all classes. These are the columns of the Cholesky
        factor (Tanabe & Sagae 1992): one less, and those of classes with probability 0 vanish.
        """
        p = logits.softmax(-1)
        tiny = torch.finfo(p.dtype).tiny
        tail = p.flip(-1).cumsum(-1).flip(-1)  # [B, C], the sum of p_k and all after it
        for k in range(p.shape[1] - 1):
            rest = tail[:, k + 1]
            size = (p[:, k] * rest / tail[:, k].clamp_min(tiny)).sqrt()
            if bool(size.any()):
                factor = torch.zeros_like(p)
                factor[:, k] = size
                factor[:, k + 1 :] = -(p[:, k + 1 :] / rest.clamp_min(tiny)[:, None]) * size[:, None]
                yield factor


class Tagging(Softmax):
    """A class at every scored step: cross-entropy, accuracy over scored steps. Logits [B, T, C], targets [B, T]."""

    targets = ("tag",)
    per_step = True

    def scored(self, batch: Batch) -> Tensor:
        """[B, T] bool: within the lengths and the mask, and not `UNSCORED`."""
        scored, within = batch.y != UNSCORED, scored_steps(batch)
        return scored if within is None else scored & within

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        y = batch.y.masked_fill(~self.scored(batch), UNSCORED)
        logits = _zeroed(logits, scored_steps(batch))
        return F.cross_entropy(logits.transpose(1, 2), y, reduction="none", ignore_index=UNSCORED)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of correct scored steps and of scored steps."""
        scored = self.scored(batch)
        return ((logits.argmax(-1) == batch.y) & scored).sum(), scored.sum()

    def fisher_factors(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """None: the sum would be over all sequences of answers.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(
            "fisher: got 'exact', which would sum over all sequences of answers, and there are too many of them where "
            "each step has a class: set fisher=sampled or fisher=empirical."
        )


class NextToken(Tagging):
    """Language modelling: cross-entropy of the next token, scored in bits a token (lower is better).

    The data give the targets already shifted: y[:, t] is the token after x[:, t].
    """

    targets = ("token",)
    score_name = "bits_per_token"
    higher_is_better = False
    by_probability = True

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bits of all scored steps, and their number."""
        return self.losses(logits, batch).sum() / math.log(2), self.scored(batch).sum()


class Bits(Objective):
    """Several independent bits at every scored step: binary cross-entropy summed over the bits of a step, accuracy
    over bits (Ehret et al. 2021). Logits and targets [B, T, O]."""

    targets = ("bits",)
    per_step = True

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
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

    def answer(self, logits: Tensor, like: Tensor) -> Tensor:
        return (logits >= 0).to(like.dtype)

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        return ((logits >= 0) == (batch.y > 0.5)).double().mean(-1)

    def sample(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)
        return (drawn < logits.sigmoid()).to(batch.y.dtype)

    def entropy(self, logits: Tensor) -> Tensor:
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        return F.binary_cross_entropy(p, p, reduction="none").sum(-1)

    def fisher_factors(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """One vector for each scored output of a sequence, of length sqrt(p (1 - p)) there."""
        p = logits.sigmoid()
        return _one_output_each((p * (1 - p)).sqrt(), self.scored(batch))

    def coded(self, y: Tensor, outputs: int) -> Tensor:
        return 2 * y.double() - 1


class Regression(Objective):
    """Real values: half the squared error, the likelihood of a unit Gaussian; scored by the mean squared error (lower
    is better). Predictions and targets [B, O] or [B, T, O]."""

    targets = ("value",)
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

    def answer(self, logits: Tensor, like: Tensor) -> Tensor:
        return logits.to(like.dtype)

    def sample(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return logits + torch.randn(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)

    def fisher_factors(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """One unit vector for each scored output of a sequence: the Gauss-Newton diagonal."""
        return _one_output_each(torch.ones_like(logits), self.scored(batch))

    def coded(self, y: Tensor, outputs: int) -> Tensor:
        return y.double()


def _one_output_each(scale: Tensor, scored: Tensor | None) -> Iterator[Tensor]:
    if scored is not None:
        scale = scale * scored[..., None]
    for number, column in enumerate(scale.flatten(1).unbind(1)):
        if bool(column.any()):
            factor = torch.zeros_like(scale).flatten(1)
            factor[:, number] = column
            yield factor.view_as(scale)


def _zeroed(values: Tensor, scored: Tensor | None) -> Tensor:
    # [B, T] or [B, T, O], 0 where nothing is scored. On padding there may be anything, and the gradient of an infinite
    # or undefined loss would be NaN even where a factor 0 follows: so what goes into the loss is replaced, by a choice.
    if scored is None:
        return values
    return values.masked_fill(~(scored if values.ndim == 2 else scored[..., None]), 0)


def objective_for(target: str) -> Objective:
    """Usual objective for a stream's kind of target."""
    return next(o() for o in (Classification, Tagging, NextToken, Bits, Regression) if target in o.targets)
