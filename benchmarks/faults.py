"""Kills and signals at random moments of real runs: is every run that went on the same as one that was left alone?

    python benchmarks/faults.py kills               # SIGKILL, every strategy and every learner
    python benchmarks/faults.py signals             # SIGTERM, SIGINT, SIGHUP
    python benchmarks/faults.py kills --only ewc --trials 5

A trial trains one of the runs of `digests.py`, with a checkpoint every third step and MLflow in an SQLite store, as
`clplat train` does. It is killed one to three times, at moments drawn evenly from its length, and resumed from its
folder after each. What it left is then compared bit for bit with what the same command left alone: the whole
`last.ckpt` (weights, strategy, optimiser, random states, scores), all files of the folder, and MLflow's values, params,
inputs, artifacts and status. Left out are addresses, identifiers and times. Processes are forked from this one, which
has everything imported, and seed their random generators by themselves.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from digests import runs  # noqa: E402  # the environment and the path come first
from lives import assert_same, imported, killed, left_alone, stopped  # noqa: E402

SHORT = [
    "training.epochs=null", "training.steps=12", "training.batch_size=16", "training.log_every_n_steps=2",
    "training.checkpoint_every_n_steps=3", "progress=false", "threads=1", "seed=3",
]  # fmt: skip


class Cases:
    """Runs that were left alone, each made when it is first wanted.

    Args:
        folder: a temporary one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, f"tracking.uri=sqlite:///{folder}/mlruns.db"
        self._lengths: dict[str, float] = {}

    def words(self, name: str) -> list[str]:
        """Its command."""
        small = ["learner.net.hidden=16"] if name.startswith("learner ") else []
        return [*SHORT, *runs()[name], *small, self.store]

    def whole(self, name: str) -> Path:
        """Folder of the run that was left alone."""
        return self.folder / f"whole-{list(runs()).index(name)}"

    def length(self, name: str) -> float:
        """Seconds that it takes when it is left alone."""
        if name not in self._lengths:
            self._lengths[name] = left_alone(self.words(name), self.whole(name))
        return self._lengths[name]


def kills(name: str, cases: Cases, cut: Path, draws: random.Random) -> Counter[str]:
    """One trial of SIGKILLs; what happened, counted."""
    done = killed(cases.words(name), cut, draws, cases.length(name), draws.randint(1, 3))
    assert_same(cases.whole(name), cut)
    return Counter({"exact": 1, **vars(done)})


def signals(name: str, cases: Cases, cut: Path, draws: random.Random) -> Counter[str]:
    """One trial of a signal that asks for an end; what happened, counted."""
    code, finished = stopped(cases.words(name), cut, draws, cases.length(name))
    if finished:
        assert_same(cases.whole(name), cut)
    what = "over before" if code == 0 else "in training, resumed, exact" if finished else "before training"
    return Counter({f"code {code}": 1, what: 1})


def main() -> int:
    """Do the trials, one run after the other; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "signals"])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to go on from")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="*", default=[""], help="names of runs, or parts of them")
    given = parser.parse_args()
    imported()
    trial = kills if given.what == "kills" else signals
    names = [name for name in runs() if any(word in name for word in given.only)]
    total, failed = Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cases = Cases(Path(folder))
        for i in range(given.first, given.trials):
            name, draws = names[i % len(names)], random.Random(f"{given.seed} {i}")
            try:
                found = trial(name, cases, Path(folder) / f"cut-{i}", draws)
                total.update(found)
                print(f"{i} {name}: {dict(found)}", flush=True)
            except (AssertionError, TimeoutError) as error:
                failed += 1
                print(f"{i} {name}: FAILED: {error}", flush=True)
    print(f"{given.trials - given.first} trials: {dict(total)}; failed: {failed}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
