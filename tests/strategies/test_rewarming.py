"""Re-warming, re-decaying and the infinite schedule: the rate at every step of a run, in one go or in two."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import Case
from tiny import Killed

from clplat import checkpoint
from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.learners.schedules import warmup_cosine
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.rehearsal_environment import RehearsalEnvironment
from clplat.strategies.rewarming import Rewarming, infinite, rewarmed
from clplat.strategy import Strategy
from clplat.streams.experience import Batch

K, N, LR = 3, 80, 0.05
stream = partial(tiny.stream, examples=80, features=4, alternating=True)
COURSE: dict[str, Any] = {
    "warmup": 100,
    "cooldown": 600,
    "anneal": 1500,
    "end": 2000,
    "constant": 0.55,
    "final": 0.1,
}


class Rates(Strategy):
    """Notes the rate of every step, and where its rows came from."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.replayed: list[float] = []

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        assert learner.optimizer is not None
        self.rates.append(learner.optimizer.param_groups[0]["lr"])
        self.replayed.append(0.0 if batch.source is None else float(batch.source.float().mean()))


def learner(strategies: dict[str, Strategy], **options: Any) -> Learner:
    return tiny.learner(Composite(strategies), stream(), lr=LR, **options)


def rates(trainer: Callable, strategy: Strategy, batch_size: int = 4, **options: Any) -> list[float]:
    """Factor of each step of a run of 3 experiences, 20 steps each."""
    noted = Rates()
    made = learner({"rewarming": strategy, "rates": noted}, **options)
    Run(stream(), made, trainer(), Training(batch_size=batch_size, epochs=1, chunk=7)).go()
    return [r / LR for r in noted.rates]


CASES = {"rewarming": Case({"warmup": 0.5}, off={"warmup": 0.0, "final": 1.0})}


@pytest.mark.parametrize("shape", ["cosine", "inverse_sqrt"])
def test_the_infinite_schedule_is_continuous(shape: str) -> None:
    at = partial(infinite, shape=shape, **COURSE)
    for joint in (COURSE["warmup"], COURSE["cooldown"], COURSE["anneal"]):
        assert at(joint - 1e-6) == pytest.approx(at(joint), abs=1e-6)
    steps = [at(t) for t in range(COURSE["end"] + 1)]
    assert max(abs(a - b) for a, b in pairwise(steps)) < 0.0105  # a step of the warm-up
    assert at(COURSE["warmup"]) == 1.0
    assert at(COURSE["end"]) == pytest.approx(0.1)
    assert steps[0] == pytest.approx(1 / 101)


def test_its_phases_by_hand() -> None:
    at = partial(infinite, **COURSE)
    assert at(49) == pytest.approx(50 / 101)
    assert at(350) == pytest.approx((1 + 0.55) / 2)  # half way down the cosine
    assert at(225) == pytest.approx(0.55 + 0.225 * (1 + math.cos(math.pi / 4)))
    assert {at(t) for t in range(600, 1500)} == {0.55}
    assert at(1750) == pytest.approx(math.sqrt(0.55 * 0.1))  # half way in the logarithm
    assert at(5000) == pytest.approx(0.1)
    root = partial(infinite, shape="inverse_sqrt", steepness=10.0, **COURSE)
    h = 1 / math.sqrt(6) - 1, 1 / math.sqrt(11) - 1
    assert root(350) == pytest.approx(1 - 0.45 * h[0] / h[1])
    assert root(350) < at(350)  # falls faster at first
    endless: dict[str, Any] = COURSE | {"anneal": None}
    forever = infinite(10**6, **endless)
    assert forever == 0.55


def test_annealing_from_above_the_constant_rate_does_not_jump() -> None:
    endless: dict[str, Any] = COURSE | {"anneal": None}
    at = partial(infinite, **endless | {"anneal": 300})
    assert at(300) == infinite(300, **endless)
    assert at(299) == pytest.approx(at(300), abs=0.01)
    assert at(2000) == pytest.approx(0.1)


def test_rewarming_is_the_schedule_of_that_form_in_every_experience(trainer: Callable) -> None:
    got = rates(trainer, Rewarming(warmup=0.2, final=0.1))
    one = warmup_cosine(20, 0.2, 0.1)
    assert got == pytest.approx([one(t) for t in range(20)] * K)
    assert got[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert got[19] == pytest.approx(0.1)
    assert rewarmed(0, 1, 0.0, 0.1) == 1.0  # a single step


def test_the_infinite_schedule_over_a_run(trainer: Callable) -> None:
    got = rates(trainer, Rewarming("infinite", warmup=0.2, cooldown=0.5, anneal=0.5))
    course: dict[str, Any] = COURSE | {"warmup": 4, "cooldown": 14, "anneal": 50, "end": 60}
    assert got == pytest.approx([infinite(t, **course) for t in range(60)])
    assert got[14:51] == pytest.approx([0.55] * 37)
    never = rates(trainer, Rewarming("infinite", warmup=0.2, cooldown=0.5, anneal=0.0))
    assert never[14:] == pytest.approx([0.55] * 46)


def test_it_multiplies_the_learners_own_schedule(trainer: Callable) -> None:
    got = rates(trainer, Rewarming(warmup=0.2), schedule=lambda steps: lambda step: 0.5 + step / steps)
    alone = rates(trainer, Rewarming(warmup=0.2))
    assert got == pytest.approx([a * (0.5 + (t % 20) / 20) for t, a in enumerate(alone)])


@pytest.mark.parametrize("mode", ["cosine", "infinite"])
@pytest.mark.parametrize("kill", [9, 27, 33, 55])
def test_killed_in_any_phase_the_rates_go_on(mode: str, kill: int, trainer: Callable, tmp_path: Path) -> None:
    """Steps 9, 27, 33 and 55 lie in the cooldown, twice in the constant phase, and in the annealing."""

    class Dying(Run):
        def save(self) -> None:
            super().save()
            if self.learner.steps == kill:
                raise Killed

    def start(kind: type[Run]) -> tuple[Run, Rates]:
        noted = Rates()
        made = learner({"rewarming": Rewarming(mode, 0.2, anneal=0.5), "rates": noted})
        often = Training(batch_size=4, epochs=1, chunk=7, checkpoint_every_n_steps=1)
        return kind(stream(), made, trainer(), often, folder=tmp_path), noted

    whole, expected = start(Run)
    whole.go()
    broken, before = start(Dying)
    with pytest.raises(Killed):
        broken.go()
    resumed, after = start(Run)
    resumed.resume(checkpoint.load(tmp_path / "last.ckpt"))
    resumed.go()
    assert len(before.rates) == kill
    assert before.rates + after.rates == expected.rates


def test_with_uniform_rehearsal_a_fixed_share_of_each_window_is_old(trainer: Callable) -> None:
    share, noted = 0.25, Rates()
    environment = RehearsalEnvironment("uniform", share, keep_steps=True)
    made = learner({"rewarming": Rewarming(), "environment": environment, "rates": noted})
    Run(stream(), made, trainer(), Training(batch_size=4, epochs=10)).go()
    assert made.steps == K * 200  # what is replayed takes the place of new examples
    assert sum(noted.replayed[:200]) == 0
    for k in (1, 2):
        own = torch.tensor(noted.replayed[200 * k : 200 * (k + 1)])
        assert float(own.mean()) == pytest.approx(share)
        windows = own.view(10, 20).mean(1)  # a pass each: the share is exact there
        assert torch.allclose(windows, torch.full((10,), share))
        for window in own.view(40, 5).mean(1).tolist():
            assert abs(window - share) < 4 * math.sqrt(share * (1 - share) / 20)
        assert float(own.std()) > 0.05  # mixed within the experience, not block by block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "linear"}, "mode: got 'linear', allowed are 'cosine', 'infinite'"),
        ({"shape": "linear"}, "shape: got 'linear', allowed are"),
        ({"warmup": 1.5}, "warmup: got 1.5, it must lie in 0..1"),
        ({"mode": "infinite", "final": 0.0}, "both must be above 0"),
        ({"warmup": 0.6, "cooldown": 0.6}, "together at most 1"),
        ({"steepness": 0.0}, "steepness: got 0.0, it must be above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewarming(**options)
