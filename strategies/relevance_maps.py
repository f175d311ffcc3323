"""Relevance mapping networks (Kaushik et al. 2021, arXiv 2102.11343)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.per_task.masked import MaskedNet, TaskMasks
from clplat.per_task.net import label_of
from clplat.per_task.strategy import check_answer, surest
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.loader import stable_seed

log = logging.getLogger(__name__)


class RelevanceMaps(Strategy):
    """Every task learns, with the shared weights W, a map A_t of how relevant each of them is to it.

        y = (r(A_t) * W) x,    r(a) = sigmoid(sharpness * (a - 1/2)),    A_t ~ U(0, 1) at the start

    In the last part of an experience's steps, several times, weights are pruned for the task unless r(A) > `relevance`
    and r(A) |W| > `magnitude` (if that empties a matrix, a tenth of the magnitude will do). At its end the map is a
    mask of what is left, and W is frozen under it: later tasks may use these weights, not change them, so outputs of
    learned tasks stay the same in every bit. The share of weights that are free is logged as "capacity/free"; when it
    is 0, only maps, biases and heads are learned.

    Maps are on all matrices of the net but the head's: linear, recurrent (one map for all time steps), convolutional
    and embeddings. Biases, gains and the head are each task's own. Works with every kind of target; without task labels
    the task of a test row is the one with the lowest predictive entropy.

    Deviations: the paper's text could not be consulted in full, nor its authors' code; this follows an independent
    implementation and the abstract. Pruning is by steps instead of epochs, W starts as the net's own initialisation,
    the sharpness is not learned, there is no sparsity term, and the paper's detection of new tasks is left out.

    Args:
        sharpness: of r, above 0.
        relevance: threshold on r(A), in 0..1 without its ends.
        magnitude: threshold on r(A) |W|, at least 0.
        prune_share: the last share of an experience's steps in which weights are pruned, in 0..1; 0: at its end only.
        prunings: how often in these steps, evenly spaced, the last time at the end.
        seed: of the initial maps.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"net"})

    def __init__(
        self,
        sharpness: float = 100.0,
        relevance: float = 0.999999,
        magnitude: float = 1e-5,
        prune_share: float = 0.5,
        prunings: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.above(0, sharpness=sharpness, relevance=relevance)
        checks.within(0, 1, below=True, relevance=relevance)
        checks.at_least(0, magnitude=magnitude)
        checks.at_least(1, prunings=prunings)
        checks.within(0, 1, prune_share=prune_share)
        self.sharpness, self.relevance, self.magnitude = sharpness, relevance, magnitude
        self.prune_share, self.prunings, self.seed = prune_share, prunings, seed
        self.tasks = TaskMasks()
        self._done = 0  # steps on the experience
        self._due: frozenset[int] | None = None  # numbers of the steps after which weights are pruned

    def setup(self, learner: Learner, stream: Stream) -> None:
        check_answer(learner, stream)
        self.tasks.plan(stream)
        learner.net = MaskedNet(learner.net, self.tasks, self.sharpness)

    def enter(self, learner: Learner, experience: Experience) -> None:
        """The experience's task is the active one; note what is frozen."""
        self.tasks.active, self._due = label_of(experience), None
        _net(learner).hold()

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """A new map, and nothing pruned for it yet."""
        random = torch.Generator().manual_seed(stable_seed(self.seed, "relevance map", experience.index))
        net, self._done = _net(learner), 0
        net.begin(label_of(experience), random)
        net.hold()

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """None for frozen weights, so that they do not count in the norm that is clipped."""
        _net(learner).mask_gradients()

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Frozen weights are as before; prune if it is time."""
        net = _net(learner)
        net.restore()
        self._done += 1
        if self._due is None:
            steps = learner.planned
            window = round(self.prune_share * steps)
            self._due = frozenset(steps - window + window * n // self.prunings for n in range(1, self.prunings + 1))
        if self.prune_share and self._done in self._due:
            self._prune(net)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """What is left of the map becomes the task's mask, and is frozen."""
        net = _net(learner)
        self._prune(net)
        net.finish()
        free = net.free_share()
        log.info("relevance_maps: %.1f %% of the weights are free after %s", 100 * free, experience.name)
        learner.log({"capacity/free": free})

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """Without task labels: the answer of the task that is surest."""
        return surest(learner, batch, logits)

    def get_extra_state(self) -> dict[str, Any]:
        return {"done": self._done}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._done = state["done"]

    @torch.no_grad()
    def _prune(self, net: MaskedNet) -> None:
        alive = []
        pieces = net.alive.split(net.sizes)
        for number, (w, before) in enumerate(zip(net.parts(net.matrices), pieces, strict=True)):
            r = net.relevance(number).flatten()
            relevant, size = before & (r > self.relevance), r * w.flatten().abs()
            kept = relevant & (size > self.magnitude)
            # A matrix without any weight would cut the net in two: rather keep more.
            for more in (relevant & (size > 0.1 * self.magnitude), before & (r >= 0.5), before):
                kept = torch.where(kept.any(), kept, more)
            alive.append(kept)
        net.alive.copy_(torch.cat(alive))


def _net(learner: Learner) -> MaskedNet:
    assert isinstance(learner.net, MaskedNet)
    return learner.net
