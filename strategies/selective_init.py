"""Selective initialisation: each experience starts from the past checkpoint that fits it best, or from the base
(Fisch et al. 2023, "Towards robust and efficient continual language learning", arXiv 2307.05741)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.modes import preserving
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.streams.loader import stable_seed
from clplat.weights import functional
from clplat.weights.flat import flatten, load_flat, unflatten

ANSWERS = ("latest", "task")


class SelectiveInit(Strategy):
    """Keeps the weights after every experience, and starts the next one from those with the lowest loss on a few of
    its labelled training examples.

    The candidates are the base (the weights before the first experience) and the checkpoints of all experiences so
    far. The best checkpoint is taken if its loss is below the base's by more than `margin`, else the base: the choice
    never trusts a checkpoint that does not help on these examples.

    All checkpoints are kept, so nothing need be forgotten: with `answer: task` each row is answered by the net as it
    was after the row's own experience. The choices are in `chosen`, the losses in `losses`.

    Deviations: the paper learns its selector from features of pairs of tasks, and its details could not be confirmed.
    Here the evidence is the loss itself, zero-shot or after a few probe steps. What is not floating (which classes a
    head offers, counters) is never taken back.

    Args:
        examples: k, labelled training examples that are looked at; with probe steps as many again to train on (half
            each where the set has fewer).
        steps: s, probe steps of the learner's optimiser before the loss is taken, each on all of its examples; 0:
            zero-shot.
        margin: in the objective's units, at least 0.
        answer: "latest" (the net as it is) or "task" (needs task labels).
        seed: of the choice of examples, and of dropout in the probe.
    """

    library: Tensor | None

    claims = frozenset({"layers"})

    def __init__(
        self, examples: int = 64, steps: int = 0, margin: float = 0.0, answer: str = "latest", seed: int = 0
    ) -> None:
        super().__init__()
        checks.at_least(1, examples=examples)
        checks.at_least(0, steps=steps, margin=margin)
        checks.one_of("answer", answer, ANSWERS)
        self.needs = frozenset({"boundaries", *(["task_labels"] if answer == "task" else [])})
        self.examples, self.steps, self.margin, self.answer, self.seed = examples, steps, margin, answer, seed
        self.passes = 1.0  # the probe is not part of a step
        self.register_buffer("library", None)  # [1 + checkpoints, P], the base first
        self.chosen: list[int] = []
        """For each experience the row of the library that it started from: 0 the base, k the one after k - 1."""
        self.losses: list[list[float]] = []
        """For each experience the loss of every candidate, in the order of the library; of the first, 0."""
        self._tasks: list[int] = []  # task label of each checkpoint

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Start from the best candidate."""
        if self.library is None:
            self.library = flatten(learner.net)[None]
        candidates = self.library
        found = [0.0] if len(candidates) == 1 else self._compare(learner, experience, candidates)
        best = min(range(len(found)), key=found.__getitem__)
        pick = best if found[0] - found[best] > self.margin else 0
        load_flat(learner.net, candidates[pick])
        self.chosen.append(pick)
        self.losses.append(found)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        assert self.library is not None
        self.library = torch.cat([self.library, flatten(learner.net)[None]])
        self._tasks.append(-1 if experience.task_label is None else experience.task_label)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """With `answer: task`: each row's logits by the checkpoint of its task; by the net itself for tasks without."""
        if self.answer == "latest" or batch.task is None or self.library is None:
            return logits
        logits = logits.clone()
        for row, task in enumerate(self._tasks, 1):
            here = batch.task == task
            if bool(here.any()):
                past = unflatten(learner.net, self.library[row])
                logits[here] = functional.call(learner.net, past, batch.rows(here)).logits.to(logits.dtype)
        return logits

    def report(self) -> dict[str, Tensor]:
        """What was chosen: `chosen` [K], and `losses` [K, K] of the candidates, NaN where there was none yet."""
        losses = torch.full((len(self.losses), len(self.losses)), torch.nan, dtype=torch.float64)
        for row, found in enumerate(self.losses):
            if row:
                losses[row, : len(found)] = torch.tensor(found, dtype=torch.float64)
        return {"chosen": torch.tensor(self.chosen, dtype=torch.int64), "losses": losses}

    def get_extra_state(self) -> dict[str, Any]:
        return {"chosen": list(self.chosen), "losses": [list(x) for x in self.losses], "tasks": list(self._tasks)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.chosen, self._tasks = list(state["chosen"]), list(state["tasks"])
        self.losses = [list(x) for x in state["losses"]]

    def _compare(self, learner: Learner, experience: Experience, candidates: Tensor) -> list[float]:
        """The loss of each candidate; the net's own weights are in no defined state afterwards."""
        data = experience.train
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "selective_init", experience.index))
        order = torch.randperm(len(data), generator=generator)
        look = min(self.examples, len(data) if self.steps == 0 else max(1, len(data) // 2))
        batch = data.batch(order[:look]).to(learner.device)
        practice = data.batch(order[look : 2 * look] if len(data) > 1 else order).to(learner.device)
        rest = {n: t.clone() for n, t in learner.net.named_buffers()}
        found = []
        for candidate in candidates:
            load_flat(learner.net, candidate)
            if self.steps:
                self._probe(learner, practice, experience.index)
            with learner.evaluating():
                found.append(float(learner.objective(learner(batch).logits, batch)))
            for name, tensor in learner.net.named_buffers():
                tensor.copy_(rest[name])
        return found

    def _probe(self, learner: Learner, batch: Batch, index: int) -> None:
        parameters = [p for p in learner.net.parameters() if p.requires_grad]
        optimizer = learner.handover.make([{"params": parameters}])
        with preserving(learner.net), torch.enable_grad():
            torch.manual_seed(stable_seed(self.seed, "probe", index))  # the same dropout for every candidate
            learner.net.train()
            for _ in range(self.steps):
                optimizer.zero_grad(set_to_none=True)
                learner.objective(learner(batch).logits, batch).backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
