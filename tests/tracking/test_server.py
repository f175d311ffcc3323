"""A tracking server that goes away, and the one that `clplat ui` starts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tracked import client, finish, free_port, history, results, run_of, started

from clplat.tracking.base import TrackingError
from clplat.tracking.mlflow_run import sync
from clplat.tracking.outbox import SPILL
from clplat.tracking.server import ui
from clplat.tracking.store import open_store


def test_the_ui_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(TrackingError, match=r"no store at .*mlruns\.db"):
        ui(f"sqlite:///{tmp_path}/mlruns.db", free_port())
    (tmp_path / "mlruns.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackingError, match="is taken"):
            ui(f"sqlite:///{tmp_path}/mlruns.db", taken.getsockname()[1])


class Server:
    """A real MLflow server on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self.port}"
        open_store(f"sqlite:///{folder}/server.db")

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = f"{sys.executable} -m mlflow server --workers 1 --host 127.0.0.1 --port {self.port}".split()
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=quiet, stderr=quiet)
        for _ in range(150):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the MLflow server did not start")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.mark.slow
def test_a_server_that_goes_away_costs_nothing(server, tmp_path, caplog):
    tracker = started(tmp_path, server.uri)
    durations: list[float] = []
    steps = 0

    def train(seconds: float) -> None:
        nonlocal steps
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.perf_counter()
            tracker.log({"train/loss": float(steps), "train/other": -float(steps)}, steps)
            durations.append(time.perf_counter() - begun)
            steps += 1
            time.sleep(0.002)

    train(0.5)
    server.kill()
    train(1.5)
    finish(tracker, results())
    assert len((tmp_path / "run" / SPILL).read_text().splitlines()) > 10, "a crash now would lose what waits"
    server.start()
    train(1.0)
    assert tracker.close(timeout=30) == 0
    durations.sort()
    assert durations[-1 - len(durations) // 100] < 0.05, "log() waits"
    assert durations[-1] < 1, "log() waits"  # on a busy machine, single calls may lose the processor
    assert history(tracker, "train/loss") == [(step, float(step)) for step in range(steps)]
    assert len(history(tracker, "train/other")) == steps
    assert run_of(tracker).info.status == "FINISHED"
    assert "curves.png" in {a.path for a in client(tracker).list_artifacts(tracker.run_id)}
    assert not (tmp_path / "run" / SPILL).exists()
    assert "is away" in caplog.text
    assert "is back" in caplog.text

    # Gone for good: what is left is kept, said, and sent later.
    caplog.clear()
    tracker = started(tmp_path, server.uri)
    tracker.log({"train/loss": 0.0}, 0)
    time.sleep(0.5)
    server.kill()
    for step in range(1, 1500):
        tracker.log({"train/loss": float(step)}, step)
    tracker.log_artifact(tmp_path / "run" / "curves.png", "late")
    tracker.set_tag("late", "yes")
    begun = time.monotonic()
    left = tracker.close("FAILED", timeout=1)
    assert time.monotonic() - begun < 10
    assert left >= 1499 + 3
    assert "kept in" in caplog.text
    assert f"clplat sync {tmp_path / 'run'}" in caplog.text
    spilled = [json.loads(line) for line in (tmp_path / "run" / SPILL).read_text().splitlines()]
    assert any(line.get("path") == "curves.png" for line in spilled)
    with pytest.raises(TrackingError, match="does not answer"):
        sync(tmp_path / "run")
    server.start()
    assert sync(tmp_path / "run") == left
    assert sync(tmp_path / "run") == 0
    assert history(tracker, "train/loss") == [(step, float(step)) for step in range(1500)]
    assert run_of(tracker).info.status == "FAILED"
    assert run_of(tracker).data.tags["late"] == "yes"
    assert [a.path for a in client(tracker).list_artifacts(tracker.run_id, "late")] == ["late/curves.png"]


def test_nothing_heavy_is_imported_by_the_commands():
    code = """
import sys, clplat.tracking.server, clplat.tracking.mlflow_run
print([m for m in ("torch", "mlflow", "pytorch_lightning", "numpy") if m in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
