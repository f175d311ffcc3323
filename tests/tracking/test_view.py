"""The saved view of forgetting curves: written once, and grown with what an experiment holds."""

import random

import pytest
from tracked import client, started

from clplat.scores import Results
from clplat.tracking import charts
from clplat.tracking import view as charts_view
from clplat.tracking.limits import EXPERIMENT_TAG
from clplat.tracking.tracker import Tracker


def test_the_charts_view_is_written_once_and_grows(tmp_path, store):
    def view(tracker: Tracker) -> tuple[str, dict]:
        tags = client(tracker).get_experiment(tracker.experiment_id).tags
        assert tracker.charts_url("").endswith("viewStateShareKey=clplat")
        assert charts_view.charts_url("", tracker.experiment_id) in tags["mlflow.note.content"]
        return tags[charts_view.VIEW_TAG], charts_view.decode_view(tags[charts_view.VIEW_TAG])

    def logged(experiences: int, score: str = "accuracy") -> Tracker:
        tracker = started(tmp_path, store, experiment="views")
        scores = Results.empty(experiences, score, score == "accuracy")
        scores.append([0.5] * experiences, [0.5] * experiences, 0, 1)
        tracker.log_results(scores)
        tracker.close()
        return tracker

    first, state = view(logged(3))
    keys = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert keys[:2] == ["average accuracy", "forgetting"]
    assert keys[3:] == [f"experience {j} - split_digits accuracy" for j in range(3)]
    axes = {
        chart["metricKey"]: chart["selectedXAxisMetricKey"] for chart in state["compareRunCharts"] if "range" in chart
    }
    # MLflow would draw what begins later too far to the left.
    assert [key for key, axis in axes.items() if axis] == ["average accuracy"]
    assert set(axes.values()) == {"experiences learned", ""}
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "line"}]
    assert [column.partition(".")[2] for column in state["selectedColumns"][:3]] == [
        "`average accuracy`", "`forgetting`", "`seed`",
    ]  # fmt: skip
    assert state["compareRunCharts"][0]["range"] == {"yMin": 0.0, "yMax": 1.02}
    tracker = logged(2)
    assert view(tracker)[0] == first
    client(tracker).set_experiment_tag(tracker.experiment_id, "mlflow.note.content", "mine " + tracker.charts_url())
    _, state = view(logged(12, "bits_per_token"))
    keys = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert "experience 2 - split_digits accuracy" in keys
    assert "experience 11 - split_digits bits per token" in keys
    tags = client(tracker).get_experiment(tracker.experiment_id).tags
    assert tags["mlflow.note.content"].startswith("mine ")


@pytest.mark.parametrize(("experiences", "streams"), [(100, 1), (5000, 1), (1000, 3), (20, 200)])
def test_the_tags_of_an_experiment_hold_any_number_of_experiences(experiences, streams):
    draw = random.Random(0)
    names = [f"{draw.getrandbits(60):x}" for _ in range(experiences)]
    every = {f"stream {s}": charts_view.experience_keys("accuracy", f"stream {s}", names) for s in range(streams)}
    scores = {"accuracy": charts_view.Shown(True, every)}
    assert len(charts._packed(scores)) <= EXPERIMENT_TAG
    tag = charts_view.fitting_view("Forgetting curves", scores, 0)
    assert len(tag) <= EXPERIMENT_TAG
    keys = [chart["metricKey"] for chart in charts_view.decode_view(tag)["compareRunCharts"]]
    assert keys[:2] == ["average accuracy", "forgetting"]
    if streams == 1:
        assert keys[3] == f"{names[0]} - stream 0 accuracy"
        assert keys[-1] == f"{names[-1]} - stream 0 accuracy"


def test_an_experiment_of_many_streams_remembers_as_much_as_fits():
    shown = charts_view.Shown(True, {f"s{s}": [f"{s} {j} {hash(str(j))}" for j in range(100)] for s in range(50)})
    packed = charts._packed({"accuracy": shown, "mse": shown})
    assert 1000 < len(packed) <= EXPERIMENT_TAG
    known = charts._known({charts.CHARTS: packed})
    assert known["accuracy"].streams["s49"][0] == shown.streams["s49"][0]
    assert charts._known({charts.CHARTS: "not ours"}) == charts._known({}) == {}


def test_experiences_have_keys_of_their_own_that_mlflow_takes():
    keys = charts_view.experience_keys("bits_per_token", "a/b", ["de", "a[0]", "a(0)", "x" * 300, "größe"])
    assert keys[:3] == ["de - a_b bits per token", "a_0_ 1 - a_b bits per token", "a_0_ 2 - a_b bits per token"]
    assert keys[4] == "größe - a_b bits per token"
    assert all(len(key) <= 250 for key in keys)
    assert len(set(keys)) == 5
