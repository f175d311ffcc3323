"""A run from Python in one call, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.lightning import pl, quiet_trainer, silenced
from clplat.loop import Run
from clplat.metrics import summary
from clplat.scores import Results
from clplat.settings import Evaluation, Training
from clplat.strategy import Strategy
from clplat.streams.experience import Stream

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from clplat.tracking.base import Tracker


@dataclass(frozen=True)
class Result:
    """Scores of a finished run.

    Attributes:
        results: all evaluations, with and without classes not seen yet.
        names: of the experiences.
    """

    results: Results
    names: tuple[str, ...]

    @property
    def R(self) -> Tensor:
        """[K, K], the score on experience j after training on experience i."""
        return self.results.R

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of continual learning by name; NaN where undefined."""
        return summary(self.results.all)

    def frame(self) -> pd.DataFrame:
        """R as a data frame: a row after each experience, the untrained learner first, and a column for each."""
        import pandas as pd

        rows = [self.results.all.baseline.tolist(), *self.R.tolist()]
        return pd.DataFrame(rows, index=["untrained", *self.names], columns=list(self.names))

    def plot(self) -> Figure:
        """Forgetting curves."""
        from clplat.report.figures import curves

        return curves(self.results.all, self.names)


def run(
    stream: Stream,
    learner: Learner,
    strategy: Strategy | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    training: Training | None = None,
    evaluation: Evaluation | None = None,
    trainer: pl.Trainer | None = None,
    tracker: Tracker | None = None,
    folder: Path | None = None,
) -> Result:
    """Train a learner on a stream, and score it on all experiences after each.

    Args:
        stream: what is learned.
        learner: what learns; it is changed.
        strategy: takes the place of the learner's own; None: that one.
        epochs: passes over each experience; 1 if neither this nor `steps` is given.
        steps: optimiser steps on each experience, instead of `epochs`.
        batch_size: rows a step.
        seed: of the order of examples.
        training: all settings of the training at once, in place of the four before.
        evaluation: how scores are taken.
        trainer: Lightning's; None: a silent one on the CPU.
        tracker: is told all metrics; None: nobody is.
        folder: of checkpoints; None: none are written.

    Raises:
        StreamError: the stream cannot be learned by this learner with these strategies.
    """
    if strategy is not None:
        learner.strategy = Composite.of(strategy)
    if training is None:
        epochs = 1 if epochs is None and steps is None else epochs
        training = Training(batch_size=batch_size, epochs=epochs, steps=steps, seed=seed)
    with silenced():
        done = Run(stream, learner, trainer or quiet_trainer(), training, evaluation, tracker, folder)
        done.go()
    return Result(done.results, tuple(experience.name for experience in stream))
