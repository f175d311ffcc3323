"""Compile every Triton kernel for GPUs that are not there, and print what it takes of them.

    python benchmarks/compile_kernels.py [PATTERN ...] [--arch 80 90] [--families NAME ...] [--first] [--json FILE]

Registers, spills to local memory (none for want of registers), shared memory and the width of global loads, of every
entry of every `compilations()` in `kernels/*_triton.py`. Compilers and disassembler come with Triton's wheel: no CUDA
is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes the default, and with it bits and speed

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clplat.kernels.triton_support import Compilation

SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one block may have."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes spilled, bytes of shared memory, kinds of loads."""

    name: str
    arch: int
    aligned: bool
    registers: int
    spilled: int
    shared: int
    loads: list[str]
    problems: list[str]


def main() -> int:
    """See the module's docstring; returns 1 if a kernel does not compile or breaks a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="of kernel names")
    parser.add_argument("--arch", nargs="*", type=int, default=[80, 90], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--families", nargs="*", default=["*"], help="files of kernels, such as cells_triton")
    parser.add_argument("--first", action="store_true", help="of each kernel the first entry only, aligned")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    found = [
        compiled(one, arch, aligned)
        for path in sorted((Path(__file__).parents[1] / "kernels").glob("*_triton.py"))
        if any(fnmatch.fnmatch(path.stem, family) for family in given.families)
        for one in listed(path.stem, given.first)
        if any(fnmatch.fnmatch(one.name, pattern + "*") for pattern in given.patterns)
        for arch in given.arch
        for aligned in ((True,) if one.aligned_only or given.first else (True, False))
    ]
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(r) for r in found], indent=1))
    table = Table(box=None, title=f"Triton {triton.__version__}", title_justify="left")
    for column in ("kernel", "sm", "aligned", "registers", "spilled", "shared", "loads", "problems"):
        table.add_column(column, overflow="fold")
    for r in found:
        cells = (r.name, r.arch, r.aligned, r.registers, r.spilled, r.shared, " ".join(r.loads), "; ".join(r.problems))
        table.add_row(*map(str, cells))
    Console(width=200).print(table)
    return int(any(r.problems for r in found) or not found)


def listed(family: str, first: bool) -> list[Compilation]:
    """The entries of one file of kernels; of each kernel only the first one, where that is asked for."""
    found: list[Compilation] = importlib.import_module(f"clplat.kernels.{family}").compilations()
    if not first:
        return found
    return list({one.kernel.__name__: one for one in reversed(found)}.values())


def compiled(one: Compilation, arch: int, aligned: bool) -> Resources:
    """The figures of one kernel; `aligned` as Triton assumes for pointers and sizes that are multiples of 16.

    T and B are of the data, so their being multiples is never assumed, nor that of what a launch does not specialise on.
    """
    names = one.kernel.arg_names
    free = {"T", "B"} | {p.name for p in one.kernel.params if p.do_not_specialize}
    kinds = {**one.pointers, **one.scalars, **dict.fromkeys(one.constants, "constexpr")}
    multiples = {i for i, n in enumerate(names) if kinds.get(n, "i32")[0] in "*i" and n not in free}
    attrs = {(i,): [["tt.divisibility", 16]] for i in sorted(multiples)}
    source = ASTSource(
        fn=one.kernel,
        signature={n: kinds.get(n, "i32") for n in names},
        constexprs=dict(one.constants),
        attrs=attrs if aligned else None,
    )
    options = {"num_warps": one.warps, "num_stages": one.stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # any failure of the compiler is the finding
        return Resources(one.name, arch, aligned, 0, 0, 0, [], [f"{type(error).__name__}: {error}"[-300:]])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump.stdout)
    assert usage is not None, dump.stdout
    registers, spilled = map(int, usage.groups())
    loads = sorted(set(re.findall(r"ld\.global[.a-z0-9:]*", made.asm["ptx"])))
    problems = []
    # Two or four numbers of a thread in local memory, far from the limit of 255 registers, are the assembler's choice:
    # they let another block onto a multiprocessor, and come and go with its version.
    if spilled > 16 or (spilled and registers > 250):
        problems.append(f"spills {spilled} bytes")
    if made.metadata.shared > SHARED_LIMIT[arch]:
        problems.append(f"{made.metadata.shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
    if one.vector and aligned and not any(".v" in load for load in loads):
        problems.append("no vectorised load")
    return Resources(one.name, arch, aligned, registers, spilled, made.metadata.shared, loads, problems)


if __name__ == "__main__":
    sys.exit(main())
