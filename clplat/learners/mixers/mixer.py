"""Contract of a mixer, the part of a block that mixes information over time.

Its state, tensors [B, ...], goes in and comes out, and is never kept in the module.

Laws, tested for every mixer in one place: parallel equals step by step; a sequence cut in two with the state handed
over equals the whole; `reset[b, t]` starts a fresh sequence at t; no output depends on a later input (unless the
mixer says `causal = False`); padding changes nothing; gradients, the initial state's too, equal the reference's.

Letters: B batch, T time, D input and output features, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from clplat.kernels.backend import State  # what a mixer remembers: it goes in and comes out, never kept in the module


class Mixer(nn.Module):
    """Base of all mixers.

    Attributes:
        causal: False for mixers that look ahead; those take no state and have no `step`.
        width: features of the output.
    """

    causal: bool = True
    width: int

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Outputs [B, T, width] for x [B, T, D], and the state after step T.

        Args:
            x: [B, T, D].
            state: from an earlier call, None for a new sequence.
            reset: [B, T] bool, True where a fresh sequence starts.
            lengths: [B] valid steps, needed only by mixers that look ahead.
        """
        raise TypeError(f"{type(self).__name__} does not define forward(x, state, reset, lengths).")

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """One step: output [B, width] for x [B, D], and the state after it."""
        y, state = self(x[:, None], state)
        return y[:, 0], state

    def penalties(self) -> Mapping[str, Tensor]:
        """Scalars by name to add to what is minimised in training, of the weights alone."""
        return {}
