"""Rehearsal with feature- and prediction-level distillation (Cappellazzo et al. 2023, arXiv 2211.08161)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream
from clplat.weights.teacher import Teacher, every_logit

ROWS = ("none", "replayed", "all")


class Distillation(Strategy):
    """Distillation of the net before the experience, on features and on answers.

    It goes with a replay strategy: `strategy=[replay,distillation]`. With r replayed rows among n, C_old classes met before and C met by now:

        feature:     MSE of features;  weight a = sqrt(r / n)
        prediction:  T^2 KL(teacher || student), both as softmax over the C_old classes, mean over rows and classes;
                     weight b = ln(1 + C_old / C) on all rows, sqrt(r / n) on replayed ones
        loss:        (1 - a) CE + a MSE + b KL          where features are distilled
                     (1 - b) CE + b KL                  where only predictions are

    Deviations from the released code: the weight of features on all rows is a constant (there it is replaced by
    ln(1 + a) at every batch and fades away); `mean="rows"` averages the KL over rows only, as its definition says
    (there over rows and classes). With task labels the softmax is over the row's own task.

    Args:
        feature: rows whose features are distilled: "none", "replayed" or "all".
        prediction: rows whose answers are distilled: "none", "replayed" or "all".
        temperature: T, above 0.
        mean: of the KL, over "rows", or "rows_and_classes" (the released code).
    """

    needs = frozenset({"boundaries", "classes"})
    not_carried = "its teacher would see each segment from a fresh state, the learner from a carried one"
    claims = frozenset({"layers"})
    known: Tensor  # [C] bool, classes met before this experience

    def __init__(
        self,
        feature: str = "replayed",
        prediction: str = "all",
        temperature: float = 1.0,
        mean: str = "rows_and_classes",
    ) -> None:
        super().__init__()
        checks.one_of("feature", feature, ROWS)
        checks.one_of("prediction", prediction, ROWS)
        checks.above(0, temperature=temperature)
        checks.one_of("mean", mean, ("rows", "rows_and_classes"))
        self.feature, self.prediction, self.temperature = feature, prediction, temperature
        self.by_class = mean == "rows_and_classes"
        self.off = feature == prediction == "none"
        self.claims = frozenset({"layers", *([] if self.off else ["objective"])})
        self.passes = 1.0 if self.off else 4 / 3
        self.old = self.all = 0  # numbers of classes
        self.register_buffer("known", None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        if not self.off:
            self.teacher = Teacher(learner.net)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.all = int(learner.seen.sum())

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        own = learner.objective(output.logits, batch)
        if not self.teacher:
            return own
        before = self.teacher(batch)
        replayed = torch.zeros_like(batch.y) if batch.source is None else batch.source
        share = weight_of_rehearsal(replayed.sum(), len(batch))
        total = own
        if self.feature != "none":
            apart = (output.features - before.features).square().mean(-1)
            total = (1 - share) * own + share * _mean(apart, replayed if self.feature == "replayed" else None)
        if self.prediction != "none":
            apart = self._divergence(every_logit(learner, batch, output), before.logits)
            apart = _mean(apart, replayed if self.prediction == "replayed" else None)
            weight = share if self.prediction == "replayed" else weight_of_classes(self.old, self.all)
            total = weight * apart + (total if self.feature != "none" else (1 - weight) * own)
        return total

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if not self.off:
            self.teacher.learn(learner.net)
            self.known, self.old = learner.seen.clone(), int(learner.seen.sum())

    def stored_bytes(self) -> int:
        return 0 if self.off else self.teacher.stored_bytes()

    def get_extra_state(self) -> dict[str, int]:
        return {"old": self.old, "all": self.all}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        self.old, self.all = state["old"], state["all"]

    def _divergence(self, new: Tensor, old: Tensor) -> Tensor:
        """T^2 KL [B] over the classes known before, where the teacher offers them."""
        offered = self.known & (old > torch.finfo(old.dtype).min)
        lowest = torch.finfo(torch.float32).min
        p, q = (
            (z.to(torch.promote_types(z.dtype, torch.float32)) / self.temperature)
            .masked_fill(~offered, lowest)
            .log_softmax(-1)
            for z in (old, new)
        )
        apart = (p.exp() * (p - q)).masked_fill(~offered, 0).sum(-1) * self.temperature**2
        return apart / self.old if self.by_class else apart


def weight_of_rehearsal(replayed: Tensor, rows: int) -> Tensor:
    """sqrt(r / n), a scalar in 0..1."""
    return (replayed / rows).sqrt()


def weight_of_classes(old: int, all_: int) -> float:
    """ln(1 + C_old / C), in 0..ln 2."""
    return math.log(1 + old / all_)


def _mean(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Mean of values [B] over all rows, or over those where `chosen` is 1; 0 without any."""
    return values.mean() if chosen is None else (values * chosen).sum() / chosen.sum().clamp_min(1)
