"""Scores of a learner on every experience of a stream, in large batches. The training state stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.streams.experience import Data, Experience, Stream, StreamError


def evaluate(
    learner: Learner,
    experiences: Sequence[Experience],
    batch_size: int = 1000,
    examples: int | None = None,
    precision: AbstractContextManager | None = None,
    carries: bool = False,
    on: str = "test",
) -> tuple[list[float], list[float]]:
    """Score on each experience's test set, and the same with the classes not seen so far masked.

    The second list is NaN where targets are not classes. With `carries`, each test set is read in
    order with a state of its own, fresh at first; that of the training is not touched.

    Args:
        learner: with its strategy, whose `predict` has the last word.
        experiences: K of them.
        batch_size: examples a forward pass.
        examples: take this many of each test set, evenly spaced and always the same; None: all. Of segments in order:
            the first of them, in whole rows.
        precision: context in which the net is run (autocast), None: plain.
        carries: the state of segments goes from each to the next.
        on: "valid" for the sets that the stream holds out, instead of the test sets.
    """
    sums: list[Tensor] = []
    with learner.evaluating(), precision or nullcontext():
        for experience in experiences:
            sums.append(_score(learner, scored(experience, on), batch_size, examples, carries))
    totals = torch.stack(sums).tolist()  # the only wait for the device
    scores = [total / count for total, _, count in totals]
    masked = learner.objective.one_class
    return scores, [seen / count if masked else float("nan") for _, seen, count in totals]


def scored(experience: Experience, on: str) -> Data:
    """The set of an experience that is scored, `on` "test" or "valid".

    Raises:
        StreamError: there is no validation set.
    """
    data = experience.valid if on == "valid" else experience.test
    if data is None or not len(data):
        raise StreamError(
            f"evaluation.on=valid: experience {experience.index} ({experience.name}) holds no examples out: give the "
            "stream some (stream.valid_fraction=0.1, or stream.valid_size=1000 where it is generated), or set "
            "evaluation.on=test."
        )
    return data


def check_held_out(stream: Stream, on: str) -> None:
    """Refuse a stream that lacks what is scored.

    Raises:
        StreamError: an experience has no validation set.
    """
    for experience in stream:
        scored(experience, on)


def _score(learner: Learner, data: Data, batch_size: int, examples: int | None, carries: bool) -> Tensor:
    total = torch.zeros(3, device=learner.device, dtype=torch.float64)
    objective = learner.objective
    state = None
    for batch, goes_on in data.test_batches(batch_size, examples, carries):
        batch = batch.to(learner.device)
        output = learner.net(batch, state if goes_on else None)
        state = output.state
        logits = learner.strategy.predict(learner, batch, output.logits, output.features)
        value, count = objective.score(logits, batch)
        seen = value
        if objective.one_class:
            seen, _ = objective.score(logits.masked_fill(~learner.seen, torch.finfo(logits.dtype).min), batch)
        total += torch.stack([value.double(), seen.double(), count.double().to(value.device)])
    return total
