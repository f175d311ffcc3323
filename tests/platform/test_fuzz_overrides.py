"""No override, however wrong, ends in a traceback, in a message without its key, or in a run of nonsense."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import torch


@pytest.fixture(autouse=True)
def _little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, and no more memory than a laptop has: what is absurdly large is refused, and not tried."""
    monkeypatch.chdir(tmp_path)
    threads, before = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    torch.set_num_threads(threads)


def faults(number: int, seed: int) -> list[str]:
    outcomes = [(case, fuzz.tried(case)) for case in fuzz.sample(number, seed)]
    assert len(outcomes) == number
    return [f"{case}: {outcome.fault}" for case, outcome in outcomes if outcome.fault]


def test_overrides_drawn_at_random_are_refused_by_name_or_harmless() -> None:
    assert faults(8, seed=20) == []


@pytest.mark.slow
def test_many_overrides_drawn_at_random_are_refused_by_name_or_harmless() -> None:
    """A hundred; `benchmarks/faults.py overrides` tries as many as wanted."""
    assert faults(100, seed=1) == []


def test_the_same_seed_draws_the_same_cases_of_every_group() -> None:
    drawn = fuzz.sample(2000, seed=5)
    assert drawn == fuzz.sample(2000, seed=5) != fuzz.sample(2000, seed=6)
    groups = {case.key.partition(".")[0] for case in drawn}
    assert groups >= {
        "strategy",
        "stream",
        "learner",
        "objective",
        "optimizer",
        "schedule",
        "training",
        "trainer",
        "seed",
    }
    assert {case.kind for case in drawn} == {"value", "unknown", "target", "partial"}


REFUSED = {
    "learner.net.layers=[1,2]": "learner.net.layers: got [1, 2], expected a whole number.",
    "learner.net.layers=1000000": "learner.net.layers: got 1000000, it must lie in 1..1000.",
    "learner.net.hidden=1000000000000": "learner.net.hidden: got 1000000000000, a whole number here may be at most",
    "learner=s4d learner.net.hidden=10000000": "learner.net.hidden: got 10000000, it must lie in 1..100000.",
    "learner.net.hidden=99999": "learner.net.hidden: got 99999, which needs ",
    "learner.clip_norm=''": "learner.clip_norm: got '', expected a number or null.",
    "stream.task_incremental=[true]": "stream.task_incremental: got [True], expected true or false.",
    "stream.order_seed=[1,2]": "stream.order_seed: got [1, 2], expected a whole number.",
    f"stream.order_seed={2**63}": "stream.order_seed: got 9223372036854775808, a whole number must fit into 64 bits.",
    "seed=-1": "seed: got -1, a seed must be at least 0.",
    f"seed={'9' * 5000}": "seed: got a number of 5000 digits",
    "strategy.bogus=1": "strategy.bogus: no strategy of that name was chosen.",
    "strategy.replay=null": "strategy.replay: no strategy of that name was chosen",
    "strategy.replay.seed={a:1}": "strategy.replay.seed: got {'a': 1}, expected a whole number.",
    f"strategy.replay.capacity={2**31}": "strategy.replay.capacity: got 2147483648, a whole number here may be at most",
    f"strategy.replay.policy={'x' * 5000}": "strategy.replay.policy: got 'xxx",
    "stream=parity stream.experiences=1000000": "stream.experiences: got 1000000, it must lie in 1..10000.",
    "stream=parity stream.test_size=-1": "stream.test_size: got -1, it must be at least 1.",
    "learner=retnet learner.net.mixer.base={a:1}": "learner.net.mixer.base: got {'a': 1}, expected a number.",
    "learner=retnet learner.net.mixer.base=-1": "learner.net.mixer.base: got -1, it must be above 0.",
    "learner=transformer learner.net.base=inf": "learner.net.base: got inf, it must be a finite number.",
    "learner=transformer learner.net.base=-1": "learner.net.base: got -1, it must be above 0.",
    "strategy=[gpm] strategy.gpm.batch_size={a:1}": "strategy.gpm.batch_size: got {'a': 1}, expected a whole number.",
    "strategy=[mas] strategy.mas.seed={a:1}": "strategy.mas.seed: got {'a': 1}, expected a whole number.",
    "strategy=[lagrangian] strategy.lagrangian.threshold=[1]": "strategy.lagrangian.threshold: got [1], expected a number or",
    "strategy=[lagrangian] strategy.lagrangian.rho=inf": "strategy.lagrangian.rho: got inf, it must be a finite number.",
    "strategy=[lagrangian] strategy.lagrangian.rho=-1": "strategy.lagrangian.rho: got -1, it must be at least 0.",
    "strategy=[lagrangian] strategy.lagrangian.slack=-1": "strategy.lagrangian.slack: got -1, it must be at least 0.",
    "strategy=[time_vectors] strategy.time_vectors.share=-1": "strategy.time_vectors.share: got -1, it must lie in 0..1.",
    "stream.task_incremental=true strategy=[chunked_hypernetwork] strategy.chunked_hypernetwork.embedding_std=1000000000000":
        "strategy.chunked_hypernetwork.embedding_std: got 1000000000000, which needs more than can be counted",
    "sweep=3": "sweep: got 3, expected a mapping.",
    "sweep.objective=[average]": "sweep.objective: got ['average'], expected text.",
    "sweep.bogus=1": "sweep.bogus",
    "strategy=[remind] strategy.remind.parts=0": "strategy.remind.parts: got 0, it must be at least 1.",
    f"stream=text stream.separator={'a' * 5000}": "stream.separator: got 'aaa",
    "training=null": "training=null: unknown",
    "learner.net._partial_=false": "learner.net._partial_: expected true, since clplat fills in inputs and head.",
    "stream._partial_=true": "stream._partial_: got true, and an object is wanted here: leave it out.",
    "stream.source._partial_=true": "stream.source._partial_: got true, and an object is wanted here: leave it out.",
    "optimizer._partial_=[1]": "optimizer._partial_: got [1], expected true or false.",
    "strategy.replay._target_=builtins.int": "strategy.replay._target_: 'builtins.int' is no name that a configuration may use",
    "strategy.replay._target_=torch.nn.Linear": "strategy.replay._target_: torch.nn.Linear is no Strategy: name a subclass",
    "learner.net._target_=clplat.loop.Run": "learner.net._target_: clplat.loop.Run is no Net: name a subclass",
    "~learner.net": "learner.net: it was taken out",
    "~learner.head": "learner.head: it was taken out",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_override_is_refused_in_one_line_that_begins_with_its_key(words: str) -> None:
    *chosen, override = words.split()
    case = fuzz.Case((*fuzz.BASE, *chosen, override), override.partition("=")[0].lstrip("~"), "", 0, "value")
    outcome = fuzz.tried(case)
    assert (outcome.code, outcome.fault) == (2, "")
    assert outcome.lines[0].startswith(REFUSED[words])


@pytest.mark.parametrize("override", ["experiment=null", "strategy.replay.seed=9223372036854775807", "optimizer.lr=1"])
def test_what_means_something_is_accepted(override: str) -> None:
    key, _, text = override.partition("=")
    outcome = fuzz.tried(fuzz.Case((*fuzz.BASE, override), key, text, 0, "value"))
    assert (outcome.code, outcome.lines, outcome.fault) == (None, (), "")
