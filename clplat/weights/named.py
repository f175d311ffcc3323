"""Tensors by parameter name, kept as one: what strategies remember of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clplat.state import StateModule


class NamedTensors(StateModule):
    """A tensor for each of some parameters, empty at first. One flat buffer, so that any shapes are checkpointed."""

    flat: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flat", None)
        self._shapes: dict[str, list[int]] = {}
        self._views: tuple[Tensor, dict[str, Tensor]] | None = None

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.flat is not None

    @torch.no_grad()
    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies of these, and nothing else."""
        self._shapes = {name: list(t.shape) for name, t in tensors.items()}
        self.flat = torch.cat([t.detach().flatten() for t in tensors.values()])

    def clear(self) -> None:
        """Keep nothing."""
        self.flat, self._shapes, self._views = None, {}, None

    def zero(self, weights: Mapping[str, Tensor]) -> None:
        """Keep zeros in the shapes of `weights`."""
        self.keep({name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()})

    def views(self) -> dict[str, Tensor]:
        """The tensors by name, in their shapes; writing to them writes to what is kept."""
        if self.flat is None:
            return {}
        # The buffer is replaced by loading and by moving to a device: views of the old one are then of no use.
        if self._views is None or self._views[0] is not self.flat:
            sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
            pieces = self.flat.split(sizes)
            named = {n: t.view(s) for (n, s), t in zip(self._shapes.items(), pieces, strict=True)}
            self._views = (self.flat, named)
        return self._views[1]

    def get_extra_state(self) -> dict[str, list[int]]:
        """The names and shapes, in order."""
        return dict(self._shapes)

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        """Take what `get_extra_state` gave."""
        self._shapes = {name: list(shape) for name, shape in state.items()}
