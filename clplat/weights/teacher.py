"""A frozen copy of the net as it was, for strategies that compare with it."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clplat.learners.nets.net import Net, Output
from clplat.state import StateModule
from clplat.streams.experience import Batch

if TYPE_CHECKING:
    from clplat.learners.learner import Learner


class Teacher(StateModule):
    """The net after an earlier experience, in evaluation mode and without gradients.

    The copy is made once, in `Strategy.setup`, so that checkpoints always find it; `learn` fills it. Until then it is
    empty (False) and must not be asked.

    Args:
        net: what is copied.
    """

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = deepcopy(net).requires_grad_(False).eval()
        self._known = False

    def __bool__(self) -> bool:
        """Whether `learn` was called."""
        return self._known

    def learn(self, net: nn.Module) -> None:
        """Become a copy of `net`, which must have the modules of the one given at first."""
        self.net.load_state_dict(net.state_dict())
        self._known = True

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Output:
        """The old net's output for a batch."""
        return super().__call__(batch)

    def forward(self, batch: Batch) -> Output:
        """See `__call__`."""
        return self.net(batch)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever its strategy is set to."""
        return self

    def stored_bytes(self) -> int:
        """Bytes of the copy; 0 before the first `learn`."""
        return sum(t.numel() * t.element_size() for t in self.net.state_dict().values()) if self else 0

    def get_extra_state(self) -> bool:
        """Whether it was taught."""
        return self._known

    def set_extra_state(self, state: bool) -> None:
        """Take what `get_extra_state` gave."""
        self._known = state


def every_logit(learner: Learner, batch: Batch, output: Output) -> Tensor:
    """The student's logits to compare with a teacher's, [B, C] or [B, T, C]: as the head gives them.

    With logit_mask "experience" those of old classes are kept out of the objective on new rows: out of `output.logits`,
    where nothing could be distilled from them.
    """
    if learner.logit_mask != "experience" or not learner.objective.one_class:
        return output.logits
    return learner.net.head(output.features, batch.task)
