"""Heads: shared by all experiences, one per task, or growing with the classes seen.

All give logits in the stream's own class space [.., C]: a class that a head does not offer (another task's, or not
seen yet) gets the lowest finite value, so that its probability is 0 and its gradient too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.streams.experience import Experience, Stream


class Head(nn.Module):
    """A linear layer whose outputs are classes (or values). This base is the shared head.

    Args:
        features: H, width of the features.
        outputs: C, the number of outputs of the stream.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.linear = nn.Linear(features, outputs)

    def adapt(self, experience: Experience) -> None:
        """Make room for an experience, before its training; old logits stay exactly what they are."""

    def forward(self, features: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits [B, C] or [B, T, C] of features [B, H] or [B, T, H]; `task` [B] where the learner is told."""
        return self.linear(features)


class GrowingHead(Head):
    """A head that offers the classes met so far, and from `adapt` on those of the new experience too.

    The rows of all C classes are there from the start and not offered: a product with a matrix of another width rounds
    differently, so that rows added later would change old logits in the last bit. Parameters keep their shape, so
    optimiser states and checkpoints fit at any time. A row not offered gets no gradient; weight decay still shrinks it.

    Args:
        features: H.
        outputs: C, the number of classes of the whole stream.
    """

    met: Tensor

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        self.register_buffer("met", torch.zeros(outputs, dtype=torch.bool))  # [C]

    def adapt(self, experience: Experience) -> None:
        """Offer the experience's classes from now on."""
        self.met[list(experience.classes)] = True

    def forward(self, features: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits in class space; classes not met yet get the lowest value."""
        logits = self.linear(features)
        return logits.masked_fill(~self.met, torch.finfo(logits.dtype).min)


class TaskHead(Head):
    """Separate outputs for every task: a row of the batch only sees its own task's.

    Args:
        features: H.
        outputs: C, the number of classes of the whole stream.
        tasks: the classes that a task can answer with, by task label; a sequence stands for labels 0, 1, ... The rows
            of the linear layer follow this order, whatever the labels are.
    """

    column: Tensor
    known: Tensor

    def __init__(
        self, features: int, outputs: int, tasks: Mapping[int, Sequence[int]] | Sequence[Sequence[int]]
    ) -> None:
        by_label = dict(tasks) if isinstance(tasks, Mapping) else dict(enumerate(tasks))
        super().__init__(features, sum(len(classes) for classes in by_label.values()))
        self.outputs, self.labels = outputs, tuple(by_label)
        # One task more, for labels that are not known: it offers nothing.
        column, start = torch.full((len(by_label) + 1, outputs), -1), 0
        for place, classes in enumerate(by_label.values()):
            column[place, list(classes)] = torch.arange(start, start + len(classes))
            start += len(classes)
        self.register_buffer("column", column, persistent=False)  # [tasks + 1, C] -> row of the linear layer
        self.register_buffer("known", torch.tensor(self.labels), persistent=False)  # [tasks]
        self.in_order = self.labels == tuple(range(len(self.labels)))  # a label is its place

    def offered(self, labels: Sequence[int]) -> Tensor:
        """[J, C] the row of the linear layer for each class of the tasks `labels`, -1 where a task lacks it.

        Raises:
            ValueError: a label that the head was not made for.
        """
        unknown = [label for label in labels if label not in self.labels]
        if unknown:
            raise ValueError(f"The head has no outputs for task {unknown[0]}: it was made for {list(self.labels)}.")
        return self.column[[self.labels.index(label) for label in labels]]

    def forward(self, features: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits in class space; classes of other tasks get the lowest value, and all do for an unknown label.

        Raises:
            ValueError: the batch carries no task labels.
        """
        if task is None:
            raise ValueError(
                "A head per task needs task labels: use a task-incremental stream, or learner.head=shared."
            )
        logits = self.linear(features)
        # One column more, for what is not offered: a gather of it needs no second mask.
        logits = F.pad(logits, [0, 1], value=torch.finfo(logits.dtype).min)
        column = self.column[self._places(task)].remainder(logits.shape[-1])  # [B, C]
        if features.ndim == 3:
            column = column[:, None].expand(-1, features.shape[1], -1)
        return logits.gather(-1, column)

    def _places(self, task: Tensor) -> Tensor:
        """[B] the place of each label among the tasks, their number for one that is not known."""
        last = len(self.labels)
        if self.in_order:
            return task.clamp(-1, last)  # -1 is the last place too
        match = task[..., None] == self.known  # [B, tasks]
        return match.long().argmax(-1).where(match.any(-1), last)


def classes_by_task(stream: Stream) -> dict[int, tuple[int, ...]]:
    """Classes of each task label, in the order in which the labels occur; those of all its experiences together."""
    tasks: dict[int, tuple[int, ...]] = {}
    for experience in stream:
        if experience.task_label is not None:
            more = experience.classes or range(stream.outputs)
            tasks[experience.task_label] = tuple(sorted({*tasks.get(experience.task_label, ()), *more}))
    return tasks


def head_for(stream: Stream, kind: str = "auto") -> Callable[[int], Head]:
    """Maker of a stream's head from the width of the features.

    Args:
        stream: what is learned.
        kind: "shared", "growing", "task", or "auto": "task" in task-incremental streams, else "shared".

    Raises:
        ValueError: a head that the stream cannot have.
    """
    if kind == "auto":
        kind = "task" if stream.scenario == "task_incremental" else "shared"
    tasks = classes_by_task(stream)
    if kind == "task" and not tasks:
        raise ValueError(
            f"head: got 'task', which needs a task-incremental stream, and {stream.name!r} is {stream.scenario}: use "
            "shared, or growing."
        )
    if kind == "growing" and stream.target != "class":
        raise ValueError(
            f"head: got 'growing', which needs one class a sequence, and {stream.name!r} has {stream.target!r} targets: "
            "use shared."
        )
    makers = {
        "shared": partial(Head, outputs=stream.outputs),
        "growing": partial(GrowingHead, outputs=stream.outputs),
        "task": partial(TaskHead, outputs=stream.outputs, tasks=tasks),
    }
    checks.one_of("head", kind, ("auto", *makers))
    return makers[kind]
