"""The SQLite file of a store: refused in one line and at once, and followed by its artifacts when it moves."""

import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tracked import NAMES, finish, results, run_of, started

from clplat.tracking import sqlite
from clplat.tracking.base import TrackingError
from clplat.tracking.sqlite import relocate
from clplat.tracking.store import open_store
from clplat.tracking.tracker import Tracker


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def copied(source: str | Path, target: Path) -> None:
    """Copy a database with what its log (WAL) holds."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


@pytest.fixture
def place(tmp_path, store) -> Path:
    """A folder with a store of its own, and one run with its files."""
    (tmp_path / "first").mkdir()
    copied(store.removeprefix("sqlite:///"), tmp_path / "first" / "mlruns.db")
    track(tmp_path / "first")
    return tmp_path / "first"


def track(folder: Path) -> Tracker:
    """A run in the store of a folder."""
    name = folder / f"run{len(list(folder.glob('run*')))}"
    name.mkdir()
    tracker = started(name, f"sqlite:///{folder}/mlruns.db", experiment="moving")
    finish(tracker, results())
    assert tracker.close() == 0
    return tracker


def test_a_copied_folder_keeps_its_files_and_a_renamed_one_finds_them(place):
    copy, renamed = place.parent / "copy", place.parent / "re named"
    before = files(place / "mlruns")
    shutil.copytree(place, copy)
    track(copy)
    assert files(place / "mlruns") == before
    assert len(files(copy / "mlruns")) == 2 * len(before)
    place.rename(renamed)
    last = track(renamed)
    assert not place.exists()
    assert len(files(renamed / "mlruns")) == 2 * len(before)
    client = open_store(f"sqlite:///{renamed}/mlruns.db")
    for run in client.search_runs([last.experiment_id]):
        assert str(run.info.artifact_uri).startswith((renamed / "mlruns").as_uri())
        assert len(client.list_artifacts(run.info.run_id)) == len(before)


def test_files_that_stayed_behind_are_still_found(place):
    (place.parent / "elsewhere").mkdir()
    copied(place / "mlruns.db", place.parent / "elsewhere" / "mlruns.db")
    old = files(place / "mlruns")
    new = track(place.parent / "elsewhere")
    client = open_store(f"sqlite:///{place.parent}/elsewhere/mlruns.db")
    addresses = [str(run.info.artifact_uri) for run in client.search_runs([new.experiment_id])]
    assert sorted(Path(address.removeprefix("file://")).parents[3].name for address in addresses) == [
        "elsewhere",
        "first",
    ]
    assert files(place / "mlruns") == old


def test_artifacts_that_never_lay_beside_a_store_are_left_alone(place):
    database = place / "mlruns.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        for name, address in (("s3", "s3://bucket/mlruns/s3"), ("own", "file:///data/own"), ("none", None)):
            connection.execute(
                "INSERT INTO experiments (name, artifact_location, lifecycle_stage, workspace) "
                "SELECT ?, ?, 'active', workspace FROM experiments LIMIT 1",
                (name, address),
            )
    relocate(database)
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT name, artifact_location FROM experiments WHERE name IN ('s3', 'own', 'none')"
        assert dict(connection.execute(query).fetchall()) == {
            "s3": "s3://bucket/mlruns/s3", "own": "file:///data/own", "none": None,
        }  # fmt: skip


def test_a_link_to_the_folder_changes_nothing(place):
    link = place.parent / "link"
    link.symlink_to(place)
    tracker = Tracker(link / "run9", "moving", f"sqlite:///{link}/mlruns.db", every=0.05)
    tracker.start(NAMES, {"seed": 1})
    tracker.close()
    assert run_of(tracker).info.artifact_uri.startswith((place / "mlruns").as_uri())


@pytest.mark.parametrize("broken", ["folder", "text", "locked"])
def test_a_file_that_cannot_be_used_is_one_line_at_once(tmp_path, monkeypatch, capfd, broken):
    database = tmp_path / "mlruns.db"
    monkeypatch.setattr(sqlite, "LOCKED", 0.1)
    if broken == "folder":
        database.mkdir()
    elif broken == "text":
        database.write_bytes(b"this is no database at all" * 1000)
    with closing(sqlite3.connect(":memory:" if broken != "locked" else database, isolation_level=None)) as other:
        if broken == "locked":
            other.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        with pytest.raises(TrackingError, match=r"Cannot use the MLflow store .*mlruns\.db: .* Give another") as caught:
            Tracker(tmp_path / "run", uri=f"sqlite:///{database}").start(NAMES, {"seed": 0})
    assert time.monotonic() - begun < 5
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_errors_of_the_database_in_a_run_are_one_line(tmp_path, store):
    copied(store.removeprefix("sqlite:///"), tmp_path / "mlruns.db")
    code = f"""
import sqlite3, time
from clplat.report.summary import Names
from clplat.tracking.tracker import Tracker
tracker = Tracker("{tmp_path}/run", uri="sqlite:///{tmp_path}/mlruns.db", every=0.1)
tracker.start(Names("s", "l", "x"), {{"seed": 0}})
time.sleep(1)
other = sqlite3.connect("{tmp_path}/mlruns.db", isolation_level=None, timeout=30)
other.execute("ALTER TABLE latest_metrics RENAME TO away")
tracker.log({{"a": 1.0}}, 0)
time.sleep(2)
other.execute("ALTER TABLE away RENAME TO latest_metrics")
print(tracker.close())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 2, done.stderr
    assert "is away; values are kept" in lines[0]
    assert "is back" in lines[1]
