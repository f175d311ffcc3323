"""Handover of an optimiser: from one experience to the next, and into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from clplat.learners.optimizers import Averaging


class Handover:
    """Optimiser of the experience in training, and the state that the next one goes on from.

    Args:
        make: makes an optimiser from parameter groups.
        kept: the next experience goes on from the state of the last; False: each begins afresh.
    """

    def __init__(self, make: Callable[[Iterable[Any]], Optimizer], kept: bool) -> None:
        self.make, self.kept = make, kept
        self.optimizer: Optimizer | None = None
        """That of the experience trained last, or being trained; None before the first step of a process."""
        self._rates: list[float] = []
        self._factor: float | None = None
        self._waiting: dict[str, Any] | None = None  # for the next `begin`

    def begin(self, groups: list[dict[str, Any]]) -> Optimizer:
        """A new optimiser, with the state that was handed over, if any."""
        self.optimizer = self.make(groups)
        self._rates, self._factor = [group["lr"] for group in self.optimizer.param_groups], None
        if self._waiting is not None:
            self.optimizer.load_state_dict(self._waiting)
            self._waiting = None
        return self.optimizer

    def set_rate(self, factor: float) -> None:
        """Multiply the learning rates that the optimiser was made with by `factor`."""
        if factor != self._factor and self.optimizer is not None:
            self._factor = factor
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor

    def end(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        """End an experience: averaged iterates become the weights, and the state is kept or dropped.

        Args:
            groups: the parameter groups, for a run that was resumed after the last step.
        """
        if self.optimizer is None and self._waiting is not None:
            self.begin(groups())
        if isinstance(self.optimizer, Averaging):
            self.optimizer.finish()
        self._waiting = self.optimizer.state_dict() if self.kept and self.optimizer is not None else None

    def forget(self) -> None:
        """Let the next experience begin afresh, whatever was kept."""
        self._waiting = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are the averaged ones, where the optimiser averages."""
        if isinstance(self.optimizer, Averaging):
            with self.optimizer.averaged():
                yield
        else:
            yield

    def state(self, inside: bool) -> dict[str, Any] | None:
        """State for a checkpoint: the optimiser's own `inside` an experience, else what waits for the next one."""
        return self.optimizer.state_dict() if inside and self.optimizer is not None else self._waiting

    def resume(self, state: dict[str, Any] | None) -> None:
        """Take what `state` gave."""
        self._waiting = state
