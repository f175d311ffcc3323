"""A frozen copy of the net as it was, for strategies that compare with it."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from clplat.learners.nets.net import Net, Output
from clplat.state import StateModule
from clplat.streams.experience import Batch


class Teacher(StateModule):
    """The net after an earlier experience, in evaluation mode and without gradients.

    The copy is made once, in `Strategy.wrap`, so that checkpoints always find it; `learn` fills it. Until then it is
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
