"""Where an optimiser's next step would lead, without taking it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

KNOWN = (Adam, AdamW, SGD)
"""The optimisers whose step is known here."""


def check_known(name: str, make_optimizer: Callable[[Iterable], Optimizer]) -> None:
    """Refuse an optimiser whose step is not known, before any training.

    Args:
        name: the option that needs the step, for the message.
        make_optimizer: makes the learner's optimiser from parameters.

    Raises:
        ValueError: it is neither Adam nor AdamW nor SGD.
    """
    made = make_optimizer([nn.Parameter(torch.zeros(1))])
    if type(made) not in KNOWN:
        raise ValueError(
            f"{name}: got true with optimizer {type(made).__name__}, whose step is not known in advance; allowed are "
            "Adam, AdamW and SGD. Set it to false, or use one of these."
        )


@torch.no_grad()
def proposed(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """The value that each parameter with a gradient would have after `optimizer.step()`.

    From `.grad`, the optimiser's moments, learning rate and weight decay as they are now; none of them is changed.
    The arithmetic is that of torch's own steps on one tensor at a time, in the same order.

    Args:
        optimizer: exactly `torch.optim.Adam`, `AdamW` or `SGD`, amsgrad, Nesterov momentum and maximize included.

    Raises:
        TypeError: another optimiser.
    """
    if type(optimizer) not in KNOWN:
        raise TypeError(f"The step of {type(optimizer).__name__} is not known: use Adam, AdamW or SGD.")
    step = _sgd if type(optimizer) is SGD else _adam
    return {
        p: step(p, -p.grad if group["maximize"] else p.grad, optimizer.state.get(p, {}), group, type(optimizer))
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    }


def _adam(p: Tensor, grad: Tensor, state: dict, group: dict, kind: type) -> Tensor:
    rate, (first, second) = float(group["lr"]), group["betas"]
    new, decay = p.clone(), group["weight_decay"]
    if decay and group.get("decoupled_weight_decay", kind is AdamW):
        new.mul_(1 - rate * decay)
    elif decay:
        grad = grad.add(p, alpha=decay)
    mean = state["exp_avg"].clone() if state else torch.zeros_like(p)
    square = state["exp_avg_sq"].clone() if state else torch.zeros_like(p)
    mean.lerp_(grad, 1 - first)
    square.mul_(second).addcmul_(grad, grad, value=1 - second)
    number = int(state["step"]) + 1 if state else 1  # kept on the CPU: not a wait for the device
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square) if state else square
    scale = (square.sqrt() / (1 - second**number) ** 0.5).add_(group["eps"])
    return new.addcdiv_(mean, scale, value=-rate / (1 - first**number))


def _sgd(p: Tensor, grad: Tensor, state: dict, group: dict, kind: type) -> Tensor:
    momentum = group["momentum"]
    if group["weight_decay"]:
        grad = grad.add(p, alpha=group["weight_decay"])
    if momentum:
        buffer = state.get("momentum_buffer")
        velocity = grad if buffer is None else buffer.mul(momentum).add_(grad, alpha=1 - group["dampening"])
        grad = grad.add(velocity, alpha=momentum) if group["nesterov"] else velocity
    return p.add(grad, alpha=-float(group["lr"]))
