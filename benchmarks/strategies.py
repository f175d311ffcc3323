"""What each strategy costs: step time and bytes relative to finetuning, with an LSTM-128 on rows of MNIST, batch 64.

    python benchmarks/strategies.py [names ...] [--rounds 3] [--threads 2] [--write]

Every strategy of `conf/strategy/` runs with its defaults (stores of 500 examples) right after a finetuning run of the
same length; its ratio is the median of the rounds' own ratios. Only steps of the second and third experience count,
when there is a past. Consolidation is what happens between two experiences. Needs MNIST under CLPLAT_DATA_ROOT.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import Classification
from clplat.lightning import pl
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.experience import Stream
from clplat.streams.sources import mnist, resolve_data_root
from clplat.streams.split import split
from clplat.tracking.base import NoTracker

ROOT = Path(__file__).parents[1]
CHUNK, EXPERIENCES = 8, 3
OPTIONS = {
    "replay": ["capacity=500"],
    "der": ["capacity=500"],
    "derpp": ["capacity=500"],
    "er_ace": ["capacity=500"],
    "mir": ["capacity=500"],
    "agem": ["capacity_per_experience=250", "rows=64"],
    "gem": ["capacity_per_experience=250"],
}
BUDGETS = {"ewc": 1.4, "si": 1.4, "center_loss": 1.4, "replay": 2.2, "derpp": 3.3, "refresh": 2.3}


@dataclass
class Clock(pl.Callback):
    """Milliseconds a step, of each experience that was trained: from the end of its first chunk to that of its last."""

    steps: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new experience."""
        self.ends = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The end of a chunk."""
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of the experience."""
        self.steps.append(1000 * (self.ends[-1] - self.ends[0]) / (CHUNK * (len(self.ends) - 1)))


class Ledger(NoTracker):
    """Keeps what a run logs of its cost."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.bytes = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note consolidation and bytes."""
        if "cost/consolidation_seconds" in metrics:
            self.seconds.append(metrics["cost/consolidation_seconds"])
            self.bytes = metrics["cost/stored_bytes"]


def measure(name: str, stream: Stream, steps: int) -> tuple[float, float, float]:
    """Milliseconds a step with a past, seconds of consolidation, bytes stored at the end."""
    overrides = [f"strategy.{name}.{o}" for o in OPTIONS.get(name, [])]
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [f"strategy=[{name}]", "seed=0", *overrides])
    strategy = instantiate(cfg.strategy[name], _convert_="all")
    torch.manual_seed(0)
    head: Any = partial(Head, outputs=stream.outputs)
    if stream.scenario == "task_incremental":
        head = partial(TaskHead, outputs=stream.outputs, tasks=[e.classes for e in stream])
    net = recurrent(stream.inputs, head, mixer=LSTM, hidden=128)
    learner = Learner(net, Classification(), Composite({name: strategy}), partial(torch.optim.Adam, lr=1e-3))
    clock, ledger = Clock(), Ledger()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    Run(
        stream,
        learner,
        trainer,
        Training(batch_size=64, steps=steps, chunk=CHUNK, log_every_n_steps=CHUNK),
        tracker=ledger,
    ).go()
    with_past = clock.steps[1:]
    mean_step = statistics.mean(with_past) if with_past else float("nan")
    return mean_step, statistics.mean(ledger.seconds), ledger.bytes


def streams(examples: int) -> dict[bool, Stream]:
    """Row MNIST with and without task labels, few examples an experience and hardly any to score."""
    data = mnist(data_root=str(resolve_data_root(None)), download=False)
    made = {}
    for tasks in (False, True):
        whole = split(data, experiences=5, layout="rows", task_incremental=tasks)
        for experience in whole:
            for part, count in ((experience.train, examples), (experience.test, 10)):
                part.rows = part.rows[:count]  # type: ignore[attr-defined]  # tensors in memory, as `split` makes them
        made[tasks] = Stream(**{**vars(whole), "experiences": whole.experiences[:EXPERIENCES]})
    return made


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = sorted(p.stem for p in (ROOT / "conf/strategy").glob("*.yaml") if p.stem not in ("custom", "finetune"))
    parser.add_argument("names", nargs="*", default=[], choices=[*there, []], metavar="names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="append the table to benchmarks/RESULTS.md")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    ready = streams(examples=2000)
    ratios: dict[str, list[float]] = {}
    cost: dict[str, tuple[float, float]] = {}
    baselines: list[float] = []
    measure("finetune", ready[False], given.steps)  # warm up
    for _ in range(given.rounds):
        for name in given.names or there:
            stream = ready[name == "packnet"]
            plain, _, _ = measure("finetune", stream, given.steps)
            step, seconds, size = measure(name, stream, given.steps)
            baselines.append(plain)
            ratios.setdefault(name, []).append(step / plain)
            cost[name] = (seconds, size)
    table = render(ratios, cost, baselines, given)
    print(table)
    if given.write:
        path = ROOT / "benchmarks" / "RESULTS.md"
        path.write_text(path.read_text().rstrip() + "\n\n" + table)


def render(
    ratios: Mapping[str, list[float]],
    cost: Mapping[str, tuple[float, float]],
    baselines: list[float],
    given: argparse.Namespace,
) -> str:
    """The table, with the machine and the protocol."""
    lines = [
        f"## Cost of strategies, {datetime.date.today()}",
        "",
        f"`python benchmarks/strategies.py --rounds {given.rounds} --steps {given.steps} --threads {given.threads}`; "
        f"{platform.processor() or platform.machine()}, {given.threads} threads, torch {torch.__version__}. LSTM-128 on rows "
        f"of MNIST, batch 64; finetuning takes {statistics.median(baselines):.1f} ms a step (median of "
        f"{len(baselines)} runs, {min(baselines):.1f} to {max(baselines):.1f}). Median (minimum to maximum) over rounds.",
        "",
        "| strategy | step time, times finetuning | budget | consolidation, s an experience | bytes stored |",
        "|---|---|---|---|---|",
    ]
    for name, several in sorted(ratios.items()):
        seconds, size = cost[name]
        middle = statistics.median(several)
        trains = middle == middle
        shown = (
            f"{middle:.2f} ({min(several):.2f} to {max(several):.2f})" if trains else "trains nothing after the first"
        )
        budget = f"{BUDGETS[name]} ({'met' if middle <= BUDGETS[name] else 'missed'})" if name in BUDGETS else ""
        lines.append(f"| `{name}` | {shown} | {budget} | {seconds:.2f} | {size:,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
