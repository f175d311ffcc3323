"""Penalty on changes of what a hypernetwork generates for learned tasks (von Oswald et al. 2020, 1906.00695, eq. 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from clplat import checks
from clplat.per_task.generated import GeneratedNet
from clplat.state import StateModule
from clplat.weights import functional
from clplat.weights.lookahead import proposed

TARGETS = ("weights", "outputs")


class OutputRegularizer(StateModule):
    """Gradients of a penalty on changes of the weights generated for the t - 1 tasks learned:

        beta / (t - 1) * sum_{j<t} || h(e_j, Theta*) - h(e_j, Theta + dTheta) ||^2

    Theta* are the generator's weights before the current task, dTheta is the step that the optimiser would take from
    the gradients of the task alone (a constant: no gradient goes through it). With a recurrent generator the same is
    done, times `beta_state`, for its hidden states. Rows of a head per task count for their own task only.

    Args:
        beta: strength on weights; 0: none.
        beta_state: strength on hidden states; 0: none.
        lookahead: False sets dTheta to 0.
        subset: this many learned tasks, drawn anew each step, stand for all; None: all of them.
        targets: what is kept of the past: "weights" (Theta*, from which the targets are generated again when
            needed) or "outputs" (the targets: t - 1 sets of target weights).
        seed: of the draws.
    """

    theta: Tensor | None
    outputs: Tensor | None
    states: Tensor | None

    def __init__(
        self,
        beta: float,
        beta_state: float = 0.0,
        lookahead: bool = True,
        subset: int | None = None,
        targets: str = "weights",
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(0, "0 is no regularisation", beta=beta, beta_state=beta_state)
        checks.at_least(1, "null for all learned tasks", subset=subset)
        checks.one_of("targets", targets, TARGETS)
        self.beta, self.beta_state, self.lookahead, self.subset = beta, beta_state, lookahead, subset
        self.targets = targets
        for buffer in ("theta", "outputs", "states"):
            self.register_buffer(buffer, None)  # [|Theta|], [J, W], [J, L * G]
        self._random = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def remember(self, net: GeneratedNet) -> None:
        """Take what the net generates now for its learned tasks as the target."""
        past = net.tasks.past
        self.theta = self.outputs = self.states = None
        if not past or not (self.beta or self.beta_state):
            return
        if self.targets == "weights":
            self.theta = parameters_to_vector(net.generator.parameters())
        else:
            self.outputs, self.states = net.generator(_embeddings(net, past))

    def add_gradients(self, net: GeneratedNet, optimizer: Optimizer) -> None:
        """Add the penalty's gradients to `.grad` of the generator's parameters, where the task's already are."""
        past = net.tasks.past
        if not past or (self.theta is None and self.outputs is None):
            return
        chosen = range(len(past))
        if self.subset is not None and self.subset < len(past):
            chosen = torch.randperm(len(past), generator=self._random)[: self.subset].tolist()
        parameters = {name: p for name, p in net.generator.named_parameters() if p.requires_grad}
        ahead = proposed(optimizer) if self.lookahead else {}
        point = {name: ahead.get(p, p).detach().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad(), torch.autocast(net.offset.device.type, enabled=False):
            penalty = self._penalty(net, point, [past[i] for i in chosen], list(chosen))
            # The gradient by Theta at Theta + dTheta, dTheta a constant, is the one by the sum.
            found = torch.autograd.grad(penalty, list(point.values()), allow_unused=True)
        for p, gradient in zip(parameters.values(), found, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def _penalty(self, net: GeneratedNet, point: dict[str, Tensor], labels: list[int], chosen: list[int]) -> Tensor:
        embeddings = _embeddings(net, labels)
        wanted, wanted_states = self._wanted(net, embeddings, chosen)
        outputs, states = functional.call(net.generator, point, embeddings)
        apart = outputs - wanted
        own = net.owned(labels)
        if own is not None:
            body = apart.shape[1] - own.shape[1]  # the head's weights come last
            apart = torch.cat([apart[:, :body], apart[:, body:] * own], 1)
        penalty = self.beta / len(labels) * apart.square().sum()
        if self.beta_state and states is not None and wanted_states is not None:
            penalty = penalty + self.beta_state / len(labels) * (states - wanted_states).square().sum()
        return penalty

    @torch.no_grad()
    def _wanted(self, net: GeneratedNet, embeddings: Tensor, chosen: list[int]) -> tuple[Tensor, Tensor | None]:
        if self.theta is None:
            assert self.outputs is not None
            return self.outputs[chosen], None if self.states is None else self.states[chosen]
        shapes = {name: p.shape for name, p in net.generator.named_parameters()}
        pieces = self.theta.split([shape.numel() for shape in shapes.values()])
        old = {name: t.view(shape) for (name, shape), t in zip(shapes.items(), pieces, strict=True)}
        return functional.call(net.generator, old, embeddings)

    def get_extra_state(self) -> dict[str, Any]:
        return {"random": self._random.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._random.set_state(state["random"].cpu())


def _embeddings(net: GeneratedNet, labels: list[int]) -> Tensor:
    return torch.stack([net.embeddings.embedding(label).detach() for label in labels])


def orthogonality(weights: dict[str, Tensor]) -> Tensor:
    """Sum of || U^T U - I ||_F^2 over recurrent matrices U [H, H] (each gate's on its own); Ehret et al. 2021.

    Args:
        weights: of a net, by name; recurrent matrices are those whose last name begins with "weight_hh".

    Raises:
        ValueError: there is no recurrent matrix.
    """
    matrices = [
        gate
        for name, w in weights.items()
        if name.rpartition(".")[2].startswith("weight_hh")
        for gate in w.split(w.shape[1])
    ]
    if not matrices:
        raise ValueError(
            "orthogonal: this net has no recurrent matrices: set it to 0, or use learner=elman, gru or lstm."
        )
    return torch.stack(
        [(u.mT @ u - torch.eye(len(u), device=u.device, dtype=u.dtype)).square().sum() for u in matrices]
    ).sum()
