"""Checks before a run: what stream, learner, trainer and settings cannot do together."""

from __future__ import annotations

import torch

from clplat.composition import check_stream
from clplat.evaluate import check_held_out
from clplat.learners.learner import Learner
from clplat.lightning import pl
from clplat.settings import Evaluation, Training
from clplat.streams.experience import Batch, Data, Stream, StreamError
from clplat.streams.order import Order
from clplat.streams.segments import segmented


def check_run(
    stream: Stream, learner: Learner, trainer: pl.Trainer, training: Training, evaluation: Evaluation
) -> bool:
    """Refuse what could not be trained or scored; returns whether the state of segments is carried.

    Raises:
        StreamError: the stream cannot be learned, or lacks what is asked of it; its segments' state cannot be carried by
            this net or with this batch size.
        ValueError: a Trainer of several processes.
    """
    stream.check()
    carries = training.carry_state and segmented(stream)
    check_stream(learner.strategy, stream, carries)
    if stream.target not in learner.objective.targets:
        allowed = " or ".join(map(repr, learner.objective.targets))
        raise StreamError(
            f"The objective is for {allowed} targets, stream {stream.name!r} has {stream.target!r} targets: "
            "set objective=auto."
        )
    if trainer.world_size > 1:
        raise ValueError(f"trainer.devices: got {trainer.world_size} processes, one is supported so far: set it to 1.")
    if carries:
        for experience in stream:
            # Refuses rows that are no batch.
            experience.train.training(Order(training.batch_size, 1, training.seed, experience.index, carries=True))
            _check_state(learner, experience.train)
    elif training.vary_segments:
        raise StreamError(
            f"training.vary_segments: stream {stream.name!r} has no segments: set it to false, or choose stream=text."
        )
    check_held_out(stream, evaluation.on)
    return carries


def _check_state(learner: Learner, data: Data) -> None:
    """Refuse a net whose state grows, or that has none, by running two short segments."""
    first = data.batch(torch.zeros(1, dtype=torch.int64))
    one = Batch(first.x[:, :1], first.y[:, :1], task=first.task)
    sizes: list[list[torch.Size]] = []
    state = None
    with learner.evaluating():
        for _ in range(2):
            state = learner.net(one.to(learner.device), state).state
            sizes.append([t.shape for block in state if block is not None for t in block])
    if sizes[0] and sizes[0] == sizes[1]:
        return
    what = f"grows with every step ({_grown(*sizes)})" if sizes[0] else "is empty"
    raise StreamError(
        f"The state of this net {what}, so it cannot be carried from segment to segment: use a recurrent learner, or "
        "set training.carry_state=false, which takes each segment for itself."
    )


def _grown(before: list[torch.Size], after: list[torch.Size]) -> str:
    a, b = next((a, b) for a, b in zip(before, after, strict=True) if a != b)
    return f"{list(a)}, then {list(b)}"
