"""The MLflow store: its address, a client of it, and the keys that it accepts. mlflow is imported when one is opened."""

from __future__ import annotations

import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from clplat.tracking import sqlite
from clplat.tracking.base import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlruns.db"


def default_uri(folder: Path | None = None) -> str:
    """The store to use when none is given: $MLFLOW_TRACKING_URI, else `mlruns.db` in `folder` (None: working directory)."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return without_password(given)
    return f"sqlite:///{(folder or Path.cwd()).resolve() / DATABASE}"


def without_password(uri: str) -> str:
    """The address itself, which must hold no password: it is printed, and stored with every run.

    Raises:
        TrackingError: it holds one; the message does not.
    """
    parts = urllib.parse.urlsplit(uri) if "://" in uri else None
    if parts is None:
        return uri
    user = parts.netloc.rpartition("@")[0]
    web = parts.scheme in ("http", "https")
    secret = re.search(r"(?i)(pass|pwd|secret|token|odbc_connect|key)\w*=", f"{parts.query}&{parts.fragment}")
    if (user if web else ":" in user) or secret:
        shown = f"{parts.scheme}://***@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise TrackingError(
            f"tracking.uri: {shown} holds a password, and addresses are printed and stored: give it without, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (a server), or PGPASSWORD or ~/.pgpass (PostgreSQL)."
        )
    return uri


def database_path(uri: str) -> Path | None:
    """The absolute file behind a `sqlite:///` address; None for any other store."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def absolute_uri(uri: str) -> str:
    """The same address with an absolute path, where it is that of an SQLite file."""
    database = database_path(without_password(uri))
    return uri if database is None else f"sqlite:///{database}"


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


def check_file(uri: str) -> None:
    """Refuse an SQLite file that is not there, where a run that began in it is to go on; opening would make a new one.

    Raises:
        TrackingError: it is not there.
    """
    database = database_path(uri)
    if database is not None and not database.exists():
        raise TrackingError(
            f"This run is in the MLflow store {database}, which is not there. If it was moved, work in the folder that "
            "holds it now, or name it with tracking.uri=sqlite:///PATH."
        )


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
    import filelock
    from mlflow import MlflowClient

    database = database_path(uri)
    if database is None:
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # the outbox says it once
        return MlflowClient(tracking_uri=uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    # Of each error SQLAlchemy and MLflow print a traceback and the whole statement; the outbox says it in one line.
    for noisy in ("alembic", "mlflow.store", "sqlalchemy.pool"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    with filelock.FileLock(f"{database}.lock", timeout=120):
        sqlite.prepare(database)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        sqlite.relocate(database)
    return client


def open_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of the MLflow experiment of this name; it is created if it does not exist.

    Raises:
        TrackingError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_path(uri)
        location = None if database is None else sqlite.artifacts(database, name).as_uri()
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
