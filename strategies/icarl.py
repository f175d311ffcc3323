"""Incremental classifier and representation learning (Rebuffi et al. 2017, arXiv 1611.07725)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.herding import herd, unit_features
from clplat.rehearsal.policies import Ranked
from clplat.strategy import Session, Strategy
from clplat.streams.data import BatchData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.union import UnionData
from clplat.weights.teacher import Teacher, every_logit


class ICaRL(Strategy):
    """Rehearsal of herded exemplars, with the old net's answers as targets, and answers by the nearest class mean.

        loss: binary cross-entropy of every class met by now, towards sigmoid(old logit) for classes met before and
              one-hot for new ones                                                                  (algorithm 3)
        exemplars: capacity / classes of each, in herding order of unit features; fewer as classes come (4 and 5)
        answer: the class whose exemplars' mean, brought to unit length, is nearest to the unit features (1)

    The loss is averaged over rows and classes (the paper sums; only the learning rate differs). Means are taken when
    an experience ends, with the net as it is then: scores inside an experience use those of the last one. Exemplars
    are not mirrored for the means.

    Args:
        capacity: K, exemplars of all classes together, at least 1.
        nearest_mean: False answers with the logits.
    """

    needs = frozenset({"boundaries", "classes"})
    claims = frozenset({"layers", "mixture", "objective", "raw_rows"})
    passes = 4 / 3
    known: Tensor  # [C] bool, classes met before this experience
    means: Tensor | None  # [C, H], rows of `known` classes

    def __init__(self, capacity: int, nearest_mean: bool = True) -> None:
        super().__init__()
        checks.at_least(1, capacity=capacity)
        self.exemplars, self.nearest_mean = Ranked(capacity), nearest_mean
        self.register_buffer("known", None)
        self.register_buffer("means", None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        self.teacher = Teacher(learner.net)
        self.known = torch.zeros_like(learner.seen)

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        if not len(self.exemplars) or session.data is None:
            return session
        held = self.exemplars.contents().to(torch.device("cpu"))
        return Session(UnionData([session.data, BatchData(held)]), session.budget, session.also_classes)

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        logits = every_logit(learner, batch, output)
        targets = F.one_hot(batch.y, logits.shape[-1]).to(logits.dtype)
        if self.teacher:
            old = self.teacher(batch).logits
            targets = torch.where(self.known, old.sigmoid().to(targets.dtype), targets)
        # Classes that a head does not offer to a row have no say.
        offered = learner.seen & (logits > torch.finfo(logits.dtype).min)
        losses = F.binary_cross_entropy_with_logits(logits.masked_fill(~offered, 0), targets, reduction="none")
        rows = losses.masked_fill(~offered, 0).sum(-1) / offered.sum(-1)
        return rows.mean() if batch.weight is None else (rows * batch.weight).sum() / batch.weight.sum()

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        held = self.exemplars.capacity // int(learner.seen.sum())
        rows, ranks = herd(learner, experience.train, max(held, 1))
        self.exemplars.insert_ranked(rows.to(learner.device), ranks)
        self.known = learner.seen.clone()
        self._take_means(learner)
        self.teacher.learn(learner.net)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        if self.means is None or not self.nearest_mean:
            return logits
        unit = F.normalize(features, dim=-1)
        apart = torch.cdist(unit.to(self.means.dtype), self.means).square()
        lowest = torch.finfo(apart.dtype).min
        held = (self.means != 0).any(-1)  # a class may have no exemplar left
        offered = self.known & held & (logits > torch.finfo(logits.dtype).min)
        return (-apart).masked_fill(~offered, lowest)

    def stored_bytes(self) -> int:
        kept = [t for t in (self.means, self.known) if isinstance(t, Tensor)]
        own = sum(t.numel() * t.element_size() for t in kept)
        return own + self.exemplars.stored_bytes() + self.teacher.stored_bytes()

    def _take_means(self, learner: Learner) -> None:
        held = self.exemplars.contents().to(learner.device)
        with learner.evaluating():
            features = torch.cat([unit_features(learner, held.rows(r)) for r in torch.arange(len(held)).split(1000)])
        member = F.one_hot(held.y, len(learner.seen)).to(features.dtype)  # [N, C]
        means = F.normalize(member.mT @ features, dim=-1)
        self.means = means.to(torch.promote_types(means.dtype, torch.float32))
