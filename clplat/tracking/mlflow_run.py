"""One MLflow run as the outbox sees it, and what a run could not send, sent later."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.tracking import view
from clplat.tracking.base import TrackingError
from clplat.tracking.outbox import SPILL, Outbox, Value
from clplat.tracking.store import absolute_uri, check_server, database_path, first_line, metric_key, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


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
            refused = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
            if isinstance(error, MlflowException) and error.error_code not in refused:
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

    def do(self, job: dict[str, Any]) -> None:
        """Upload an artifact, set a tag, log params or an input, write the charts view, or end the run."""
        kind, client = job["kind"], self.client
        if kind == "artifact":
            path = inside(self.folder, job["path"])
            upload = client.log_artifacts if path.is_dir() else client.log_artifact
            upload(self.run_id, str(path), job["to"])
        elif kind == "tag":
            client.set_tag(self.run_id, job["key"], job["value"])
        elif kind == "params":
            known = client.get_run(self.run_id).data.params
            self.log_params({key: value for key, value in job["params"].items() if metric_key(key) not in known})
        elif kind == "input":
            self._log_input(job)
        elif kind == "view":
            self._write_view(job)
        elif kind == "status":
            client.set_terminated(self.run_id, job["status"])

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log params in batches, keys made acceptable and values cut at 6000 characters."""
        from mlflow.entities import Param

        items = [Param(metric_key(k), v if len(v) <= 6000 else v[:5997] + "...") for k, v in params.items()]
        for first in range(0, len(items), 100):
            self.client.log_batch(self.run_id, params=items[first : first + 100])

    def _log_input(self, job: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=job["name"][:500],
            digest=job["digest"][:36],
            source_type="clplat",
            source=json.dumps({"source": job["source"]}),
            profile=json.dumps({"num_rows": job["examples"]}),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", job["context"])])])

    def _write_view(self, job: Mapping[str, Any]) -> None:
        identity = job["experiment_id"]
        tags = self.client.get_experiment(identity).tags
        # A view covers every score and the longest stream that the experiment has seen.
        scores = json.loads(tags.get("clplat.scores", "{}"))
        longest = max(job["experiences"], scores.get(job["score"], [0])[0])
        scores[job["score"]] = [longest, job["higher_is_better"]]
        state = view.view_state({name: tuple(value) for name, value in scores.items()}, job["group_by"])
        shown = tags.get(view.VIEW_TAG)
        if shown is None or view.decode_view(shown) != state:
            encoded = view.encode_view("Forgetting curves", state, int(time.time() * 1000))
            self.client.set_experiment_tag(identity, "clplat.scores", json.dumps(scores))
            self.client.set_experiment_tag(identity, view.VIEW_TAG, encoded)
        if not tags.get("mlflow.note.content"):
            link = view.charts_url("", identity)
            self.client.set_experiment_tag(identity, "mlflow.note.content", f"[**Open the forgetting curves**]({link})")


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


def _judge(spill: Path, lines: list[dict[str, Any]], store: str) -> None:
    """Refuse a spill file that sends what is not the run's, or to another place than the one it was logged to."""
    others = {str(line["uri"]) for line in lines} - {str(lines[0]["uri"])}
    if others:
        raise TrackingError(f"{spill} names several stores ({lines[0]['uri']}, {others.pop()}): nothing was sent.")
    database = database_path(store)
    if database is not None and not database.is_file():
        raise TrackingError(f"{spill} names the store {store}, and there is no such file: nothing was sent.")
    for line in lines:
        if line.get("kind") == "artifact":
            inside(spill.parent, line["path"])


def sync(folder: str | Path, uri: str | None = None) -> int:
    """Send what earlier runs in `folder` could not send. Values that had arrived after all are not logged twice.

    Args:
        folder: of the run, with its `unsent.jsonl`.
        uri: the store; None for the one that the run was logged to.

    Returns:
        The number of values, files and tags that were waiting; 0 if nothing was.

    Raises:
        TrackingError: the store cannot be used; what was not sent is still in the file.
    """
    spill = Path(folder).absolute() / SPILL
    if not spill.exists():
        return 0
    lines = [json.loads(line) for line in spill.read_text(encoding="utf-8").splitlines()]
    store = absolute_uri(uri or lines[0]["uri"])
    _judge(spill, lines, store)
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
    spill.unlink()
    return len(lines)
