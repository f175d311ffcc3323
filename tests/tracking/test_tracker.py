"""The tracker against real MLflow stores: nothing lost, nothing twice, nothing that makes training wait."""

import json
import logging
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from clplat.metrics import ScoreTable
from clplat.tracking import tracker as tracking
from clplat.tracking import view as charts_view
from clplat.tracking.outbox import SPILL, Outbox
from clplat.tracking.tracker import DataInput, Tracker, TrackingError
from clplat.train import Names

NAMES = Names(stream="split_digits", learner="lstm", strategy="ewc", sweep="sweep-1")
PARAMS = {"seed": 3, "strategy": {"ewc": {"strength": 100.0, "mode": None}}, "stream": {"classes": [0, 1]}}


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One SQLite store for the tests that need no fresh one: creating it takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlruns.db"
    tracking.open_store(uri)
    return uri


def started(tmp_path: Path, uri: str, run_id: str | None = None, **options) -> Tracker:
    tracker = Tracker(tmp_path / "run", uri=uri, every=0.05, **options)
    tracker.start(NAMES, PARAMS, run_id=run_id)
    return tracker


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.experiment.get_metric_history(tracker.run_id, key))


def run_of(tracker: Tracker):
    return tracker.experiment.get_run(tracker.run_id)


def table(score: str = "accuracy", rows: int = 3, higher: bool = True) -> ScoreTable:
    scores = ScoreTable(3, score, higher)
    scores.append([0.1, 0.2, 0.3], -1, 0)
    for i, row in enumerate([[0.9, 0.2, 0.1], [0.5, 0.8, 0.1], [0.4, 0.6, 0.7]][:rows]):
        scores.append(row, i, 10 * (i + 1))
    return scores


def test_a_run_from_start_to_end(tmp_path, store):
    tracker = started(tmp_path, store)
    assert run_of(tracker).info.status == "RUNNING"
    for step in range(2500):  # more than two batches
        tracker.log({"train/loss": 1 / (step + 1)}, step)
    seen = table()
    for rows in (1, 2, 3):
        tracker.log_results(table(rows=rows), table(rows=rows))
    tracker.finish(table(), seen)
    assert tracker.close() == 0
    assert tracker.close() == 0

    run = run_of(tracker)
    assert run.info.status == "FINISHED"
    assert history(tracker, "train/loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert history(tracker, "accuracy/average") == [
        (n, pytest.approx(v)) for n, v in [(1, 0.9), (2, 0.65), (3, 1.7 / 3)]
    ]
    assert history(tracker, "accuracy/experience_01") == [(2, 0.8), (3, 0.6)]
    assert history(tracker, "forgetting/average") == [(2, pytest.approx(0.4)), (3, pytest.approx(0.35))]
    assert len(history(tracker, "accuracy_seen/average")) == 3
    assert run.data.metrics["summary/backward_transfer"] == pytest.approx(-0.35)
    assert not any("minimum" in key for key in run.data.metrics), "an undefined metric was logged"

    assert run.data.params | {"strategy.ewc.mode": "None", "stream.classes": "[0, 1]"} == run.data.params
    assert {k: run.data.params[k] for k in ("seed", "strategy.name", "stream.name", "strategy.ewc.strength")} == {
        "seed": "3", "strategy.name": "ewc", "stream.name": "split_digits", "strategy.ewc.strength": "100.0",
    }  # fmt: skip
    assert run.data.tags["sweep"] == "sweep-1"
    assert run.data.tags["mlflow.runColor"] == tracking.run_color("ewc")
    assert "| forgetting | 0.3500 |" in run.data.tags["mlflow.note.content"]

    names = {a.path for a in tracker.experiment.list_artifacts(tracker.run_id)}
    assert names == {
        "code.json", "config.yaml", "curves.png", "environment.txt", "figures.html", "matrix.png", "results.npz",
        "results_table.json",
    }  # fmt: skip
    saved = np.load(tracker.experiment.download_artifacts(tracker.run_id, "results.npz", str(tmp_path)))
    assert np.array_equal(saved["R"], table().R.numpy())
    assert np.array_equal(saved["seen_rows"], seen.rows.numpy())
    assert "torch==" in (tmp_path / "run" / "environment.txt").read_text()
    assert not (tmp_path / "run" / SPILL).exists()


def test_a_loss_is_logged_under_its_own_name(tmp_path, store):
    tracker = started(tmp_path, store)
    tracker.log_results(table("bits_per_token", higher=False), table("bits_per_token", higher=False))
    tracker.close()
    metrics = run_of(tracker).data.metrics
    assert metrics["bits_per_token/average"] == pytest.approx(1.7 / 3)
    assert metrics["forgetting/average"] == pytest.approx((-0.1 + 0.4) / 2)
    assert "bits_per_token/experience_00" in metrics
    assert not any(key.startswith("accuracy") for key in metrics)


def test_a_resumed_run_logs_nothing_twice(tmp_path, store):
    first = started(tmp_path, store)
    for step in range(10):
        first.log({"train/loss": step / 7}, step)
    first.close("KILLED")
    assert run_of(first).info.status == "KILLED"

    second = started(tmp_path, store, run_id=first.run_id)
    assert second.run_id == first.run_id
    assert run_of(second).info.status == "RUNNING"
    for step in range(5, 15):  # the checkpoint was from step 5
        second.log({"train/loss": step / 7, "train/new": 1.0}, step)
    second.close()
    assert history(second, "train/loss") == [(step, step / 7) for step in range(15)]
    assert [step for step, _ in history(second, "train/new")] == list(range(5, 15))
    assert run_of(second).info.status == "FINISHED"


def test_what_a_killed_run_persisted_is_in_the_resumed_one(tmp_path, store):
    code = f"""
import os
from clplat.tracking.tracker import Tracker
from clplat.train import Names
tracker = Tracker({str(tmp_path / "run")!r}, uri={store!r}, every=60.0)
print(tracker.start(Names("s", "l", "ewc"), {{"seed": 0}}), flush=True)
for step in range(5):
    tracker.log({{"train/loss": step / 3}}, step)
tracker.persist()
tracker.log({{"train/loss": 5 / 3}}, 5)
os._exit(9)
"""
    run_id = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    tracker = started(tmp_path, store, run_id=run_id)
    assert not (tmp_path / "run" / SPILL).exists()
    for step in range(5, 8):
        tracker.log({"train/loss": step / 3}, step)
    tracker.close()
    assert history(tracker, "train/loss") == [(step, step / 3) for step in range(8)]


def test_odd_values_and_keys_hold_nothing_up(tmp_path, store, caplog):
    tracker = started(tmp_path, store)
    tracker.log({"nan": math.nan, "inf": math.inf}, 0)
    tracker.log({"tensor": torch.tensor(2.0)}, 0)  # type: ignore[dict-item]  # anything that becomes a float will do
    tracker.log({"a[b]=c@d": 1.0, "../up//a": 2.0, "k" * 300: 3.0, "": 4.0}, 0)
    tracker.log({"text": "high", "none": None}, 0)  # type: ignore[dict-item]  # on purpose
    tracker.log_metrics({"epoch": 1, "val/x": 5.0}, 0)
    assert tracker.close() == 0
    metrics = run_of(tracker).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] > 1e300
    assert {metrics[k] for k in ("tensor", "a_b__c_d", "_/up/a", "k" * 250, "_", "val/x")} == {1, 2, 3, 4, 5}
    assert not {"text", "none", "epoch"} & metrics.keys()
    assert "text = 'high' is not a number" in caplog.text


def test_a_refused_value_does_not_take_its_batch_with_it(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "metric_key", lambda name: name)
    tracker = started(tmp_path, store)
    tracker.log({f"train/{i}": 1.0 for i in range(20)} | {"train/[x]": 1.0} | {f"val/{i}": 1.0 for i in range(20)}, 0)
    assert tracker.close(timeout=0.5) == 1
    assert len(run_of(tracker).data.metrics) == 40
    assert run_of(tracker).info.status == "FINISHED"
    assert "MLflow refused train/[x]" in caplog.text
    assert json.loads((tmp_path / "run" / SPILL).read_text())["key"] == "train/[x]"


def test_params_of_any_length_and_number(tmp_path, store):
    tracker = Tracker(tmp_path / "run", uri=store)
    tracker.start(NAMES, {"seed": 0, "long": "x" * 7000, "many": {f"k{i}": i for i in range(250)}, "a[0]": 1, "e": {}})
    tracker.log_hyperparams({"long": "other", "hidden": 128})
    tracker.close()
    params = run_of(tracker).data.params
    assert len(params["long"]) == 6000
    assert params["long"].endswith("...")
    assert params["many.k249"] == "249"
    assert (params["a_0_"], params["e"], params["hidden"]) == ("1", "{}", "128")


def test_inputs_and_the_model_on_request(tmp_path, store):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(b"weights")
    for wanted in (False, True):
        tracker = started(tmp_path, store, log_model=wanted)
        tracker.log_inputs([DataInput("digits", "abc123", "file.gz", 1797)])
        tracker.log_checkpoint(checkpoint)
        tracker.close()
        (data,) = run_of(tracker).inputs.dataset_inputs
        assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == ("digits", "abc123", "train")
        assert json.loads(data.dataset.profile) == {"num_rows": 1797}
        found = {a.path for a in tracker.experiment.list_artifacts(tracker.run_id, "model")}
        assert found == ({"model/last.ckpt"} if wanted else set())


def test_a_stream_is_shown_as_data_for_training_and_for_test(tmp_path, store):
    from clplat.streams.data import Examples
    from clplat.streams.experience import Batch, Experience, Stream

    class Digits(Examples):
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def batch(self, index):
            return Batch(torch.zeros(len(index), 2), torch.zeros(len(index)))

    two = tuple(Experience(i, f"digits {i}", (i,), Digits(10), Digits(3)) for i in range(2))
    tracker = Tracker(tmp_path / "run", uri=store)
    tracker.start(NAMES, PARAMS, Stream("digits", two, "class_incremental", "class", 2, features=2))
    tracker.close()
    found = {d.tags[0].value: json.loads(d.dataset.profile) for d in run_of(tracker).inputs.dataset_inputs}
    assert found == {"train": {"num_rows": 20}, "test": {"num_rows": 6}}
    assert json.loads((tmp_path / "run" / "code.json").read_text())["command"] == sys.argv


def test_the_charts_view_is_written_once_and_grows(tmp_path, store):
    def view(tracker: Tracker) -> tuple[str, dict]:
        tags = tracker.experiment.get_experiment(tracker.experiment_id).tags
        assert tracker.charts_url("").endswith("viewStateShareKey=clplat")
        assert charts_view.charts_url("", tracker.experiment_id) in tags["mlflow.note.content"]
        return tags[charts_view.VIEW_TAG], charts_view.decode_view(tags[charts_view.VIEW_TAG])

    def logged(experiences: int, score: str = "accuracy") -> Tracker:
        tracker = started(tmp_path, store, experiment="views")
        scores = ScoreTable(experiences, score, score == "accuracy")
        scores.append([0.5] * experiences, 0, 1)
        tracker.log_results(scores)
        tracker.close()
        return tracker

    first, state = view(logged(3))
    keys = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert keys[:2] == ["accuracy/average", "forgetting/average"]
    assert keys[3:] == [f"accuracy/experience_{j:02d}" for j in range(3)]
    assert state["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "strategy.name"}]
    assert state["compareRunCharts"][0]["range"] == {"yMin": 0.0, "yMax": 1.02}
    tracker = logged(2)
    assert view(tracker)[0] == first
    tracker.experiment.set_experiment_tag(tracker.experiment_id, "mlflow.note.content", "mine " + tracker.charts_url())
    _, state = view(logged(12, "bits_per_token"))
    keys = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert "accuracy/experience_02" in keys
    assert "bits_per_token/experience_11" in keys
    tags = tracker.experiment.get_experiment(tracker.experiment_id).tags
    assert tags["mlflow.note.content"].startswith("mine ")


def test_a_view_of_a_hundred_experiences_fits_into_a_tag():
    tag = charts_view.encode_view("Forgetting curves", charts_view.view_state({"accuracy": (100, True)}), 0)
    assert len(tag) < 5000


def test_it_is_a_lightning_logger(tmp_path, store):
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

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

    tracker = started(tmp_path, store)
    assert isinstance(tracker, Logger)
    assert {name for name in vars(Logger) | vars(Logger.__mro__[1]) if not name.startswith("_")} <= set(dir(tracker))
    options = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        logger=tracker, max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", **options
    )  # with its checkpoint callback
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]  # a tensor is a data set
    trainer.fit(Probe(), data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Probe(), data)
    assert run_of(tracker).info.status == "RUNNING"
    tracker.close()
    assert [step for step, _ in history(tracker, "probe/loss")] == list(range(8))
    assert run_of(tracker).data.params["hidden"] == "7"


def test_a_rank_other_than_zero_logs_nothing(tmp_path, monkeypatch):
    from pytorch_lightning.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = Tracker(tmp_path / "run", uri="http://127.0.0.1:1")
    assert tracker.start(NAMES, PARAMS) == ""
    tracker.log({"a": 1.0}, 0)
    tracker.log_results(table(rows=1))
    tracker.finish(table())
    tracker.persist()
    assert tracker.close() == 0
    assert not (tmp_path / "run").exists()


def test_four_processes_open_a_fresh_store_at_once(tmp_path):
    code = f"""
import sys
import mlflow
from clplat.tracking.tracker import MlflowRun, _experiment_id, open_store
print("ready", flush=True)
sys.stdin.readline()
uri = "sqlite:///{tmp_path}/mlruns.db"
client = open_store(uri)
run = client.create_run(_experiment_id(client, "clplat", uri))
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
    client = tracking.open_store(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "clplat"]
    assert [run.data.metrics for run in client.search_runs([experiment.experiment_id])] == [{"a": 1.0}] * 4
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_is_said_at_once(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = Tracker(tmp_path, uri=uri)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r"does not answer .* Start it .* or unset it") as caught:
        tracker.start(NAMES, PARAMS)
    assert time.monotonic() - begun < 5
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_stuck_is_said_soon(tmp_path):
    with socket.socket() as stuck:
        stuck.bind(("127.0.0.1", 0))
        stuck.listen()
        tracker = Tracker(tmp_path, uri=f"http://127.0.0.1:{stuck.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(TrackingError, match="timed out"):
            tracker.start(NAMES, PARAMS)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("uri", ["sqlite:///{}/file/mlruns.db", "nonsense://x", "./mlruns"])
def test_a_store_that_cannot_be_used_is_one_line(tmp_path, uri):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TrackingError, match=r"Cannot use the MLflow store .* Give another one") as caught:
        Tracker(tmp_path / "run", uri=uri.format(tmp_path)).start(NAMES, PARAMS)
    assert "\n" not in str(caught.value)


def test_the_ui_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(TrackingError, match=r"no store at .*mlruns\.db"):
        tracking.ui(f"sqlite:///{tmp_path}/mlruns.db", free_port())
    (tmp_path / "mlruns.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackingError, match="is taken"):
            tracking.ui(f"sqlite:///{tmp_path}/mlruns.db", taken.getsockname()[1])


class Server:
    """A real MLflow server on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self.port}"
        tracking.open_store(f"sqlite:///{folder}/server.db")

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
    tracker.finish(table())
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
    assert "curves.png" in {a.path for a in tracker.experiment.list_artifacts(tracker.run_id)}
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
        tracking.sync(tmp_path / "run")
    server.start()
    assert tracking.sync(tmp_path / "run") == left
    assert tracking.sync(tmp_path / "run") == 0
    assert history(tracker, "train/loss") == [(step, float(step)) for step in range(1500)]
    assert run_of(tracker).info.status == "FAILED"
    assert run_of(tracker).data.tags["late"] == "yes"
    assert [a.path for a in tracker.experiment.list_artifacts(tracker.run_id, "late")] == ["late/curves.png"]


class Flaky:
    """A store that fails at random, half of the times after it had taken the request."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        self.values: list = []
        self.jobs: list = []

    def _maybe_fail(self) -> None:
        if self.draw.random() < 0.4:
            raise ConnectionError("away")

    def send_values(self, values):
        self._maybe_fail()
        self.values += [value for value in values if value not in self.values]  # as MLflow does
        self._maybe_fail()
        return []

    def steps(self, key):
        self._maybe_fail()
        return set()

    def do(self, job):
        self._maybe_fail()
        self.jobs.append(job)


def test_the_outbox_delivers_through_any_failure(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    box, store = Outbox({"uri": "flaky", "run_id": "1"}, tmp_path, every=0.001), Flaky()
    box.start(store)
    expected = [("key", float(i), i, i) for i in range(3000)]
    for value in expected:
        box.values.append(value)
        if value[2] % 300 == 0:
            box.jobs.append({"kind": "tag", "key": value[2]})
            time.sleep(0.01)
    assert box.close(timeout=20) == 0
    assert sorted(store.values) == expected
    assert sorted({job["key"] for job in store.jobs}) == list(range(0, 3000, 300))
    assert not (tmp_path / SPILL).exists()


def test_logging_a_value_costs_microseconds(tmp_path):
    tracker = Tracker(tmp_path / "run", uri="sqlite:///unused.db")
    values = {f"train/{i}": 0.5 for i in range(5)}
    costs = []
    for _ in range(5):
        begun = time.perf_counter()
        for step in range(1000):
            tracker.log(values, step)
        costs.append((time.perf_counter() - begun) / 5000)
    assert min(costs) < 10e-6


def test_colors_and_keys_are_fixed():
    assert tracking.run_color("ewc") == tracking.run_color("ewc")
    shipped = ["finetune", "joint", "cumulative", "ewc", "si", "lwf", "replay", "der", "agem", "remind", "refresh"]
    assert len({tracking.run_color(name) for name in shipped}) == len(shipped)
    assert tracking.flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}


def test_nothing_heavy_is_imported_by_the_module():
    code = "import sys, clplat.tracking.tracker; print([m for m in ('torch', 'mlflow', 'pytorch_lightning', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
