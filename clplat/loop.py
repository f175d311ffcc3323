"""Loop over experiences: train on one, score on all, keep what is needed to go on after a crash.

for each experience
    trainer.fit (one of its epochs is one experience), strategy.after_experience
    score all test sets -> a row of R -> tracker
    strategy.before_experience of the next one, so that the checkpoint holds what it prepared -> checkpoint
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from clplat import checkpoint
from clplat.between import BetweenChunks
from clplat.checkpoint import LAST, CheckpointError
from clplat.errors import UserError
from clplat.evaluate import evaluate
from clplat.learners.carry import Carry
from clplat.learners.learner import Learner
from clplat.lightning import convert_weights, forward_context, one_fit, pl, root_device, weights_precision
from clplat.preflight import check_run
from clplat.resuming import state_of, take_up
from clplat.scores import Results
from clplat.settings import Evaluation, Training
from clplat.signals import Pending
from clplat.stepper import Stepper
from clplat.strategy import Session
from clplat.streams.experience import Stream
from clplat.streams.order import Order
from clplat.streams.unchanged import check_unchanged
from clplat.tracking.base import NoTracker, Tracker

log = logging.getLogger(__name__)


class EndedEarly(UserError):
    """Fewer steps were taken than planned, though nothing failed."""

    code = 1


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
        StreamError: the stream cannot be learned, or lacks what strategy, net or batch size need.
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
        evaluation = evaluation or Evaluation()
        convert_weights(trainer, learner)
        with weights_precision(trainer):
            carries = check_run(stream, learner, trainer, training, evaluation)
        self.stream, self.learner, self.trainer = stream, learner, trainer
        self.carry = Carry() if carries else None
        self.signals = Pending()  # what is received in training is heeded between two steps
        self.stepper = Stepper(learner, self.carry, stops=lambda: self.signals.number is not None)
        self.training, self.evaluation = training, evaluation
        self.tracker = tracker or NoTracker()
        self.folder, self.notes = folder, notes or {}
        score, higher = learner.objective.score_name, learner.objective.higher_is_better
        self.results = Results.empty(len(stream), score, higher, self.evaluation.on)
        self.experience = 0
        """The experience being trained; K when the run is complete."""
        self.step = 0
        """Optimiser steps done on it."""
        self._random: dict[str, Any] | None = None
        self._earlier: list[dict[str, Tensor]] = []
        self._begun = False
        learner.log = lambda values: self.tracker.log(values, learner.steps)
        with weights_precision(trainer):
            learner.strategy.setup(learner, stream)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, exactly.

        Raises:
            CheckpointError: it does not fit this run.
            StreamError: the data are not those that the run began with.
        """
        with weights_precision(self.trainer):
            check_unchanged(self.stream, state.get("data"))
            take_up(self, state)
        self._earlier, self._random = state["terms"], state["random"]

    def begin(self) -> None:
        """Prepare the first experience, unless the run was resumed.

        `go` does it where nobody did. Apart from it, a strategy refuses here what it can tell only from an example.
        """
        self.learner.to(root_device(self.trainer))
        if self._random is None:
            with weights_precision(self.trainer):
                self.learner.begin(self.stream[0])
        self._begun = True

    def go(self) -> Results:
        """Train on what is left of the stream; returns all scores.

        A signal that asks the process to end is heeded between two steps, when a checkpoint is written.

        Raises:
            NonFiniteLoss: a loss became NaN or infinite; the last checkpoint is from before it.
            EndedEarly: fewer steps were taken than planned.
            Stopped: a signal was received.
        """
        with self.signals.waiting(), weights_precision(self.trainer):
            return self._go()

    def _go(self) -> Results:
        if not self._begun:
            self.begin()
        if self._random is None:
            self.save()
        else:
            checkpoint.set_random_state(self._random)
        if not self.results.all.trained:
            self.score(trained=-1, final=True)
        while self.experience < len(self.stream):
            self.signals.heed()
            self._learn_experience()
        self.signals.heed()
        return self.results

    def _learn_experience(self) -> None:
        stream, learner, experience = self.stream, self.learner, self.stream[self.experience]
        started = time.perf_counter()
        session = learner.strategy.session(stream, self.experience, Session(experience.train))
        length = self.training.length(session)
        for other in session.also_classes:
            learner.shape_for(other)
        learner.enter(experience)
        if self.step > length:
            raise CheckpointError(f"The checkpoint is of step {self.step} of an experience that has {length} steps.")
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
        earlier, self._earlier = self._earlier[len(self._earlier) - order.begun() :], []
        self.stepper.plan(length, self.step, loader.nominal, lambda: checkpoint.set_random_state(state), earlier)
        with one_fit(trainer, BetweenChunks(self, learner.steps - self.step, length)):
            trainer.fit(self.stepper, train_dataloaders=loader)
        if self.step != length:
            self.save()
            raise EndedEarly(
                f"Training on experience {self.experience} ended after {self.step} of {length} steps: a callback or an "
                "option of the Trainer ended it. Begin anew without it."
            )

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
        state = state_of(self)
        self.tracker.persist()
        try:
            checkpoint.save(self.folder / LAST, state)
        except OSError as error:
            log.warning(
                "No checkpoint written at step %d (%s). Training goes on; the last good checkpoint is kept. "
                "Free some space, or set output_dir to another disk.",
                self.learner.steps,
                error,
            )
