"""Everything MLflow. Training never waits for the tracking store, and no value is lost when the store goes away.

mlflow is imported when a store is opened, and only in this file; the saved view and the UI's server are in
`clplat.tracking.view`, the queue and its thread in `clplat.tracking.outbox`.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.tracking import provenance
from clplat.tracking import view as charts_view
from clplat.tracking.outbox import SPILL, Outbox, Value
from clplat.tracking.view import TrackingError, experience_key, ui

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from clplat.metrics import ScoreTable
    from clplat.report.tables import RunNames
    from clplat.streams.experience import Stream

__all__ = ["DataInput", "Tracker", "TrackingError", "open_store", "sync", "ui"]

PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e07b39", "#332288", "#88aa22", "#117733",
    "#cc6688", "#009988", "#882255", "#997700", "#5566cc", "#bb5566", "#44aa99", "#995533", "#7744aa", "#667788",
)  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInput:
    """A data set as MLflow shows it beside a run.

    Attributes:
        name: of the data set, up to 500 characters.
        digest: what tells two versions of it apart, up to 36 characters.
        source: where it came from: a path, an address, or the arguments of a generator.
        examples: number of examples.
        context: "train", "test" or another word.
    """

    name: str
    digest: str
    source: str
    examples: int
    context: str = "train"


class Tracker:
    """One MLflow run, and a Lightning logger: what a learner or a callback logs reaches the same run.

    Lightning ends its loggers after every `fit`; here `finalize` does nothing, and `close` ends the run. Processes of
    a rank other than 0 log nothing. No method but `start` waits for the store or raises for it.

    Args:
        folder: the run's local folder, for artifacts and for what could not be sent yet.
        experiment: name of the MLflow experiment.
        uri: the store; None: $MLFLOW_TRACKING_URI, else `mlruns.db` in the working directory. An SQLite file is put
            in WAL mode (not for network file systems: run a server there), its artifacts go to `mlruns/` beside it.
        group_by: the params that name a line in the charts; the runs of a line are averaged, with their spread.
        log_model: upload checkpoints given to `log_checkpoint`.
        every: seconds between two sendings.
    """

    def __init__(
        self,
        folder: str | Path,
        experiment: str = "clplat",
        uri: str | None = None,
        group_by: Sequence[str] = ("strategy.name",),
        log_model: bool = False,
        every: float = 1.0,
    ) -> None:
        from clplat._torchvision import ensure_importable

        ensure_importable()
        from pytorch_lightning.loggers import Logger
        from pytorch_lightning.utilities import rank_zero_only

        # Not inherited, because this file is also read by commands that should not wait for Lightning's import.
        Logger.register(Tracker)
        self.uri = _absolute(uri or charts_view.default_uri())
        self.folder = Path(folder).absolute()
        self.run_id = ""
        self.experiment_id = ""
        self._experiment = experiment
        self._group_by = list(group_by)
        self._log_model = log_model
        self._active = rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]  # Lightning sets it on the function
        self._about = {"uri": self.uri, "run_id": ""}
        self._outbox = Outbox(self._about, self.folder, every)
        self._client: MlflowClient | None = None
        self._labels: list[str] | None = None

    def start(
        self,
        names: RunNames,
        params: Mapping[str, Any],
        stream: Stream | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Open the store and start a run, or go on with one.

        Args:
            names: of the run; params `stream.name`, `learner.name`, `strategy.name` and tag `sweep`.
            params: the resolved config, nested or flat; logged flattened with dots, values cut at 6000 characters.
            stream: shown as the run's data sets.
            run_id: the run to resume. Values it already holds at the same key and step are not logged twice.
            tags: further tags.

        Returns:
            The MLflow run id; "" on ranks other than 0.

        Raises:
            TrackingError: the store cannot be reached or written; in less than 5 s for a server that is down.
        """
        if not self._active:
            return ""
        charts_view.check_server(self.uri)
        kinds = {"stream": names.stream, "learner": names.learner, "strategy": names.strategy}
        flat = flatten(params) | {f"{kind}.name": name for kind, name in kinds.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            client = open_store(self.uri)
            sync(self.folder, self.uri)
            self.experiment_id = _experiment_id(client, self._experiment, self.uri)
            known: Mapping[str, str] = {}
            if run_id is None:
                about = provenance.tags() | {"mlflow.runColor": run_color(names.strategy)} | dict(tags or {})
                about |= {"sweep": names.sweep} if names.sweep else {}
                name = f"{names.strategy} {names.learner} {names.stream} seed {flat.get('seed', '?')}"
                run_id = str(client.create_run(self.experiment_id, tags=about, run_name=name).info.run_id)
            else:
                known = client.get_run(run_id).data.params
                client.update_run(run_id, status="RUNNING")
                self._outbox.drop_stored()
            store = MlflowRun(client, run_id, self.folder)
            store.log_params({key: value for key, value in flat.items() if metric_key(key) not in known})
        except TrackingError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            raise _unusable(self.uri, error) from error
        self.run_id = self._about["run_id"] = run_id
        self._client = client
        self._outbox.start(store)
        atexit.register(self.close, "KILLED")
        self._describe(params, stream)
        return run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue some values. What is not a number is left out, with a warning.

        Args:
            metrics: by key. Characters that MLflow refuses become "_".
            step: global step for training curves, number of experiences seen for stream metrics.
        """
        if not self._active:
            return
        now, at = int(time.time() * 1000), int(step)
        for key, value in metrics.items():
            try:
                self._outbox.values.append((key, float(value), at, now))
            except (TypeError, ValueError):
                log.warning("Not logged: %s = %r is not a number.", key, value)

    def log_results(self, results: ScoreTable, seen: ScoreTable | None = None) -> None:
        """Log the last finished row: the score on each experience trained so far, their average, and forgetting.

        The experiment gets its saved view of these charts with the first one.

        Args:
            results: keys `<score>/average`, `<score>/experience_00`..., `forgetting/average`.
            seen: the scores with unseen classes masked; key `<score>_seen/average`.
        """
        from clplat.metrics import forgetting_so_far

        n = results.seen
        if n == 0:
            return
        if n == 1:
            self._ensure_charts_view(results)
        row = results.R[n - 1, :n]
        values = {f"{results.score}/average": float(row.mean()), "forgetting/average": forgetting_so_far(results)}
        values |= {experience_key(results.score, j): float(row[j]) for j in range(n)}
        if seen is not None and seen.seen == n:
            values[f"{results.score}_seen/average"] = float(seen.R[n - 1, :n].mean())
        self.log({key: value for key, value in values.items() if not math.isnan(value)}, step=n)

    def finish(self, results: ScoreTable, seen: ScoreTable | None = None) -> None:
        """Log what a finished run is judged by: summary metrics, all scores, a table, figures, and the run's note.

        Args:
            results: the scores.
            seen: the scores with unseen classes masked.
        """
        if not self._active:
            return
        import numpy as np

        from clplat.metrics import summary
        from clplat.report import figures
        from clplat.report import tables as report

        metrics = summary(results)
        self.log({f"summary/{name}": value for name, value in metrics.items() if not math.isnan(value)}, results.seen)
        arrays = results.arrays()
        if seen is not None:
            arrays |= {f"seen_{name}": array for name, array in seen.arrays().items()}
        labels = figures.labels(results.experiences, self._labels)
        np.savez(self.folder / "results.npz", allow_pickle=False, **arrays)
        (self.folder / "results_table.json").write_text(json.dumps(_table(results, labels)))
        figures.curves(results, self._labels).savefig(self.folder / "curves.png", dpi=130)
        figures.matrix(results, self._labels).savefig(self.folder / "matrix.png", dpi=130)
        (self.folder / "figures.html").write_text(figures.html(results, self._labels), encoding="utf-8")
        pictures = ("curves.png", "matrix.png", "figures.html")
        for name in ("results.npz", "results_table.json", *pictures, "result.json", "strategy.npz"):
            if (self.folder / name).exists():
                self.log_artifact(self.folder / name)
        # The UI shows a json file as a table only if this tag names it.
        self.set_tag("mlflow.loggedArtifacts", json.dumps([{"path": "results_table.json", "type": "table"}]))
        self.set_tag("mlflow.note.content", report.markdown(results, metrics, labels))

    def log_inputs(self, inputs: Sequence[DataInput]) -> None:
        """Show data sets as the run's inputs. Nothing is hashed: the digests are the caller's."""
        for data in inputs:
            self._job("input", **asdict(data))

    def log_artifact(self, path: str | Path, to: str | None = None) -> None:
        """Upload a file or folder, into the run's artifact folder `to`; it has to stay in place until then."""
        path = Path(path).absolute()
        inside = path.is_relative_to(self.folder)
        self._job("artifact", path=str(path.relative_to(self.folder) if inside else path), to=to)

    def log_checkpoint(self, path: str | Path) -> None:
        """Upload a checkpoint as the run's model, if `log_model`."""
        if self._log_model:
            self.log_artifact(path, "model")

    def set_tag(self, key: str, value: str) -> None:
        """Tag the run, cut at 8000 characters."""
        self._job("tag", key=key, value=value[:8000])

    def persist(self) -> None:
        """Write down what is not sent yet; call it just before a checkpoint is written.

        A run that is killed, and resumed from that checkpoint, then misses no value.
        """
        if self._active and self._outbox:
            self._outbox.keep()

    def close(self, status: str = "FINISHED", timeout: float = 10.0) -> int:
        """Send what is left and end the run. A second call does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout: seconds to try for while the store is away; what is left then stays in `unsent.jsonl`.

        Returns:
            The number of values, files and tags that were not sent.
        """
        atexit.unregister(self.close)
        if not self.run_id:
            return 0
        self._job("status", status=status)
        return self._outbox.close(timeout)

    def charts_url(self, host: str = "") -> str:
        """The link that opens the forgetting curves; by default on the server that is logged to, else `clplat ui`'s."""
        return charts_view.charts_url(host or self._host(), self.experiment_id)

    def where(self) -> str:
        """One line that tells where to look at this run's curves."""
        if not self._active or not self.run_id:
            return "not tracked"
        if self._host() == self.uri:
            return self.charts_url()
        store = "" if self.uri == charts_view.default_uri() else f" --uri {self.uri}"
        return f"`clplat ui{store}`, then {self.charts_url()}"

    def _host(self) -> str:
        return self.uri if self.uri.startswith(("http://", "https://")) else charts_view.HOST

    def _job(self, kind: str, **fields: Any) -> None:
        if self._active:
            self._outbox.jobs.append({"kind": kind, **fields})

    def _describe(self, params: Mapping[str, Any], stream: Stream | None) -> None:
        import yaml

        config = self.folder / "config.yaml"
        if not config.exists():
            config.write_text(yaml.safe_dump(_plain(params), sort_keys=False, allow_unicode=True), encoding="utf-8")
        (self.folder / "environment.txt").write_text(provenance.installed(), encoding="utf-8")
        (self.folder / "code.json").write_text(json.dumps(provenance.code(), indent=1), encoding="utf-8")
        for name in ("config.yaml", "environment.txt", "code.json"):
            self.log_artifact(self.folder / name)
        if stream is not None:
            self._labels = [experience.name for experience in stream]
            source = json.dumps(_plain(params.get("stream", {})), sort_keys=True)
            sizes = {
                "train": sum(len(experience.train) for experience in stream),
                "test": sum(len(experience.test) for experience in stream),
            }
            for part, size in sizes.items():
                # The part is in the digest, because MLflow shows data of one name and digest only once.
                digest = hashlib.sha256(f"{part} {size} {source}".encode()).hexdigest()[:16]
                self.log_inputs([DataInput(stream.name, digest, source, size, part)])

    def _ensure_charts_view(self, results: ScoreTable) -> None:
        fields = {"experiment_id": self.experiment_id, "score": results.score, "experiences": results.experiences}
        self._job("view", **fields, higher_is_better=results.higher_is_better, group_by=self._group_by)

    # What Lightning asks of a logger.

    @property
    def name(self) -> str:
        """The MLflow experiment."""
        return self._experiment

    @property
    def version(self) -> str:
        """The MLflow run id, "" before `start`."""
        return self.run_id

    @property
    def experiment(self) -> Any:
        """The `MlflowClient`, for what is not covered here; the run is `version`. Its calls wait and raise."""
        return self._client

    @property
    def save_dir(self) -> str:
        """The run's local folder."""
        return str(self.folder)

    @property
    def root_dir(self) -> str:
        """The run's local folder."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """The run's local folder."""
        return str(self.folder)

    @property
    def group_separator(self) -> str:
        """Between a section and a chart's name."""
        return "/"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """What `self.log` collected; Lightning's automatic `epoch` is left out."""
        self.log({key: value for key, value in metrics.items() if key != "epoch"}, step or 0)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Params that a module saved. Those of the config stand, since MLflow's cannot change."""
        self._job("params", params=flatten(vars(params) if isinstance(params, Namespace) else params))

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Nothing: MLflow has no place for a graph."""

    def save(self) -> None:
        """Nothing: values are sent in the background."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Nothing: `log_checkpoint` uploads one on request."""

    def finalize(self, status: str) -> None:
        """Nothing: a run goes over many fits, and `close` ends it."""


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
                log.warning("MLflow refused %s: %s", values[0][0], _first_line(error))
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
            path = self.folder / job["path"]
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
        state = charts_view.view_state({name: tuple(value) for name, value in scores.items()}, job["group_by"])
        shown = tags.get(charts_view.VIEW_TAG)
        if shown is None or charts_view.decode_view(shown) != state:
            view = charts_view.encode_view("Forgetting curves", state, int(time.time() * 1000))
            self.client.set_experiment_tag(identity, "clplat.scores", json.dumps(scores))
            self.client.set_experiment_tag(identity, charts_view.VIEW_TAG, view)
        if not tags.get("mlflow.note.content"):
            link = charts_view.charts_url("", identity)
            self.client.set_experiment_tag(identity, "mlflow.note.content", f"[**Open the forgetting curves**]({link})")


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
    store = _absolute(uri or lines[0]["uri"])
    charts_view.check_server(store)
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
            raise TrackingError(f"{spill} could not be sent to {store}: {_first_line(error)}") from error
    spill.unlink()
    return len(lines)


def open_store(uri: str) -> MlflowClient:
    """A client of the store at `uri`; an SQLite file that does not exist is created.

    That happens under a file lock: of several processes that open a fresh file at once, MLflow lets all but one fail.

    Raises:
        Exception: whatever the store raises if it cannot be used.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # With MLflow's own seven retries, a call to a server that is away blocks for four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import sqlite3

    import filelock
    from mlflow import MlflowClient

    database = charts_view.database_path(uri)
    if database is None:
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # the outbox says it once
        return MlflowClient(tracking_uri=uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with filelock.FileLock(f"{database}.lock", timeout=120):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        connection = sqlite3.connect(database)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    return client


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with text values: {"a": {"b": 1}} gives {"a.b": "1"}. Lists stay one value."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: str(value)}
    return flat


def metric_key(name: str) -> str:
    """The nearest key that MLflow accepts: letters, digits, `_ - . : /` and blanks, no path detours, 250 characters."""
    clean = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(re.sub(r"\.\.+", "_", clean).strip("/") or "_")[:250]


def run_color(strategy: str) -> str:
    """The color of a strategy's runs in the UI: the same in every experiment, on every machine."""
    # With this number the strategies that come with clplat have colors of their own.
    digest = hashlib.sha256(f"{strategy}8664".encode()).digest()
    return PALETTE[int.from_bytes(digest[:4], "big") % len(PALETTE)]


def _absolute(uri: str) -> str:
    database = charts_view.database_path(uri)
    return uri if database is None else f"sqlite:///{database}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unusable(uri: str, error: Exception) -> TrackingError:
    return TrackingError(
        f"Cannot use the MLflow store {uri}: {_first_line(error)}. Give another one with tracking.uri=..., or correct "
        "or unset MLFLOW_TRACKING_URI."
    )


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = charts_view.database_path(uri)
        location = None if database is None else (database.parent / "mlruns" / metric_key(name)).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"The MLflow experiment {name!r} was deleted: restore it, or choose another one with tracking.experiment=..."
        )
    return found.experiment_id


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _table(results: ScoreTable, labels: Sequence[str]) -> dict[str, list[Any]]:
    # The form in which MLflow's UI shows a json file as a table.
    rows = [["untrained", *results.baseline.tolist()]]
    rows += [[f"after {label}", *row] for label, row in zip(labels, results.R.tolist(), strict=True)]
    data = [[None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows]
    return {"columns": ["trained", *labels], "data": data}
