"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat import checks
from clplat.importance.fisher import check_kind, fisher
from clplat.importance.penalty import Quadratic
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.loader import stable_seed

MODES = ("separate", "online", "single")


class EWC(Strategy):
    """Quadratic penalty on changes of weights, each by its Fisher information F_i (eq. 3):

        strength / 2 * sum_i F_i (theta_i - theta*_i)^2

    The modes differ in what is kept of several experiences:

    - separate (Kirkpatrick): one such penalty for each, with its own anchor. Their sum is one quadratic with summed
      F and a weighted centre, plus a constant: that is how it is stored, so memory and time do not grow with K.
    - online (Schwarz et al. 2018, eq. 8 and 9): F <- gamma * F + F_k, only the latest anchor, and gamma again in the
      penalty.
    - single (Huszar 2018): online with gamma = 1. Separate anchors count old experiences twice; this does not.

    Deviations: the paper leaves its Fisher estimate open; here it is always a mean over examples of squared gradients
    of single examples. Strengths of libraries without the factor 1/2 (Avalanche, Mammoth) are half of these.

    Args:
        strength: lambda; 0 is finetuning.
        mode: "separate", "online" or "single".
        gamma: of mode "online", in 0..1.
        fisher: "exact", "sampled", "empirical" or "batched", see `clplat.importance.fisher`.
        examples: the Fisher is a mean over this many examples of the experience, null: all.
        batch_size: examples a pass of the Fisher; no effect on the result (but for "batched").
        seed: of the choice of these examples and of sampled labels.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"weight_values"})

    def __init__(
        self,
        strength: float,
        mode: str = "separate",
        gamma: float = 1.0,
        fisher: str = "exact",
        examples: int | None = 500,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", strength=strength)
        checks.one_of("mode", mode, MODES)
        checks.within(0, 1, gamma=gamma)
        checks.at_least(1, examples=examples, batch_size=batch_size)
        if gamma != 1 and mode != "online":
            raise ValueError(f"gamma: got {gamma} with mode {mode!r}, only 'online' has it: set gamma to 1.")
        check_kind(fisher)
        self.strength, self.mode, self.gamma = strength, mode, gamma
        self.fisher, self.examples, self.batch_size, self.seed = fisher, examples, batch_size, seed
        self.past = Quadratic()

    def setup(self, learner: Learner, stream: Stream) -> None:
        check_kind(self.fisher, learner.objective)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        return {"ewc": self.past.penalty(learner.weights(), self.strength * self.gamma)} if self.past else {}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.strength == 0:
            return
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "fisher", experience.index))
        new = fisher(learner, experience.train, self.fisher, self.examples, generator, self.batch_size)
        if self.mode == "separate":
            self.past.add(new, learner.weights())
        else:
            self.past.renew(new, learner.weights(), self.gamma)
