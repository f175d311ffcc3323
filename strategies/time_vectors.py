"""Time vectors: arithmetic on the weights after each experience (Nylund, Gururangan & Smith 2024, arXiv 2312.13401)."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.strategy import Strategy
from clplat.streams.experience import Experience
from clplat.weights.arithmetic import add, difference, interpolate
from clplat.weights.flat import flatten, load_flat

MERGES = ("mean", "interpolate", "none")
STARTS = ("last", "merged", "base")


class TimeVectors(Strategy):
    """Keeps the weights theta_t after every experience, answers with a combination of them, and goes on training from
    a place of its own choice.

    With tau_t = theta_t - theta_0 (theta_0: the weights before the first experience), after experience t:

    - mean: theta_0 + scale * (tau_0 + ... + tau_t) / (t + 1)
    - interpolate: theta_0 + scale * (share tau_t + (1 - share) tau_{t-1}); in the first experience tau_0 alone
    - none: theta_t, as in finetuning; the weights are kept for `clplat.weights.arithmetic`

    The net holds the combination while it is scored after an experience, and the start of the next one from when that
    begins: scores taken in between (evaluation.every_n_steps) are those of the weights in training. Strategies listed
    before this one consolidate on theta_t, those after it on the combination.

    The paper finetunes every period from theta_0 (`start: base`) and interpolates between two periods to answer for
    one in between. Deviations: the mean of all, and starts other than the base, are not among its experiments; all
    floating tensors take part, running statistics too.

    Args:
        merge: "mean", "interpolate" or "none".
        start: where the next experience starts from: "last" (theta_t), "merged" or "base" (theta_0).
        share: of the latest experience in "interpolate"; 1: it alone, 0: the one before it.
        scale: of the combined vector; 1 is none.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"layers"})
    base: Tensor | None
    past: Tensor | None

    def __init__(self, merge: str = "mean", start: str = "last", share: float = 0.5, scale: float = 1.0) -> None:
        super().__init__()
        checks.one_of("merge", merge, MERGES)
        checks.one_of("start", start, STARTS)
        checks.within(0, 1, share=share)
        if merge == "none" and scale != 1:
            raise ValueError(f"scale: got {scale} with merge 'none', which combines nothing: set it to 1.")
        self.merge, self.start, self.share, self.scale = merge, start, share, scale
        self.register_buffer("base", None)  # [P] theta_0
        self.register_buffer("past", None)  # [experiences, P] theta_t

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Go to where the training starts from."""
        if self.base is None or self.past is None:
            self.base = flatten(learner.net)
        elif self.start == "base":
            load_flat(learner.net, self.base)
        elif self.start == "last" and self.merge != "none":
            load_flat(learner.net, self.past[-1])

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Keep the weights, and answer with the combination."""
        now = flatten(learner.net)[None]
        self.past = now if self.past is None else torch.cat([self.past, now])
        if self.merge != "none":
            load_flat(learner.net, self.merged())

    def merged(self) -> Tensor:
        """[P] the combination of what is kept.

        Raises:
            ValueError: nothing is kept yet.
        """
        if self.base is None or self.past is None:
            raise ValueError("time_vectors: no experience has been learned yet, so there is nothing to combine.")
        base, states = {"net": self.base}, [{"net": state} for state in self.past]
        if self.merge == "mean":
            whole = add(base, [(self.scale / len(states), difference(state, base)) for state in states])
        elif self.merge == "none" or len(states) == 1:
            whole = add(base, [(self.scale, difference(states[-1], base))])
        else:
            whole = interpolate(base, states[-1], states[-2], self.share)
            if self.scale != 1:
                whole = add(base, [(self.scale, difference(whole, base))])
        return whole["net"]
