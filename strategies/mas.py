"""Memory aware synapses (Aljundi et al. 2018, arXiv 1711.09601)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from clplat import checks
from clplat.importance.penalty import Quadratic
from clplat.importance.per_example import AbsoluteGradients
from clplat.learners.learner import Learner
from clplat.learners.modes import evaluating
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.streams.loader import stable_seed


class MAS(Strategy):
    """Adds strength * sum_i Omega_i (theta_i - theta*_i)^2 (eq. 4), Omega from the sensitivity of the outputs:

        Omega_i = mean over x of | d ||f(x)||^2 / d theta_i |                                       (eq. 2 and 3)

    with f the logits, over scored steps of a sequence, one gradient for each example. No targets are used. Logits of
    classes that are masked out do not count. Importance is summed over experiences (`decay` 1, as in the paper's
    sequence experiments) or decays.

    Args:
        strength: lambda; 0 is finetuning.
        decay: old importance is multiplied by this before the new one is added, in 0..1.
        examples: of each experience, null: all.
        batch_size: examples a pass; no effect on the result.
        seed: of the choice of these examples.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"weight_values"})

    def __init__(
        self, strength: float, decay: float = 1.0, examples: int | None = 500, batch_size: int = 128, seed: int = 0
    ) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", strength=strength)
        checks.within(0, 1, decay=decay)
        checks.at_least(1, examples=examples, batch_size=batch_size)
        self.strength, self.decay, self.examples = strength, decay, examples
        self.batch_size, self.seed = batch_size, seed
        self.past = Quadratic()

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        return {"mas": self.past.penalty(learner.weights(), 2 * self.strength)} if self.past else {}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.strength == 0:
            return
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "mas", experience.index))
        chosen = torch.randperm(len(experience.train), generator=generator)[: self.examples]

        def cotangents(logits: Tensor, batch: Batch) -> Iterable[Tensor]:
            offered = logits > torch.finfo(logits.dtype).min
            force = (2 * logits).masked_fill(~offered, 0)
            scored = learner.objective.scored(batch)
            return [force if scored is None else force * scored[..., None]]

        sums = AbsoluteGradients(learner, learner.weights())
        with evaluating(learner, grad=True):
            for batch in experience.train.batches(chosen.split(self.batch_size)):
                sums.add(batch.to(learner.device), cotangents)
        self.past.renew({n: t.div_(len(chosen)) for n, t in sums.total.items()}, learner.weights(), self.decay)
