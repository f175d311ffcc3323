"""Loop over experiences: train on one, score on all, keep what is needed to go on after a crash.

for each experience
    trainer.fit          (one Trainer; one of its epochs is one experience)
    strategy.after_experience
    score all test sets -> a row of R -> tracker
    strategy.before_experience of the next one, so that the checkpoint holds what it prepared -> checkpoint
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from clplat import checkpoint
from clplat.composition import check_stream
from clplat.evaluate import check_held_out, evaluate
from clplat.learners.carry import Carry
from clplat.learners.learner import Learner
from clplat.lightning import forward_context, one_fit, pl, root_device
from clplat.scores import Results
from clplat.settings import Evaluation, Training
from clplat.stepper import Stepper
from clplat.strategy import Session
from clplat.streams.experience import Batch, Data, Stream, StreamError
from clplat.streams.order import Order
from clplat.streams.segments import segmented
from clplat.tracking.base import NoTracker, Tracker

log = logging.getLogger(__name__)


class Run:
    """One learner over one stream.

    Args:
        stream: what is learned.
        learner: what learns, with its strategy.
        trainer: Lightning's; device, precision and callbacks are its own.
        training: batch size, length, seed, chunks.
        evaluation: batch size and extra rows.
        tracker: told all metrics.
        folder: where `last.ckpt` is kept; None: no checkpoints.
        notes: plain values that are kept in every checkpoint (configuration, run id).

    Raises:
        StreamError: the stream cannot be learned, or lacks what the strategy needs; its segments' state cannot be
            carried by this net or with this batch size.
    """

    def __init__(
        self,
        stream: Stream,
        learner: Learner,
        trainer: pl.Trainer,
        training: Training,
        evaluation: Evaluation | None = None,
        tracker: Tracker | None = None,
        folder: Path | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
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
            raise ValueError(
                f"trainer.devices: got {trainer.world_size} processes, one is supported so far: set it to 1."
            )
        if carries:
            for experience in stream:
                # Refuses rows that are no batch.
                experience.train.training(Order(training.batch_size, 1, training.seed, experience.index, carries=True))
                _check_state(learner, experience.train)
        elif training.vary_segments:
            raise StreamError(
                f"training.vary_segments: stream {stream.name!r} has no segments: set it to false, or choose stream=text."
            )
        self.stream, self.learner, self.trainer = stream, learner, trainer
        self.carry = Carry() if carries else None
        self.stepper = Stepper(learner, self.carry)
        self.training, self.evaluation = training, evaluation or Evaluation()
        self.tracker = tracker or NoTracker()
        self.folder, self.notes = folder, notes or {}
        check_held_out(stream, self.evaluation.on)
        score, higher = learner.objective.score_name, learner.objective.higher_is_better
        self.results = Results.empty(len(stream), score, higher, self.evaluation.on)
        self.experience = 0
        """The experience being trained; K when the run is complete."""
        self.step = 0
        """Optimiser steps done on it."""
        self._random: dict[str, Any] | None = None
        self._begun = False
        learner.log = lambda values: self.tracker.log(values, learner.steps)
        learner.strategy.setup(learner, stream)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, exactly."""
        learner = self.learner
        self.experience, self.step = state["experience"], state["step"]
        for experience in self.stream.experiences[: self.experience + 1]:
            learner.shape_for(experience)
        learner.load_state_dict(state["learner"])
        learner.steps = state["steps"]
        learner.handover.resume(state["optimizer"])
        if self.carry is not None:
            self.carry.state = state["carried"]
        self.results.load_state_dict(state["results"])
        self._random = state["random"]

    def begin(self) -> None:
        """Prepare the first experience, unless the run was resumed.

        `go` does it where nobody did. Apart from it, what a strategy can refuse only now, with an example at hand, is
        refused before anything is written or announced.
        """
        self.learner.to(root_device(self.trainer))
        if self._random is None:
            self.learner.begin(self.stream[0])
        self._begun = True

    def go(self) -> Results:
        """Train on what is left of the stream; returns all scores.

        Raises:
            NonFiniteLoss: a loss became NaN or infinite; the last checkpoint is from before it.
        """
        if not self._begun:
            self.begin()
        if self._random is None:
            self.save()
        else:
            checkpoint.set_random_state(self._random)
        if not self.results.all.trained:
            self.score(trained=-1, final=True)
        while self.experience < len(self.stream):
            self._learn_experience()
        return self.results

    def _learn_experience(self) -> None:
        stream, learner, experience = self.stream, self.learner, self.stream[self.experience]
        started = time.perf_counter()
        session = learner.strategy.session(stream, self.experience, Session(experience.train))
        length = self.training.length(session)
        for other in session.also_classes:
            learner.shape_for(other)
        learner.enter(experience)
        if session.data is not None and self.step < length:
            self._fit(session, length)
        learner.to(root_device(self.trainer))  # Lightning leaves it on the CPU after fit
        trained = time.perf_counter()
        learner.end(experience)
        consolidated = time.perf_counter()
        self.score(trained=self.experience, final=True)
        done = self.experience + 1
        self.tracker.log_results(self.results)
        self.tracker.log(
            {
                "cost/training_seconds": trained - started,
                "cost/consolidation_seconds": consolidated - trained,
                "cost/evaluation_seconds": time.perf_counter() - consolidated,
                "cost/stored_bytes": learner.strategy.stored_bytes(),
                "cost/passes_per_step": learner.strategy.passes,
            },
            step=done,
        )
        self.experience, self.step = done, 0
        if done < len(stream):
            if self.carry is not None:
                self.carry.state = None
            learner.begin(stream[done])
        self.save()

    def _fit(self, session: Session, length: int) -> None:
        learner, trainer, training = self.learner, self.trainer, self.training
        assert session.data is not None
        due = (training.log_every_n_steps, training.checkpoint_every_n_steps, self.evaluation.every_n_steps)
        order = Order(
            training.batch_size,
            steps=length,
            seed=training.seed,
            experience=self.experience,
            start=self.step,
            chunk=training.chunk,
            cuts=[n for n in due if n is not None],
            offset=learner.steps - self.step,
            carries=self.carry is not None,
            vary=training.vary_segments,
        )
        loader = session.data.training(order)
        if self.carry is not None:
            self.carry.to(learner.device)
        # Lightning's set-up may draw random numbers: what comes before the first step must not matter.
        state = checkpoint.random_state()
        self.stepper.plan(length, self.step, loader.nominal, lambda: checkpoint.set_random_state(state))
        with one_fit(trainer, _BetweenChunks(self, learner.steps - self.step, length)):
            trainer.fit(self.stepper, train_dataloaders=loader)

    def score(self, trained: int, final: bool) -> None:
        """Add a row to the results.

        Args:
            trained: the experience trained last, -1 for none.
            final: True after the whole experience, False in between.
        """
        scores, seen = evaluate(
            self.learner,
            self.stream.experiences,
            self.evaluation.batch_size,
            None if final else self.evaluation.examples,
            forward_context(self.trainer),
            self.carry is not None,
            self.evaluation.on,
        )
        self.results.append(scores, seen, trained, self.learner.steps, final)

    def save(self) -> None:
        """Write `last.ckpt`. A full disk does not stop the training: the last good checkpoint stays."""
        if self.folder is None:
            return
        state = {
            "experience": self.experience,
            "step": self.step,
            "steps": self.learner.steps,
            "complete": self.experience == len(self.stream),
            "learner": self.learner.state_dict(),
            "optimizer": self.learner.handover.state(inside=self.step > 0),
            "carried": None if self.carry is None else self.carry.state,
            "random": checkpoint.random_state(),
            "results": self.results.state_dict(),
            "notes": self.notes,
        }
        self.tracker.persist()
        try:
            checkpoint.save(self.folder / "last.ckpt", state)
        except OSError as error:
            log.warning(
                "No checkpoint written at step %d (%s). Training goes on; the last good checkpoint is kept. "
                "Free some space, or set output_dir to another disk.",
                self.learner.steps,
                error,
            )


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


class _BetweenChunks(pl.Callback):
    """Curves, extra rows and checkpoints between two chunks of an experience."""

    def __init__(self, run: Run, before: int, length: int) -> None:
        self.run, self.before, self.length = run, before, length

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what is due at this optimiser step; chunks end where something is due."""
        run, steps = self.run, self.run.learner.steps
        run.step = steps - self.before
        last = run.step == self.length
        if steps % run.training.log_every_n_steps == 0 or last:
            run.tracker.log({f"train/{name}": v for name, v in run.stepper.mean_terms().items()}, steps)
        every = run.evaluation.every_n_steps
        if every is not None and steps % every == 0 and not last:
            run.score(trained=run.experience, final=False)
        every = run.training.checkpoint_every_n_steps
        if every is not None and steps % every == 0:
            run.save()
