"""Every Triton kernel compiles for GPUs that are not here, within their limits, with each Triton that is at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
FAMILIES = sorted(path.stem for path in (REPO / "kernels").glob("*_triton.py"))
OLD = "CLPLAT_OLD_TRITON"


def compiled(target: Path, old: str | None, *arguments: str) -> list[dict[str, object]]:
    """The figures that benchmarks/compile_kernels.py writes, in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [old, str(REPO), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "benchmarks/compile_kernels.py", *arguments, "--json", str(target)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert target.exists(), done.stdout + done.stderr
    return json.loads(target.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["installed", "old"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_without_spills(family: str, which: str, tmp_path: Path) -> None:
    """One choice of constants of each, for both architectures; without `--first` the command takes all of them, and
    widths that are no multiple of 16, in the better part of an hour."""
    old = os.environ.get(OLD) if which == "old" else None
    if which == "old" and not old:
        pytest.skip(f"set {OLD} to a folder with another Triton: pip install --no-deps --target DIR triton==3.6.0")
    found = compiled(tmp_path / "figures.json", old, "--first", "--families", family, "--arch", "80", "90")
    assert {(f["name"], f["arch"]): f["problems"] for f in found if f["problems"]} == {}
    assert {f["arch"] for f in found} == {80, 90}


def test_every_family_lists_its_kernels() -> None:
    """In a process of its own: interpreted functions have no name to list."""
    code = (
        "import importlib, sys\n"
        "for family in sys.argv[1:]:\n"
        "    module = importlib.import_module('clplat.kernels.' + family)\n"
        "    listed = {c.kernel.__name__ for c in module.compilations()}\n"
        "    assert listed, family\n"
        "    for c in module.compilations():\n"
        "        unknown = {*c.pointers, *c.constants, *c.scalars} - set(c.kernel.arg_names)\n"
        "        assert not unknown, (family, c.name, unknown)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    assert FAMILIES
    done = subprocess.run([sys.executable, "-c", code, *FAMILIES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_kernel_over_its_limits_is_reported(tmp_path: Path) -> None:
    """The check itself: a pattern without a kernel is an error, and so is what Triton cannot compile."""
    assert compiled(tmp_path / "none.json", None, "no_such_kernel") == []
    code = (
        "import json, sys; sys.path.insert(0, 'benchmarks')\n"
        "import compile_kernels\n"
        "from clplat.kernels import diagonal_triton as d\n"
        "from clplat.kernels.triton_support import Compilation\n"
        "one = next(c for c in d.compilations() if c.kernel is d.complex_forward)\n"
        "large = Compilation(one.kernel, one.pointers, {**one.constants, 'BT': 64, 'BD': 64}, warps=1)\n"
        "broken = Compilation(one.kernel, one.pointers, {**one.constants, 'BT': 24}, warps=1)\n"
        "print(json.dumps([compile_kernels.compiled(c, 90, True).problems for c in (large, broken)]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    large, broken = json.loads(done.stdout)
    assert any(re.fullmatch(r"spills \d+ bytes", problem) for problem in large)
    assert "no vectorised load" in large
    assert len(broken) == 1 and "arange's range must be a power of 2" in broken[0]
