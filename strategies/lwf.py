"""Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import TaskHead
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream
from clplat.weights.teacher import Teacher, every_logit


class LwF(Strategy):
    """Distillation of the old net's answers on new inputs: strength * KL(teacher || student) over the classes known.

        - sum_k softmax(z' / T)_k log softmax(z / T)_k + const                                      (eq. 2 to 4)

    z' are the logits of the net as it was before this experience. With a head per task the outputs of every earlier
    task are distilled, and their terms are summed. Else those of all classes met before are, as one softmax, whatever
    logit_mask keeps out of the objective.

    Deviation: the paper's factor 1 stays (no T^2, with which Hinton et al. keep gradients of one size). It warms up a
    new head alone before the joint training; here there is no such phase.

    Args:
        strength: lambda_o, one number, or one for each experience (the last one for all that follow); 0 is finetuning.
        temperature: T, above 0.
        replayed: True distils on replayed rows too, False on rows of the current experience only.
    """

    needs = frozenset({"boundaries"})
    not_carried = "its teacher would see each segment from a fresh state, the learner from a carried one"
    claims = frozenset({"layers"})
    known: Tensor  # [C] bool, classes met before this experience

    def __init__(self, strength: float | Sequence[float], temperature: float = 2.0, replayed: bool = True) -> None:
        super().__init__()
        strengths = [float(s) for s in strength] if isinstance(strength, Sequence) else [float(strength)]
        if not strengths or min(strengths) < 0:
            raise ValueError(f"strength: got {strength}, it must be at least 0 (0 is finetuning).")
        checks.above(0, temperature=temperature)
        self.strengths, self.temperature, self.replayed = strengths, temperature, replayed
        self.tasks: list[int] = []  # labels of the experiences learned
        self._strength = 0.0  # of the current experience
        self.register_buffer("known", None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        if not learner.objective.classes:
            name = type(learner.objective).__name__
            raise ValueError(f"lwf distils probabilities of classes, and {name} has none: use lfl.")
        if max(self.strengths) > 0:
            self.teacher = Teacher(learner.net)
        self.passes = 4 / 3 if max(self.strengths) > 0 else 1.0

    def enter(self, learner: Learner, experience: Experience) -> None:
        self._strength = self.strengths[min(experience.index, len(self.strengths) - 1)]

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        if self._strength == 0 or not self.teacher:
            return {}
        before, share = self.teacher(batch), self._share(learner, batch)
        if batch.task is None or not isinstance(learner.net.head, TaskHead):
            new = every_logit(learner, batch, output)
            term = (self._divergence(new, before.logits, self.known) * share).sum()
        else:
            terms = []
            for label in self.tasks:
                task = torch.full_like(batch.task, label)
                old = self.teacher.net.head(before.features, task)
                offered = old > torch.finfo(old.dtype).min
                new = learner.net.head(output.features, task)
                terms.append((self._divergence(new, old, offered) * share).sum())
            term = torch.stack(terms).sum()
        return {"lwf": self._strength * term}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if max(self.strengths) == 0:
            return
        self.teacher.learn(learner.net)
        self.known = learner.seen.clone() if experience.classes else torch.ones_like(learner.seen)
        if experience.task_label is not None and experience.task_label not in self.tasks:
            self.tasks.append(experience.task_label)

    def stored_bytes(self) -> int:
        return self.teacher.stored_bytes() if max(self.strengths) > 0 else 0

    def get_extra_state(self) -> dict[str, list[int]]:
        return {"tasks": list(self.tasks)}

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        self.tasks = list(state["tasks"])

    def _divergence(self, new: Tensor, old: Tensor, offered: Tensor) -> Tensor:
        """KL [B] or [B, T] of old and new answers, among the classes that `offered` [C] or [.., C] allows."""
        lowest = torch.finfo(torch.float32).min
        new = (
            (new.to(torch.promote_types(new.dtype, torch.float32)) / self.temperature)
            .masked_fill(~offered, lowest)
            .log_softmax(-1)
        )
        old = (
            (old.to(torch.promote_types(old.dtype, torch.float32)) / self.temperature)
            .masked_fill(~offered, lowest)
            .log_softmax(-1)
        )
        return F.kl_div(
            new.masked_fill(~offered, 0), old.masked_fill(~offered, lowest), reduction="none", log_target=True
        ).sum(-1)

    def _share(self, learner: Learner, batch: Batch) -> Tensor:
        """Weight of each row [B] or of each step [B, T], summing to 1 over what is distilled."""
        scored = learner.objective.scored(batch)
        if not learner.objective.per_step:
            share = torch.ones_like(batch.y, dtype=torch.float32)
        else:
            share = torch.ones_like(batch.y, dtype=torch.float32) if scored is None else scored.float()
        if batch.source is not None and not self.replayed:
            share = share * (batch.source == 0).view(-1, *[1] * (share.ndim - 1))
        return share / share.sum().clamp_min(1)
