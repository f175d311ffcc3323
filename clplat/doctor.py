"""`clplat doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clplat._home import ADVICE, stopped_at_home, unheard
from clplat.errors import first_line

Finding = tuple[str, str, str]
"""What was looked at; "ok", "note" or "wrong"; what was found, and what to do."""

PACKAGES = (
    "torch", "pytorch-lightning", "hydra-core", "omegaconf", "pydantic", "mlflow", "avalanche-lib", "triton", "torchvision",
    "numpy", "scikit-learn", "numba",
)  # fmt: skip
_OPTIONAL = {
    "numba": "recurrences then run in torch, several times slower on the CPU: pip install 'clplat[cpu]'",
    "triton": "on a GPU recurrences then run as loops in torch, step by step; the CPU does not need it",
    "torchvision": "it downloads data sets and Avalanche needs it",
}


def main() -> int:
    """Print all findings; returns 1 if something is wrong."""
    findings = list(findings_of_all())
    table = Table(box=None, pad_edge=False, show_header=False)
    colour = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[red]wrong[/]"}
    for what, state, text in findings:
        table.add_row(what, colour[state], escape(text))  # paths and messages may hold brackets
    Console().print(table)
    return int(any(state == "wrong" for _, state, _ in findings))


def findings_of_all() -> Iterator[Finding]:
    """Findings in the order of the table."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _devices,
        _imports,
        _kernels,
        _data,
        _folder,
        _store,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield check.__name__.strip("_"), "wrong", f"{type(error).__name__}: {error}"


def _versions() -> Iterator[Finding]:
    yield "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield package, "ok", importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in _OPTIONAL:
                yield package, "note", f"not installed: {_OPTIONAL[package]}"
            else:
                yield package, "wrong", "not installed: pip install clplat"


def _devices() -> Iterator[Finding]:
    import torch

    yield "CPU", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads (threads=N changes it)"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            yield f"GPU {i}", "ok", f"{p.name}, {p.total_memory / 2**30:.0f} GiB (trainer=gpu)"
    else:
        reason = "this build of torch has no CUDA" if torch.version.cuda is None else "no device or no driver"
        yield "GPU", "note", f"none: {reason}; runs use the CPU"


def _imports() -> Iterator[Finding]:
    from clplat._torchvision import ensure_importable

    ensure_importable()
    advice: dict[str, str] = dict.fromkeys(
        ("pytorch_lightning", "torchvision", "avalanche"), "reinstall it to match torch"
    )
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("numba")
        advice["numba"] = "reinstall it (pip install 'clplat[cpu]'), or uninstall it"
    chosen = os.environ.get("MPLCONFIGDIR")
    for name, what in advice.items():
        failure = _failure(name)
        if failure is None:
            yield f"import {name}", "ok", ""
        elif stopped_at_home(failure):
            yield f"import {name}", "note", f"it keeps its settings in {Path.home()}, and cannot: to use it, {ADVICE}"
        else:
            yield f"import {name}", "wrong", f"{first_line(failure)}: {what}"
    if os.environ.get("MPLCONFIGDIR") != chosen:  # matplotlib, imported above, took a temporary folder
        yield (
            "matplotlib",
            "note",
            "it looks for fonts anew in every process (seconds), since its folder cannot be written: set MPLCONFIGDIR "
            "to one that can",
        )


def _failure(name: str) -> Exception | None:
    """Why a module cannot be imported, None if it can."""
    try:
        with warnings.catch_warnings(action="ignore"), unheard():  # Avalanche's, of a solver that nothing here uses
            importlib.import_module(name)
    except Exception as error:
        return error
    return None


def _kernels() -> Iterator[Finding]:
    import torch

    from clplat.kernels import backend

    if backend.HAS_NUMBA and not _failure("numba"):
        from clplat.kernels import numba_cache

        threads, kept = torch.get_num_threads(), numba_cache.folder(Path(backend.__file__).parent)
        if kept is not None:
            yield (
                "CPU kernels",
                "ok",
                f"compiled by numba at first use and kept in {kept}, on torch's {threads} threads",
            )
        else:
            advice = "no folder to keep them in can be written: set NUMBA_CACHE_DIR to one that can"
            yield "CPU kernels", "note", f"compiled by numba anew by every process (seconds), since {advice}"
    else:
        yield "CPU kernels", "note", f"none: {_OPTIONAL['numba']}"
    if not backend.HAS_TRITON:
        yield "GPU kernels", "note", f"none: {_OPTIONAL['triton']}"
    elif backend.interpreting():
        yield "GPU kernels", "note", "TRITON_INTERPRET=1 is set: Triton interprets them, for tests only; unset it"
    elif torch.cuda.is_available():
        yield "GPU kernels", "ok", "compiled by Triton at first use and kept"
    else:
        yield "GPU kernels", "note", "Triton is here, a GPU is not: they stay unused"


def _data() -> Iterator[Finding]:
    from clplat.streams import sources

    root = sources.resolve_data_root()
    yield "digits", "ok", "embedded in scikit-learn"
    for name in ("MNIST", "FashionMNIST"):
        folder = root / name / "raw"
        if folder.is_dir() and any(folder.glob("train-images-idx3-ubyte*")):
            yield name, "ok", str(folder)
        else:
            yield name, "note", f"not in {folder}: set CLPLAT_DATA_ROOT, or stream.source.download=true"


def _folder() -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        yield "output folder", "wrong", f"cannot write to {Path.cwd()}: {error.strerror}; set output_dir=PATH"
    else:
        free = shutil.disk_usage(Path.cwd()).free / 2**30
        state = "ok" if free > 1 else "wrong"
        yield "output folder", state, f"{Path.cwd() / 'runs'}, {free:.1f} GiB free"


def _store() -> Iterator[Finding]:
    from clplat.errors import UserError
    from clplat.tracking import store

    uri = store.default_uri()
    database = store.database_path(uri)
    if database is not None and not database.exists():
        yield "MLflow store", "ok", f"{uri}, made by the first run"
        return
    try:
        store.check_server(uri)
        store.open_store(uri)
        yield "MLflow store", "ok", uri
    except UserError as error:
        yield "MLflow store", "wrong", str(error)
