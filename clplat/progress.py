"""Progress bar over all experiences of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from clplat.lightning import pl
from clplat.stepper import Stepper


class Progress(pl.Callback):
    """One bar for all experiences, on a terminal only: logs stay readable.

    Args:
        name: of the run, shown in front.
        experiences: K.
    """

    def __init__(self, name: str, experiences: int) -> None:
        console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.name, self.experiences = name, experiences
        self.task: TaskID | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.task is None:
            self.task = self.bar.add_task(self.name, total=self.experiences)
        assert isinstance(pl_module, Stepper)
        experience = pl_module.learner.experience
        assert experience is not None
        self.done, self.chunks = experience.index, max(1, int(trainer.num_training_batches))
        self.bar.update(self.task, description=f"{self.name}: {experience.name}", completed=self.done)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.task is not None
        self.bar.update(self.task, completed=self.done + (batch_idx + 1) / self.chunks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.bar.stop()
