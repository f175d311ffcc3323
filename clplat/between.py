"""What is done between two chunks of steps: curves, extra rows, checkpoints, and an end where a signal asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clplat.lightning import pl

if TYPE_CHECKING:
    from clplat.loop import Run


class BetweenChunks(pl.Callback):
    """Curves, extra rows and checkpoints between two chunks of an experience."""

    def __init__(self, run: Run, before: int, length: int) -> None:
        self.run, self.before, self.length = run, before, length

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take signals back from Lightning, which would end the fit at SIGTERM without a checkpoint, with exit code 0."""
        self.run.signals.insist()

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
        due = every is not None and steps % every == 0
        asked = run.signals.number is not None  # asked once: what is heeded here was saved here
        if due or asked:
            run.save()
        if asked:
            run.signals.heed()
