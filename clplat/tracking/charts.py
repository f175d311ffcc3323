"""What an MLflow experiment shows of all its runs: their lines, and the saved view of the charts."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clplat.report.spread import spread
from clplat.tracking import view
from clplat.tracking.limits import EXPERIMENT_TAG
from clplat.tracking.lines import LINE, TrackedRun, lines
from clplat.tracking.view import Shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHARTS = "clplat.charts"
"""Tag of an experiment: what its charts show."""

RUNS = 500
"""So many runs of an experiment, the latest, are told apart; a search for all would take minutes in a large one."""


def name_lines(client: MlflowClient, experiment_id: str) -> None:
    """Tag the runs of an experiment with the lines that they belong to."""
    order = ["attributes.start_time DESC"]
    found = [
        run
        for run in client.search_runs([experiment_id], max_results=RUNS, order_by=order)
        if "strategy.name" in run.data.params
    ]
    named = lines(
        [
            TrackedRun(run.info.run_id, run.data.params, run.info.start_time or 0, run.info.status == "FINISHED")
            for run in found
        ]
    )
    for run in found:
        run_id, tags = run.info.run_id, run.data.tags
        if run_id in named:
            for tag, value in zip((LINE, "mlflow.runColor"), named[run_id], strict=True):
                if tags.get(tag) != value:
                    client.set_tag(run_id, tag, value)
        elif LINE in tags:
            client.delete_tag(run_id, LINE)


def write_view(client: MlflowClient, experiment_id: str, score: str, shown: Shown) -> None:
    """Let the saved view cover this too: every score and stream that the experiment has seen, every length."""
    tags = client.get_experiment(experiment_id).tags
    scores = _known(tags)
    scores[score] = scores[score].merged(shown) if score in scores else shown
    packed = _packed(scores)
    if view.VIEW_TAG not in tags or tags.get(CHARTS) != packed:
        client.set_experiment_tag(experiment_id, CHARTS, packed)
        encoded = view.fitting_view("Forgetting curves", scores, int(time.time() * 1000))
        client.set_experiment_tag(experiment_id, view.VIEW_TAG, encoded)
    if not tags.get("mlflow.note.content"):
        curves, runs = (view.charts_url("", experiment_id, mode) for mode in ("CHART", "TABLE"))
        note = f"[**Open the forgetting curves**]({curves}) or [the runs with their averages]({runs})"
        client.set_experiment_tag(experiment_id, "mlflow.note.content", note)


def _known(tags: Mapping[str, str]) -> dict[str, Shown]:
    try:
        return {score: Shown(**fields) for score, fields in view.unpack(tags[CHARTS]).items()}
    except (KeyError, ValueError, TypeError, AttributeError, zlib.error):  # absent, or somebody else's
        return {}


def _packed(scores: Mapping[str, Shown]) -> str:
    # What does not fit into a tag goes: half of the experiences, and half of them again, then the streams seen first.
    plain: dict[str, Any] = {score: asdict(shown) for score, shown in scores.items()}
    packed = view.pack(plain)
    each = view.EACH
    while len(packed) > EXPERIMENT_TAG and each:
        for fields in plain.values():
            streams = fields["streams"].items()
            fields["streams"] = {stream: [keys[i] for i in spread(len(keys), each)] for stream, keys in streams}
        packed, each = view.pack(plain), each // 2
    while len(packed) > EXPERIMENT_TAG:
        largest = max(plain.values(), key=lambda fields: len(fields["streams"]))
        del largest["streams"][next(iter(largest["streams"]))]
        packed = view.pack(plain)
    return packed
