"""Signals that ask for an end: a checkpoint at the next step, one line, the right exit code, an exact resume."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from leftovers import assert_same
from lives import CODES, code_of, forked, imported, left_alone, stopped

from clplat import checkpoint
from clplat.cli import main
from clplat.lightning import pl, quiet_trainer
from clplat.loop import Run
from clplat.settings import Evaluation, Training
from clplat.signals import Stopped, ending, heeded_at_once
from clplat.strategy import Strategy
from clplat.tracking.base import NoTracker


@pytest.fixture(autouse=True)
def _none_is_ignored() -> Iterator[None]:
    """As in a terminal: where tests run in the background, SIGINT and SIGHUP are ignored, and stay so."""
    before = {number: signal.getsignal(number) for number in CODES}
    for number in CODES:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Sends(Strategy):
    """Sends a signal to this process after a step, or at another moment."""

    def __init__(self, number: int | None = None, step: int = 0, moment: str = "step") -> None:
        super().__init__()
        self.number, self.at, self.moment = number, step, moment

    def _send(self, learner, moment: str) -> None:
        if self.number is not None and (learner.steps >= self.at) and moment == self.moment:
            number, self.number = self.number, None
            signal.raise_signal(number)

    def after_step(self, learner, batch, output) -> None:
        self._send(learner, "step")

    def after_experience(self, learner, experience) -> None:
        self._send(learner, "consolidation")

    def predict(self, learner, batch, logits, features):
        self._send(learner, "evaluation")
        return logits


class Notes(NoTracker):
    """Keeps all values that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[str, float, int]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.values += [(key, value, step) for key, value in metrics.items() if not key.endswith("_seconds")]


def start(folder: Path | None, sends: Sends | None = None) -> Run:
    of = tiny.stream()
    learner = tiny.learner(sends or Sends(), of, dropout=0.2)
    training = Training(batch_size=8, epochs=3, chunk=6, log_every_n_steps=10)
    return Run(of, learner, quiet_trainer(), training, Evaluation(every_n_steps=4), Notes(), folder)


def values(run: Run) -> list[tuple[str, float, int]]:
    assert isinstance(run.tracker, Notes)
    return run.tracker.values


@pytest.fixture(scope="module")
def whole() -> Run:
    run = start(None)
    torch.manual_seed(3)
    run.go()
    return run


@pytest.mark.parametrize(
    ("number", "moment", "step"),
    [(signal.SIGTERM, "step", n) for n in (1, 2, 4, 5, 6, 9, 10, 14, 15, 16, 45)]
    + [(number, "step", 23) for number in CODES]
    + [(signal.SIGTERM, "consolidation", 15), (signal.SIGINT, "evaluation", 18), (signal.SIGHUP, "evaluation", 0)],
)
def test_a_signal_at_any_moment_then_resume_equals_uninterrupted(whole, tmp_path, number, moment, step):
    cut = start(tmp_path, Sends(number, step, moment))
    torch.manual_seed(3)
    with pytest.raises(Stopped) as stop:
        cut.go()
    assert stop.value.code == CODES[number]
    state = checkpoint.load(tmp_path / checkpoint.LAST)
    if moment == "step":
        assert state["steps"] == step, "the checkpoint is of the step after which the signal came"
    resumed = start(tmp_path)
    torch.manual_seed(99)  # the checkpoint's own random state counts
    resumed.resume(state)
    resumed.go()
    assert torch.equal(tiny.flat(resumed.learner), tiny.flat(whole.learner))
    assert torch.equal(resumed.results.all.rows.nan_to_num(-1), whole.results.all.rows.nan_to_num(-1))
    assert values(cut) + values(resumed) == values(whole)


def test_lightnings_own_handler_does_not_get_in_between(tmp_path):
    """It would end the fit with exit code 0 where no checkpoint was written yet."""

    class AtEnd(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            signal.raise_signal(signal.SIGTERM)

    of = tiny.stream()
    run = Run(
        of, tiny.learner(of=of), quiet_trainer(callbacks=[AtEnd()]), Training(batch_size=8, epochs=1), folder=tmp_path
    )
    with pytest.raises(Stopped):
        run.go()
    assert checkpoint.load(tmp_path / checkpoint.LAST)["steps"] == 5


def test_it_is_left_as_it_was_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in CODES]
    with pytest.raises(Stopped):
        start(tmp_path, Sends(signal.SIGTERM, 3)).go()
    start(None).go()
    assert [signal.getsignal(number) for number in CODES] == before


def test_what_is_ignored_stays_so():
    """As under nohup, and for jobs in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = start(None, Sends(signal.SIGHUP, 3))
        run.go()
        assert run.experience == 3
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_at_once(tmp_path, number):
    def waits() -> int:
        with contextlib.suppress(Stopped), heeded_at_once():
            signal.raise_signal(number)
        run = start(None)
        with run.signals.waiting():
            signal.raise_signal(number)
            signal.raise_signal(number)
        return 98

    def ends() -> int:
        with ending("said\n"):
            signal.raise_signal(number)
        return 98

    assert code_of(forked(waits, tmp_path / "out")) == CODES[number]
    assert code_of(forked(ends, tmp_path / "out")) == CODES[number]
    assert (tmp_path / "out").read_text() == "said\n"


COMMAND = [
    "train", "strategy=[replay,ewc]", "strategy.ewc.examples=100", "seed=4", "progress=false", "learner.net.hidden=16",
    "learner.net.dropout=0.2", "tracking=none", "training.epochs=6", "training.log_every_n_steps=5", "threads=1",
    "stream.experiences=2", "evaluation.every_n_steps=40",
]  # fmt: skip


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    imported()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_signals_at_twenty_random_moments(in_tmp):
    whole, draws, trained = in_tmp / "whole", random.Random(7), 0
    training = left_alone(COMMAND[1:], whole)
    for i in range(20):
        cut = in_tmp / f"cut{i}"
        code, finished = stopped(COMMAND[1:], cut, draws, training)
        if finished:
            assert_same(whole, cut)
            trained += code != 0
    assert trained >= 8, "too few signals came in training to say anything"


def wait_for(text: str, file: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if file.exists() and text in file.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"{text!r} was never said: {file.read_text()}")


def test_a_run_that_is_stopped_says_how_to_go_on_from_anywhere(in_tmp, monkeypatch):
    child = forked(lambda: main([*COMMAND, "training.epochs=500", "output_dir=cut"]), in_tmp / "out.txt")
    wait_for("folder:", in_tmp / "out.txt")
    os.kill(child, signal.SIGTERM)
    assert code_of(child) == 143
    said = (in_tmp / "out.txt").read_text().splitlines()
    (path,) = in_tmp.rglob(checkpoint.LAST)
    assert said[-1] == f"clplat: stopped. To go on with the run that was in training: clplat train resume={path.parent}"


@pytest.mark.slow
def test_a_signal_stops_the_whole_sweep(in_tmp):
    sweep = ["-m", "seed=1,2", "training.epochs=500", "output_dir=cut", "progress=false"]
    child = forked(lambda: main([*COMMAND, *sweep]), in_tmp / "out.txt")
    end = time.monotonic() + 60
    while time.monotonic() < end and not list((in_tmp / "cut").rglob(checkpoint.LAST)):
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert code_of(child) == 130
    (path,) = (in_tmp / "cut").rglob(checkpoint.LAST)
    assert path.parent.name == "0", "the second run of the sweep was begun"
    last = (in_tmp / "out.txt").read_text().splitlines()[-1]
    assert last.endswith(f"resume={path.parent}")


@pytest.mark.slow
def test_the_tracker_is_told_that_a_run_was_killed(in_tmp):
    from tracked import shared_store

    from clplat.tracking.store import open_store

    store = shared_store()
    tracked = ["tracking=mlflow", f"tracking.uri={store}", "tracking.experiment=signals", "training.epochs=500"]
    child = forked(lambda: main([*COMMAND, *tracked]), in_tmp / "out.txt")
    wait_for("folder:", in_tmp / "out.txt")
    os.kill(child, signal.SIGHUP)
    assert code_of(child) == 129
    client = open_store(store)
    experiment = client.get_experiment_by_name("signals")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
