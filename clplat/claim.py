"""Claim of a run's folder: one process at a time works on a run, and a folder holds one run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from clplat.checkpoint import LAST, PREVIOUS
from clplat.errors import UserError
from clplat.report.folder import ORIGIN, OUTCOME, WHERE

LOCK, OWNER = ".lock", ".running"
"""Files of a claimed folder: the lock, which stays, and who holds it."""

SWEEP = "multirun.yaml"
"""File that Hydra puts into the folder of a sweep."""


class ClaimError(UserError):
    """A folder that another process works in, that holds another run, or that cannot be written."""


_TRACES = (SWEEP, *ORIGIN, *OUTCOME, WHERE, LAST, PREVIOUS)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder alone; it is made where there is none, and goes again if it stays empty.

    Raises:
        ClaimError: the folder cannot be written, or another process works on the run in it.
    """
    made = not folder.exists()
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ClaimError(
            f"{folder}: another process works on this run ({_owner(folder)}): wait for its end, or stop it first."
        ) from None
    except OSError as error:
        raise ClaimError(
            f"output_dir: cannot write to {folder} ({os.strerror(error.errno or 0)}): choose another with output_dir=PATH."
        ) from error
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same
            (folder / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        if not any(path.name != LOCK for path in folder.iterdir()):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def alive(folder: Path) -> bool:
    """Whether a process works on the run in this folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def check_unused(folder: Path) -> None:
    """Refuse a folder that holds a run or a sweep.

    Raises:
        ClaimError: names what was found, and what to do.
    """
    found = next((name for name in _TRACES if (folder / name).exists()), None)
    if found is not None:
        resume = "" if found == SWEEP else f", or go on with that run by resume={folder}"
        raise ClaimError(
            f"output_dir: {folder} holds a {'sweep' if found == SWEEP else 'run'} already ({found}), and nothing is "
            f"overwritten: choose another folder{resume}"
        )


def check_unused_below(folder: Path) -> None:
    """Refuse a folder for a sweep that holds a run or a sweep, itself or below.

    Raises:
        ClaimError: names what was found, and what to do.
    """
    check_unused(folder)
    for name in (LAST, "config.yaml", "result.json"):
        for found in folder.rglob(name):
            raise ClaimError(
                f"hydra.sweep.dir: {folder} holds runs already ({found}), and a sweep's table shows the runs of its "
                "folder: choose another folder."
            )


def _owner(folder: Path) -> str:
    try:
        return (folder / OWNER).read_text(encoding="utf-8") or "it has just begun"
    except OSError:
        return "it has just begun"
