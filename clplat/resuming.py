"""State of a run as its checkpoint holds it, and a run that takes it up again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clplat import checkpoint
from clplat.checkpoint import CheckpointError

if TYPE_CHECKING:
    from clplat.loop import Run


def state_of(run: Run) -> dict[str, Any]:
    """All that a run needs to go on exactly from here, as tensors and plain values."""
    return {
        "experience": run.experience,
        "step": run.step,
        "steps": run.learner.steps,
        "complete": run.experience == len(run.stream),
        "learner": run.learner.state_dict(),
        "optimizer": run.learner.handover.state(inside=run.step > 0),
        "carried": None if run.carry is None else run.carry.state,
        # Of a chunk that a signal cut short; what a whole one was needed for is logged by now.
        "terms": run.stepper.terms() if run.step and run.signals.number is not None else [],
        "random": checkpoint.random_state(),
        "results": run.results.state_dict(),
        "data": run.stream.fingerprint(),
        "notes": run.notes,
    }


def take_up(run: Run, state: dict[str, Any]) -> None:
    """Put a run that was just made where a checkpoint's state was.

    Raises:
        CheckpointError: the state is of another net, stream or strategy, or a part of it is not what it should be.
    """
    try:
        _take_up(run, state)
    except CheckpointError:
        raise
    except Exception as error:  # a strategy's own state may fail in any way
        reason = " ".join(
            (str(error) or "no reason given").removeprefix("Error(s) in loading state_dict for Learner:").split()
        )
        raise CheckpointError(
            f"The checkpoint does not fit this run ({type(error).__name__}: {reason[:300]}). "
            "It is of another net, stream or strategy, or of another version of their code."
        ) from error


def _take_up(run: Run, state: dict[str, Any]) -> None:
    learner, experiences = run.learner, len(run.stream)
    run.experience, run.step = state["experience"], state["step"]
    if run.experience > experiences:
        raise CheckpointError(f"The checkpoint is of experience {run.experience}, this stream has {experiences}.")
    for experience in run.stream.experiences[: run.experience + 1]:
        learner.shape_for(experience)
    learner.load_state_dict(state["learner"])
    learner.steps = state["steps"]
    learner.handover.resume(state["optimizer"])
    if run.carry is not None:
        run.carry.state = state["carried"]
    run.results.load_state_dict(state["results"])
    before = checkpoint.random_state()
    try:
        checkpoint.set_random_state(state["random"])  # fails here if it ever does
    finally:
        checkpoint.set_random_state(before)
