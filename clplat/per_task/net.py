"""Nets whose weights depend on the task: those that a hypernetwork generates, and those behind a mask a task.

Letters: B batch, T time, H hidden, C outputs, K tasks learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clplat.learners.nets.net import Net, Output, State
from clplat.learners.objective import Objective
from clplat.state import StateModule
from clplat.streams.experience import Batch, Experience, Stream
from clplat.weights import functional


def label_of(experience: Experience) -> int:
    """The task of an experience: its task label, or its index where the learner is told none."""
    return experience.index if experience.task_label is None else experience.task_label


NONE = torch.iinfo(torch.int64).min
"""Stands in a checkpoint for no active task; every other number may be a label."""


class Tasks(StateModule):
    """Which tasks were learned, and which one is being learned; base of what is kept for each of them.

    Attributes:
        labels: of the tasks learned, in order.
        active: the label of the experience trained last or being trained; None before the first.
        open: True from `start` to `finish`: the active task is being learned.
        order: of all tasks of the stream, as they occur in it; a task's place decides what is drawn for it, its label
            does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[int] = []
        self.active: int | None = None
        self.open = False
        self.order: list[int] = []

    def plan(self, stream: Stream) -> None:
        """Note the tasks of a stream."""
        self.order = list(dict.fromkeys(map(label_of, stream)))

    def place(self, label: int) -> int:
        """Place of a task among those of the stream; the label itself where it is none of them."""
        return self.order.index(label) if label in self.order else label

    @property
    def known(self) -> list[int]:
        """The labels an example may belong to: those learned and the active one."""
        more = [] if self.active is None or self.active in self.labels else [self.active]
        return [*self.labels, *more]

    @property
    def past(self) -> list[int]:
        """The labels learned, without the one that is being learned."""
        return [label for label in self.labels if not (self.open and label == self.active)]

    def start(self, label: int) -> None:
        """Begin to learn a task."""
        self.active, self.open = label, True

    def finish(self) -> None:
        """The active task is learned."""
        assert self.active is not None
        if self.active not in self.labels:
            self.labels.append(self.active)
        self.open = False

    def learning(self, label: int) -> bool:
        """Whether `label` is the task that is being learned."""
        return self.open and label == self.active

    def get_extra_state(self) -> Tensor:
        """The active label (`NONE`: none), 1 if it is being learned, and all labels; a tensor, as everything in a net."""
        active = NONE if self.active is None else self.active
        return torch.tensor([active, int(self.open), *self.labels])

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `get_extra_state` gave."""
        active, learning, *self.labels = state.tolist()
        self.active, self.open = (None if active == NONE else active), bool(learning)


class PerTaskNet(Net):
    """A net around another, which is run with the weights of the batch's task (by `clplat.weights.functional.call`).

    Rows of several tasks are run task by task and put back in order. The task of a row is its label in `Batch.task`;
    where there is none, the active task. A training batch of current rows only is taken to be of the active task, so
    that its labels need not be waited for.

    Args:
        template: the net whose embedding, blocks, pooling and head are used.
        tasks: what is kept for each task.

    Raises:
        ValueError: the template keeps running statistics, which would be shared by all tasks and drift.
    """

    def __init__(self, template: Net, tasks: Tasks) -> None:
        nn.Module.__init__(self)  # not Net's: its parts are registered once, in the template
        for name, module in template.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise ValueError(
                    f"learner.net: {name} keeps running statistics, which all tasks would share: use layer or rms "
                    "normalisation, or track_running_stats=False."
                )
        self.template, self.tasks = template, tasks
        for name in ("embedding", "blocks", "head"):
            object.__setattr__(self, name, getattr(template, name))
        self.per_step, self.pooling = template.per_step, template.pooling

    def weights_for(self, label: int) -> Mapping[str, Tensor]:
        """The template's weights for a task, by name."""
        raise TypeError(f"{type(self).__name__} does not define weights_for(label).")

    def forward(self, batch: Batch, state: Sequence[State | None] | None = None, reset: Tensor | None = None) -> Output:
        """As `Net.forward`, each row with its task's weights."""
        return self._by_task(batch, lambda net, rows, s, r: net(rows, s, r), state, reset)

    def lower(
        self, batch: Batch, cut: int, state: Sequence[State | None] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State | None, ...]]:
        """As `Net.lower`, each row with its task's weights."""
        return self._by_task(batch, lambda net, rows, s, r: net.lower(rows, cut, s, r), state, reset)

    def upper(
        self,
        hidden: Tensor,
        cut: int,
        batch: Batch,
        state: Sequence[State | None] | None = None,
        reset: Tensor | None = None,
    ) -> Output:
        """As `Net.upper`, each row with its task's weights."""
        return self._by_task(batch, lambda net, rows, h, s, r: net.upper(h, cut, rows, s, r), hidden, state, reset)

    def as_task(self, batch: Batch, label: int) -> Output:
        """The output with the weights of one task, whatever the batch says."""
        return self._run(label, lambda net, rows: net(rows), batch)

    def _by_task(self, batch: Batch, call: Callable[..., Any], *rest: Any) -> Any:
        active = self.tasks.active or 0
        if batch.task is None or (self.training and batch.source is None and self.tasks.open):
            return self._run(active, call, batch, *rest)
        labels = sorted(batch.task.unique().tolist(), key=self.tasks.place)
        if len(labels) == 1:
            return self._run(labels[0], call, batch, *rest)
        places = [(batch.task == label).nonzero().squeeze(1) for label in labels]
        parts = [
            self._run(label, call, *(_rows(value, place) for value in (batch, *rest)))
            for label, place in zip(labels, places, strict=True)
        ]
        return _joined(parts, torch.cat(places).argsort())

    def _run(self, label: int, call: Callable[..., Any], *args: Any) -> Any:
        weights = {f"net.{name}": weight for name, weight in self.weights_for(label).items()}
        return functional.call(_Caller(self.template), weights, call, *args)


class _Caller(nn.Module):
    """Runs any method of a net where `functional.call` only runs `forward`."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(self.net, *args)


def _rows(value: Any, index: Tensor) -> Any:
    """The rows `index` of every tensor in nested tuples, batches and None."""
    if value is None:
        return None
    if isinstance(value, Batch):
        return value.rows(index)
    return value[index] if isinstance(value, Tensor) else tuple(_rows(v, index) for v in value)


def _joined(parts: list[Any], order: Tensor) -> Any:
    """What `_rows` took apart, outputs included, in the order of `order`."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Output):
        logits, features, state = (
            _joined([getattr(p, name) for p in parts], order) for name in ("logits", "features", "state")
        )
        # Each part's penalties are means over its own rows, or of the task's weights: they count by the share of rows.
        shares = [len(p.logits) / len(order) for p in parts]
        penalties = {
            name: torch.stack([p.penalties[name] * s for p, s in zip(parts, shares, strict=True)]).sum()
            for name in first.penalties
        }
        return Output(logits, features, state, penalties)
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    return tuple(_joined(list(several), order) for several in zip(*parts, strict=True))


@torch.no_grad()
def lowest_entropy(net: PerTaskNet, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
    """Logits of each row under the task whose prediction for it is surest (HNET+ENT, von Oswald et al. 2020).

    The entropy of a row is that of its predictive distribution, in nats, summed over scored steps; a task of a wrong
    sequence is not told to it. All known tasks are tried, so it costs a forward pass for each.

    Args:
        net: with at least one known task.
        batch: B rows.
        objective: with an entropy, and the steps that count.

    Returns:
        Logits [B, C] or [B, T, C], and the label [B] that was chosen for each row.

    Raises:
        Unsupported: the objective has no entropy.
    """
    labels = net.tasks.known
    logits = torch.stack([net.as_task(batch, label).logits for label in labels])  # [K, B, ...]
    entropy, scored = objective.entropy(logits), objective.scored(batch)
    if entropy.ndim == 3:
        entropy = (entropy if scored is None else entropy * scored).sum(-1)
    best = entropy.argmin(0)  # [B]
    chosen = torch.as_tensor(labels, device=best.device)[best]
    return logits[best, torch.arange(len(best), device=best.device)], chosen
