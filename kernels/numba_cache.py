"""numba's `njit` for kernels, with compiled code kept on disk for as long as no source that it depends on changes.

Numba's own cache looks at the file of a function and not at what that imports (elementary functions, sizes of chunks):
old code would give old numbers, or write beyond arrays. Nor does it start where no folder can be written. Here code
carries the digest of all sources, and a file that cannot be read or written costs a compilation, nothing else. What is
out of date is overwritten; nothing is deleted, and nothing is written before code is compiled.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, config
from numba.misc.appdirs import AppDirs


def digest(sources: Path) -> str:
    """Of everything in a folder of kernels that numba's code can depend on; Triton's files are not among it."""
    files = sorted(p for p in sources.glob("*.py") if "triton" not in p.stem)
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


SOURCES = digest(Path(__file__).parent)


def folder(beside: Path) -> Path | None:
    """The folder of the compiled code of sources in `beside`: the first that can be written, or None.

    `NUMBA_CACHE_DIR` goes first, then `__pycache__`, then the user's cache.
    """
    own = caching.UserProvidedCacheLocator.get_suitable_cache_subpath(str(beside / "any.py"))
    chosen: str = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]  set as numba is imported
    user = AppDirs(appname="numba", appauthor=False).user_cache_dir
    candidates = [*([Path(chosen, own)] if chosen else []), beside / "__pycache__", Path(user, own)]
    return next((f for f in candidates if _writable(f)), None)


def _writable(path: Path) -> bool:
    """Whether files could be made in a folder, which need not exist: without making one."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(**options)` of which compiled code is kept, where there is a place for it."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(**options)(function)
        if folder(Path(function.__code__.co_filename).parent) is not None:
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled


class _Locator(caching._CacheLocator):  # its methods return None for a type checker, hence Any
    def __init__(self, py_file: str) -> None:
        self._py_file = py_file  # the base class's name, for its warnings

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return cls(py_file)

    def get_cache_path(self) -> Any:
        return str(folder(Path(self._py_file).parent))

    def get_source_stamp(self) -> Any:
        return SOURCES

    def get_disambiguator(self) -> Any:
        return "kernel"  # numba's is the line; a function that moves would leave its old file behind


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012  as the base class has it


class _Cache(caching.FunctionCache):
    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (OSError, EOFError, pickle.UnpicklingError):  # somebody else's file, or half a one
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except (OSError, EOFError, pickle.UnpicklingError):  # a full disk; the old index is read first
            self.disable()
