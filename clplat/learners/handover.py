"""Handover of an optimiser: from one experience to the next, and into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from clplat.checkpoint import CheckpointError
from clplat.learners.optimizers import Averaging

_LIKE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""Names under which torch's optimisers keep tensors of the weights' shapes."""


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
        self._resumed = False  # what waits is a checkpoint's

    def begin(self, groups: list[dict[str, Any]]) -> Optimizer:
        """A new optimiser, with the state that was handed over, if any.

        Raises:
            CheckpointError: a checkpoint's state is for other weights.
        """
        self.optimizer = self.make(groups)
        self._rates, self._factor = [group["lr"] for group in self.optimizer.param_groups], None
        if self._waiting is not None:
            if self._resumed:
                _check_fits(self.optimizer.param_groups, self._waiting)
            self.optimizer.load_state_dict(self._waiting)
            self._waiting, self._resumed = None, False
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
        self._waiting, self._resumed = state, True


def _check_fits(groups: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Refuse the state of an optimiser of other weights, which torch would take, and fail at the first step."""
    weights = [p for group in groups for p in group["params"]]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    wrong = f"for {sum(sizes)} weights, this run trains {len(weights)}" if sum(sizes) != len(weights) else ""
    for number, kept in state["state"].items():
        for name in _LIKE_WEIGHTS:
            value = kept.get(name)
            if not wrong and isinstance(value, Tensor) and value.shape != weights[number].shape:
                wrong = f"for a weight {list(value.shape)}, in this run it is {list(weights[number].shape)}"
    if wrong:
        raise CheckpointError(f"The optimiser's state in the checkpoint is {wrong}.")
