"""Cumulative training: everything met so far, the upper bound that is comparable at every experience."""

from __future__ import annotations

from clplat.strategy import Session, Strategy
from clplat.streams.experience import Stream
from clplat.streams.union import UnionData


class Cumulative(Strategy):
    """Experience k goes on from the weights of k - 1 and trains on the union of the training sets of 0..k, for k + 1
    experiences' worth of steps: each example is seen as often an experience as in finetuning."""

    not_carried = "it trains on another set than the experience's own, in which segments do not follow one another"
    claims = frozenset({"data"})

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """The union of all training sets up to `index`."""
        return Session(UnionData([stream[k].train for k in range(index + 1)]), float(index + 1))
