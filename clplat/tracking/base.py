"""Contract of a tracker, and one that keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clplat.errors import UserError

if TYPE_CHECKING:
    from clplat.report.summary import Names
    from clplat.scores import Results
    from clplat.streams.experience import Stream


class TrackingError(UserError):
    """A tracking store that cannot be used; the message says what was tried and what to do."""


def unusable(store: object, error: Exception) -> TrackingError:
    """What to raise where opening a store raised an error."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrackingError(
        f"Cannot use the MLflow store {store}: {reason}. Give another one with tracking.uri=..., or correct or unset "
        "MLFLOW_TRACKING_URI."
    )


class Tracker(Protocol):
    """Copies what a run logs, and what lies in its folder, to some store.

    No method but `start` waits for the store or raises for it.

    Attributes:
        folder: of the run.
        experiment: name under which the store keeps this run with others.
        run_id: the store's name of this run, "" if it has none.
    """

    folder: Path
    experiment: str
    run_id: str

    def start(
        self,
        names: Names,
        params: Mapping[str, Any],
        stream: Stream | None = None,
        run_id: str | None = None,
    ) -> str:
        """Begin a run, or go on with one; returns its id.

        The folder holds the run's configuration and origin by now.

        Args:
            names: of the run.
            params: the resolved config, nested or flat.
            stream: what is learned.
            run_id: of the run to go on with; None for a new one.

        Raises:
            TrackingError: the store cannot be reached or written.
        """
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep some values.

        Args:
            metrics: by key.
            step: global step for training curves, number of experiences seen for stream metrics.
        """
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep further params, nested or flat. Those of `start` stand."""
        ...

    def log_results(self, results: Results) -> None:
        """Keep the last finished row of the scores."""
        ...

    def persist(self) -> None:
        """Make safe what was logged so far: a checkpoint is about to be written, and a resume starts there."""
        ...

    def finish(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep what a finished run is judged by, and its folder, which now holds scores, tables and figures.

        Args:
            metrics: `clplat.metrics.summary` of the scores.
            step: the number of experiences seen.
        """
        ...

    def log_checkpoint(self, path: Path) -> None:
        """Keep a checkpoint, if checkpoints are wanted."""
        ...

    def close(self, status: str = "FINISHED") -> Any:
        """End the run as FINISHED, FAILED or KILLED. A second call does nothing."""
        ...

    def where(self) -> str:
        """One line that tells where to look at this run's curves."""
        ...


class NoTracker(Tracker):
    """A tracker that keeps nothing.

    Args:
        folder: of the run; None: the working directory.
        experiment: not used, so that `tracking=none` goes with a configuration that names one.
    """

    def __init__(self, folder: Path | None = None, experiment: str = "clplat") -> None:
        self.folder, self.experiment, self.run_id = folder or Path(), experiment, ""

    def start(
        self,
        names: Names,
        params: Mapping[str, Any],
        stream: Stream | None = None,
        run_id: str | None = None,
    ) -> str:
        return ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_results(self, results: Results) -> None:
        pass

    def persist(self) -> None:
        pass

    def finish(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_checkpoint(self, path: Path) -> None:
        pass

    def close(self, status: str = "FINISHED") -> None:
        pass

    def where(self) -> str:
        return "not tracked (tracking=none)"
