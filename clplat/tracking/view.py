"""The saved view of forgetting curves in the MLflow UI, and the link to it.

Its form is internal to MLflow (read from 3.17); `tests/tracking/test_browser.py` looks at it in a browser. If a later
MLflow ignores it, the metric keys alone still give one chart for each experience.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clplat.report.spread import spread
from clplat.tracking.limits import EXPERIMENT_TAG, KEY, metric_key
from clplat.tracking.lines import LINE

VIEW_KEY = "clplat"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"


LEARNED = "experiences learned"
"""The metric that is the x axis of averages, since MLflow calls its own "Step".

Other metrics have names to be read, too, since MLflow shows them as titles of charts.
"""

EACH = 100
"""At most so many charts of single experiences a stream."""


@dataclass
class Shown:
    """What the charts of one score show.

    Attributes:
        higher_is_better: False for losses.
        streams: of each stream in the MLflow experiment, the metrics of its experiences that have curves.
        low: the lowest score so far.
        high: the highest.
    """

    higher_is_better: bool
    streams: dict[str, list[str]]
    low: float | None = None
    high: float | None = None

    def merged(self, other: Shown) -> Shown:
        """What charts of both show."""
        streams = {
            name: list(dict.fromkeys([*self.streams.get(name, []), *other.streams.get(name, [])]))
            for name in {**self.streams, **other.streams}
        }
        lows, highs = ([x for x in pair if x is not None] for pair in ((self.low, other.low), (self.high, other.high)))
        return Shown(other.higher_is_better, streams, min(lows, default=None), max(highs, default=None))


def average_key(score: str) -> str:
    """The MLflow key of the average over the experiences so far: `average accuracy`."""
    return f"average {score.replace('_', ' ')}"


def forgetting_key(score: str) -> str:
    """The MLflow key of forgetting so far; what is lost of a loss is in other units, and has its own."""
    return "forgetting" if score == "accuracy" else f"forgetting in {score.replace('_', ' ')}"


def experience_keys(score: str, stream: str, names: Sequence[str]) -> list[str]:
    """The MLflow keys of the score on each experience: `digits 0 1 - split_digits accuracy`.

    Args:
        score: what is scored.
        stream: its name, which keeps the curves of streams apart.
        names: of the K experiences; where two are alike to MLflow they get their numbers.
    """
    clean = [metric_key(name.replace("/", "_").replace("…", "")) for name in names]
    alike = {name for name in clean if clean.count(name) > 1}
    end = metric_key(f"{stream} {score.replace('_', ' ')}".replace("/", "_"))
    return [f"{name}{f' {j}' if name in alike else ''} - {end}"[:KEY] for j, name in enumerate(clean)]


def view_state(scores: Mapping[str, Shown], each: int = EACH) -> dict[str, Any]:
    """The view: average score and forgetting on top, then, for each stream, a chart for each experience.

    Lines are means over the runs of a configuration with the spread of its seeds, x axes count experiences learned.

    Args:
        scores: for each score logged in this MLflow experiment, what to show of it.
        each: at most so many charts of single experiences a stream, evenly chosen.
    """
    charts: list[dict[str, Any]] = []
    sections: list[dict[str, Any]] = []
    for score, shown in scores.items():
        words, top = score.replace("_", " "), f"{score}-average"
        level = _limits(score, shown)
        sections.append(_section(top, f"Average {words}, forgetting"))
        charts.append(_line(top, average_key(score), level, learned=True))
        charts.append(_line(top, forgetting_key(score), None))
        charts.append(_chart("BAR", top, average_key(score)))
        for stream, keys in shown.streams.items():
            section = f"{score}-{stream}"
            which = f": {stream}" if len(shown.streams) > 1 else ""
            sections.append(_section(section, f"Forgetting curves{which} (step: experiences learned)"))
            charts += [_line(section, keys[i], level) for i in spread(len(keys), each)]
    first, shown = next(iter(scores.items()))
    return {
        "searchFilter": f"tags.{LINE} != ''",
        "orderByKey": f"metrics.`{average_key(first)}`",
        "orderByAsc": not shown.higher_is_better,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [
            *(f"metrics.`{key}`" for key in (average_key(first), forgetting_key(first))),
            *(f"params.`{name}`" for name in ("seed", "strategy.name", "learner.name", "stream.name")),
        ],
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": LINE}]},
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _limits(score: str, shown: Shown) -> tuple[float, float] | None:
    if score == "accuracy":
        return 0.0, 1.02
    if shown.low is None or shown.high is None:
        return None
    room = 0.05 * (shown.high - shown.low) or 0.05 * abs(shown.high) or 1.0
    return shown.low - room, shown.high + room


def _section(identity: str, name: str) -> dict[str, Any]:
    return {
        "uuid": identity,
        "name": name,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }


def _chart(kind: str, section: str, key: str) -> dict[str, Any]:
    return {
        "uuid": f"{kind}-{section}-{key}",
        "type": kind,
        "runsCountToCompare": 100,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "displayName": key,
        "metricKey": key,
    }


def _line(section: str, key: str, limits: tuple[float, float] | None, learned: bool = False) -> dict[str, Any]:
    # Of groups of runs MLflow draws the n-th value at the n-th value of the metric on the x axis, whatever their steps.
    # So that metric can only be the axis of what is there from the first experience on; the rest has the step.
    axis = {"xAxisKey": "metric", "selectedXAxisMetricKey": LEARNED, "useGlobalXaxisKey": False}
    steps = {"xAxisKey": "step", "selectedXAxisMetricKey": "", "useGlobalXaxisKey": True}
    return _chart("LINE", section, key) | {
        "selectedMetricKeys": [key],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {"yMin": limits[0], "yMax": limits[1]} if limits else {},
        **(axis if learned else steps),
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalLineSmoothing": True,
    }


def fitting_view(name: str, scores: Mapping[str, Shown], created: int) -> str:
    """The value of the tag `VIEW_TAG`, with as many charts of single experiences as fit into a tag."""
    each = EACH
    while True:
        tag = encode_view(name, view_state(scores, each), created)
        if len(tag) <= EXPERIMENT_TAG or each == 0:
            return tag
        each //= 2


def encode_view(name: str, state: dict[str, Any], created: int) -> str:
    """The value of the tag `VIEW_TAG`, `created` in ms since 1970."""
    return json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": pack(state)})


def decode_view(tag: str) -> dict[str, Any]:
    """The view state inside a tag that `encode_view` or the UI wrote."""
    return unpack(json.loads(tag)["state"])


def pack(values: dict[str, Any]) -> str:
    """Plain values as MLflow packs its views: json, deflated, in base 64."""
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(values).encode(), 9)).decode()}"


def unpack(text: str) -> dict[str, Any]:
    """What was packed."""
    return json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))))


def charts_url(host: str, experiment_id: str, mode: str = "CHART") -> str:
    """The link that opens the forgetting curves of an MLflow experiment.

    Args:
        host: of the UI, "http://127.0.0.1:5000"; "" for a link that works inside the UI, wherever it runs.
        experiment_id: MLflow's.
        mode: TABLE for the run list, with averages, forgetting and seeds as columns.
    """
    base = f"{host.rstrip('/')}/" if host else ""
    view = f"compareRunsMode={mode}&workflowType=machine_learning&viewStateShareKey={VIEW_KEY}"
    return f"{base}#/experiments/{experiment_id}/runs?{view}"
