"""Signals that end a process: heeded at once, or when a step is done and a checkpoint written; a second one ends it.

The exit code is 128 and the signal's number, as a shell has it: 129 SIGHUP, 130 SIGINT, 143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ENDING = [s for s in signal.Signals if s.name in ("SIGHUP", "SIGINT", "SIGTERM")]
"""The signals that ask a process to end; not every system has all three."""


class Stopped(SystemExit):
    """A signal asked this process to end.

    Args:
        number: of the signal.

    Attributes:
        exit_code: of the process.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)
        self.folder: Path | None = None
        """Folder of the run that was stopped, None before one was begun."""


class Pending:
    """A signal that waits until it is convenient.

    Attributes:
        number: of the signal that was received, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the first signal is only noted; a second one ends the process."""
        self.number = None
        with _handled(self._note):
            yield

    def insist(self) -> None:
        """Be asked first again, where a library has set a handler of its own."""
        if self.number is None and _may_handle():
            for one in ENDING:
                if signal.getsignal(one) != signal.SIG_IGN:
                    signal.signal(one, self._note)

    def heed(self) -> None:
        """Stop if a signal was received.

        Raises:
            Stopped: one was.
        """
        if self.number is not None:
            raise Stopped(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            _end(number, frame)
        self.number = number


@contextmanager
def heeded_at_once() -> Iterator[None]:
    """Inside, the first signal raises `Stopped` wherever the program is; a second one ends the process."""
    pending = Pending()

    def stop(number: int, frame: FrameType | None) -> None:
        pending._note(number, frame)
        pending.heed()

    with _handled(stop):
        yield


@contextmanager
def ending(line: str = "") -> Iterator[None]:
    """Inside, a signal ends the process without further ado: where nothing was begun, or all but the end is done.

    Args:
        line: said then.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, line.encode())
        _end(number, frame)

    with _handled(end):
        yield


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Set a handler for all three; what is ignored, as under nohup, stays so, and other threads can set none."""
    before = {s: signal.getsignal(s) for s in ENDING} if _may_handle() else {}
    before = {s: old for s, old in before.items() if old != signal.SIG_IGN}
    for one in before:
        signal.signal(one, handler)
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)
