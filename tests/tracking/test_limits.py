"""Limits of the store: known, kept, and nothing that breaks one is called an absent store."""

import json
import logging
import math

import pytest
from tracked import NAMES, run_of, started

from clplat.scores import Results
from clplat.tracking import limits
from clplat.tracking.mlflow_run import sync
from clplat.tracking.outbox import SPILL
from clplat.tracking.tracker import Tracker


def test_the_limits_are_mlflows():
    from mlflow.utils import validation

    assert (limits.KEY, limits.PARAM, limits.TAG) == (
        validation.MAX_ENTITY_KEY_LENGTH, validation.MAX_PARAM_VAL_LENGTH, validation.MAX_TAG_VAL_LENGTH,
    )  # fmt: skip
    assert (limits.EXPERIMENT_TAG, limits.EXPERIMENT_NAME) == (
        validation.MAX_EXPERIMENT_TAG_VAL_LENGTH, validation.MAX_EXPERIMENT_NAME_LENGTH,
    )  # fmt: skip
    assert (limits.DATASET_NAME, limits.DATASET_DIGEST, limits.DATASET_SOURCE) == (
        validation.MAX_DATASET_NAME_SIZE, validation.MAX_DATASET_DIGEST_SIZE, validation.MAX_DATASET_SOURCE_SIZE,
    )  # fmt: skip
    assert limits.PARAMS == validation.MAX_PARAMS_TAGS_PER_BATCH
    assert limits.REQUEST < validation.MAX_BATCH_LOG_REQUEST_SIZE


def test_params_whose_keys_become_equal_are_all_kept(tmp_path, store):
    tracker = Tracker(tmp_path / "run", uri=store, every=0.05)
    tracker.start(NAMES, {"a[0]": 1, "a(0)": 2, "k" * 250 + "x": 3, "k" * 250 + "y": 4})
    tracker.close()
    params = run_of(tracker).data.params
    assert (params["a_0_"], params["a_0__2"], params["k" * 250], params["k" * 242 + "_2"]) == ("1", "2", "3", "4")


def test_a_request_of_params_is_never_too_large():
    values = limits.params({f"k{i}": "ü" * 7000 for i in range(100)})
    parts = list(limits.batches(values))
    assert sum(map(len, parts)) == 100
    assert max(len(json.dumps(part)) for part in parts) < 1e6


def test_a_data_set_of_many_files_fits(tmp_path, store):
    tracker = started(tmp_path, store)
    from clplat.tracking.about import DataInput

    tracker.log_inputs([DataInput("x" * 600, "d" * 40, "ü" * 70_000, 3)])
    assert tracker.close() == 0
    (data,) = run_of(tracker).inputs.dataset_inputs
    assert len(data.dataset.source) <= 65_535
    assert json.loads(data.dataset.source)["source"].endswith("...")


@pytest.mark.parametrize("experiences", [1100])
def test_a_thousand_experiences_are_tracked_whole(tmp_path, store, experiences, caplog):
    tracker = started(tmp_path, store, experiment=f"long {experiences}")
    found = Results.empty(experiences)
    found.append([0.5] * experiences, [0.5] * experiences, 0, 1)
    tracker.log_results(found)
    tracker.set_tag("k" * 300, "v" * 9000)
    tracker.log({"big": 1e308, "step": 1.0}, 10**30)
    tracker.log({"huge": 10**400, "odd": math.nan}, 3)
    assert tracker.close() == 0
    assert "away" not in caplog.text
    assert run_of(tracker).info.status == "FINISHED"
    assert len([key for key in run_of(tracker).data.metrics if key.startswith("experience ")]) == 1
    assert not (tmp_path / "run" / SPILL).exists()


def test_what_is_logged_grows_with_the_number_of_experiences_and_all_curves_are_a_choice():
    def count(experiences: int, curves: int | None) -> int:
        from clplat.tracking.curves import curve_values

        found, values = Results.empty(experiences), 0
        for i in range(experiences):
            found.append([0.5] * experiences, [0.5] * experiences, i, i)
            values += len(curve_values(found, "s", [], curves))
        return values

    assert count(5, 20) == count(5, None) == 4 * 5 - 1 + 15
    assert count(100, 20) < 100 * 24
    assert count(100, None) == 4 * 100 - 1 + 5050
    assert count(30, 0) == 4 * 30 - 1


def test_a_job_that_mlflow_refuses_is_said_and_dropped(tmp_path, store, caplog):
    tracker = started(tmp_path, store)
    tracker._job("tag", key="a[b]\x00", value=3)
    tracker._job("nonsense")
    tracker._job("artifact", path="gone.txt", to=None)
    tracker.log_artifact(tmp_path / "outside.txt")
    tracker.log({"kept": 1.0}, 0)
    assert tracker.close() == 0
    assert "away" not in caplog.text
    assert "Not tracked: artifact gone.txt" in caplog.text
    assert "no such job: nonsense" in caplog.text
    assert "leads out of the run's folder" in caplog.text
    assert run_of(tracker).data.metrics["kept"] == 1.0
    assert run_of(tracker).info.status == "FINISHED"


def test_a_place_that_cannot_be_written_is_not_an_absent_store(tmp_path, store, caplog):
    tracker = started(tmp_path, store)
    place = tmp_path / "file"
    place.write_text("no folder")

    def blocked(run_id: str, path: str, to: str | None) -> None:
        raise NotADirectoryError(20, "Not a directory", str(place))

    tracker.client.log_artifact = blocked  # type: ignore[union-attr, method-assign]
    tracker.log_artifact(tmp_path / "run" / "config.yaml")
    assert tracker.close(timeout=0.1) > 0
    assert "away" not in caplog.text
    assert "config.yaml cannot be copied to" in caplog.text


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_seconds_between_sendings_are_positive(tmp_path, store, value):
    with pytest.raises(ValueError, match=r"^every: got"):
        Tracker(tmp_path, uri=store, every=value)


@pytest.mark.parametrize("name", ["", "  ", "x" * 501])
def test_the_experiments_name_is_checked(tmp_path, store, name):
    with pytest.raises(ValueError, match=r"^experiment: got"):
        Tracker(tmp_path, name, store)


def test_of_a_torn_spill_file_the_whole_lines_are_sent(tmp_path, store, caplog):
    tracker = started(tmp_path, store)
    tracker.close()
    about = {"uri": store, "run_id": tracker.run_id}
    whole = json.dumps(about | {"key": "kept", "value": 2.0, "step": 1, "time": 5})
    spill = tmp_path / "run" / SPILL
    spill.write_text(f"{whole}\n[1]\n{json.dumps(about | {'kind': 'artifact'})}\n\n{whole[:30]}")
    with caplog.at_level(logging.WARNING):
        assert sync(tmp_path / "run") == 1
    assert run_of(tracker).data.metrics["kept"] == 2.0
    assert f"{spill} is damaged in line 2, 3, 4, 5" in caplog.text
    assert not spill.exists()
    for nothing in ("", "[]", "\x00"):
        spill.write_text(nothing)
        assert sync(tmp_path / "run") == 0


def test_the_store_of_a_run_that_was_moved_is_not_made_anew(tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    line = {"uri": f"sqlite:///{tmp_path}/old/mlruns.db", "run_id": "1", "key": "a", "value": 1.0, "step": 0, "time": 0}
    (tmp_path / SPILL).write_text(json.dumps(line) + "\n")
    from clplat.tracking.base import TrackingError

    with pytest.raises(TrackingError, match=r"old/mlruns\.db, which is not there"):
        sync(tmp_path)
    with pytest.raises(TrackingError, match=r"old/mlruns\.db, which is not there"):
        Tracker(tmp_path / "run", uri=line["uri"]).start(NAMES, {}, run_id="1")  # type: ignore[arg-type]
    assert not (tmp_path / "old").exists()
    assert (tmp_path / SPILL).exists()
