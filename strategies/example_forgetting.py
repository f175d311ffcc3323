"""Observer of the examples that are forgotten while they are trained (Toneva et al. 2019, arXiv 1812.05159)."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.example_forgetting import NEVER, Presentations, answered_right, forgetting_scores
from clplat.strategy import Session, Strategy
from clplat.streams.experience import Batch, Experience, Stream


class ExampleForgetting(Strategy):
    """Count of how often each training example is forgotten at its own presentations; nothing is changed.

    What a presentation and a forgetting event are: `clplat.rehearsal.example_forgetting.Presentations`.

    An example's presentation is its row in the training batch, as the net answered it in training mode before the
    update. Replayed rows do not count: they have no number in the current set. List it behind strategies that change
    what is trained (cumulative, rehearsal), whose example numbers are then those of the set they make.

    What is kept for an example is 7 bytes: three 16-bit numbers and one flag. The paper also keeps each presentation's
    loss and margin; these are not kept.

    Args:
        fraction: a sequence with a target at every step is right if at least this share of its scored steps is, above
            0 and at most 1. The paper has one label an example only.
    """

    not_carried = "it follows examples by their numbers, and segments of random length have none"

    events: Tensor
    first: Tensor
    shown: Tensor
    last: Tensor
    ends: Tensor | None  # None before the first experience ends, as are the others

    def __init__(self, fraction: float = 1.0) -> None:
        super().__init__()
        checks.above(0, fraction=fraction)
        checks.within(0, 1, fraction=fraction)
        self.fraction = fraction
        self.now = Presentations()
        for name in ("events", "first", "shown", "last", "ends"):
            self.register_buffer(name, None)
        self._examples = 0  # of the session

    def setup(self, learner: Learner, stream: Stream) -> None:
        learner.objective.right(torch.zeros(0, 1), Batch(torch.zeros(0, 1), torch.zeros(0)))

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        self._examples = 0 if session.data is None else len(session.data)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        if self._examples:
            self.now.begin(self._examples, learner.device)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        self.now.observe(batch, answered_right(learner.objective, output.logits, batch, self.fraction))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self._examples = 0  # the next experience's is not known until its session
        if len(self.now) == 0:  # trained on nothing
            self.now.begin(0, learner.device)
        found = self.now.compact()
        # A mixture with old examples is longer than the numbers of its current ones reach.
        reached = torch.arange(1, len(self.now) + 1, device=learner.device)[found["shown"].int() > 0]
        kept = min(len(self.now), max(len(experience.train), int(reached.max()) if len(reached) else 0))
        for name, new in found.items():
            new = new[:kept]
            old = self._buffers[name]
            # Joined as int32: not every device joins 16-bit numbers without a sign.
            self._buffers[name] = new if old is None else torch.cat([old.int(), new.int()]).to(new.dtype)
        self.now.clear()
        end = torch.tensor([len(self.events)], device=self.events.device)
        self.ends = end if self.ends is None else torch.cat([self.ends, end])

    def report(self) -> dict[str, Tensor]:
        """What was found, for all experiences one after the other (N examples in all, K experiences):

        - events [N]: forgetting events
        - first_learned [N]: number of the first presentation with a right answer, from 0; -1: never
        - presentations [N]
        - right_at_last [N]: 1 if the last presentation was answered right
        - scores [N]: events, but presentations where never learned
        - experience [N] and example [N]: whose numbers these are
        - unforgettable [K]: share of the presented examples that were learned and never forgotten

        Empty before the first experience ends.
        """
        if self.ends is None:
            return {}
        events, first, shown = (t.int() for t in (self.events, self.first, self.shown))
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        place = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        never = first == NEVER
        good = ((events == 0) & ~never & (shown > 0)).double()
        total = torch.zeros(len(sizes), dtype=torch.float64, device=good.device)
        share = total.index_add(0, place, good) / total.index_add(0, place, (shown > 0).double())
        return {
            "events": events,
            "first_learned": torch.where(never, -1, first),
            "presentations": shown,
            "right_at_last": self.last.to(torch.uint8),
            "scores": forgetting_scores(self.events, self.first, self.shown),
            "experience": place,
            "example": torch.arange(len(place), device=place.device) - (self.ends - sizes)[place],
            "unforgettable": share,
        }
