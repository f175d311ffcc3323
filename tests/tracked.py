"""Runs in a real MLflow store, for the tests of tracking."""

from __future__ import annotations

import socket
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from clplat.report import folder as report
from clplat.report.summary import Names, summarise
from clplat.scores import Results
from clplat.tracking.store import open_store
from clplat.tracking.tracker import Tracker

STORES = tempfile.TemporaryDirectory(prefix="clplat-store-")
NAMES = Names(stream="split_digits", learner="lstm", strategy="ewc", sweep="sweep-1")
PARAMS = {"seed": 3, "strategy": {"ewc": {"strength": 100.0, "mode": None}}, "stream": {"classes": [0, 1]}}


@cache
def shared_store() -> str:
    """Address of one SQLite store for all tests that need no fresh one: creating it takes seconds."""
    uri = f"sqlite:///{STORES.name}/mlruns.db"
    open_store(uri)
    return uri


def started(tmp_path: Path, uri: str, run_id: str | None = None, every: float = 0.05, **options: Any) -> Tracker:
    """A tracker of a run that has begun."""
    (tmp_path / "run").mkdir(exist_ok=True)
    report.begin(tmp_path / "run", "seed: 3\n")
    tracker = Tracker(tmp_path / "run", uri=uri, every=every, **options)
    tracker.start(NAMES, PARAMS, run_id=run_id)
    return tracker


def finish(tracker: Tracker, found: Results) -> None:
    """Write the folder's files and let the tracker upload them."""
    summary = summarise(NAMES, 3, found)
    report.finish(tracker.folder, summary, found, ["zero", "one", "two"], tracker.where())
    tracker.finish(summary.metrics, found.all.finished)


def client(tracker: Tracker) -> MlflowClient:
    """The client of a tracker that was started."""
    assert tracker.client is not None
    return tracker.client


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    """Step and value of everything logged under a key, in the order of steps."""
    return sorted((m.step, m.value) for m in client(tracker).get_metric_history(tracker.run_id, key))


def run_of(tracker: Tracker) -> Any:
    """MLflow's record of the run."""
    return client(tracker).get_run(tracker.run_id)


def results(score: str = "accuracy", rows: int = 3, higher: bool = True) -> Results:
    """Scores of three experiences, of which `rows` are trained, the same with unseen classes masked."""
    found = Results.empty(3, score, higher)
    found.append([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], -1, 0)
    for i, row in enumerate([[0.9, 0.2, 0.1], [0.5, 0.8, 0.1], [0.4, 0.6, 0.7]][:rows]):
        found.append(row, row, i, 10 * (i + 1))
    return found


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
