"""Times of the recurrent kernels beside what else computes the same, alternating in one run.

    python benchmarks/kernels.py [--device cpu|cuda] [--rounds 9] [--threads 2] [--write] [PATTERN ...]

Each row group first checks its op against the float64 reference, values and gradients, in the dtype and on the device
that is timed; where the check fails no speed is printed and the exit code is 1. Every round times every side once, and
a copy of as many bytes as the op has to move, so that drift of a shared machine meets all alike. Printed: median
(minimum to maximum) over rounds; useful GB/s, which counts each input, output and gradient once; its share of the
copy's bandwidth; and the median of the rounds' own ratios to the first side. What cannot run here is listed as not
measured, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from clplat.kernels.cells import lstm, slstm
from clplat.kernels.delta import delta_rule
from clplat.kernels.diagonal import min_gru, scan
from clplat.kernels.matrix_state import matrix_state
from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.mixers.slstm import SLSTM

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass
class Group:
    """Sides that compute the same, or that a target sets beside one another.

    Attributes:
        name: what is computed, with its shape.
        sides: name -> a function that runs it once; the first is the one that the others are compared with.
        check: the relative error of the timed op against the float64 reference.
        tolerance: of that error.
        moved: useful bytes of one run of the ops that have a bandwidth, by side.
        steps: time steps, where the time of one is of interest.
        missing: sides that cannot run here, and why.
    """

    name: str
    sides: dict[str, Callable[[], object]]
    check: Callable[[], float]
    tolerance: float
    moved: dict[str, int] = field(default_factory=dict)
    steps: int | None = None
    missing: dict[str, str] = field(default_factory=dict)


def forward(op: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], *inputs: Tensor, **options: object) -> Tensor:
    """Outputs only, without gradients."""
    with torch.no_grad():
        return op(*inputs, **options)[0]


def both(op: Callable[..., tuple[Tensor, object]], leaves: list[Tensor], gradient: Tensor, *inputs: Tensor) -> None:
    """Forward and backward."""
    y, _ = op(*inputs)
    torch.autograd.grad(y, leaves, gradient)


def error(op: Callable[..., tuple[Tensor, object]], inputs: list[Tensor]) -> float:
    """The largest relative error, of outputs and gradients, against the reference in float64."""
    found = []
    for backend, dtype in (("reference", torch.float64), (None, None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y, _ = op(*leaves, backend=backend)
        found.append([y, *torch.autograd.grad(y.square().sum() / 2, leaves)])
    pairs = zip(*found, strict=True)
    return max(((a.double() - e).norm() / e.norm()).item() for e, a in pairs)


def leaf(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """A standard normal leaf that takes gradients."""
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def cumulative(a: Tensor, b: Tensor) -> tuple[Tensor, None]:
    """The same recurrence from cumulative sums of logarithms (Heinsen 2023): for positive a and b only."""
    total = a.log().cumsum(1)
    return (total + (b.log() - total).logcumsumexp(1)).exp(), None


def unbound(a: Tensor, b: Tensor) -> tuple[Tensor, None]:
    """A loop over time in torch, with autograd."""
    h, rows = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = torch.addcmul(b_t, a_t, h)
        rows.append(h)
    return torch.stack(rows, 1), None


def diagonal(device: torch.device) -> Iterator[Group]:
    """The diagonal linear recurrence."""
    if device.type == "cpu":
        rows, steps, width, dtype = 16, 1024, 256, torch.float32
    else:
        rows, steps, width, dtype = 8, 4096, 2048, torch.bfloat16
    size = rows * steps * width * dtype.itemsize
    shape = f"B {rows}, T {steps}, D {width}, {str(dtype).removeprefix('torch.')}"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    small = (2, min(steps, 300), 100)

    a = torch.rand(rows, steps, width, device=device).mul(0.98).add(0.01).to(dtype).requires_grad_()
    b = torch.rand(rows, steps, width, device=device).add(0.01).to(dtype).requires_grad_()
    dy = torch.randn_like(a)
    group = Group(
        f"K2 scan, forward and backward, {shape}",
        {
            "clplat": partial(both, scan, [a, b], dy, a, b),
            "log-cumsum-exp": partial(both, cumulative, [a, b], dy, a, b),
        },
        partial(error, scan, [leaf(device, dtype, *small).sigmoid().detach(), leaf(device, dtype, *small)]),
        tolerance,
        {"clplat": 8 * size},  # a, b in, h out; a, h, dh in, da, db out
    )
    if device.type == "cpu":
        group.sides["loop in torch"] = partial(both, unbound, [a, b], dy, a, b)
    yield group

    k, v = leaf(device, dtype, rows, steps, width), leaf(device, dtype, rows, steps, width)
    check = partial(error, min_gru, [leaf(device, dtype, *small), leaf(device, dtype, *small)])
    yield Group(
        f"K2 min_gru, forward, {shape}",
        {"clplat": partial(forward, min_gru, k, v)},
        check,
        tolerance,
        {"clplat": 3 * size},
    )
    yield Group(
        f"K2 min_gru, forward and backward, {shape}",
        {"clplat": partial(both, min_gru, [k, v], dy, k, v)},
        check,
        tolerance,
        {"clplat": 9 * size},
    )


def mixer_run(mixer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Forward and backward of a whole layer, with its input projection."""
    y = mixer(x)[0]
    torch.autograd.grad(y, [x, *mixer.parameters()], gradient)


def cell_run(project: nn.Linear, recurrent: Tensor, x: Tensor, gradient: Tensor) -> None:
    """Forward and backward of an sLSTM's recurrence with its input projection, and nothing else."""
    heads, _, width, _ = recurrent.shape
    y, _ = slstm(project(x).view(*x.shape[:2], heads, 4, width), recurrent)
    torch.autograd.grad(y.flatten(2), [x, recurrent, *project.parameters()], gradient)


def cells(device: torch.device) -> Iterator[Group]:
    """Fused nonlinear recurrences."""
    tolerance = 1e-5 if device.type == "cpu" else 2e-2
    if device.type == "cpu":
        rows, steps, width = 32, 128, 128
        x = leaf(device, torch.float32, rows, steps, width)
        dy = torch.randn(rows, steps, width)
        layers = {
            "LSTM": LSTM(width, width),
            "GRU": GRU(width, width),
            "Elman": Elman(width, width),
            "sLSTM": SLSTM(width, width),
        }
        sides: dict[str, Callable[[], object]] = {
            "nn.LSTM": partial(mixer_run, nn.LSTM(width, width, batch_first=True), x, dy)
        }
        sides |= {f"clplat {name}": partial(mixer_run, layer, x, dy) for name, layer in layers.items()}
        sides["clplat sLSTM, convolution and norm"] = sides.pop("clplat sLSTM")
        project, heads = (
            nn.Linear(width, 4 * width),
            leaf(device, torch.float32, 4, 4, width // 4, width // 4, scale=0.05),
        )
        sides["clplat sLSTM, the cell"] = partial(cell_run, project, heads, x, dy)
        sides["nn.GRU"] = partial(mixer_run, nn.GRU(width, width, batch_first=True), x, dy)
        check = [leaf(device, torch.float32, 3, 20, 2, 4, 16), leaf(device, torch.float32, 2, 4, 16, 16, scale=0.2)]
        yield Group(
            f"K1 layers, forward and backward, B {rows}, T {steps}, H {width}, float32",
            sides,
            partial(error, lstm, check),
            tolerance,
        )
        return
    rows, steps, heads, width, dtype = 16, 1024, 12, 64, torch.bfloat16
    gates = leaf(device, dtype, rows, steps, heads, 4, width)
    recurrent = leaf(device, dtype, heads, 4, width, width, scale=0.1)
    dy = torch.randn(rows, steps, heads, width, device=device, dtype=dtype)
    check = [leaf(device, dtype, 3, 50, 2, 4, width), leaf(device, dtype, 2, 4, width, width, scale=0.1)]
    dense = nn.LSTM(heads * width, heads * width, batch_first=True, device=device, dtype=dtype)
    x = leaf(device, dtype, rows, steps, heads * width)
    missing = {} if importlib.util.find_spec("flashrnn") else {"FlashRNN": "not installed"}
    shape = f"B {rows}, T {steps}, {heads} heads of {width}, bfloat16"
    yield Group(
        f"K1 LSTM, forward, {shape}",
        {"clplat": partial(forward, lstm, gates, recurrent)},
        partial(error, lstm, check),
        tolerance,
        steps=steps,
        missing=missing,
    )
    yield Group(
        f"K1 LSTM, forward and backward, {shape}",
        {
            "clplat": partial(both, lstm, [gates, recurrent], dy, gates, recurrent),
            f"cuDNN nn.LSTM({heads * width})": partial(mixer_run, dense, x, dy.flatten(2)),
        },
        partial(error, lstm, check), tolerance, steps=steps, missing=missing,
    )  # fmt: skip


def matrices(device: torch.device) -> Iterator[Group]:
    """Chunked matrix states."""
    if device.type == "cpu":
        rows, steps, heads, width, dtype, tolerance = 4, 512, 4, 32, torch.float32, 1e-5
    else:
        rows, steps, heads, width, dtype, tolerance = 8, 4096, 16, 128, torch.bfloat16, 2e-2
    shape = f"B {rows}, T {steps}, {heads} heads, K = V = {width}, {str(dtype).removeprefix('torch.')}"
    q, k, v = (leaf(device, dtype, rows, steps, heads, width, scale=width**-0.5) for _ in range(3))
    gate = torch.rand(rows, steps, heads, device=device).mul(-0.1).to(dtype).requires_grad_()
    vector = torch.rand(rows, steps, heads, width, device=device).mul(-0.1).to(dtype).requires_grad_()
    beta = torch.rand(rows, steps, heads, device=device).to(dtype).requires_grad_()
    unit = nn.functional.normalize(k.detach().float(), dim=-1).to(dtype).requires_grad_()
    dy = torch.randn_like(v)
    missing = {} if importlib.util.find_spec("fla") else {"flash-linear-attention": "not installed"}
    for name, op, inputs in (
        ("no gate", matrix_state, [q, k, v]),
        ("scalar gate", matrix_state, [q, k, v, gate]),
        ("vector gate", matrix_state, [q, k, v, vector]),
        ("delta rule", delta_rule, [q, unit, v, beta]),
    ):
        small = [x[:1, :100, :2].detach() for x in inputs]
        sides: dict[str, Callable[[], object]] = {"clplat": partial(both, op, inputs, dy, *inputs)}
        if device.type == "cpu":
            sides["loop in torch"] = partial(both, partial(op, backend="reference"), inputs, dy, *inputs)
        yield Group(
            f"K3 {name}, forward and backward, {shape}",
            sides,
            partial(error, op, small),
            tolerance,
            missing=missing if name == "scalar gate" else {},
        )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one run, on the device itself where it is a GPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measured(group: Group, rounds: int, device: torch.device) -> list[tuple[str, ...]] | None:
    """Rows of the table, or None where the check fails."""
    found = group.check()
    if not found <= group.tolerance:
        Console(stderr=True).print(f"[red]{group.name}: error {found:.1e} > {group.tolerance:.0e}: not timed[/]")
        return None
    sides = dict(group.sides)
    copied = 0
    if group.moved:
        copied = max(group.moved.values()) // 2  # read once and written once
        source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        sides["copy"] = partial(target.copy_, source)
        sides["copy to new memory"] = source.clone  # what an op does that returns new tensors
    for run in sides.values():
        run()  # compiles, and fills caches
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds(run, device))
    first = times[next(iter(sides))]
    rows = []
    for name, took in times.items():
        median = statistics.median(took)
        moved = 2 * copied if name.startswith("copy") else group.moved.get(name, 0)
        rate = moved / median / 1e9
        share = ""
        if moved and not name.startswith("copy"):
            share = f"{100 * statistics.median(c / t for c, t in zip(times['copy'], took, strict=True)) * moved / (2 * copied):.0f} %"
        ratio = statistics.median(t / f for t, f in zip(took, first, strict=True))
        rows.append((
            group.name, name, f"{1e3 * median:.3f} ({1e3 * min(took):.3f} to {1e3 * max(took):.3f})",
            f"{1e6 * median / group.steps:.2f}" if group.steps else "", f"{rate:.1f}" if moved else "", share, f"{ratio:.2f}",
        ))  # fmt: skip
    rows += [(group.name, name, f"not measured: {why}", "", "", "", "") for name, why in group.missing.items()]
    return rows


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="of row groups, such as 'K2*'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"append the table to {RESULTS.name}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    rows: list[tuple[str, ...]] = []
    failed = False
    for family in (diagonal, cells, matrices):
        for group in family(device):
            if any(fnmatch.fnmatch(group.name, pattern) for pattern in given.patterns):
                found = measured(group, given.rounds, device)
                failed |= found is None
                rows += found or [(group.name, "clplat", "not measured: the check failed", "", "", "", "")]
    header = ("what", "side", "ms, median (min to max)", "us a step", "useful GB/s", "of copy", "times first side")
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {given.threads} threads"
    )
    title = f"Kernels on {machine}, torch {torch.__version__}, {given.rounds} rounds, {datetime.date.today()}"
    table = Table(title=title, box=None, title_justify="left")
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=170).print(table)
    if given.write:
        extra = "triton " + version("triton") if device.type == "cuda" else "numba " + version("numba")
        lines = [f"\n## {title}\n", f"`python benchmarks/kernels.py --device {device.type}`; {extra}.\n"]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
