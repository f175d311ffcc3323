"""Learning rates for continual pre-training: re-warming and re-decaying, and the infinite schedule (Ibrahim et al.
2024, arXiv 2403.08763; Gupta et al. 2023, arXiv 2308.04014)."""

from __future__ import annotations

import math
from typing import Any

from clplat import checks
from clplat.learners.learner import Learner
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream

MODES = ("cosine", "infinite")
SHAPES = ("cosine", "inverse_sqrt")


class Rewarming(Strategy):
    """Sets the course of the learning rate over the experiences; factors are relative to `optimizer.lr`, eta_max.

    - cosine: in every experience a linear re-warming to eta_max and a cosine re-decay to final * eta_max.
    - infinite: one course over the whole run. Warm-up and cooldown to constant * eta_max in the first experience;
      constant from then on, however many experiences follow; annealing to final * eta_max at the end of the last one.

    It multiplies what `schedule` gives, so leave that at `constant`. For the paper's recipe add replay, or, with a
    share q of each batch drawn from all earlier sets, `rehearsal_environment` with `schedule: uniform`, `fraction: q`
    and `keep_steps: true`. Adam's moments are those of `learner.optimizer_state`: fresh in every experience unless
    kept.

    Deviations: the paper's lengths are in tokens of its own data sets; here they are fractions of the optimiser steps
    of one experience. The form of cooldown and annealing is that of the paper's text as others have implemented it, and
    its constants (eta_const / eta_max = 0.55, eta_min / eta_max = 0.1) could not be confirmed.

    Args:
        mode: "cosine" or "infinite".
        warmup: fraction of the steps of an experience (infinite: of the first) spent warming up, in 0..1.
        final: eta_min / eta_max, in 0..1; infinite: above 0.
        cooldown: infinite: fraction of the first experience's steps after the warm-up, with it at most 1.
        constant: infinite: eta_const / eta_max, above 0 and at most 1.
        anneal: infinite: fraction of the last experience's steps, in 0..1; 0: never, the run may be gone on with.
        shape: of the cooldown, "cosine" or "inverse_sqrt".
        steepness: a of inverse_sqrt, above 0.
    """

    def __init__(
        self,
        mode: str = "cosine",
        warmup: float = 0.01,
        final: float = 0.1,
        cooldown: float = 0.5,
        constant: float = 0.55,
        anneal: float = 0.2,
        shape: str = "cosine",
        steepness: float = 10.0,
    ) -> None:
        super().__init__()
        checks.one_of("mode", mode, MODES)
        checks.one_of("shape", shape, SHAPES)
        checks.within(0, 1, warmup=warmup, final=final, cooldown=cooldown, constant=constant, anneal=anneal)
        if mode == "infinite" and not (final > 0 and constant > 0):
            raise ValueError(
                f"final: got final={final} and constant={constant} with mode 'infinite', whose annealing is a ratio "
                "of the two: both must be above 0."
            )
        if warmup + cooldown > 1:
            raise ValueError(f"cooldown: got {cooldown} after a warm-up of {warmup}, together at most 1.")
        checks.above(0, steepness=steepness)
        self.mode, self.warmup, self.final, self.cooldown = mode, warmup, final, cooldown
        self.constant, self.anneal, self.shape, self.steepness = constant, anneal, shape, steepness
        self._before = 0  # optimiser steps before this experience
        self._first = 0  # optimiser steps of the first experience
        self._index, self._count = 0, 1  # of this experience, and the number of experiences

    def setup(self, learner: Learner, stream: Stream) -> None:
        self._count = len(stream)

    def enter(self, learner: Learner, experience: Experience) -> None:
        self._index = experience.index

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self._before = learner.steps

    def rate(self, step: int, steps: int, batch: Batch, factor: float) -> float:
        if self.mode == "cosine":
            return factor * rewarmed(step, steps, self.warmup, self.final)
        index, count = self._index, self._count
        if index == 0:
            self._first = steps
        start, before = None, self._before
        if index == count - 1 and self.anneal > 0:
            start = before + steps - round(self.anneal * steps)
        options = {
            "warmup": round(self.warmup * self._first),
            "cooldown": round((self.warmup + self.cooldown) * self._first),
            "anneal": start,
            "end": before + steps,
            "constant": self.constant,
            "final": self.final,
            "shape": self.shape,
            "steepness": self.steepness,
        }
        return factor * infinite(before + step, **options)

    def get_extra_state(self) -> dict[str, int]:
        return {"before": self._before, "first": self._first}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._before, self._first = state["before"], state["first"]


def rewarmed(step: int, steps: int, warmup: float, final: float) -> float:
    """The factor at `step` of 0..steps - 1: linear from 1 / T_w to 1 in the first T_w = round(warmup * steps) steps,
    then half a cosine from 1 to `final` at the last step."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def infinite(
    t: float,
    warmup: float,
    cooldown: float,
    anneal: float | None,
    end: float,
    constant: float,
    final: float,
    shape: str = "cosine",
    steepness: float = 10.0,
) -> float:
    """The factor at step t of a run, continuous in t; e_c = constant, e_min = final, eta_max = 1.

    - t < T_w: (t + 1) / (T_w + 1), since a step at rate 0 would be lost; 1 at T_w
    - T_w <= t < T_cd: cosine: e_c + (1 - e_c) / 2 * (1 + cos(pi x)), x = (t - T_w) / (T_cd - T_w);
      inverse_sqrt: 1 + (e_c - 1) h(x) / h(1), h(x) = 1 / sqrt(1 + a x) - 1
    - T_cd <= t < T_a: e_c
    - T_a <= t: e_c (e_min / e_c)^((t - T_a) / (T_end - T_a)), at most the power 1; it begins where the rate then is,
      if that is still above e_c

    Args:
        t: steps taken before this one.
        warmup: T_w.
        cooldown: T_cd.
        anneal: T_a; None: never.
        end: T_end.
        constant: e_c.
        final: e_min.
        shape: of the cooldown.
        steepness: a.
    """
    if anneal is not None and t >= anneal:
        from_ = infinite(anneal, warmup, cooldown, None, end, constant, final, shape, steepness)
        return from_ * (final / from_) ** min(1.0, (t - anneal) / max(1e-9, end - anneal))
    if t < warmup:
        return (t + 1) / (warmup + 1)
    if t >= cooldown:
        return constant
    progress = (t - warmup) / (cooldown - warmup)
    if shape == "cosine":
        return constant + (1 - constant) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 + (constant - 1) * _h(progress, steepness) / _h(1.0, steepness)


def _h(x: float, a: float) -> float:
    return 1 / math.sqrt(1 + a * x) - 1
