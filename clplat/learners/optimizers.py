"""Optimisers that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer


@runtime_checkable
class Averaging(Protocol):
    """Optimiser whose answer is an average of its iterates, while it trains on from the last one."""

    def observe(self, loss: Tensor, held_out: Callable[[], Tensor | None]) -> None:
        """Take note of a step's loss; `held_out` computes the loss on held-out data, None where there are none."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are the average."""
        ...

    def finish(self) -> None:
        """End a training: the weights become the average."""
        ...


class NTASGD(Optimizer):
    """SGD that begins to average its iterates once a loss stops to improve (NT-ASGD).

    Merity, Keskar & Socher 2018, arXiv 1708.02182, Algorithm 1. Steps are those of SGD without momentum,

        w_{k+1} = w_k - lr * (g_k + weight_decay * w_k).

    Every `every` steps a loss v is checked: if at least n + 1 checks came before and v is larger than the smallest of
    all of them but the last n, step T = k is the trigger, and the answer is the mean of w_T, ..., w_k from then on.
    Training itself goes on from w_k, not from the mean. Averaging does not change the learning rate.

    The paper checks the perplexity of a validation set once an epoch. Here v is the learner's objective on what the
    experience holds out (`Experience.valid`), in evaluation mode; where nothing is held out it is the mean of the
    training objective since the last check, dropout and all. A check waits for the device.

    It is an `Averaging` optimiser: `observe` comes after each `step`, scores are taken inside of `averaged`, `finish`
    ends a training. `state_dict` holds all that a resumed run needs.

    Args:
        params: parameters or groups.
        lr: the learning rate.
        n: checks that a loss may fail to improve, the paper's n.
        every: L, steps between two checks.
        weight_decay: added to the gradient as weight_decay * w.

    Raises:
        ValueError: a negative rate or weight decay; n or `every` below 1.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1.0, n: int = 5, every: int = 100, weight_decay: float = 0.0
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"NTASGD: got lr={lr}, weight_decay={weight_decay}; both must be at least 0.")
        if n < 1 or every < 1:
            raise ValueError(f"NTASGD: got n={n}, every={every}; both must be at least 1.")
        super().__init__(params, {"lr": lr, "n": n, "every": every, "weight_decay": weight_decay})
        self._restart()

    @property
    def averaging(self) -> bool:
        """True from the trigger on."""
        return self.param_groups[0]["averaged"] > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # overloaded there
        """One step of SGD, and one more iterate in the mean.

        Args:
            closure: computes the loss and its gradients first, if given.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                    p.add_(gradient, alpha=-group["lr"])
        shared = self.param_groups[0]
        if shared["averaged"]:
            shared["averaged"] += 1
            for p in self._all():
                self.state[p]["average"].lerp_(p, 1 / shared["averaged"])
        return loss

    @torch.no_grad()
    def observe(self, loss: Tensor, held_out: Callable[[], Tensor | None] = lambda: None) -> None:
        """Take note of a step's training loss; every `every` steps, check whether to begin averaging.

        Args:
            loss: a scalar, of the step just taken.
            held_out: called at a check: the loss on held-out data, None where there are none.
        """
        shared = self.param_groups[0]
        if shared["averaged"]:
            return
        first = self.state[self._all()[0]]
        first["loss_sum"] = first["loss_sum"] + loss.detach() if shared["observed"] else loss.detach().clone()
        shared["observed"] += 1
        if shared["observed"] < shared["every"]:
            return
        value = held_out()
        checked = float(first["loss_sum"] / shared["observed"] if value is None else value)
        before = shared["checks"][: -shared["n"]]
        shared["observed"], shared["checks"] = 0, [*shared["checks"], checked]
        if before and checked > min(before):
            self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Begin to average, with the weights as they are for the first of the iterates."""
        self.param_groups[0]["averaged"] = 1
        for p in self._all():
            self.state[p]["average"] = p.detach().clone()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are the mean of the iterates (no change before the trigger); then exactly as before."""
        if not self.averaging:
            yield
            return
        # Copied, not exchanged: recurrent kernels want the weights to stay where they are in memory.
        current = [p.detach().clone() for p in self._all()]
        self._set([self.state[p]["average"] for p in self._all()])
        try:
            yield
        finally:
            self._set(current)

    def finish(self) -> None:
        """End a training: the weights become the mean of the iterates, if there is one, and the checks start anew."""
        if self.averaging:
            self._set([self.state[p]["average"] for p in self._all()])
        self.state.clear()
        self._restart()

    def _restart(self) -> None:
        # In the first group, since `state_dict` keeps groups as they are; the sums and means are tensors of the state.
        self.param_groups[0].update(averaged=0, observed=0, checks=[])

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self._all(), values, strict=True):
            p.copy_(value)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
