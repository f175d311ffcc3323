"""What other packages say and do as they are imported, where the user's home folder cannot be written above all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADVICE = "set HOME to a folder that can be written"


@contextmanager
def unheard() -> Iterator[None]:
    """Import in here what imports matplotlib, as Lightning does, or Avalanche: what no run needs stays unsaid.

    matplotlib warns about its own folder, which `clplat doctor` tells; Avalanche's gem about a solver that it lacks.
    All speak as before once this is left.
    """
    said = logging.getLogger("matplotlib")
    before = said.level
    said.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no QP solver found")
            yield
    finally:
        said.setLevel(before)


def stopped_at_home(error: BaseException) -> bool:
    """Whether an import failed since it could not write to the home folder, as Avalanche's does."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | Path):
        return False
    home, named = Path.home().absolute(), Path(error.filename).absolute()
    return home in (named, *named.parents) or named in home.parents  # the latter where home itself is missing
