"""Orthogonal gradient descent (Farajtabar, Azizan, Mott & Li 2020, arXiv 1910.07104)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.modes import evaluating
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.loader import stable_seed
from clplat.weights.flat import flat_gradient
from clplat.weights.restricted import RestrictedUpdates
from clplat.weights.subspace import extended, rounding, without

OF = ("true", "mean", "all")


class OGD(RestrictedUpdates):
    """Steps orthogonal to the gradients of old examples' outputs: to first order, these outputs stay what they are.

    After an experience the gradients of the logits of some of its examples by all P weights join an orthonormal basis
    Q [M, P] (the paper's Gram-Schmidt); from then on a change g of the weights becomes g - Q^T Q g (algorithm 1).
    Memory and time of a step are M * P.

    Which logits: "true", that of the example's class (OGD-GTL, the paper's choice); "mean", their mean (OGD-AVE);
    "all", each of them (OGD-ALL). Classes that the head does not offer have none. Of a sequence with a target at every
    step, one scored step is drawn.

    Deviations: the basis comes from a singular value decomposition of the new gradients' part outside Q, which spans
    the same space; where `capacity` has no room for all of it, the largest directions stay (in the manner of PCA-OGD,
    Doan et al. 2021). The paper projects gradients and trains with SGD; see `apply_to`.

    Args:
        examples: of each experience, drawn at random.
        capacity: M at most, over all experiences; once it is reached, nothing more is protected. 0 is finetuning.
        of: "true", "mean" or "all".
        apply_to: "update" projects what the optimiser did, so that momentum, Adam's scales and weight decay respect
            Q too, and what strategies after this one in the list do in a step; "gradient" projects the gradient as the
            paper does, which is the same for plain SGD only.
        seed: of the choice of examples and steps.
    """

    needs = frozenset({"boundaries"})
    basis: Tensor | None  # [M, P]

    def __init__(
        self, examples: int = 200, capacity: int = 1000, of: str = "true", apply_to: str = "update", seed: int = 0
    ) -> None:
        super().__init__(apply_to)
        checks.at_least(1, "capacity 0 is finetuning", examples=examples)
        checks.at_least(0, "0 is finetuning", capacity=capacity)
        checks.one_of("of", of, OF)
        self.examples, self.capacity, self.of, self.seed = examples, capacity, of, seed
        self.register_buffer("basis", None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        if self.of == "true" and not learner.objective.classes:
            name = type(learner.objective).__name__
            raise ValueError(f"of: got 'true', and {name} has no true class: use 'mean' or 'all'.")

    def restricts(self) -> bool:
        return self.basis is not None

    def allowed(self, learner: Learner, changes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert self.basis is not None
        weights = dict(learner.net.named_parameters())
        flat = flat_gradient([changes.get(name) for name in weights], list(weights.values()))
        parts = without(flat[None], self.basis.mT)[0].split([w.numel() for w in weights.values()])
        return {n: part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True) if n in changes}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Add the output gradients of what was learned, as far as there is room."""
        room = self.capacity - (0 if self.basis is None else len(self.basis))
        if room <= 0:
            return
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "ogd", experience.index))
        chosen = torch.randperm(len(experience.train), generator=generator)[: self.examples]
        rows: list[Tensor] = []
        with evaluating(learner, grad=True):
            for batch in experience.train.batches(chosen.split(1)):
                rows += self._output_gradients(learner, batch.to(learner.device), generator)
        if not rows:  # not one of them has a scored step
            return
        gradients = torch.stack(rows)
        old = None if self.basis is None else self.basis.mT
        basis = extended(old, gradients, 1.0, rounding(gradients.dtype), room)
        self.basis = basis.mT.to(gradients.dtype).contiguous()

    def _output_gradients(self, learner: Learner, batch: Batch, generator: torch.Generator) -> list[Tensor]:
        """Gradients [P] of the chosen logits of one example."""
        logits, y = learner.net(batch).logits[0], batch.y[0]
        if logits.ndim == 2:
            scored = learner.objective.scored(batch)
            steps = torch.arange(len(logits)) if scored is None else scored[0].nonzero().squeeze(1).cpu()
            if len(steps) == 0:
                return []
            step = int(steps[torch.randint(len(steps), (1,), generator=generator)])
            logits, y = logits[step], y[step]
        offered = logits[logits != torch.finfo(logits.dtype).min]
        outputs = {"true": lambda: [logits[y]], "mean": lambda: [offered.mean()], "all": lambda: list(offered)}[
            self.of
        ]()
        parameters = list(learner.net.parameters())
        wanted = [p for p in parameters if p.requires_grad]
        found: list[Tensor] = []
        for output in outputs:
            gradients = iter(torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True))
            found.append(flat_gradient([next(gradients) if p.requires_grad else None for p in parameters], parameters))
        return found
