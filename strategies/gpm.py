"""Gradient projection memory (Saha, Garg & Roy 2021, arXiv 2103.09762)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.importance.recorder import Recorder
from clplat.importance.use import Use
from clplat.learners.learner import Learner
from clplat.learners.modes import evaluating
from clplat.learners.nets.heads import TaskHead
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.loader import stable_seed
from clplat.weights.restricted import RestrictedUpdates
from clplat.weights.subspace import collect, extended, rounding, without


class GPM(RestrictedUpdates):
    """Projection of each weight matrix's changes to where old inputs of its layer do not reach.

    After an experience the inputs x [N, D] that W [M, D] was multiplied with are collected. An orthonormal basis B
    [D, k] is extended by their leading singular directions, until it holds the fraction `energy` of their squared norm
    (eq. 5 and 9). From then on a change of W is replaced by change - change B B^T (eq. 6 and 7): on inputs in the span
    of B, W x stays what it was. With energy 1 that is every input collected, and no old answer on them changes.

    In recurrent layers every valid time step is an input, and the recurrent matrix has a basis of its own, of the
    hidden states that it was multiplied with; in attention the projections do so on every step. Rows of an embedding
    that old tokens used stay as they are. Biases, norms and whatever else acts on all inputs alike are `others`.

    Deviations: the paper's nets have no biases, and its heads, one a task, are not projected; here a shared head is a
    layer like any other, which keeps old logits. Singular vectors come from a triangular factor of all inputs, which
    gives the same ones. The growth of the threshold by experience is in the authors' experiments; its size is
    unconfirmed.

    Args:
        energy: epsilon, in 0..1; 0 is finetuning.
        energy_growth: added to `energy` with every experience, up to 1.
        examples: of each experience whose inputs are collected, drawn at random; null: all.
        apply_to: "update" projects what the optimiser did to W, so that momentum, Adam's scales and weight decay
            respect the bases too, and what strategies after this one in the list do in a step; "gradient" projects the
            gradient as the paper does, which is the same for plain SGD and loses the guarantee with optimisers that
            rescale single weights.
        head: "project", "free", or "auto": free where every task has its own outputs, else projected.
        others: "freeze" from experience 1 on, or "free", without a guarantee.
        batch_size: examples a pass; no effect on the result but rounding.
        seed: of the choice of examples.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"layers"})

    def __init__(
        self,
        energy: float = 0.97,
        energy_growth: float = 0.003,
        examples: int | None = 300,
        apply_to: str = "update",
        head: str = "auto",
        others: str = "freeze",
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(apply_to)
        checks.within(0, 1, energy=energy, energy_growth=energy_growth)
        checks.one_of("head", head, ("auto", "project", "free"))
        checks.one_of("others", others, ("freeze", "free"))
        checks.at_least(1, examples=examples, batch_size=batch_size)
        self.energy, self.energy_growth, self.examples = energy, energy_growth, examples
        self.head, self.others = head, others
        self.batch_size, self.seed = batch_size, seed
        self._past = 0  # experiences consolidated
        self._free: tuple[str, ...] = ()  # names of parameters that are never held back

    def setup(self, learner: Learner, stream: Stream) -> None:
        if self.head == "free" or (self.head == "auto" and isinstance(learner.net.head, TaskHead)):
            self._free = tuple(f"head.{name}" for name, _ in learner.net.head.named_parameters())
        for name, parameter in learner.net.named_parameters():
            if parameter.ndim == 2:
                self.register_buffer(_basis(name), None)  # [D, k], or [V] bool: which rows of an embedding are kept

    def restricts(self) -> bool:
        return self._past > 0

    def allowed(self, learner: Learner, changes: Mapping[str, Tensor]) -> Mapping[str, Tensor | None]:
        return {name: self._allowed(name, change) for name, change in changes.items()}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.energy == 0:
            return
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "gpm", experience.index))
        chosen = torch.randperm(len(experience.train), generator=generator)[: self.examples]
        inputs: dict[str, Tensor] = {}
        weights = dict(learner.net.named_parameters())  # those that are frozen for now included
        with evaluating(learner, grad=True):
            for batch in experience.train.batches(chosen.split(self.batch_size)):
                batch = batch.to(learner.device)
                with Recorder(weights, len(batch)) as recorder:
                    learner.net(batch)
                for name, uses in recorder.uses.items():
                    self._note(inputs, name, weights[name], uses, batch)
        energy = min(1.0, self.energy + self._past * self.energy_growth)
        for name, rows in inputs.items():
            dtype = weights[name].dtype
            self._buffers[_basis(name)] = extended(self._held(name), rows, energy, rounding(dtype)).to(dtype)
        self._past += 1

    def get_extra_state(self) -> dict[str, Any]:
        return {"past": self._past}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._past = state["past"]

    def _held(self, name: str) -> Tensor | None:
        return self._buffers.get(_basis(name))

    def _allowed(self, name: str, change: Tensor) -> Tensor | None:
        """Part of a parameter's change that leaves old answers as they are; None: nothing may change."""
        held = self._held(name)
        if name in self._free:
            return change
        if held is None:
            return None if self.others == "freeze" else change
        return change.masked_fill(held[:, None], 0) if held.dtype == torch.bool else without(change, held)

    def _note(self, inputs: dict[str, Tensor], name: str, weight: Tensor, uses: list[Use], batch: Batch) -> None:
        kinds, factors = {use.kind for use in uses}, [use.factor for use in uses if use.factor is not None]
        if name in self._free or _basis(name) not in self._buffers:
            return
        if kinds == {"rows"}:
            held = self._held(name)
            held = torch.zeros(len(weight), dtype=torch.bool, device=weight.device) if held is None else held
            self._buffers[_basis(name)] = held.index_fill(0, torch.cat([ids.flatten() for ids in factors]), True)
        elif kinds == {"matrix"}:
            valid = batch.valid()
            if len(factors) > 1 and all(f.ndim == 2 for f in factors):
                factors = [torch.stack(factors, 1)]  # one use a time step
            for factor in factors:
                padded = valid is not None and factor.ndim == 3 and factor.shape[:2] == valid.shape
                inputs[name] = collect(inputs.get(name), factor[valid] if padded else factor.flatten(0, -2))


def _basis(name: str) -> str:
    return "basis_" + name.replace(".", "__")
