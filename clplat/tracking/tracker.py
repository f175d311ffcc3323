"""Tracking of a run in MLflow. Training never waits for the store, and no value is lost when the store goes away."""

from __future__ import annotations

import atexit
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.lightning import rank_zero_only
from clplat.metrics import forgetting_so_far
from clplat.report.flatten import flatten
from clplat.report.folder import ORIGIN, OUTCOME
from clplat.tracking import about, base
from clplat.tracking.about import DataInput
from clplat.tracking.base import TrackingError
from clplat.tracking.mlflow_run import MlflowRun, sync
from clplat.tracking.outbox import Outbox
from clplat.tracking.server import HOST
from clplat.tracking.store import (
    absolute_uri,
    check_server,
    default_uri,
    first_line,
    metric_key,
    open_experiment,
    open_store,
)
from clplat.tracking.view import charts_url, experience_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from clplat.report.summary import Names
    from clplat.scores import Results
    from clplat.streams.experience import Stream

log = logging.getLogger(__name__)


class Tracker(base.Tracker):
    """One MLflow run. Processes of a rank other than 0 log nothing.

    Args:
        folder: the run's folder, whose files are uploaded; what could not be sent yet waits there.
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
        self.uri = absolute_uri(uri or default_uri())
        self.folder = Path(folder).absolute()
        self.run_id = ""
        self.experiment_id = ""
        self.experiment = experiment
        self.client: MlflowClient | None = None
        """For what is not covered here; the run is `run_id`. Its calls wait and raise."""
        self._group_by = list(group_by)
        self._log_model = log_model
        self._active = rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]  # Lightning sets it on the function
        self._about = {"uri": self.uri, "run_id": ""}
        self._outbox = Outbox(self._about, self.folder, every)

    def start(
        self,
        names: Names,
        params: Mapping[str, Any],
        stream: Stream | None = None,
        run_id: str | None = None,
    ) -> str:
        """Open the store and start a run, or go on with one.

        Args:
            names: of the run; params `stream.name`, `learner.name`, `strategy.name` and tag `sweep`.
            params: the resolved config, nested or flat; logged flattened with dots, values cut at 6000 characters.
            stream: shown as the run's data sets.
            run_id: the run to resume. Values it already holds at the same key and step are not logged twice.

        Returns:
            The MLflow run id; "" on ranks other than 0.

        Raises:
            TrackingError: the store cannot be reached or written; in less than 5 s for a server that is down.
        """
        if not self._active:
            return ""
        check_server(self.uri)
        flat = {key: str(value) for key, value in flatten(params).items()}
        flat |= {"stream.name": names.stream, "learner.name": names.learner, "strategy.name": names.strategy}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            client = open_store(self.uri)
            sync(self.folder, self.uri)
            self.experiment_id = open_experiment(client, self.experiment, self.uri)
            known: Mapping[str, str] = {}
            if run_id is None:
                shown = about.origin() | {"mlflow.runColor": about.run_color(names.strategy)}
                shown |= {"sweep": names.sweep} if names.sweep else {}
                name = f"{names.strategy} {names.learner} {names.stream} seed {flat.get('seed', '?')}"
                run_id = str(client.create_run(self.experiment_id, tags=shown, run_name=name).info.run_id)
            else:
                known = client.get_run(run_id).data.params
                client.update_run(run_id, status="RUNNING")
                self._outbox.drop_stored()
            store = MlflowRun(client, run_id, self.folder)
            store.log_params({key: value for key, value in flat.items() if metric_key(key) not in known})
        except TrackingError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            raise TrackingError(
                f"Cannot use the MLflow store {self.uri}: {first_line(error)}. Give another one with tracking.uri=..., "
                "or correct or unset MLFLOW_TRACKING_URI."
            ) from error
        self.run_id = self._about["run_id"] = run_id
        self.client = client
        self._outbox.start(store)
        atexit.register(self.close, "KILLED")
        self._upload(ORIGIN)
        if stream is not None:
            self.log_inputs(about.inputs(stream, params))
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

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._job("params", params={key: str(value) for key, value in flatten(params).items()})

    def log_results(self, results: Results) -> None:
        """Log the score on each experience trained so far, their average, and forgetting.

        Keys are `<score>/average`, `<score>/experience_00`..., `forgetting/average`, and with unseen classes masked
        `<score>_seen/average`. The experiment gets its saved view of these charts with the first row.
        """
        table, n = results.all, results.all.finished
        if n == 0:
            return
        if n == 1:
            fields = {"experiment_id": self.experiment_id, "score": table.score, "experiences": table.experiences}
            self._job("view", **fields, higher_is_better=table.higher_is_better, group_by=self._group_by)
        row = table.R[n - 1, :n]
        values = {f"{table.score}/average": float(row.mean()), "forgetting/average": forgetting_so_far(table)}
        values |= {experience_key(table.score, j): float(row[j]) for j in range(n)}
        if results.seen.finished == n:
            values[f"{table.score}_seen/average"] = float(results.seen.R[n - 1, :n].mean())
        self.log({key: value for key, value in values.items() if not math.isnan(value)}, step=n)

    def finish(self, metrics: Mapping[str, float], step: int) -> None:
        """Log `summary/<name>` for each metric that is defined, and upload tables, figures and the run's note."""
        self.log({f"summary/{name}": value for name, value in metrics.items() if not math.isnan(value)}, step)
        self._upload(OUTCOME)
        # The UI shows a json file as a table only if this tag names it.
        self.set_tag("mlflow.loggedArtifacts", json.dumps([{"path": "results_table.json", "type": "table"}]))
        if (self.folder / "table.md").exists():
            self.set_tag("mlflow.note.content", (self.folder / "table.md").read_text(encoding="utf-8"))

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
        """Write down what is not sent yet. A run that is killed, and resumed from there, then misses no value."""
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
        return charts_url(host or self._host(), self.experiment_id)

    def where(self) -> str:
        if not self._active or not self.run_id:
            return "not tracked"
        if self._host() == self.uri:
            return self.charts_url()
        store = "" if self.uri == default_uri() else f" --uri {self.uri}"
        return f"`clplat ui{store}`, then {self.charts_url()}"

    def _host(self) -> str:
        return self.uri if self.uri.startswith(("http://", "https://")) else HOST

    def _job(self, kind: str, **fields: Any) -> None:
        if self._active:
            self._outbox.jobs.append({"kind": kind, **fields})

    def _upload(self, files: Sequence[str]) -> None:
        for name in files:
            if (self.folder / name).exists():
                self.log_artifact(self.folder / name)
