"""CWR*: copy weights with re-initialisation (Lomonaco, Maltoni & Pellegrini 2020, arXiv 1907.03799)."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import TaskHead
from clplat.rehearsal.rows import in_order
from clplat.strategy import Strategy
from clplat.streams.experience import Experience, Stream


class CWRStar(Strategy):
    """Head with two copies, on a net that is trained on experience 0 and then frozen.

    Before each experience the head in training is set to 0, but for the saved rows of its own classes (of those met
    before). After it, with past_c and cur_c the examples of class c before and in this experience (algorithm 2):

        s = sqrt(past_c / cur_c),    saved_c <- (saved_c s + w_c - mean) / (s + 1)

    The mean is one number, over all weights of the rows of the experience's classes; a new class has s = 0. The
    saved head is what is tested; between experiences it is also in the net. Rows of classes not met yet are 0.

    Deviations: the paper says nothing of the head's bias and the authors' code leaves it in training throughout, which
    favours the latest classes; see `bias`. In rows of R taken inside an experience the head in training answers.
    Replayed rows of other classes train the head, and their rows are not saved.

    Args:
        bias: "consolidate" treats it like the weights, with a mean of its own; "shared" leaves one bias in training
            throughout, as in the authors' code.
    """

    needs = frozenset({"boundaries", "classes"})
    claims = frozenset({"layers"})
    saved_weight: Tensor | None  # [C, H]
    saved_bias: Tensor | None  # [C]
    past: Tensor | None  # [C] examples of each class so far

    def __init__(self, bias: str = "consolidate") -> None:
        super().__init__()
        checks.one_of("bias", bias, ("consolidate", "shared"))
        self.bias = bias
        for name in ("saved_weight", "saved_bias", "past"):
            self.register_buffer(name, None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        if isinstance(learner.net.head, TaskHead):
            raise ValueError(
                "learner.head: got one head per task, and cwr_star shares one among all experiences: set "
                "learner.head=shared."
            )
        if learner.optimizer_state == "kept":
            raise ValueError(
                "learner.optimizer_state: got 'kept', which would carry the state of weights that cwr_star freezes "
                "after experience 0: set it to fresh."
            )

    def enter(self, learner: Learner, experience: Experience) -> None:
        if experience.index > 0:
            head = {id(p) for p in learner.net.head.parameters()}
            for parameter in learner.net.parameters():
                parameter.requires_grad_(id(parameter) in head)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        classes = list(experience.classes)
        for parameter, saved in self._pairs(learner):
            parameter.zero_()
            if saved is not None:
                parameter[classes] = saved[classes]

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        head = learner.net.head
        current = _counts(experience, head.outputs).to(learner.device)
        past = torch.zeros_like(current) if self.past is None else self.past
        classes = current.nonzero().squeeze(1)
        ratio = (past[classes] / current[classes]).sqrt()
        pairs = self._pairs(learner)
        kept: list[Tensor] = []
        for parameter, saved in pairs:
            rows = parameter[classes]
            s = ratio.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
            kept.append(torch.zeros_like(parameter) if saved is None else saved.clone())
            kept[-1][classes] = (kept[-1][classes] * s + rows - rows.mean()) / (s + 1)
            parameter.copy_(kept[-1])
        self.saved_weight, self.saved_bias = kept[0], kept[1] if len(kept) == 2 else None
        self.past = past + current

    def _pairs(self, learner: Learner) -> list[tuple[Tensor, Tensor | None]]:
        """The head's parameters that are consolidated, and their saved copies."""
        linear = learner.net.head.linear
        pairs = [(linear.weight, self.saved_weight)]
        return pairs if self.bias == "shared" else [*pairs, (linear.bias, self.saved_bias)]


def _counts(experience: Experience, classes: int) -> Tensor:
    """[C] training examples of each class."""
    targets = experience.train.targets()
    if targets is None:  # only where reading all examples is the way to know
        targets = torch.cat([batch.y for batch in in_order(experience.train)])
    return torch.bincount(targets, minlength=classes)
