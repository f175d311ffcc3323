"""Two recurrences over the same sequence, one from each end (Schuster & Paliwal 1997; Graves & Schmidhuber 2005)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clplat.learners.mixers.mixer import Mixer, State


class Bidirectional(Mixer):
    """Mixers from both ends side by side: [forward(x), reversed backward(reversed x)], feature by feature.

    Mike Schuster, Kuldip Paliwal, "Bidirectional recurrent neural networks", 1997; with LSTMs: Alex Graves, Juergen
    Schmidhuber, "Framewise phoneme classification with bidirectional LSTM and other neural network architectures",
    2005. Time is reversed within each row's length, so that the backward half never meets padding. It sees whole
    sequences and has no state, no resets and no steps. With pooling of the last step the backward half has seen that
    step only: take the mean.

    Args:
        features: D, width of the inputs.
        hidden: width of each half; the outputs have both.
        mixer: makes a causal mixer from its input width and its hidden width, called once for each direction.

    Raises:
        ValueError: a mixer that is not causal.
    """

    causal = False

    def __init__(self, features: int, hidden: int, mixer: Callable[[int, int], Mixer]) -> None:
        super().__init__()
        self.ahead, self.back = mixer(features, hidden), mixer(features, hidden)
        if not self.ahead.causal:
            raise ValueError(
                f"Bidirectional: got {type(self.ahead).__name__}, which looks ahead by itself: give a causal mixer."
            )
        self.width = self.ahead.width + self.back.width

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Outputs [B, T, width] for x [B, T, D], and no state.

        Args:
            x: [B, T, D].
            state: refused.
            reset: refused.
            lengths: [B] valid steps, None where all are.

        Raises:
            ValueError: a state or a reset is given.
        """
        if state is not None or reset is not None:
            raise ValueError(
                "Bidirectional sees the whole sequence at once and takes neither state nor reset: "
                "give one whole sequence a row, or use a causal learner."
            )
        ahead, _ = self.ahead(x, None, None, lengths)
        back, _ = self.back(_reversed(x, lengths), None, None, lengths)
        return torch.cat([ahead, _reversed(back, lengths)], -1), None

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, None]:
        """Refused: a step has no sequence to look ahead in.

        Raises:
            ValueError: always.
        """
        raise ValueError("Bidirectional cannot go step by step: call it on whole sequences, or use a causal learner.")

    def penalties(self) -> Mapping[str, Tensor]:
        """Penalties of both mixers, summed by name."""
        back = self.back.penalties()
        return {name: term + back[name] for name, term in self.ahead.penalties().items()}


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, T, D] with the first `lengths` steps of each row in reverse order, the others where they are."""
    if lengths is None:
        return x.flip(1)
    time = torch.arange(x.shape[1], device=x.device)
    order = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return x.gather(1, order[..., None].expand_as(x))
