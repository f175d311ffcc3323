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
    assert keys[:2] == ["accuracy/average", "forgetting/average"]
    assert keys[3:] == [f"accuracy/split_digits/experience_{j:02d}" for j in range(3)]
    titles = [chart["displayName"] for chart in state["compareRunCharts"]]
    assert titles == [
        "average accuracy",
        "forgetting",
        "average accuracy, at last",
        *(f"experience {j}" for j in range(3)),
    ]
    assert {chart.get("selectedXAxisMetricKey") for chart in state["compareRunCharts"]} == {"experiences learned", None}
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "line"}]
    assert [column.partition(".")[2] for column in state["selectedColumns"][:3]] == [
        "`accuracy/average`", "`forgetting/average`", "`seed`",
    ]  # fmt: skip
    assert state["compareRunCharts"][0]["range"] == {"yMin": 0.0, "yMax": 1.02}
    tracker = logged(2)
    assert view(tracker)[0] == first
    client(tracker).set_experiment_tag(tracker.experiment_id, "mlflow.note.content", "mine " + tracker.charts_url())
    _, state = view(logged(12, "bits_per_token"))
    keys = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert "accuracy/split_digits/experience_02" in keys
    assert "bits_per_token/split_digits/experience_11" in keys
    tags = client(tracker).get_experiment(tracker.experiment_id).tags
    assert tags["mlflow.note.content"].startswith("mine ")


@pytest.mark.parametrize(("experiences", "streams"), [(100, 1), (5000, 1), (1000, 3), (20, 200)])
def test_the_tags_of_an_experiment_hold_any_number_of_experiences(experiences, streams):
    draw = random.Random(0)
    every = {f"stream {s}": {str(j): f"{draw.getrandbits(60):x}" for j in range(experiences)} for s in range(streams)}
    scores = {"accuracy": charts_view.Shown(True, every)}
    assert len(charts._packed(scores)) <= EXPERIMENT_TAG
    tag = charts_view.fitting_view("Forgetting curves", scores, 0)
    assert len(tag) <= EXPERIMENT_TAG
    keys = [chart["metricKey"] for chart in charts_view.decode_view(tag)["compareRunCharts"]]
    assert keys[:2] == ["accuracy/average", "forgetting/average"]
    if streams == 1:
        assert keys[3] == "accuracy/stream 0/experience_00"
        assert keys[-1] == f"accuracy/stream 0/experience_{experiences - 1}"
