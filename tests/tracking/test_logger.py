"""What a Lightning module or callback logs reaches the run's tracker."""

import pytest
import pytorch_lightning as pl
import torch
from tracked import history, run_of, started

from clplat.tracking.base import NoTracker
from clplat.tracking.logger import RunLogger


class Probe(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"hidden": 7})
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        self.log("probe/loss", self.weight.sum())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained_twice(logger: RunLogger, **options) -> pl.Trainer:
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(logger=logger, max_epochs=1, accelerator="cpu", **options)  # with its checkpoint callback
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]  # a tensor is a data set
    trainer.fit(Probe(), data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Probe(), data)
    return trainer


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_what_a_module_logs_over_several_fits_is_in_one_run(tmp_path, store):
    tracker = started(tmp_path, store)
    trainer = trained_twice(RunLogger(tracker), default_root_dir=tmp_path)
    assert run_of(tracker).info.status == "RUNNING"
    assert trainer.log_dir == str(tmp_path / "run")
    tracker.close()
    assert [step for step, _ in history(tracker, "probe/loss")] == list(range(8))
    assert run_of(tracker).data.params["hidden"] == "7"
    assert "epoch" not in run_of(tracker).data.metrics


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_any_tracker_is_told(tmp_path):
    class Kept(NoTracker):
        def __init__(self, folder):
            super().__init__(folder)
            self.values: dict[str, list[tuple[int, float]]] = {}

        def log(self, metrics, step):
            for key, value in metrics.items():
                self.values.setdefault(key, []).append((step, value))

    tracker = Kept(tmp_path)
    trained_twice(RunLogger(tracker), default_root_dir=tmp_path)
    assert [step for step, _ in tracker.values["probe/loss"]] == list(range(8))
    assert tracker.values.keys() == {"probe/loss"}
