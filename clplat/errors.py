"""Base of errors that are the user's to mend: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Says what was given, what is allowed and what to do.

    Attributes:
        code: the exit code of the command: 2 for what is refused before training, 1 for what happened in it.
    """

    code: int = 2
