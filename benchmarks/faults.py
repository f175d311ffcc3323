"""Kills and signals at random moments of real runs: is every run that went on the same as one that was left alone?

    python benchmarks/faults.py kills                    # SIGKILL, every strategy and every learner
    python benchmarks/faults.py signals                  # SIGTERM, SIGINT, SIGHUP
    python benchmarks/faults.py overrides --trials 700   # generated ones, of `tests/fuzz.py`
    python benchmarks/faults.py kills --only ewc --trials 5

A trial trains one of the runs of `digests.py`, with a checkpoint every third step and MLflow in an SQLite store, as
`clplat train` does. Moments are drawn evenly from the time between its first checkpoint and its last; every fifth is
drawn from the first two seconds of the process instead, its start-up or resume. Kills go on, with a resume after each,
until one to three of them hit the run inside an experience. What is left at the end is compared bit for bit with what
the same command left alone: the whole `last.ckpt` (weights, strategy, optimiser, random states, scores), all files of
the folder, and MLflow's values, params, inputs, artifacts and status. Left out are addresses, identifiers and times.
The runs of learners have `tracking=none`, since it is the same for all of them.

Processes are forked from this one, which has everything imported; each seeds its random generators by its number.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from digests import runs  # noqa: E402  # the environment and the path come first
from leftovers import assert_same  # noqa: E402
from lives import imported, killed, left_alone, stopped  # noqa: E402

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
        self._training: dict[str, float] = {}

    def words(self, name: str) -> list[str]:
        """Its command."""
        hidden = "[16]" if name == "learner mlp" else "16"
        learner = [f"learner.net.hidden={hidden}", "tracking=none"]
        return [*SHORT, *runs()[name], *(learner if name.startswith("learner ") else [self.store])]

    def whole(self, name: str) -> Path:
        """Folder of the run that was left alone."""
        return self.folder / f"whole-{list(runs()).index(name)}"

    def training(self, name: str) -> float:
        """Seconds from its first checkpoint to its last, when it is left alone."""
        if name not in self._training:
            self._training[name] = left_alone(self.words(name), self.whole(name))
        return self._training[name]


def kills(name: str, cases: Cases, cut: Path, draws: random.Random) -> Counter[str]:
    """One trial of SIGKILLs; what happened, counted."""
    done = killed(cases.words(name), cut, draws, cases.training(name), draws.randint(1, 3))
    assert_same(cases.whole(name), cut)
    return Counter({"exact": 1, **vars(done)})


def signals(name: str, cases: Cases, cut: Path, draws: random.Random) -> Counter[str]:
    """One trial of a signal that asks for an end; what happened, counted."""
    code, finished = stopped(cases.words(name), cut, draws, cases.training(name))
    if finished:
        assert_same(cases.whole(name), cut)
    what = "over before" if code == 0 else "in training, resumed, exact" if finished else "before training"
    return Counter({f"code {code}": 1, what: 1})


def overrides(given: argparse.Namespace) -> int:
    """Try generated overrides of every key, up to where training would begin; 1 if any came out wrong."""
    import fuzz

    resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, resource.RLIM_INFINITY))  # what asks for all memory is wrong
    total = Counter[str]()
    for case in fuzz.sample(given.trials, given.seed):
        outcome = fuzz.tried(case)
        total["wrong" if outcome.fault else "accepted" if outcome.code is None else "refused"] += 1
        if outcome.fault:
            print(f"{case}: {outcome.fault}", flush=True)
    print(f"{total.total()} overrides: {dict(total)}")
    return int(total["wrong"] > 0)


def lives(given: argparse.Namespace) -> int:
    """Do the trials of kills or signals, one run after the other; 1 if any failed."""
    trial = kills if given.what == "kills" else signals
    names = [name for name in runs() if any(word in name for word in given.only)]
    total, failed, cases = Counter[str](), 0, Cases(Path.cwd())
    imported()
    for i in range(given.first, given.trials):
        name, draws = names[i % len(names)], random.Random(f"{given.seed} {i}")
        try:
            found = trial(name, cases, Path.cwd() / f"cut-{i}", draws)
            total.update(found)
            print(f"{i} {name}: {dict(found)}", flush=True)
        except (AssertionError, TimeoutError) as error:
            failed += 1
            print(f"{i} {name}: FAILED: {error}", flush=True)
    print(f"{given.trials - given.first} trials: {dict(total)}; failed: {failed}")
    return int(failed > 0)


def main() -> int:
    """Do what was asked for in an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "signals", "overrides"])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to go on from")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, or of the choice of overrides")
    parser.add_argument("--only", nargs="*", default=[""], help="names of runs, or parts of them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        return overrides(given) if given.what == "overrides" else lives(given)


if __name__ == "__main__":
    sys.exit(main())
