"""Lives of a real `clplat train`: forked with everything imported, ended by a signal, gone on with.

The tests of kills and signals use it for a few runs, `benchmarks/faults.py` for all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clplat import checkpoint
from clplat.cli import main

SLOW = [
    "clplat.build", "clplat.launch", "clplat.loop", "clplat.report.folder", "clplat.report.tables", "clplat.stepper",
    "clplat.tracking.tracker", "matplotlib.pyplot", "mlflow.data", "mlflow.store.tracking.sqlalchemy_store",
    "sklearn.datasets",
]  # fmt: skip
"""Modules that each child would import anew."""

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def imported() -> None:
    """Import what takes long, once for all children; nothing here starts a thread."""
    for module in SLOW:
        importlib.import_module(module)


def forked(work: Callable[[], int], out: Path) -> int:
    """Do something in a child process with everything imported; returns its id."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException), out.open("w") as file:  # a child never returns to the caller
        for number in CODES:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        warnings.resetwarnings()  # a process of its own has none of the test's filters
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        try:
            os._exit(work())
        except BaseException:
            traceback.print_exc()
    os._exit(99)


def code_of(child: int, seconds: float = 60) -> int:
    """Exit code of a child, negative for the signal that ended it.

    Raises:
        TimeoutError: it did not end; it was killed.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the process did not end within {seconds} s")


def trains(words: Sequence[str], out: Path) -> int:
    """Begin `clplat train` in a child, its random generators as no other process has them; returns its id."""

    def work() -> int:
        own = os.getpid()
        torch.manual_seed(own)
        np.random.seed(own)
        random.seed(own)
        return main(["train", *words])

    return forked(work, out)


def left_alone(words: Sequence[str], folder: Path, seconds: float = 300) -> float:
    """Train in a folder without a signal; returns the seconds from its first checkpoint to its last."""
    out, last, end = folder.with_suffix(".txt"), folder / checkpoint.LAST, time.monotonic() + seconds
    child = trains([*words, f"hydra.run.dir={folder}"], out)
    while not last.exists() and time.monotonic() < end and not _over(child, out):
        time.sleep(0.002)
    first = time.time()
    code = code_of(child, seconds)
    assert code == 0, out.read_text()
    return last.stat().st_mtime - first


@dataclass
class Kills:
    """Counts of SIGKILLs, by the checkpoint that they left.

    Attributes:
        inside: one of a step inside an experience.
        between: one between two experiences.
        over: one of a run that was trained to its end, and had its report to write.
        early: none; the run was begun anew.
        torn: of all, those that left a half-written checkpoint beside the last one.
    """

    inside: int = 0
    between: int = 0
    over: int = 0
    early: int = 0
    torn: int = 0


def killed(words: Sequence[str], folder: Path, draws: random.Random, training: float, kills: int) -> Kills:
    """Train in a folder; kill at random moments and resume, until it was killed inside experiences, then to the end.

    Args:
        words: of the command.
        folder: of the run, absent or empty.
        draws: the moments.
        training: seconds between the run's first checkpoint and its last.
        kills: inside an experience; it may end before the last of them, not before the first.
    """
    counts, out, torn = Kills(), folder.with_suffix(".txt"), set()
    while counts.inside < kills:
        child = _lives_on(words, folder, out)
        if _moment(child, folder, draws, training, out):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            torn |= {p.stat().st_mtime_ns for p in folder.glob(f"{checkpoint.LAST}.part")}
            counts.torn = len(torn)
            where = _reached(folder)
            setattr(counts, where, getattr(counts, where) + 1)
        elif counts.inside:
            return counts
        else:
            shutil.rmtree(folder)  # over before such a kill: again
    code = code_of(_lives_on(words, folder, out), 300)
    assert code == 0, out.read_text()
    return counts


def _lives_on(words: Sequence[str], folder: Path, out: Path) -> int:
    if (folder / checkpoint.LAST).exists():
        return trains([f"resume={folder}", "progress=false"], out)
    shutil.rmtree(folder, ignore_errors=True)
    return trains([*words, f"hydra.run.dir={folder}"], out)


def _moment(child: int, folder: Path, draws: random.Random, training: float, out: Path) -> bool:
    """Wait for a random moment of training, or every fifth time of start-up; False if the life ends well before."""
    last, early = folder / checkpoint.LAST, draws.random() < 0.2

    def written() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    before = written()
    while not early and written() == before:
        if _over(child, out):
            return False
        time.sleep(0.002)
    end = time.monotonic() + draws.uniform(0, 2 if early else training)
    while time.monotonic() < end:
        if _over(child, out):
            return False
        time.sleep(0.002)
    return True


def _over(child: int, out: Path) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    assert not done or status == 0, out.read_text()
    return bool(done)


def _reached(folder: Path) -> str:
    if not (folder / checkpoint.LAST).exists():
        return "early"
    state = checkpoint.load(folder / checkpoint.LAST)
    return "over" if state["complete"] else "inside" if state["step"] else "between"


def stopped(words: Sequence[str], folder: Path, draws: random.Random, training: float) -> tuple[int, bool]:
    """Train in a folder until a signal comes at a random moment, then do what was said.

    Returns the exit code, 0 if the run was over before, and whether there is a finished run now.
    """
    number, out = draws.choice(list(CODES)), folder.with_suffix(".txt")
    child = trains([*words, f"hydra.run.dir={folder}"], out)
    if not _moment(child, folder, draws, training, out):
        return 0, True
    os.kill(child, number)
    code, said = code_of(child), out.read_text().splitlines()
    if code == 0:
        return 0, True
    assert code == CODES[number], said
    assert said[-1].startswith("clplat: stopped"), said
    assert not any("Traceback" in line for line in said), said
    if "To go on" not in said[-1]:
        assert not list(folder.rglob("config.yaml"))
        return code, False
    more = said[-1].partition(" train ")[2].split()
    assert code_of(trains([*more, "progress=false"], out)) == 0, out.read_text()
    return code, True
