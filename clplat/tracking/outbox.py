"""Outbox of values and files for a store, sent by a background thread: adding never blocks, nothing is lost.

While the store is away the thread tries again, less and less often, and writes what waits to `unsent.jsonl` in the
run's folder. What is still unsent at the end stays there, and can be loaded into a new outbox.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

SPILL = "unsent.jsonl"
BATCH = 1000
FIELDS = ("key", "value", "step", "time")

Value = tuple[str, float, int, int]
"""Key, value, step, and ms since 1970."""

log = logging.getLogger(__name__)


class Store(Protocol):
    """One run of a tracking store. Every method raises when the store is away."""

    def send_values(self, values: list[Value]) -> list[Value]:
        """Send up to `BATCH` values in one request; returns those that the store will never take."""
        ...

    def steps(self, key: str) -> set[int]:
        """The steps at which the run holds a value under this key."""
        ...

    def do(self, job: dict[str, Any]) -> bool:
        """Do anything else: upload a file, set a tag, end the run. False if the store will never do it."""
        ...


class PlaceError(OSError):
    """A file that cannot be written where the store keeps files; the store itself is there."""


class Outbox:
    """Values and jobs that wait to be sent.

    Args:
        about: plain values that every line of the spill file repeats, so that it can be sent without the run.
        folder: where the spill file is.
        every: seconds between two sendings; doubled up to 10 while the store is away.

    Attributes:
        values: append to it from any thread.
        jobs: plain dicts; append to it from any thread. They go after the values, each on its own.
    """

    def __init__(self, about: dict[str, str], folder: Path, every: float = 1.0) -> None:
        self.about = about
        self.folder = folder
        self.values: deque[Value] = deque()
        self.jobs: deque[dict[str, Any]] = deque()
        self.store: Store | None = None
        self._every = every
        self._stored: dict[str, set[int]] | None = None
        self._sending: list[Value] = []
        self._refused: list[Value] = []
        self._file = threading.Lock()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def drop_stored(self) -> None:
        """From now on, drop values that the run already holds at the same key and step."""
        self._stored = {}

    def start(self, store: Store) -> None:
        """Send to `store` from now on, in the background."""
        self.store = store
        self._thread = threading.Thread(target=self._work, name="clplat-outbox", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> int:
        """Send what is left; give up after `timeout` seconds in which nothing went. Returns how much was left."""
        if self._thread is None or self._closing.is_set():
            return 0
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        left = math.inf
        while self._thread.is_alive() and len(self) < left:
            left = len(self)
            self._thread.join(timeout + 1)
        left = len(self)
        if left:
            self.keep()
            log.warning(
                "%d values, files or tags could not be sent to %s. They are kept in %s and sent when this run is "
                "resumed, or by `clplat sync %s`.",
                left, self.about.get("uri"), self.folder / SPILL, self.folder,
            )  # fmt: skip
        return left

    def __len__(self) -> int:
        """The number of values and jobs not sent yet."""
        return len(self.values) + len(self._sending) + len(self._refused) + len(self.jobs)

    def keep(self) -> None:
        """Write all that is not sent yet to the spill file, in one step; remove the file if that is nothing.

        A full disk, or a job that json cannot hold, is no reason to stop: the store may be back first.
        """
        with self._file:
            path = self.folder / SPILL
            # Copied in the order in which values wander, so that one on its way is written twice rather than not.
            waiting, sending, refused = list(self.values), list(self._sending), list(self._refused)
            lines: list[dict[str, Any]] = [
                dict(zip(FIELDS, value, strict=True)) for value in [*refused, *sending, *waiting]
            ]
            lines += list(self.jobs)
            try:
                if lines:
                    part = path.with_suffix(".part")
                    part.write_text("".join(json.dumps(self.about | line) + "\n" for line in lines), encoding="utf-8")
                    part.replace(path)
                else:
                    path.unlink(missing_ok=True)
            except (OSError, TypeError, ValueError) as error:
                log.warning("Could not write %s: %s", path, error)

    def load(self, lines: list[dict[str, Any]]) -> None:
        """Take over lines of a spill file."""
        for line in lines:
            content = {key: value for key, value in line.items() if key not in self.about}
            if "kind" in content:
                self.jobs.append(content)
            else:
                self.values.append((content["key"], content["value"], content["step"], content["time"]))

    def send(self) -> None:
        """Send everything now, in this thread.

        Raises:
            Exception: what the store raised; whatever was not sent is still here.
        """
        assert self.store is not None
        while self._sending or self.values:
            while self.values and len(self._sending) < BATCH:
                self._sending.append(self.values[0])
                self.values.popleft()
            new = [value for value in self._sending if self._is_new(value)]
            if new:
                self._refused += self.store.send_values(new)
            self._sending = []
        failure: Exception | None = None
        for _ in range(len(self.jobs)):  # one that fails, say a file that is gone, does not hold up the rest
            try:
                self.store.do(self.jobs[0])
                self.jobs.popleft()
            except Exception as error:
                # That the store is away matters more than that one of its folders cannot be written.
                failure = error if failure is None or isinstance(failure, PlaceError) else failure
                self.jobs.rotate(-1)
        if failure is not None:
            raise failure

    def _is_new(self, value: Value) -> bool:
        if self._stored is None:
            return True
        key = value[0]
        if key not in self._stored:
            assert self.store is not None
            self._stored[key] = self.store.steps(key)
        return value[2] not in self._stored[key]

    def _work(self) -> None:
        wait = self._every
        while not self._closing.wait(wait):
            wait = self._every if self._attempt() else min(2 * wait, 10.0)
        while not self._attempt() and time.monotonic() < self._deadline:
            time.sleep(0.5)

    def _attempt(self) -> bool:
        try:
            self.send()
        except Exception as error:
            if self._failure is None:
                reason = (str(error) or type(error).__name__).splitlines()[0][:300]
                if isinstance(error, PlaceError):
                    log.warning("%s. It is tried again; the file lies in the run's folder, %s.", reason, self.folder)
                else:
                    log.warning("%s is away; values are kept and sent later (%s).", self.about.get("uri"), reason)
            self._failure = error
            self.keep()
            return False
        if self._failure is not None:
            back = "The place" if isinstance(self._failure, PlaceError) else self.about.get("uri")
            log.warning("%s is back; what was kept has been sent.", back)
            self._failure = None
        if (self.folder / SPILL).exists():
            self.keep()
        return True
