"""Lives of a real `clplat train`: forked with everything imported, ended by a signal, gone on with; and what is left.

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
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    with contextlib.suppress(BaseException), out.open("w") as file:
        for number in CODES:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        warnings.resetwarnings()  # a process of its own has none of the test's filters
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        os._exit(work())
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
    """Train in a folder without a signal; returns the seconds that it took."""
    began, out = time.monotonic(), folder.with_suffix(".txt")
    code = code_of(trains([*words, f"hydra.run.dir={folder}"], out), seconds)
    assert code == 0, out.read_text()
    return time.monotonic() - began


@dataclass
class Kills:
    """Counts of SIGKILLs.

    Attributes:
        trained: that hit a run with a checkpoint, in training, in its report or while it was taken up.
        early: that hit one without, which was begun anew.
        torn: of all, those that left a half-written checkpoint.
    """

    trained: int = 0
    early: int = 0
    torn: int = 0


def killed(words: Sequence[str], folder: Path, draws: random.Random, length: float, kills: int) -> Kills:
    """Train in a folder; kill at random moments as often as asked for, resuming after each, then train to the end.

    Args:
        words: of the command.
        folder: of the run, absent or empty.
        draws: the moments.
        length: seconds that the run takes when it is left alone.
        kills: of a run with a checkpoint; it may end before the last of them, not before the first.
    """
    counts, out, torn = Kills(), folder.with_suffix(".txt"), set()
    while counts.trained < kills:
        if not _killed(_lives_on(words, folder, out), draws.uniform(0, length), out):
            if counts.trained:
                return counts
            shutil.rmtree(folder)  # over before its first kill, which says nothing: again
            continue
        torn |= {p.stat().st_mtime_ns for p in folder.glob(f"{checkpoint.LAST}.part")}
        counts.torn = len(torn)
        if (folder / checkpoint.LAST).exists():
            counts.trained += 1
        else:
            counts.early += 1
    code = code_of(_lives_on(words, folder, out), 300)
    assert code == 0, out.read_text()
    return counts


def _lives_on(words: Sequence[str], folder: Path, out: Path) -> int:
    if (folder / checkpoint.LAST).exists():
        return trains([f"resume={folder}", "progress=false"], out)
    shutil.rmtree(folder, ignore_errors=True)
    return trains([*words, f"hydra.run.dir={folder}"], out)


def _killed(child: int, seconds: float, out: Path) -> bool:
    """Kill a child after some time, unless it ends well before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, out.read_text()
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def stopped(words: Sequence[str], folder: Path, draws: random.Random, length: float) -> tuple[int, bool]:
    """Train in a folder until a signal comes at a random moment, then do what was said.

    Returns the exit code, 0 if the run was over before, and whether there is a finished run now.
    """
    number, out = draws.choice(list(CODES)), folder.with_suffix(".txt")
    child = trains([*words, f"hydra.run.dir={folder}"], out)
    time.sleep(draws.uniform(0.0, length))
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


def assert_same(whole: Path, cut: Path) -> None:
    """All that two runs left is the same, bit for bit, apart from addresses, identifiers and times.

    It is looked at in a child: a process that has an SQLite store open should not be forked.
    """
    out = cut.with_suffix(".unlike")
    assert code_of(forked(lambda: _say_unlike(whole, cut), out)) == 0, out.read_text()


def _say_unlike(whole: Path, cut: Path) -> int:
    found = list(unlike(left(whole), left(cut)))
    print("\n".join(found))
    return int(bool(found))


def left(folder: Path) -> dict[str, Any]:
    """What a finished run left in its folder and in its tracking store."""
    state = checkpoint.load(folder / checkpoint.LAST)
    assert state["complete"]
    config, run_id = state["notes"]["config"], state["notes"].pop("run_id")
    config.pop("resume")
    found: dict[str, Any] = {"names": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))}
    found |= {"checkpoint": state, "files": _contents(folder)}
    return found | ({"store": _stored(config["tracking"]["uri"], run_id)} if run_id else {})


def _contents(folder: Path) -> dict[str, Any]:
    """Arrays and bytes of a run's files, but for those that tell where and how it was run."""
    own = (checkpoint.LAST, checkpoint.PREVIOUS, "code.json", "config.yaml", "where.txt")
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in own]
    return {p.name: dict(np.load(p)) if p.suffix == ".npz" else p.read_bytes() for p in paths}


def _stored(uri: str, run_id: str) -> dict[str, Any]:
    """What MLflow has of a run: of times only how many there are, of tags only which.

    The tag of the charts' lines is left out: of two runs that are the same, only the newer one has it.
    """
    from clplat.tracking.store import open_store

    client = open_store(uri)
    run = client.get_run(run_id)
    histories = {k: sorted((m.step, m.value) for m in client.get_metric_history(run_id, k)) for k in run.data.metrics}
    return {
        "status": run.info.status,
        "metrics": {k: len(v) if k.endswith("_seconds") else v for k, v in histories.items()},
        "params": {k: v for k, v in run.data.params.items() if k != "resume"},
        "tags": sorted(run.data.tags.keys() - {"line"}),
        "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
        "artifacts": sorted(a.path for a in client.list_artifacts(run_id)),
    }


def unlike(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths at which two nested values are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{path}/{key} is in one only" for key in a.keys() ^ b.keys())
        for key in a.keys() & b.keys():
            yield from unlike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from unlike(one, other, f"{path}/{i}")
    elif _bits(a) != _bits(b):
        yield f"{path}: {str(a)[:80]} -> {str(b)[:80]}"


def _bits(value: Any) -> tuple[Any, ...]:
    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value), repr(value)
