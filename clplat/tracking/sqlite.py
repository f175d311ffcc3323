"""The SQLite file behind a store: whether it can be written, and its artifacts where it lies now.

MLflow writes absolute addresses of artifacts into the file and has no call that changes them. So the addresses of a
project folder that was copied or renamed are changed here, in the file.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from clplat.tracking.base import unusable
from clplat.tracking.limits import metric_key

LOCKED = 30.0
"""Seconds to wait for another process that writes."""


def prepare(database: Path) -> None:
    """Make the file, or look whether it can be written; it then lets one process write while others read (WAL).

    MLflow itself would try for minutes, and print hundreds of lines, before it said what is wrong.

    Raises:
        TrackingError: it cannot be read or written, is no database, or stays locked.
    """
    try:
        with closing(sqlite3.connect(database, timeout=LOCKED, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error as error:
        raise unusable(database, error) from error


def artifacts(database: Path, experiment: str) -> Path:
    """The folder for an experiment's artifacts: `mlruns/NAME` beside the file."""
    return database.resolve().parent / "mlruns" / metric_key(experiment)


def relocate(database: Path) -> None:
    """Let the addresses of artifacts point beside the file again, after it was copied or moved with its folder.

    New runs of an experiment write beside the file. Files of old runs are looked for there, if they are there.
    Experiments whose artifacts never lay beside a store as `artifacts` puts them are left alone.
    """
    with closing(sqlite3.connect(database, timeout=LOCKED)) as connection, connection:
        known = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for identity, name, address in known:
            old, new = _path(address), artifacts(database, name)
            beside_a_store = old is not None and old.as_posix().endswith(f"/mlruns/{metric_key(name)}")
            if old is None or not beside_a_store or old.resolve() == new:
                continue
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new.as_uri(), identity)
            )
            runs = connection.execute("SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (identity,))
            for run, place in runs.fetchall():
                if place.startswith(f"{address}/") and ((new / run).exists() or not (old / run).exists()):
                    moved = new.as_uri() + place.removeprefix(address)
                    connection.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (moved, run))


def _path(address: str | None) -> Path | None:
    """The absolute path behind `file:///...` or a bare path; None for artifacts that are elsewhere."""
    parts = urlsplit(address or "")
    path = Path(unquote(parts.path) if parts.scheme else parts.path)
    return path if parts.scheme in ("", "file") and path.is_absolute() else None
