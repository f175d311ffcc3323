"""Adapter to Lightning: each thing it reaches for inside a Trainer does what the run relies on."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from clplat.lightning import forward_context, one_fit, pl, quiet_trainer, root_device, tell_steps


class Counting(pl.LightningModule):
    """Counts its steps, and says each time that it took three optimiser steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []
        self.count = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen += batch.tolist()
        self.count += 3
        tell_steps(self.trainer, self.count)


class Ends(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append(trainer.global_step)


def loader(start: int) -> DataLoader:
    return DataLoader(range(start, start + 2), batch_size=1)  # type: ignore[arg-type]  # a sequence is a data set


def test_every_fit_of_one_trainer_trains_and_steps_go_on():
    trainer, module, ends = quiet_trainer(), Counting(), Ends()
    for start in (0, 10, 20):
        with one_fit(trainer, ends):
            trainer.fit(module, train_dataloaders=loader(start))
        assert ends not in trainer.callbacks  # type: ignore[attr-defined]  # a plain list, set by Lightning
    assert module.seen == [0, 1, 10, 11, 20, 21]
    assert ends.steps == [3, 6, 9, 12, 15, 18]


def test_a_second_fit_without_it_trains_nothing():
    trainer, module = quiet_trainer(), Counting()
    trainer.fit(module, train_dataloaders=loader(0))
    trainer.fit(module, train_dataloaders=loader(10))
    assert module.seen == [0, 1], "Lightning changed: one_fit may not be needed any more"


def test_the_callback_goes_when_a_fit_fails():
    trainer, ends = quiet_trainer(), Ends()
    with pytest.raises(KeyError), one_fit(trainer, ends):
        raise KeyError
    assert ends not in trainer.callbacks  # type: ignore[attr-defined]  # a plain list, set by Lightning


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_the_context_has_the_trainers_precision(precision, dtype):
    trainer = quiet_trainer(precision=precision)
    with forward_context(trainer):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype
    assert root_device(trainer) == torch.device("cpu")


def test_a_quiet_trainer_writes_nothing(tmp_path, capsys):
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.fit(Counting(), train_dataloaders=loader(0))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
