"""Freezing of the bottom layers against spurious forgetting (Zheng et al. 2025, "Spurious forgetting in continual
learning of language models", ICLR)."""

from __future__ import annotations

from torch import nn

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Net
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream


class Freeze(Strategy):
    """Freezing of the embedding and the first blocks of the net, from experience `start` on.

    Frozen weights are left out of the optimiser: neither momentum, nor Adam's moments, nor weight decay can move them.
    Blocks are counted, not matched by name, so that block 1 never means blocks 10 to 19 too. Frozen layers are kept
    in evaluation mode, so that running statistics do not move either and dropout inside them is off.

    Deviations: the paper's optional early stop is a matter of training.steps. In its code frozen layers stay in
    training mode: `eval_mode: false`.

    Args:
        blocks: k, the first k blocks of the net are frozen; all of them: only the head goes on learning. With
            `embedding: false` 0 is finetuning.
        embedding: freeze the embedding too.
        start: the first experience that is trained with frozen layers, from 0.
        eval_mode: keep frozen layers in evaluation mode.
    """

    claims = frozenset({"layers"})

    def __init__(self, blocks: int = 1, embedding: bool = True, start: int = 1, eval_mode: bool = True) -> None:
        super().__init__()
        checks.at_least(0, blocks=blocks, start=start)
        self.blocks, self.embedding, self.start, self.eval_mode = blocks, embedding, start, eval_mode
        self._active = False  # set by `enter`

    def setup(self, learner: Learner, stream: Stream) -> None:
        checks.within(0, len(learner.net.blocks), "all blocks of this net", blocks=self.blocks)
        if learner.optimizer_state == "kept":
            raise ValueError(
                "learner.optimizer_state: got 'kept', which would carry the state of weights that freeze no longer "
                "trains: set it to fresh."
            )

    def enter(self, learner: Learner, experience: Experience) -> None:
        self._active = experience.index >= self.start
        if self._active:
            for layer in self.frozen(learner.net):
                layer.requires_grad_(False)

    def before_step(self, learner: Learner, batch: Batch) -> None:
        if self._active and self.eval_mode:
            for layer in self.frozen(learner.net):
                if layer.training:  # again, since whatever trains the net puts all of it into training mode
                    layer.eval()

    def frozen(self, net: Net) -> list[nn.Module]:
        """The layers that are frozen, from the bottom."""
        return [*([net.embedding] if self.embedding else []), *list(net.blocks)[: self.blocks]]
