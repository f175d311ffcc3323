"""Tracking of a run in MLflow. Training never waits for the store, and no value is lost when the store goes away."""

from __future__ import annotations

import atexit
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.checks import at_least, within
from clplat.lightning import rank_zero_only
from clplat.report.figures import labels
from clplat.report.flatten import flatten
from clplat.report.folder import ORIGIN, OUTCOME
from clplat.tracking import about, base
from clplat.tracking.about import DataInput
from clplat.tracking.base import TrackingError, unusable
from clplat.tracking.curves import curve_values, shown
from clplat.tracking.limits import KEY, STEP, TAG, check_name, cut
from clplat.tracking.mlflow_run import MlflowRun, sync
from clplat.tracking.outbox import Outbox
from clplat.tracking.server import HOST
from clplat.tracking.store import (
    absolute_uri,
    check_file,
    check_server,
    default_uri,
    open_experiment,
    open_store,
)
from clplat.tracking.view import charts_url

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
        curves: at most so many experiences, evenly chosen, get a curve of their own; None: all, which makes K² / 2
            values of K experiences. R is in the run's folder anyway.
        log_model: upload checkpoints given to `log_checkpoint`.
        every: seconds between two sendings.
    """

    def __init__(
        self,
        folder: str | Path,
        experiment: str = "clplat",
        uri: str | None = None,
        curves: int | None = 20,
        log_model: bool = False,
        every: float = 1.0,
    ) -> None:
        at_least(0, curves=curves)
        within(0.01, 3600.0, every=every)
        check_name(experiment)
        self.uri = absolute_uri(uri or default_uri())
        self.folder = Path(folder).absolute()
        self.run_id = ""
        self.experiment_id = ""
        self.experiment = experiment
        self.client: MlflowClient | None = None
        """For what is not covered here. Its calls wait and raise."""
        self._curves = curves
        self._stream, self._names = "stream", list[str]()
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
        if run_id is not None:
            check_file(self.uri)
        flat = {key: str(value) for key, value in flatten(params).items()}
        flat |= {"stream.name": names.stream, "learner.name": names.learner, "strategy.name": names.strategy}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            client = open_store(self.uri)
            sync(self.folder, self.uri)
            self.experiment_id = open_experiment(client, self.experiment, self.uri)
            if run_id is None:
                origin = about.origin() | ({"sweep": cut(names.sweep, TAG)} if names.sweep else {})
                name = f"{names.strategy} {names.learner} {names.stream} seed {flat.get('seed', '?')}"
                run_id = str(client.create_run(self.experiment_id, tags=origin, run_name=cut(name, KEY)).info.run_id)
            else:
                client.update_run(run_id, status="RUNNING")
                self._outbox.drop_stored()
            store = MlflowRun(client, run_id, self.folder)
            store.log_params(flat)
        except TrackingError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            raise unusable(self.uri, error) from error
        self.run_id = self._about["run_id"] = run_id
        self.client = client
        self._outbox.start(store)
        atexit.register(self.close, "KILLED")
        self._upload(ORIGIN)
        self._stream = names.stream
        self._job("lines", experiment_id=self.experiment_id)
        if stream is not None:
            self._names = labels(len(stream), [experience.name for experience in stream])
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
        now, at = int(time.time() * 1000), min(max(int(step), -STEP), STEP)
        for key, value in metrics.items():
            try:
                self._outbox.values.append((key, float(value), at, now))
            except (TypeError, ValueError, OverflowError):
                log.warning("Not logged: %s = %r is not a number.", key, value)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._job("params", params={key: str(value) for key, value in flatten(params).items()})

    def log_results(self, results: Results) -> None:
        """Log the score on each experience trained so far, their average, and forgetting.

        Keys are `average <score>`, `forgetting` (of losses `forgetting in <score>`), with unseen classes masked
        `average <score> - seen classes`, and for up to `curves` experiences `<experience> - <stream> <score>`.
        """
        if results.all.finished in (1, results.all.experiences):
            fields = asdict(shown(results, self._stream, self._names, self._curves))
            self._job("view", experiment_id=self.experiment_id, score=results.all.score, shown=fields)
        if results.all.finished:
            self.log(curve_values(results, self._stream, self._names, self._curves), step=results.all.finished)

    def finish(self, metrics: Mapping[str, float], step: int) -> None:
        """Log `summary/<name>` for each metric that is defined, and upload tables, figures and the run's note."""
        self.log({f"summary/{name}": value for name, value in metrics.items() if not math.isnan(value)}, step)
        self._upload(OUTCOME)
        self.set_tag("mlflow.loggedArtifacts", about.TABLE)
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
        self._job("tag", key=key, value=cut(value, TAG))

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
        self._job("lines", experiment_id=self.experiment_id)
        return self._outbox.close(timeout)

    def charts_url(self, host: str = "") -> str:
        """The link that opens the forgetting curves; by default on the server that is logged to, else `clplat ui`'s."""
        return charts_url(host or self._host(), self.experiment_id)

    def where(self) -> str:
        if not self.run_id:
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
