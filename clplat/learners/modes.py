"""Modes of a module: evaluation that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def preserving(module: nn.Module) -> Iterator[None]:
    """Afterwards the modes of all its modules, and the random state of the CPU and of its device, are what they were."""
    modes = [(part, part.training) for part in module.modules()]
    device = _device(module)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(module: nn.Module, grad: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and random state are what they were.

    Args:
        module: say a learner. `Learner.evaluating` is this with averaged weights, where the optimiser averages.
        grad: True for gradients, in full precision whatever the Trainer's is.
    """
    with ExitStack() as stack:
        stack.enter_context(preserving(module))
        stack.enter_context(torch.set_grad_enabled(grad))
        if grad:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its recurrences have none in eval mode
            stack.enter_context(torch.autocast(_device(module).type, enabled=False))
        module.eval()
        yield


def _device(module: nn.Module) -> torch.device:
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device
