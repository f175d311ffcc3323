"""Registration of a recurrence with `torch.library`: an op, its gradient as another op, and the shapes of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Like = Callable[..., Sequence[Tensor | None]]
"""The arguments of an op -> tensors that its outputs are like in shape, dtype and device; None is an empty one."""


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    *,
    like: Like,
    gradients_like: Like,
    saved: Callable[..., Sequence[Tensor | None]],
    options: int,
    read: Sequence[int] = (0, 1),
) -> Callable[..., Any]:
    """The op `clplat::NAME`, with `clplat::NAME_backward` for its gradient.

    Args:
        name: of the op.
        forward: (tensors, options) -> outputs, with annotations, of which torch makes the schema.
        backward: (the saved tensors, gradients of the outputs that are read, options) -> gradients of as many of the
            first arguments of `forward`, likewise annotated. The one of an argument that is None is not looked at.
        like: for `forward`.
        gradients_like: for `backward`.
        saved: (arguments of `forward`, its outputs) -> what `backward` needs of them.
        options: how many of the last arguments of `forward` are no tensors.
        read: which outputs have a gradient.
    """
    op = torch.library.custom_op(f"clplat::{name}", forward, mutates_args=())
    gradient_op = torch.library.custom_op(f"clplat::{name}_backward", backward, mutates_args=())
    op.register_fake(lambda *args: _empty(like(*args), args[0]))
    gradient_op.register_fake(lambda *args: _empty(gradients_like(*args), args[0]))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*(o for i, o in enumerate(output) if i not in read))
        ctx.save_for_backward(*saved(*inputs, *output))
        ctx.missing, ctx.options = [x is None for x in inputs], inputs[len(inputs) - options :]

    def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = gradient_op(*ctx.saved_tensors, *(gradients[i] for i in read), *ctx.options)
        padded = (*found, *[None] * (len(ctx.missing) - len(found)))
        return tuple(None if missing else g for missing, g in zip(ctx.missing, padded, strict=True))

    op.register_autograd(differentiate, setup_context=setup)
    return op


def _empty(like: Sequence[Tensor | None], device: Tensor) -> tuple[Tensor, ...]:
    return tuple(device.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)
