"""What a person meets in the MLflow UI: the saved view of forgetting curves, the link to it, and the server.

Nothing here imports mlflow, so `clplat ui` starts fast. The form of a saved view is internal to MLflow (read from 3.17);
`tests/tracking/test_browser.py` looks at it in a browser. If a later MLflow ignores it, the metric keys alone still give one
chart for each experience.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.errors import UserError

VIEW_KEY = "clplat"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
DATABASE = "mlruns.db"
PORT = 5000
HOST = f"http://127.0.0.1:{PORT}"
"""Where `ui` serves by default."""


class TrackingError(UserError):
    """The tracking store cannot be used; the message says what was tried and what to do."""


def default_uri(folder: Path | None = None) -> str:
    """The store to use when none is given: $MLFLOW_TRACKING_URI, else `mlruns.db` in `folder` (None: working directory)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder or Path.cwd()).resolve() / DATABASE}"


def database_path(uri: str) -> Path | None:
    """The absolute file behind a `sqlite:///` address; None for any other store."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


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


def check_server(uri: str, timeout: float = 3.0) -> None:
    """Refuse an http(s) tracking server that does not answer; any other store passes.

    Raises:
        TrackingError: it cannot be reached, does not answer within `timeout` seconds, or answers with a 5xx.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout).close()
    except urllib.error.HTTPError as error:
        if error.code < 500:  # it is there; whether it lets us in shows with the first request
            return
        reason = f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    else:
        return
    raise TrackingError(
        f"The MLflow server at {uri} does not answer ({reason}). Start it (`clplat ui` starts one), correct "
        "MLFLOW_TRACKING_URI, or unset it to use a local file."
    )


def ui(uri: str | None = None, port: int = PORT) -> int:
    """Serve the MLflow UI on loopback until it is told to stop, and print the links to the forgetting curves.

    With an http(s) store there is nothing to serve: the links are printed, and that is all.

    Args:
        uri: the store; None for `default_uri()`.
        port: on 127.0.0.1.

    Returns:
        The server's exit code, 0 if it was told to stop.

    Raises:
        TrackingError: the store is missing or down, the port is taken, or the server ended while starting.
    """
    uri = uri or default_uri()
    if uri.startswith(("http://", "https://")):
        check_server(uri)
        _print_links(uri)
        return 0
    database = database_path(uri)
    if database is not None and not database.exists():
        raise TrackingError(f"There is no store at {database}. Train something here first, or name another store.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise TrackingError(f"Port {port} on 127.0.0.1 is taken. Give another one.")
    host = f"http://127.0.0.1:{port}"
    # Without these two the server takes 2 GB and ten processes.
    environment = {
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]  # a line for every request would bury the links
    command += ["--backend-store-uri", uri if database is None else f"sqlite:///{database}"]
    if database is not None:
        command += ["--artifacts-destination", (database.parent / "mlruns").as_uri()]
    # In a session of its own the server and its worker can be stopped together.
    server = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        _signal_group(server, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while server.poll() is None and not stopped:
            try:
                check_server(host, timeout=1.0)
            except TrackingError:
                time.sleep(0.2)
            else:
                _print_links(host)
                break
        else:
            if not stopped:
                raise TrackingError(f"The MLflow server ended while starting (exit code {server.returncode}).")
        code = server.wait()
        return 0 if stopped else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signal_group(server, signal.SIGKILL)


def _signal_group(server: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


def _print_links(host: str) -> None:
    request = urllib.request.Request(
        f"{host.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1000}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            experiments = json.load(answer).get("experiments", [])
    except (OSError, ValueError):
        experiments = []
    print(f"MLflow UI: {host}", flush=True)
    for experiment in experiments:
        if any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", [])):
            link = charts_url(host, experiment["experiment_id"])
            print(f"forgetting curves of {experiment['name']}: {link}", flush=True)
