"""Compiled code on disk: kept, forgotten when a source changes, done without where no folder can be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import config

from clplat.kernels import numba_cache


def double(x: Any) -> Any:
    return x + x


def compile_anew() -> tuple[Any, bool]:
    """A result of `double`, compiled as if in a new process, and whether kept code was found."""
    function = numba_cache.njit()(double)
    result = function(np.float32(1.5))
    return result, sum(function.stats.cache_hits.values()) == 1


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled code."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "deep" / "er"))
    found = numba_cache.folder(Path(__file__).parent)
    assert found is not None and tmp_path in found.parents
    return found


def test_compiled_code_is_found_again_until_a_source_changes(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [compile_anew(), compile_anew()] == [(3.0, False), (3.0, True)]
    monkeypatch.setattr(numba_cache, "SOURCES", "others")
    assert [compile_anew(), compile_anew()] == [(3.0, False), (3.0, True)]
    assert len(list(kept.iterdir())) == 2  # an index and the code: what is out of date is overwritten


def test_the_digest_is_that_of_all_sources_but_tritons(tmp_path: Path) -> None:
    """Numba looks at the file of a function only, not at what that imports."""
    found = [numba_cache.digest(tmp_path)]
    for name, text in (("a.py", "one"), ("a.py", "two"), ("b.py", "two"), ("c.py", "")):
        (tmp_path / name).write_text(text)
        found.append(numba_cache.digest(tmp_path))
    assert len(set(found)) == 5
    (tmp_path / "a_triton.py").write_text("one")
    assert numba_cache.digest(tmp_path) == found[-1]


@pytest.mark.parametrize("torn", [b"", b"\x80", None])
def test_a_torn_file_costs_a_compilation(kept: Path, torn: bytes | None) -> None:
    compile_anew()
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:-40] if torn is None else torn)
    assert compile_anew() == (3.0, False)


def test_code_is_compiled_where_no_folder_can_be_written(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cache, "folder", lambda beside: None)
    assert [compile_anew(), compile_anew()] == [(3.0, False), (3.0, False)]


def test_code_is_compiled_where_a_folder_turns_out_not_to_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba_cache, "folder", lambda beside: tmp_path / "file" / "below")
    assert [compile_anew(), compile_anew()] == [(3.0, False), (3.0, False)]


def test_a_folder_below_a_file_is_passed_over_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "file"))
    assert numba_cache.folder(tmp_path) == tmp_path / "__pycache__"
    monkeypatch.setattr(numba_cache, "_writable", lambda path: False)
    assert numba_cache.folder(tmp_path) is None


def test_importing_compiled_kernels_leaves_every_file_as_it_is(tmp_path: Path) -> None:
    sources = Path(numba_cache.__file__).parent
    package = tmp_path / "clplat" / "kernels"
    shutil.copytree(sources, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cells_cpu.old.nbi").write_text("of another version")

    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}

    before = files()
    modules = ", ".join(f"clplat.kernels.{p.stem}" for p in package.glob("*_cpu.py"))
    subprocess.run([sys.executable, "-B", "-c", f"import {modules}"], cwd=tmp_path, check=True, timeout=120)
    assert files() == before


@pytest.mark.slow
def test_the_process_that_compiles_a_kernel_computes_what_those_after_it_do(tmp_path: Path) -> None:
    """Bit for bit: else a run that was killed in the first process would go on as another one."""
    code = (
        "import torch; torch.set_num_threads(1); torch.manual_seed(0)\n"
        "from clplat.kernels.cells import slstm\n"
        "from clplat.kernels.diagonal import rg_lru\n"
        "x = [torch.randn(3, 40, 37, requires_grad=True) for _ in range(3)]\n"
        "gates, u = torch.randn(3, 40, 1, 4, 37, requires_grad=True), torch.randn(1, 4, 37, 37) / 10\n"
        "for y, leaves in ((rg_lru(*x, torch.rand(37))[0], x), (slstm(gates, u)[0], [gates])):\n"
        "    for t in (y, *torch.autograd.grad(y.square().sum(), leaves)):\n"
        "        print(t.detach().numpy().tobytes().hex())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    )
    assert first and first == second
