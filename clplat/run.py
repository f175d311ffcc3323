"""Where a run's classes are looked for first: `Run` and its `Training`; as `clplat.run(...)` it runs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from clplat.loop import Run
from clplat.notebook import run
from clplat.settings import Training

__all__ = ["Run", "Training"]


class _Callable(ModuleType):
    """A module that is the function of its name too, since importing it takes that function's place in `clplat`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
