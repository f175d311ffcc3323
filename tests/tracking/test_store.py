"""The store: found where the user says, usable by several processes at once, refused in one line."""

import socket
import sqlite3
import subprocess
import sys
import time

import pytest
from tracked import NAMES, PARAMS, free_port

from clplat.tracking.base import TrackingError
from clplat.tracking.store import check_server, open_store
from clplat.tracking.tracker import Tracker


@pytest.mark.slow
def test_four_processes_open_a_fresh_store_at_once(tmp_path):
    code = f"""
import sys
import mlflow
from clplat.tracking.mlflow_run import MlflowRun
from clplat.tracking.store import open_experiment, open_store
print("ready", flush=True)
sys.stdin.readline()
uri = "sqlite:///{tmp_path}/mlruns.db"
client = open_store(uri)
run = client.create_run(open_experiment(client, "clplat", uri))
MlflowRun(client, run.info.run_id, None).send_values([("a", 1.0, 0, 0)])
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    assert [worker.wait(60) for worker in workers] == [0] * 4
    opened = open_store(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = [e for e in opened.search_experiments() if e.name == "clplat"]
    assert [run.data.metrics for run in opened.search_runs([experiment.experiment_id])] == [{"a": 1.0}] * 4
    connection = sqlite3.connect(tmp_path / "mlruns.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_the_store_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Tracker("run").uri == f"sqlite:///{tmp_path}/mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert Tracker("run").uri == f"sqlite:///{tmp_path}/other.db"
    assert Tracker("run", uri="http://host:5000").uri == "http://host:5000"


def test_a_server_that_is_down_is_said_at_once(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = Tracker(tmp_path, uri=uri)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r"does not answer .* Start it .* or unset it") as caught:
        tracker.start(NAMES, PARAMS)
    assert time.monotonic() - begun < 5
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_stuck_is_said_soon():
    with socket.socket() as stuck:
        stuck.bind(("127.0.0.1", 0))
        stuck.listen()
        with pytest.raises(TrackingError, match="timed out"):
            check_server(f"http://127.0.0.1:{stuck.getsockname()[1]}", timeout=0.2)


@pytest.mark.parametrize("uri", ["sqlite:///{}/file/mlruns.db", "nonsense://x", "./mlruns"])
def test_a_store_that_cannot_be_used_is_one_line(tmp_path, uri):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TrackingError, match=r"Cannot use the MLflow store .* Give another one") as caught:
        Tracker(tmp_path / "run", uri=uri.format(tmp_path)).start(NAMES, PARAMS)
    assert "\n" not in str(caught.value)
