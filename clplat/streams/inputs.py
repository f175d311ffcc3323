"""What a stream feeds a net."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Inputs:
    """Kind and shape of a stream's inputs: all that is needed to build a net.

    Attributes:
        features: D, the width of float inputs; None for token inputs.
        vocabulary: the number of token ids; None for float inputs.
        length: T where every sequence has the same number of time steps. None: lengths differ. 0: no time axis.
        per_step: True when there is a target at every time step.

    Raises:
        ValueError: not exactly one of features and vocabulary is given.
    """

    features: int | None = None
    vocabulary: int | None = None
    length: int | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        if (self.features is None) == (self.vocabulary is None):
            raise ValueError(
                f"Inputs: got features={self.features} and vocabulary={self.vocabulary}; "
                "give features for float inputs or vocabulary for token inputs, and leave the other None."
            )

    def need_time(self, learner: str) -> None:
        """Refuse inputs without a time axis.

        Raises:
            ValueError: they have none; the message names `learner` and what to change.
        """
        if self.length == 0:
            raise ValueError(
                f"{learner} learns sequences [B, T, D], and this stream's inputs are [B, {self.features}] without a "
                "time axis: set stream.layout=rows to read them row by row, or learner=mlp."
            )
