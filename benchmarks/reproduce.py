"""Published accuracies again: experiments of `conf/experiment/`, seed by seed. Can be stopped at any time and goes on.

    python benchmarks/reproduce.py split_mnist_class_der_200 split_mnist_class_derpp_200      # these, 5 seeds each
    python benchmarks/reproduce.py 'split_mnist_class*' --seeds 0 1
    python benchmarks/reproduce.py --table                                                     # what is there so far

Each finished seed is one line of `reproduce.jsonl` in the output folder; seeds that have one are not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table

from clplat.train import Names, train

CONF = Path(__file__).parents[1] / "conf" / "experiment"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="names or patterns of conf/experiment")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides, as on the command line of clplat")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    log = given.output / "reproduce.jsonl"
    if not given.table:
        names = sorted(p.stem for p in CONF.glob("*.yaml"))
        for pattern in given.experiments:
            chosen = fnmatch.filter(names, pattern)
            if not chosen:
                parser.error(f"no experiment matches {pattern!r}; there are: {', '.join(names)}")
            for name in chosen:
                for seed in given.seeds:
                    run(name, seed, given.set, given.output, log)
    show(log)


def run(name: str, seed: int, overrides: list[str], output: Path, log: Path) -> None:
    """One seed, unless it is there already."""
    key = {"experiment": name, "seed": seed, "overrides": overrides}
    if any({k: line[k] for k in key} == key for line in lines(log)):
        return
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [f"experiment={name}", f"seed={seed}", "tracking=none", "progress=false", *overrides])
    started = time.time()
    torch.set_num_threads(1)
    folder = output / name / "_".join([str(seed), *(o.replace("/", "-") for o in overrides)])
    metrics = train(cfg, folder, Names("stream", "learner", "+".join(cfg.strategy)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=CONF).stdout
    line = key | {"metrics": metrics, "seconds": round(time.time() - started), "commit": commit.strip()}
    with log.open("a") as file:
        file.write(json.dumps(line | {"torch": torch.__version__}) + "\n")


def lines(log: Path) -> list[dict]:
    """What is there so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def show(log: Path) -> None:
    """Mean and standard deviation over seeds of every experiment in the log."""
    table = Table("experiment", "overrides", "average, %", "forgetting, %", "seeds")
    groups: dict[tuple[str, str], list[dict]] = {}
    for line in lines(log):
        groups.setdefault((line["experiment"], " ".join(line["overrides"])), []).append(line)
    for (name, overrides), several in sorted(groups.items()):
        cells = []
        for metric in ("average", "forgetting"):
            values = 100 * torch.tensor([line["metrics"][metric] for line in several], dtype=torch.float64)
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        table.add_row(name, overrides, *cells, " ".join(str(line["seed"]) for line in several))
    Console().print(table)


if __name__ == "__main__":
    main()
