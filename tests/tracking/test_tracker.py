"""The tracker against a real MLflow store: nothing lost, nothing twice."""

import atexit
import json
import math

import numpy as np
import pytest
import torch
from tracked import NAMES, PARAMS, client, finish, history, results, run_of, started

from clplat.tracking import mlflow_run
from clplat.tracking.about import DataInput
from clplat.tracking.lines import PALETTE
from clplat.tracking.outbox import SPILL
from clplat.tracking.tracker import Tracker


def test_a_run_from_start_to_end(tmp_path, store):
    tracker = started(tmp_path, store)
    assert run_of(tracker).info.status == "RUNNING"
    for step in range(2500):  # more than two batches
        tracker.log({"train/loss": 1 / (step + 1)}, step)
    for rows in (1, 2, 3):
        tracker.log_results(results(rows=rows))
    finish(tracker, results())
    assert tracker.close() == 0
    assert tracker.close() == 0

    run = run_of(tracker)
    assert run.info.status == "FINISHED"
    assert history(tracker, "train/loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert history(tracker, "average accuracy") == [
        (n, pytest.approx(v)) for n, v in [(1, 0.9), (2, 0.65), (3, 1.7 / 3)]
    ]
    assert history(tracker, "experience 1 - split_digits accuracy") == [(2, 0.8), (3, 0.6)]
    assert history(tracker, "forgetting") == [(2, pytest.approx(0.4)), (3, pytest.approx(0.35))]
    assert len(history(tracker, "average accuracy - seen classes")) == 3
    assert run.data.metrics["summary/backward_transfer"] == pytest.approx(-0.35)
    assert not any("minimum" in key for key in run.data.metrics), "an undefined metric was logged"

    assert run.data.params | {"strategy.ewc.mode": "None", "stream.classes": "[0, 1]"} == run.data.params
    assert {k: run.data.params[k] for k in ("seed", "strategy.name", "stream.name", "strategy.ewc.strength")} == {
        "seed": "3", "strategy.name": "ewc", "stream.name": "split_digits", "strategy.ewc.strength": "100.0",
    }  # fmt: skip
    assert run.data.tags["sweep"] == "sweep-1"
    assert run.data.tags["mlflow.runColor"] in PALETTE
    assert run.data.tags["line"].startswith("ewc")
    assert "| forgetting | 0.3500 |" in run.data.tags["mlflow.note.content"]

    names = {a.path for a in client(tracker).list_artifacts(tracker.run_id)}
    assert names == {
        "code.json", "config.yaml", "curves.png", "environment.txt", "figures.html", "matrix.png", "result.json",
        "results.npz", "results_table.json", "table.md",
    }  # fmt: skip
    saved = np.load(client(tracker).download_artifacts(tracker.run_id, "results.npz", str(tmp_path)))
    assert np.array_equal(saved["R"], results().R.numpy())
    assert np.array_equal(saved["seen_rows"], results().seen.rows.numpy())
    assert not (tmp_path / "run" / SPILL).exists()


def test_a_loss_is_logged_under_its_own_name(tmp_path, store):
    tracker = started(tmp_path, store)
    tracker.log_results(results("bits_per_token", higher=False))
    tracker.close()
    metrics = run_of(tracker).data.metrics
    assert metrics["average bits per token"] == pytest.approx(1.7 / 3)
    assert metrics["forgetting in bits per token"] == pytest.approx((-0.1 + 0.4) / 2)
    assert "experience 0 - split_digits bits per token" in metrics
    assert not any("accuracy" in key for key in metrics)


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
    killed = started(tmp_path, store, every=60.0)
    for step in range(5):
        killed.log({"train/loss": step / 3}, step)
    killed.persist()
    killed.log({"train/loss": 5 / 3}, 5)
    atexit.unregister(killed.close)  # it is never closed: what counts is what lies on the disk by now
    assert (tmp_path / "run" / SPILL).exists()

    tracker = started(tmp_path, store, run_id=killed.run_id)
    assert not (tmp_path / "run" / SPILL).exists()
    assert [step for step, _ in history(tracker, "train/loss")] == list(range(5))
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
    assert tracker.close() == 0
    metrics = run_of(tracker).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] > 1e300
    assert {metrics[k] for k in ("tensor", "a_b__c_d", "_/up/a", "k" * 250, "_")} == {1, 2, 3, 4}
    assert not {"text", "none"} & metrics.keys()
    assert "text = 'high' is not a number" in caplog.text


def test_a_refused_value_does_not_take_its_batch_with_it(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_run, "metric_key", lambda name: name)
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
    tracker.log_params({"long": "other", "hidden": 128})
    tracker.close()
    params = run_of(tracker).data.params
    assert len(params["long"]) == 6000
    assert params["long"].endswith("...")
    assert params["many.k249"] == "249"
    assert (params["a_0_"], params["e"], params["hidden"]) == ("1", "{}", "128")


def test_inputs_and_the_model_on_request(tmp_path, store):
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run" / "last.ckpt"
    checkpoint.write_bytes(b"weights")
    for wanted in (False, True):
        tracker = started(tmp_path, store, log_model=wanted)
        tracker.log_inputs([DataInput("digits", "abc123", "file.gz", 1797)])
        tracker.log_checkpoint(checkpoint)
        tracker.close()
        (data,) = run_of(tracker).inputs.dataset_inputs
        assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == ("digits", "abc123", "train")
        assert json.loads(data.dataset.profile) == {"num_rows": 1797}
        found = {a.path for a in client(tracker).list_artifacts(tracker.run_id, "model")}
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


def test_a_rank_other_than_zero_logs_nothing(tmp_path, monkeypatch):
    from pytorch_lightning.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = Tracker(tmp_path / "run", uri="http://127.0.0.1:1")
    assert tracker.start(NAMES, PARAMS) == ""
    tracker.log({"a": 1.0}, 0)
    tracker.log_results(results(rows=1))
    tracker.finish({"average": 0.5}, 1)
    tracker.persist()
    assert tracker.close() == 0
    assert not (tmp_path / "run").exists()
