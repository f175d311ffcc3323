"""Cumulative training: an upper bound that is comparable at every experience."""

from __future__ import annotations

from clplat.strategy import Session, Strategy
from clplat.streams.experience import Stream
from clplat.streams.union import UnionData


class Cumulative(Strategy):
    """Training on everything met so far, again in every experience.

    Experience k goes on from the weights of k - 1, on the union of the training sets of 0..k. It has the steps of
    k + 1 experiences, so that each example is seen as often an experience as in finetuning.
    """

    not_carried = "it trains on another set than the experience's own, in which segments do not follow one another"
    claims = frozenset({"data"})

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        return Session(UnionData([stream[k].train for k in range(index + 1)]), float(index + 1))
