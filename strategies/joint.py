"""Joint training: all experiences at once, the usual upper bound."""

from __future__ import annotations

from clplat.strategy import Session, Strategy
from clplat.streams.experience import Stream
from clplat.streams.union import UnionData


class Joint(Strategy):
    """Training on all experiences at once.

    Experience 0 is the union of all training sets, with the steps of all experiences together. The later ones train
    on nothing, so that every row of R is the same.
    """

    not_carried = "it trains on another set than the experience's own, in which segments do not follow one another"
    claims = frozenset({"data"})

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        if index > 0:
            return Session(None, 0.0)
        return Session(UnionData([e.train for e in stream]), float(len(stream)), stream.experiences)
