"""Base of errors that are the user's to mend: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Says what was given, what is allowed and what to do.

    Attributes:
        code: the exit code of the command: 2 for what is refused before training, 1 for what happened in it.
    """

    code: int = 2


def first_line(error: BaseException) -> str:
    """First line of an error's message, its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
