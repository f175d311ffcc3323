"""Refresh learning: unlearn, then relearn (Wang et al. 2024, arXiv 2403.13249)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, _foreach_add_, _foreach_mul_, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim

from clplat import checks
from clplat.importance.fisher import check_kind, fisher
from clplat.importance.per_example import SquaredGradients
from clplat.learners.learner import Learner
from clplat.learners.modes import evaluating
from clplat.learners.nets.net import Output
from clplat.rehearsal.rows import current_rows
from clplat.strategy import Closure, Strategy, Update
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.loader import stable_seed
from clplat.weights.named import NamedTensors


class Refresh(Strategy):
    """Before every step the weights go a little up the loss, and the step is taken from there. Wraps every other
    strategy: put it first in the list.

    Mode "paper", `unlearn_steps` times, on the whole loss of the step (replay and penalties included):

        theta <- theta + rate * (F + damping)^-1 g + N(0, 2 rate (F + damping)^-1)

    with F the diagonal Fisher information of earlier experiences, F <- decay * F + F_k; the identity in the first.
    The paper's full text could not be consulted: the noise's scale (a factor, `noise`) and the damping are ours.

    Mode "reference" is what the authors' code does: the gradient g of the current rows' loss alone, brought to each
    weight tensor's own length, and F only as a divisor near 1:

        theta <- theta + rate * (g ||theta|| / ||g|| + 0.001 N(0, 1)) / (1 + 0.001 F)

    with F the mean of p(y | x) times the squared gradient for the label, and one unlearning step.

    Args:
        rate: gamma (paper, 0.02 there) or delta (reference, 1e-5 there); 0 is the base strategy, at no cost.
        mode: "paper" or "reference".
        unlearn_steps: J; 1 in mode "reference".
        noise: factor of the noise; 0 for none. Mode "reference" has it as 0.001 times this.
        decay: of F, in 0..1 (the reference's tau: 1e-5).
        damping: added to F in mode "paper", above 0: what weights without information are divided by.
        fisher: "exact", "sampled" or "empirical", in mode "paper".
        examples: F is a mean over this many of each experience, null: all.
        batch_size: examples a pass of the Fisher; no effect on the result.
        seed: of the noise and of the choice of these examples.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"weight_values"})

    def __init__(
        self,
        rate: float = 0.02,
        mode: str = "paper",
        unlearn_steps: int = 1,
        noise: float = 1.0,
        decay: float = 1.0,
        damping: float = 1.0,
        fisher: str = "empirical",
        examples: int | None = 500,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.one_of("mode", mode, ("paper", "reference"))
        checks.at_least(0, "0 is the base strategy", rate=rate)
        checks.at_least(0, "0 is no noise", noise=noise)
        checks.above(0, damping=damping)
        checks.within(0, 1, decay=decay)
        checks.at_least(1, unlearn_steps=unlearn_steps, examples=examples, batch_size=batch_size)
        if mode == "reference" and unlearn_steps != 1:
            raise ValueError(f"unlearn_steps: got {unlearn_steps}, mode 'reference' takes one: set it to 1.")
        check_kind(fisher)
        self.unlearn_rate, self.mode, self.unlearn_steps = rate, mode, unlearn_steps
        self.noise, self.decay, self.damping = noise, decay, damping
        self.fisher, self.examples, self.batch_size, self.seed = fisher, examples, batch_size, seed
        self.information = NamedTensors()
        self.passes = 1.0 + (unlearn_steps if rate > 0 else 0)
        self._generator = torch.Generator().manual_seed(stable_seed(seed, "refresh"))
        self._current: Batch | None = None

    def setup(self, learner: Learner, stream: Stream) -> None:
        check_kind(self.fisher, learner.objective)

    def before_step(self, learner: Learner, batch: Batch) -> None:
        if self.mode == "reference" and self.unlearn_rate > 0:
            self._current = current_rows(batch)

    def step(self, learner: Learner, closure: Closure, update: Update) -> Output:
        """Unlearn, then the step of everything inside."""
        if self.unlearn_rate > 0:
            for _ in range(self.unlearn_steps):
                if self.mode == "paper":
                    closure()
                    self._unlearn(learner)
                else:
                    self._unlearn_as_released(learner)
        return update(closure)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Add what is known now of the weights' importance; nothing at rate 0."""
        if self.unlearn_rate == 0:
            return
        if self.mode == "paper":
            generator = torch.Generator().manual_seed(stable_seed(self.seed, "fisher", experience.index))
            new = fisher(learner, experience.train, self.fisher, self.examples, generator, self.batch_size)
        else:
            new = self._weighted_fisher(learner, experience)
        old = self.information.views()
        self.information.keep({n: f + self.decay * old[n] if n in old else f for n, f in new.items()})

    def get_extra_state(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"].cpu())

    @torch.no_grad()
    def _unlearn(self, learner: Learner) -> None:
        weights, information = learner.weights(), self.information.views()
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            known = name in information
            curvature = information[name] + self.damping if known else torch.ones_like(weight)
            weight.addcdiv_(weight.grad, curvature, value=self.unlearn_rate)
            if self.noise > 0:
                scale = self.noise * math.sqrt(2 * self.unlearn_rate)
                weight.addcdiv_(self._normal(weight), curvature.sqrt(), value=scale)

    @torch.no_grad()
    def _unlearn_as_released(self, learner: Learner) -> None:
        assert self._current is not None
        weights, information = learner.weights(), self.information.views()
        with torch.enable_grad():
            loss = learner.objective(learner(self._current).logits, self._current)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        pairs = [(n, w, g.clone()) for (n, w), g in zip(weights.items(), found, strict=True) if g is not None]
        directions = [g for _, _, g in pairs]
        lengths, own = _foreach_norm(directions), _foreach_norm([w.detach() for _, w, _ in pairs])
        _foreach_mul_(directions, [o / (n + 1e-20) for n, o in zip(lengths, own, strict=True)])
        if self.noise > 0:
            _foreach_add_(directions, [self._normal(w) for _, w, _ in pairs], alpha=1e-3 * self.noise)
        for name, weight, direction in pairs:
            if name in information:
                direction = direction / (1 + 1e-3 * information[name])
            weight.add_(direction, alpha=self.unlearn_rate)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype).to(like.device, non_blocking=True)

    def _weighted_fisher(self, learner: Learner, experience: Experience) -> dict[str, Tensor]:
        """Mean of p(y | x) (d log p(y | x) / d theta)^2, the estimate of the released code."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "fisher", experience.index))
        chosen = torch.randperm(len(experience.train), generator=generator)[: self.examples]

        def cotangents(logits: Tensor, batch: Batch) -> Iterable[Tensor]:
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                likelihood = learner.objective.log_likelihood(logits, batch)
                slope = torch.autograd.grad(likelihood.sum(), logits)[0]
            root = (0.5 * likelihood.detach()).exp()
            return [slope * root.view(-1, *[1] * (slope.ndim - 1))]

        sums = SquaredGradients(learner, learner.weights())
        with evaluating(learner, grad=True):
            for batch in experience.train.batches(chosen.split(self.batch_size)):
                sums.add(batch.to(learner.device), cotangents)
        return {name: total.div_(len(chosen)) for name, total in sums.total.items()}
