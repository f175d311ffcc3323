"""Options of Lightning's Trainer: those that clplat sets itself are refused, and no fit ends early without a word."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import tiny
import torch

from clplat import checkpoint
from clplat.cli import main
from clplat.config.refusing import ConfigError
from clplat.config.trainer import REFUSED, check_trainer
from clplat.lightning import pl, quiet_trainer
from clplat.loop import EndedEarly, Run
from clplat.settings import Training

ALLOWED = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "callbacks", "deterministic", "benchmark",
    "inference_mode", "profiler", "detect_anomaly", "plugins", "sync_batchnorm", "enable_autolog_hparams",
}  # fmt: skip


def test_every_option_of_the_trainer_is_allowed_or_refused():
    options = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert options - ALLOWED <= set(REFUSED), "Lightning has a new option: say what clplat does about it"
    assert not ALLOWED & set(REFUSED)


@pytest.mark.parametrize("key", REFUSED)
def test_what_clplat_sets_itself_is_refused(key):
    check_trainer(["_target_", "accelerator", "precision", "callbacks"])
    with pytest.raises(ConfigError, match=rf"^trainer\.{key}: .* Leave it out\.$"):
        check_trainer(["_target_", key])


def test_the_command_refuses_before_anything_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["strategy=finetune", "tracking=none", "stream.experiences=2", "hydra.run.dir=run"]
    for option in ("max_epochs=-5", "fast_dev_run=true", "max_time=00:00:00:00", "limit_train_batches=1"):
        assert main(["train", *options, f"+trainer.{option}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"clplat: trainer.{option.partition('=')[0]}: ") and err.count("\n") == 1
    assert not Path("run").exists()


class Stops(pl.Callback):
    """Ends a fit early, in one of the ways that Lightning has."""

    def __init__(self, way: str, at: int) -> None:
        self.way, self.at = way, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.way == "end" and batch_idx == self.at:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if self.way == "limit":
            trainer.fit_loop.max_batches = 1
        if self.way == "loops":
            trainer.fit_loop.epoch_loop.max_steps = 1


def start(folder: Path, *callbacks: pl.Callback, **options: object) -> Run:
    of = tiny.stream()
    learner = tiny.learner(of=of, dropout=0.2)
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    return Run(of, learner, trainer, Training(batch_size=8, epochs=3, chunk=4), folder=folder)


@pytest.mark.parametrize(("way", "at", "steps"), [("end", 0, 4), ("end", 2, 12), ("limit", 0, 4), ("loops", 0, None)])
def test_a_fit_that_ends_early_never_ends_as_a_complete_run_and_can_be_gone_on_with(tmp_path, way, at, steps):
    run = start(tmp_path, Stops(way, at))
    torch.manual_seed(3)
    with pytest.raises(EndedEarly, match=r"experience 0 ended after \d+ of 15 steps") as ended:
        run.go()
    assert ended.value.code == 1
    state = checkpoint.load(tmp_path / checkpoint.LAST)
    assert not state["complete"] and state["experience"] == 0
    assert steps is None or state["steps"] == steps
    whole = start(tmp_path / "none")
    whole.folder = None
    torch.manual_seed(3)
    whole.go()
    resumed = start(tmp_path)
    resumed.resume(state)
    resumed.go()
    assert torch.equal(tiny.flat(resumed.learner), tiny.flat(whole.learner))


@pytest.mark.parametrize(
    "option", [{"max_steps": 5}, {"limit_train_batches": 1}, {"overfit_batches": 1}, {"max_time": {"seconds": 0}}]
)
def test_a_trainer_from_python_that_ends_early_is_noticed_too(tmp_path, option):
    with pytest.raises(EndedEarly, match=r"ended after \d+ of 15 steps"):
        start(tmp_path, **option).go()
