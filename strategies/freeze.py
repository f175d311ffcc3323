"""Freezing of the bottom layers against spurious forgetting (Zheng et al. 2025, "Spurious forgetting in continual
learning of language models", ICLR)."""

from __future__ import annotations

from torch import nn

from clplat.learners.learner import Learner
from clplat.learners.nets.net import Net
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream


class Freeze(Strategy):
    """From experience `start` on the embedding and the first blocks of the net no longer change.

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

    Raises:
        ValueError: a negative number; `setup`: more blocks than the net has, or an optimiser whose state is kept.
    """

    claims = frozenset({"layers"})

    def __init__(self, blocks: int = 1, embedding: bool = True, start: int = 1, eval_mode: bool = True) -> None:
        super().__init__()
        for name, value in (("blocks", blocks), ("start", start)):
            if value < 0:
                raise ValueError(f"freeze.{name}: got {value}, it must be at least 0.")
        self.blocks, self.embedding, self.start, self.eval_mode = blocks, embedding, start, eval_mode
        self._active = False  # set by `enter`

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Refuse what the net or the optimiser cannot give."""
        have = len(learner.net.blocks)
        if self.blocks > have:
            raise ValueError(f"freeze.blocks: got {self.blocks}, this net has {have}: set it to 0..{have}.")
        if learner.optimizer_state == "kept":
            raise ValueError(
                "freeze: learner.optimizer_state=kept would go on with the state of weights that are no longer trained: "
                "set learner.optimizer_state=fresh."
            )

    def enter(self, learner: Learner, experience: Experience) -> None:
        """Freeze, from experience `start` on."""
        self._active = experience.index >= self.start
        if self._active:
            for layer in self.frozen(learner.net):
                layer.requires_grad_(False)

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch as it is; frozen layers are put into evaluation mode, which whatever trains the net may undo."""
        if self._active and self.eval_mode:
            for layer in self.frozen(learner.net):
                if layer.training:
                    layer.eval()
        return batch

    def frozen(self, net: Net) -> list[nn.Module]:
        """The layers that are frozen, from the bottom."""
        return [*([net.embedding] if self.embedding else []), *list(net.blocks)[: self.blocks]]
