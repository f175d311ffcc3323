"""A recurrence with resets as an explicit loop over time, for mixers whose fresh state is all zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clplat.learners.mixers.mixer import State


def loop(
    step: Callable[[Tensor, State], tuple[Tensor, State]], x: Tensor, state: State, reset: Tensor
) -> tuple[Tensor, State]:
    """Outputs [B, T, H] and the state after step T, one call of `step` a time step.

    Args:
        step: maps x_t [B, D] and a state to y_t [B, H] and the next state.
        x: [B, T, D].
        state: tensors [B, ...] before the first step.
        reset: [B, T] bool, True where the state is set to zero before the step.
    """
    outputs: list[Tensor] = []
    for x_t, reset_t in zip(x.unbind(1), reset.unbind(1), strict=True):
        # Filled, not multiplied by 0: a state that overflowed must not reach the sequence that starts here.
        state = tuple(s.masked_fill(reset_t[:, None], 0) for s in state)
        y, state = step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state
