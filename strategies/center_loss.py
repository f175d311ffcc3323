"""Center-loss regularisation (Olpadkar & Gavas 2021, arXiv 2110.11314), and less-forgetful learning as a mode."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import TaskHead
from clplat.learners.nets.net import Output
from clplat.strategy import Strategy
from clplat.streams.experience import UNSCORED, Batch, Experience, Stream
from clplat.weights.teacher import Teacher


class CenterLoss(Strategy):
    """Penalty that keeps features where they were, with a head that is frozen for old classes.

    Mode "centers" adds strength / 2 * mean ||f(x) - c_y||^2, with a centre c for every class. After each step the
    centres of the classes in the batch move (Wen et al. 2016, eq. 4):

        c_j <- c_j - rate * sum over rows of class j of (c_j - f(x)) / (1 + number of them)

    From the second experience on, centres of classes met before stay (`centers_after="frozen"`) or go on moving
    ("moving"), and the rows of the head for these classes stay exactly what they are (`freeze_head`). Replayed rows
    count like others. In a domain-incremental stream that is the paper's setting: all classes are met in the first
    experience. A class that comes later starts a centre of its own.

    Mode "features" is less-forgetful learning (Jung et al. 2016, arXiv 1607.00122): strength * mean squared distance
    to the features of the net as it was before the experience, averaged over features too, and the same frozen head.

    The first paper's full text could not be consulted: its strength, the centres' fate after the first experience,
    and whether cross-entropy is kept are choices here (kept; the others are keys).

    Args:
        strength: lambda; 0 adds no term.
        mode: "centers" or "features".
        rate: alpha of the centres, in 0..1.
        centers_after: "frozen" or "moving", for classes of earlier experiences.
        freeze_head: whether the head's rows of classes met before stay as they are.
        normalize: True compares features of unit length.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"layers"})
    centers: Tensor  # [C, H], of mode "centers" with a strength
    old: Tensor  # [C] bool, classes of earlier experiences
    rows: Tensor | None  # [rows of the head] bool, those that stay
    head_weight: Tensor  # the head as it was when the experience began, once there are rows that stay
    head_bias: Tensor

    def __init__(
        self,
        strength: float,
        mode: str = "centers",
        rate: float = 0.5,
        centers_after: str = "frozen",
        freeze_head: bool = True,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        checks.at_least(0, strength=strength)
        checks.one_of("mode", mode, ("centers", "features"))
        checks.within(0, 1, rate=rate)
        checks.one_of("centers_after", centers_after, ("frozen", "moving"))
        self.strength, self.mode, self.center_rate, self.normalize = strength, mode, rate, normalize
        self.moving, self.freeze_head = centers_after == "moving", freeze_head
        for name in ("centers", "old", "rows", "head_weight", "head_bias"):
            self.register_buffer(name, None)
        self.passes = 4 / 3 if mode == "features" and strength > 0 else 1.0
        if mode == "features":
            self.not_carried = "its old net would see each segment from a fresh state, the learner from a carried one"

    def setup(self, learner: Learner, stream: Stream) -> None:
        head = learner.net.head
        if self.mode == "centers":
            if not learner.objective.classes:
                name = type(learner.objective).__name__
                raise ValueError(f"mode: 'centers' needs classes, and {name} has none: use mode=features.")
            if self.strength > 0:
                self.centers = torch.zeros(head.outputs, head.linear.in_features)
        elif self.strength > 0:
            self.teacher = Teacher(learner.net)
        self.old = torch.zeros(head.outputs, dtype=torch.bool)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if not self.freeze_head or experience.index == 0:
            return
        head = learner.net.head
        self.rows = self.old.clone()
        if isinstance(head, TaskHead):  # each task has rows of its own: all but the current one's stay
            assert experience.task_label is not None  # by the stream's check
            own = head.offered([experience.task_label])[0]
            self.rows = torch.ones(head.linear.out_features, dtype=torch.bool, device=own.device)
            self.rows[own[own >= 0]] = False
        self.head_weight, self.head_bias = head.linear.weight.detach().clone(), head.linear.bias.detach().clone()

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        if self.strength == 0:
            return {}
        features = self._unit(output.features)
        if self.mode == "features":
            if not self.teacher:
                return {}
            apart = (features - self._unit(self.teacher(batch).features)).square().mean(-1)
            scored = _steps(learner, batch, apart)
            return {"center_loss": self.strength * (apart.masked_fill(~scored, 0).sum() / scored.sum())}
        scored = _steps(learner, batch, features[..., 0])
        nearest = F.embedding(batch.y.clamp_min(0), self.centers)
        apart = (features - nearest).square().sum(-1)
        return {"center_loss": 0.5 * self.strength * apart.masked_fill(~scored, 0).sum() / scored.sum()}

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        if self.mode == "centers" and self.strength > 0:
            self._move(learner, batch, self._unit(output.features.detach()))
        if self.rows is not None:  # an optimiser's memory may have moved them
            linear = learner.net.head.linear
            linear.weight.copy_(torch.where(self.rows[:, None], self.head_weight, linear.weight))
            linear.bias.copy_(torch.where(self.rows, self.head_bias, linear.bias))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if experience.classes:
            self.old[list(experience.classes)] = True
        else:
            self.old.fill_(True)
        if self.mode == "features" and self.strength > 0:
            self.teacher.learn(learner.net)

    def stored_bytes(self) -> int:
        kept = [self.centers, self.old, self.rows, self.head_weight, self.head_bias]
        own = sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
        return own + (self.teacher.stored_bytes() if self.mode == "features" and self.strength > 0 else 0)

    def _move(self, learner: Learner, batch: Batch, features: Tensor) -> None:
        scored = _steps(learner, batch, features[..., 0]).flatten()
        y, features = batch.y.flatten().clamp_min(0), features.flatten(0, -2).to(self.centers.dtype)
        member = F.one_hot(y, len(self.centers)).to(features.dtype) * scored[:, None]  # [N, C]
        count = member.sum(0)[:, None]
        change = (count * self.centers - member.mT @ features) / (1 + count)
        if not self.moving:
            change = change.masked_fill(self.old[:, None], 0)
        self.centers -= self.center_rate * change

    def _unit(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.normalize else features


def _steps(learner: Learner, batch: Batch, like: Tensor) -> Tensor:
    """[B] or [B, T] bool as `like`: what is trained."""
    if like.ndim == 1:
        return torch.ones_like(like, dtype=torch.bool)
    scored = learner.objective.scored(batch)
    scored = torch.ones_like(like, dtype=torch.bool) if scored is None else scored
    return scored & (batch.y != UNSCORED) if batch.y.shape == scored.shape else scored
