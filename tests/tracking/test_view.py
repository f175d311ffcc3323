"""The saved view of forgetting curves: written once, and grown with what an experiment holds."""

from tracked import client, started

from clplat.scores import Results
from clplat.tracking import view as charts_view
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
    assert keys[3:] == [f"accuracy/experience_{j:02d}" for j in range(3)]
    assert state["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "strategy.name"}]
    assert state["compareRunCharts"][0]["range"] == {"yMin": 0.0, "yMax": 1.02}
    tracker = logged(2)
    assert view(tracker)[0] == first
    client(tracker).set_experiment_tag(tracker.experiment_id, "mlflow.note.content", "mine " + tracker.charts_url())
    _, state = view(logged(12, "bits_per_token"))
    keys = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert "accuracy/experience_02" in keys
    assert "bits_per_token/experience_11" in keys
    tags = client(tracker).get_experiment(tracker.experiment_id).tags
    assert tags["mlflow.note.content"].startswith("mine ")


def test_a_view_of_a_hundred_experiences_fits_into_a_tag():
    tag = charts_view.encode_view("Forgetting curves", charts_view.view_state({"accuracy": (100, True)}), 0)
    assert len(tag) < 5000
