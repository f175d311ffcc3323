"""Compiled kernels on one thread or on several, each compiled when it is first wanted.

numba takes three times as long to compile a loop for several threads, so small work, and processes with one thread,
never wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import torch

from clplat.kernels.numba_cache import njit

# Loops of the source only: to look for more in array expressions takes numba longer than all the rest.
_PRANGE = {
    "prange": True,
    **dict.fromkeys(("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False),
}


class Kernel:
    """A function with a loop over `numba.prange`, compiled for one thread and for several.

    Args:
        function: returns nothing; no two turns of its loop write to one place.
        options: numba's.
    """

    def __init__(self, function: FunctionType, options: dict[str, Any]) -> None:
        # A division that might raise ZeroDivisionError would not vectorise, and parallel loops never raise it.
        common = {"nogil": True, "error_model": "numpy", **options}
        twin = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_parallel")
        self._serial = njit(**common)(function)
        self._parallel = njit(**common, parallel=_PRANGE)(twin)

    def __call__(self, threads: int, *args: Any) -> None:
        """Run it on so many threads."""
        if threads == 1:
            self._serial(*args)
        else:
            _let_numba_use(threads)
            self._parallel(*args)


def kernel(**options: Any) -> Callable[[FunctionType], Kernel]:
    """Decorator that compiles a function with a loop over `numba.prange` as a `Kernel`."""
    return lambda function: Kernel(function, options)


def threads_worth(work: int, serial_below: int) -> int:
    """Threads that some work is worth: one, or as many as torch may use and numba has."""
    # Numba sets its options when it is imported, out of a type checker's sight.
    most: int = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    return 1 if work < serial_below else min(torch.get_num_threads(), most)


def _let_numba_use(threads: int) -> None:
    before = torch.get_num_threads()
    numba.set_num_threads(threads)
    # At its first call numba starts its threads, and where it shares OpenMP with torch that is a setting of both.
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
