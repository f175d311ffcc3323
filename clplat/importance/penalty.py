"""Quadratic penalties on moving away from an anchor: EWC, SI, MAS and their kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, _foreach_mul, _foreach_sub  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clplat.state import StateModule


def quadratic_penalty(
    params: Sequence[Tensor], importance: Sequence[Tensor], anchor: Sequence[Tensor], strength: float
) -> Tensor:
    """The scalar strength / 2 * sum over i of importance_i * (params_i - anchor_i)^2.

    One node in the autograd graph whatever the number of parameters; the gradient strength * importance * (params -
    anchor) is half done in the forward pass. Can be differentiated once. (One flat vector instead of lists was
    measured too: slower, by the copy into it and since its pieces cannot be added to in place.)

    Args:
        params: tensors of any shapes.
        importance: tensors of the same shapes, not differentiated.
        anchor: tensors of the same shapes, not differentiated.
        strength: a factor.
    """
    value = _Quadratic.apply(importance, anchor, strength, *params)
    assert value is not None
    return value


class _Quadratic(Function):
    @staticmethod
    def forward(ctx: Any, importance: Sequence[Tensor], anchor: Sequence[Tensor], strength: float, *params: Tensor):
        drift = _foreach_sub(params, list(anchor))
        force = _foreach_mul(list(importance), drift)
        ctx.save_for_backward(*force)
        ctx.strength = strength
        terms = [torch.dot(f.flatten(), d.flatten()) for f, d in zip(force, drift, strict=True)]
        return torch.stack(terms).sum() * (0.5 * strength)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # one output
        return None, None, None, *_foreach_mul(ctx.saved_tensors, grad * ctx.strength)


class Quadratic(StateModule):
    """sum over i of importance_i * (theta_i - anchor_i)^2, plus a constant, as state that is checkpointed.

    Sums of such functions are again one: `add` keeps the sum of all experiences' penalties exactly, in the memory and
    time of one. Parameters are known by name, and keep their shapes. One that is not trainable for a while keeps its
    entries and adds nothing.
    """

    importance: Tensor | None
    anchor: Tensor | None
    constant: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("importance", "anchor", "constant"):
            self.register_buffer(name, None)
        self._shapes: dict[str, list[int]] = {}
        self._views: tuple[Tensor, dict[str, Tensor], dict[str, Tensor]] | None = None

    def __bool__(self) -> bool:
        """Whether anything has been added yet."""
        return self.importance is not None

    def importances(self) -> dict[str, Tensor]:
        """The importance of each parameter, in its shape."""
        return self._split()[0]

    def anchors(self) -> dict[str, Tensor]:
        """The anchor of each parameter, in its shape."""
        return self._split()[1]

    @torch.no_grad()
    def add(self, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        """Add sum of importance * (theta - anchor)^2, by completing the square: nothing is approximated."""
        old, center = self.importances(), self.anchors()
        extra = [] if self.constant is None else [self.constant]
        for name, more in importance.items():
            if name not in old:
                old[name], center[name] = more, anchor[name]
                continue
            total = old[name] + more
            share = torch.where(total > 0, more / total, torch.ones_like(total))  # 0 / 0: the latest
            apart = anchor[name] - center[name]
            extra.append((old[name] * share * apart.square()).sum())
            old[name], center[name] = total, center[name] + share * apart
        self._join(old, center)
        self.constant = torch.stack(extra).sum() if extra else None

    @torch.no_grad()
    def renew(self, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Importance becomes decay * old + `importance`, and the only anchor is `anchor`."""
        old, center = self.importances(), self.anchors()
        for name, more in importance.items():
            old[name] = decay * old[name] + more if name in old else more
        self._join(old, center | dict(anchor))

    def penalty(self, weights: Mapping[str, Tensor], strength: float) -> Tensor:
        """strength / 2 times the function's value at `weights`, a scalar; constant included.

        Raises:
            ValueError: none of `weights` is known.
        """
        importance, anchor = self._split()
        names = [name for name in importance if name in weights]
        if not names:
            raise ValueError("None of the parameters that the penalty knows is trainable: freeze fewer, or drop it.")
        value = quadratic_penalty(
            [weights[n] for n in names], [importance[n] for n in names], [anchor[n] for n in names], strength
        )
        return value if self.constant is None else value + 0.5 * strength * self.constant

    def get_extra_state(self) -> dict[str, list[int]]:
        return dict(self._shapes)

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        self._shapes = {name: list(shape) for name, shape in state.items()}

    def _join(self, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        self._shapes = {name: list(t.shape) for name, t in importance.items()}
        self.importance = torch.cat([t.detach().flatten() for t in importance.values()])
        self.anchor = torch.cat([anchor[name].detach().flatten() for name in importance])

    def _split(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.importance is None or self.anchor is None:
            return {}, {}
        # The tensors are replaced by loading and by moving to a device: views of the old ones are then of no use.
        if self._views is None or self._views[0] is not self.importance:
            sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
            pieces = [
                {n: t.view(s) for (n, s), t in zip(self._shapes.items(), flat.split(sizes), strict=True)}
                for flat in (self.importance, self.anchor)
            ]
            self._views = (self.importance, pieces[0], pieces[1])
        return dict(self._views[1]), dict(self._views[2])
