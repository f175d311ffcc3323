"""One MLflow run as the outbox sees it, and what a run could not send, sent later."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.errors import first_line
from clplat.tracking import charts, limits
from clplat.tracking.base import TrackingError
from clplat.tracking.limits import metric_key
from clplat.tracking.outbox import FIELDS, SPILL, Outbox, PlaceError, Value
from clplat.tracking.store import (
    absolute_uri,
    check_file,
    check_server,
    database_path,
    default_uri,
    open_store,
)
from clplat.tracking.view import Shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ABOUT = ("uri", "run_id")
"""What every line of a spill file says."""

REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow's words for what it will never take."""


class MlflowRun:
    """One MLflow run as the outbox sees it.

    Args:
        client: of the store.
        run_id: MLflow's.
        folder: that relative paths of artifacts are relative to.
    """

    def __init__(self, client: MlflowClient, run_id: str, folder: Path) -> None:
        self.client, self.run_id, self.folder = client, run_id, folder

    def send_values(self, values: list[Value]) -> list[Value]:
        """Log metrics in one request; returns those that MLflow refuses whatever else is in the request."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        try:
            batch = [Metric(metric_key(key), value, at, step) for key, value, step, at in values]
            self.client.log_batch(self.run_id, metrics=batch)
        except (MlflowException, TypeError, OverflowError) as error:
            if isinstance(error, MlflowException) and error.error_code not in REFUSED:
                raise
            if len(values) == 1:
                log.warning("MLflow refused %s: %s", values[0][0], first_line(error))
                return values
            half = len(values) // 2
            return self.send_values(values[:half]) + self.send_values(values[half:])
        return []

    def steps(self, key: str) -> set[int]:
        """The steps at which the run holds a value under this key."""
        return {value.step for value in self.client.get_metric_history(self.run_id, metric_key(key))}

    def do(self, job: dict[str, Any]) -> bool:
        """Upload an artifact, set a tag, log params or an input, name lines, write the charts view, or end the run.

        Returns:
            False if it can never be done: MLflow refuses it whatever the state of the store, or its file is gone.

        Raises:
            OSError: a file of the run cannot be copied to its place among the artifacts, now.
            Exception: the store is away.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._do(job)
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            return _refused(job, error)
        except (TypeError, ValueError, KeyError, OverflowError, TrackingError) as error:
            if isinstance(error, OSError):  # as errors of a connection are
                raise
            return _refused(job, error)
        return True

    def _do(self, job: dict[str, Any]) -> None:
        kind, client = job["kind"], self.client
        if kind == "artifact":
            self._upload(inside(self.folder, job["path"]), job["to"])
        elif kind == "tag":
            client.set_tag(self.run_id, job["key"][: limits.KEY], job["value"][: limits.TAG])
        elif kind == "params":
            self.log_params(job["params"])
        elif kind == "input":
            self._log_input(job)
        elif kind == "lines":
            charts.name_lines(client, job["experiment_id"])
        elif kind == "view":
            charts.write_view(client, job["experiment_id"], job["score"], Shown(**job["shown"]))
        elif kind == "status":
            client.set_terminated(self.run_id, job["status"])
        else:
            raise ValueError(f"no such job: {kind}")

    def _upload(self, path: Path, to: str | None) -> None:
        if not path.exists():
            raise ValueError(f"{path} is gone")
        place = self.client.get_run(self.run_id).info.artifact_uri
        try:
            (self.client.log_artifacts if path.is_dir() else self.client.log_artifact)(self.run_id, str(path), to)
        except OSError as error:
            if isinstance(error, ConnectionError) or error.filename is None:
                raise
            raise PlaceError(f"{path.name} cannot be copied to {place} ({error.strerror})") from error

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log params that the run does not have yet; what is too long is cut."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        new = {key: value for key, value in limits.params(params).items() if key not in known}
        for batch in limits.batches(new):
            self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in batch])

    def _log_input(self, job: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=job["name"][: limits.DATASET_NAME],
            digest=job["digest"][: limits.DATASET_DIGEST],
            source_type="clplat",
            source=limits.dataset_source(job["source"]),
            profile=json.dumps({"num_rows": job["examples"]}),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", job["context"])])])


def _refused(job: Mapping[str, Any], error: Exception) -> bool:
    what = " ".join(str(job[key]) for key in ("kind", "key", "path", "name") if key in job)
    log.warning("Not tracked: %s, which MLflow never takes (%s).", what, first_line(error))
    return False


def inside(folder: Path, path: str) -> Path:
    """The file or folder of an artifact, which must lie in the run's folder with all that it holds.

    Raises:
        TrackingError: some of it lies elsewhere, by its name or by a link.
    """
    root, whole = folder.resolve(), (folder / path).resolve()
    for file in [whole, *(whole.rglob("*") if whole.is_dir() else ())]:
        if not file.resolve().is_relative_to(root):
            raise TrackingError(f"{folder / SPILL} names {path!r}, which leads out of the run's folder: not sent.")
    return whole


def _judge(spill: Path, lines: list[dict[str, Any]]) -> None:
    """Refuse a spill file that sends what is not the run's, or to another place than the one it was logged to."""
    others = {str(line["uri"]) for line in lines} - {str(lines[0]["uri"])}
    if others:
        raise TrackingError(f"{spill} names several stores ({lines[0]['uri']}, {others.pop()}): nothing was sent.")
    for line in lines:
        if line.get("kind") == "artifact":
            inside(spill.parent, line["path"])


def sync(folder: str | Path, uri: str | None = None, show: Callable[[str], object] = log.debug) -> int:
    """Send what earlier runs in `folder` could not send. Values that had arrived after all are not logged twice.

    Args:
        folder: of the run, with its `unsent.jsonl`.
        uri: the store of the run that goes on; None for the one that the file names.
        show: is called with the store's address before anything is sent.

    Returns:
        The number of values, files and tags that were waiting; 0 if nothing was.

    Raises:
        TrackingError: the store cannot be used; what was not sent is still in the file.
    """
    spill = Path(folder).absolute() / SPILL
    if not spill.exists():
        return 0
    lines, torn = _read_spill(spill)
    if torn:
        log.warning("%s is damaged in line %s; the rest of it is sent.", spill, ", ".join(map(str, torn)))
    if lines:
        _send(lines, spill, uri, show)
    if torn:
        spill.replace(spill.with_suffix(".damaged"))
    else:
        spill.unlink()
    return len(lines)


def _send(lines: list[dict[str, Any]], spill: Path, uri: str | None, show: Callable[[str], object]) -> None:
    _judge(spill, lines)
    named = absolute_uri(lines[0]["uri"])
    store = absolute_uri(uri or named)
    database = database_path(named)
    if store != named and (database is None or database.exists()):  # a database that is gone may have moved
        raise TrackingError(
            f"{spill} waits for the store {named}, and this run logs to {store}: send it with "
            f"`clplat sync {spill.parent}`, or take the file away; then start again."
        )
    database = database_path(store)
    if database is not None and not database.exists():
        here = database_path(default_uri())
        if here is None or not here.exists():
            check_file(store)
        store = default_uri()
    show(store)
    check_server(store)
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        runs.setdefault(line["run_id"], []).append(line)
    for run_id, waiting in runs.items():
        outbox = Outbox({"uri": store, "run_id": run_id}, spill.parent)
        outbox.load(waiting)
        outbox.drop_stored()
        try:
            outbox.store = MlflowRun(open_store(store), run_id, spill.parent)
            outbox.send()
        except Exception as error:
            raise TrackingError(f"{spill} could not be sent to {store}: {first_line(error)}") from error


def _wanted(line: Mapping[str, Any]) -> tuple[str, ...]:
    if line.get("kind") == "artifact":
        return ("path", "to")
    return () if "kind" in line else FIELDS


def _read_spill(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines that are whole, and the numbers of those that are not."""
    lines, torn = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and all(key in line for key in (*ABOUT, *_wanted(line))):
            lines.append(line)
        else:
            torn.append(number)
    return lines, torn
