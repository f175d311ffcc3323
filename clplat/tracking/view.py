"""The saved view of forgetting curves in the MLflow UI, and the link to it.

Its form is internal to MLflow (read from 3.17); `tests/tracking/test_browser.py` looks at it in a browser. If a later
MLflow ignores it, the metric keys alone still give one chart for each experience.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

VIEW_KEY = "clplat"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"


def experience_key(score: str, index: int) -> str:
    """The MLflow key of the score on one experience: `accuracy/experience_00`."""
    return f"{score}/experience_{index:02d}"


def view_state(scores: Mapping[str, tuple[int, bool]], group_by: Sequence[str] = ("strategy.name",)) -> dict[str, Any]:
    """The view: average score and forgetting on top, then a chart for each experience.

    Lines are means over the runs of a group with the spread of its seeds, x axes count experiences seen.

    Args:
        scores: for each score logged in this MLflow experiment, the number of experiences K and whether higher is
            better.
        group_by: the params that name a group.
    """
    charts: list[dict[str, Any]] = []
    sections: list[dict[str, Any]] = []
    for score, (count, _) in scores.items():
        words, top, each = score.replace("_", " "), f"{score}-average", f"{score}-each"
        level, change = ((0.0, 1.02), (-0.1, 1.02)) if score == "accuracy" else (None, None)
        sections.append(_section(top, f"Average {words}, forgetting"))
        sections.append(_section(each, "Forgetting curves"))
        charts.append(_line(top, f"{score}/average", level))
        charts.append(_line(top, "forgetting/average", change))
        charts.append(_chart("BAR", top, f"{score}/average"))
        charts += [_line(each, experience_key(score, j), level) for j in range(count)]
    first, (_, higher) = next(iter(scores.items()))
    groups = [{"mode": "param", "groupByData": name} for name in group_by]
    return {
        "searchFilter": "",
        "orderByKey": f"metrics.`{first}/average`",
        "orderByAsc": not higher,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [
            *(f"params.`{name}`" for name in (*group_by, "seed")),
            *(f"metrics.`{key}`" for key in (f"{first}/average", "forgetting/average")),
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
        "groupBy": {"aggregateFunction": "average", "groupByKeys": groups} if groups else None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


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


def _line(section: str, key: str, limits: tuple[float, float] | None) -> dict[str, Any]:
    return _chart("LINE", section, key) | {
        "selectedMetricKeys": [key],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {"yMin": limits[0], "yMax": limits[1]} if limits else {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def encode_view(name: str, state: dict[str, Any], created: int) -> str:
    """The value of the tag `VIEW_TAG`, `created` in ms since 1970."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": f"deflate;{packed}"})


def decode_view(tag: str) -> dict[str, Any]:
    """The view state inside a tag that `encode_view` or the UI wrote."""
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def charts_url(host: str, experiment_id: str) -> str:
    """The link that opens the forgetting curves of an MLflow experiment.

    Args:
        host: of the UI, "http://127.0.0.1:5000"; "" for a link that works inside the UI, wherever it runs.
        experiment_id: MLflow's.
    """
    base = f"{host.rstrip('/')}/" if host else ""
    view = f"compareRunsMode=CHART&workflowType=machine_learning&viewStateShareKey={VIEW_KEY}"
    return f"{base}#/experiments/{experiment_id}/runs?{view}"
