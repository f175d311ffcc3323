"""Is something forgotten, or only out of reach? Train a copy a little on the old data and look (Zheng et al. 2025,
"Spurious forgetting in continual learning of language models", ICLR).

If a few steps on old training data bring an old experience's score back, its knowledge was still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from clplat.learners.learner import Learner
from clplat.learners.objective import Objective
from clplat.streams.experience import Data, Experience
from clplat.streams.loader import stable_seed
from clplat.streams.order import Order


@dataclass(frozen=True)
class Recovery:
    """Scores on an experience's test set, of the learner as it is and of the copy.

    Attributes:
        before: of the learner as it is.
        after: of the copy, after its steps.
        steps: the copy's optimiser steps.
    """

    before: float
    after: float
    steps: int

    @property
    def gain(self) -> float:
        """after - before; for losses a recovery is below 0."""
        return self.after - self.before


def recoverability(
    learner: Learner,
    experience: Experience,
    steps: int,
    data: Data | None = None,
    optimizer: Callable[[Iterable], Optimizer] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Recovery:
    """How much of an experience comes back after `steps` optimiser steps of plain finetuning on it, in a copy.

    All weights of the copy are trained, frozen ones too. The learner is left as it is: its weights, buffers, modes,
    strategy, optimiser and the global random state. Scores are the net's own, without the strategy's `predict`.

    Args:
        learner: after training on later experiences.
        experience: an earlier one, whose test set is scored.
        steps: at least 0; the paper takes a tenth of a finetuning run.
        data: what the copy trains on; None: the experience's own training set. Unrelated data of the same task tell
            whether the way to the knowledge was lost, rather than the knowledge (the paper's second probe).
        optimizer: makes the copy's optimiser; None: the learner's, at its base rate.
        batch_size: B, in training and in scoring.
        seed: of the order of examples and of dropout.

    Raises:
        ValueError: a number of steps or a batch size that is too low.
    """
    if steps < 0 or batch_size < 1:
        raise ValueError(
            f"recoverability: got steps={steps}, batch_size={batch_size}; steps must be at least 0, batch_size at least 1."
        )
    net = deepcopy(learner.net)
    for parameter in net.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    before = _score(net, learner.objective, experience.test, batch_size, learner.device)
    made = (learner.handover.make if optimizer is None else optimizer)([{"params": list(net.parameters())}])
    order = Order(batch_size, steps, seed, experience.index)
    loader = (experience.train if data is None else data).training(order)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(stable_seed(seed, "recoverability", experience.index))
        net.train()
        for chunk in loader:
            for batch in chunk:
                batch = batch.to(learner.device)
                made.zero_grad(set_to_none=True)
                learner.objective(net(batch).logits, batch).backward()
                made.step()
    after = _score(net, learner.objective, experience.test, batch_size, learner.device)
    return Recovery(before, after, steps)


@torch.no_grad()
def _score(net: nn.Module, objective: Objective, data: Data, batch_size: int, device: torch.device) -> float:
    net.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in data.batches(torch.arange(len(data)).split(batch_size)):
        batch = batch.to(device)
        value, count = objective.score(net(batch).logits, batch)
        total += torch.stack([value.double(), count.double().to(value.device)])
    return float(total[0] / total[1])
