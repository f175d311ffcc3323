"""PackNet (Mallya & Lazebnik 2018, arXiv 1711.05769)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.per_task.masked import MaskedNet, TaskMasks
from clplat.per_task.net import label_of
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream

log = logging.getLogger(__name__)


class PackNet(Strategy):
    """Packs one task after the other into the weights that pruning has set free.

    A task trains all free weights W beside those of earlier tasks, which it uses and cannot change. After the share
    `prune_at` of the experience's steps the free weights of each matrix with the smallest |W|, a share `prune` of them,
    are set to 0 and held there while the rest of the steps retrain the others. These then belong to the task, and the
    pruned ones are free for the next. A task runs with the weights of its own and of earlier tasks, so its outputs
    stay the same in every bit. The share of weights that are free is logged as "capacity/free".

    Pruned are all matrices of the net but the head's, linear, recurrent, convolutional and embeddings alike.

    Deviations: the paper trains, prunes and retrains in separate phases of epochs, here they share the steps of the
    experience. In the paper biases and normalisations are those of the first task; that is `vectors: frozen`, while
    "own" lets each task have its own. The head is each task's own. Masks are stored as a bit a weight and task.

    Args:
        prune: the share of free weights that is set free again, in 0..1 (paper: 0.5 to 0.75).
        prune_at: when, as a share of the experience's steps, above 0; 1: at its end, without retraining.
        vectors: "frozen" after the first task, or "own" for each.
    """

    needs = frozenset({"boundaries", "task_labels"})
    claims = frozenset({"net"})

    def __init__(self, prune: float = 0.75, prune_at: float = 0.5, vectors: str = "frozen") -> None:
        super().__init__()
        checks.within(0, 1, prune=prune, prune_at=prune_at)
        checks.above(0, prune_at=prune_at)
        checks.one_of("vectors", vectors, ("frozen", "own"))
        self.prune, self.prune_at, self.vectors = prune, prune_at, vectors
        self.tasks = TaskMasks()
        self._done, self._pruned = 0, False
        self._due: int | None = None

    def setup(self, learner: Learner, stream: Stream) -> None:
        self.tasks.plan(stream)
        learner.net = MaskedNet(learner.net, self.tasks)

    def enter(self, learner: Learner, experience: Experience) -> None:
        """The experience's task is the active one; note what is held."""
        self.tasks.active, self._due = label_of(experience), None
        self._hold(_net(learner))

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """All free weights are trained."""
        net = _net(learner)
        self._done, self._pruned = 0, False
        net.begin(label_of(experience), torch.Generator())
        self._hold(net)

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """None for held weights, so that they do not count in the norm that is clipped."""
        _net(learner).mask_gradients()

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Held weights are as before; prune if it is time."""
        net = _net(learner)
        net.restore()
        self._done += 1
        if self._due is None:
            self._due = max(1, round(self.prune_at * learner.planned))
        if self.prune_at < 1 and self._done == self._due:
            self._release(net)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Prune unless that is done; the weights that are left belong to the task."""
        net = _net(learner)
        if not self._pruned:
            self._release(net)
        net.finish()
        free = net.free_share()
        log.info("packnet: %.1f %% of the weights are free after %s", 100 * free, experience.name)
        learner.log({"capacity/free": free})

    def get_extra_state(self) -> dict[str, Any]:
        return {"done": self._done, "pruned": self._pruned}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._done, self._pruned = state["done"], state["pruned"]

    def _hold(self, net: MaskedNet) -> None:
        net.hold(dead=self._pruned, vectors=self.vectors == "frozen" and bool(self.tasks.past))

    @torch.no_grad()
    def _release(self, net: MaskedNet) -> None:
        alive = []
        for w, frozen in zip(net.parts(net.matrices), net.frozen(), strict=True):
            free = (~frozen).flatten().nonzero().squeeze(1)
            smallest = w.detach().flatten()[free].abs().argsort(stable=True)[: round(self.prune * len(free))]
            kept = torch.ones(w.numel(), dtype=torch.bool, device=w.device)
            kept[free[smallest]] = False
            w.masked_fill_(~kept.view(w.shape), 0)
            alive.append(kept)
        net.alive.copy_(torch.cat(alive))
        self._pruned = True
        self._hold(net)


def _net(learner: Learner) -> MaskedNet:
    assert isinstance(learner.net, MaskedNet)
    return learner.net
