"""Handover of an optimiser: fresh or kept over experiences, in and out of a checkpoint, and averaging ones."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from clplat.learners.handover import Handover
from clplat.learners.optimizers import NTASGD, Averaging


def groups(weight: nn.Parameter) -> list[dict]:
    return [{"params": [weight]}]


def step(handover: Handover, weight: nn.Parameter) -> None:
    assert handover.optimizer is not None
    weight.grad = torch.ones_like(weight)
    handover.optimizer.step()


def moments(handover: Handover) -> int:
    """Steps that Adam's moments have seen."""
    assert handover.optimizer is not None
    return int(sum(state["step"] for state in handover.optimizer.state.values()))


def test_a_fresh_one_forgets_and_a_kept_one_goes_on():
    for kept, expected in ((False, 0), (True, 1)):
        weight = nn.Parameter(torch.zeros(2))
        handover = Handover(torch.optim.Adam, kept)
        handover.begin(groups(weight))
        step(handover, weight)
        handover.end(lambda weight=weight: groups(weight))
        assert (handover.state(inside=False) is not None) == kept
        handover.begin(groups(weight))
        assert moments(handover) == expected


def test_forgotten_state_does_not_come_back():
    weight = nn.Parameter(torch.zeros(2))
    handover = Handover(torch.optim.Adam, True)
    handover.begin(groups(weight))
    step(handover, weight)
    handover.end(lambda: groups(weight))
    handover.forget()
    handover.begin(groups(weight))
    assert moments(handover) == 0


def test_a_checkpoint_inside_an_experience_holds_the_moments_and_is_used_once():
    for kept in (False, True):
        weight = nn.Parameter(torch.zeros(2))
        old = Handover(torch.optim.Adam, kept)
        old.begin(groups(weight))
        step(old, weight)
        new = Handover(torch.optim.Adam, kept)
        new.resume(old.state(inside=True))
        new.begin(groups(weight))
        assert moments(new) == 1
        new.end(lambda weight=weight: groups(weight))
        new.begin(groups(weight))
        assert moments(new) == (1 if kept else 0)


def test_a_run_resumed_after_the_last_step_hands_on_what_the_checkpoint_holds():
    weight = nn.Parameter(torch.zeros(2))
    old = Handover(torch.optim.Adam, True)
    old.begin(groups(weight))
    step(old, weight)
    new = Handover(torch.optim.Adam, True)
    new.resume(old.state(inside=True))
    new.end(lambda: groups(weight))  # nothing was left to train
    new.begin(groups(weight))
    assert moments(new) == 1


def test_rates_are_multiples_of_those_it_was_made_with():
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    handover = Handover(partial(torch.optim.SGD, lr=0.5), False)
    optimizer = handover.begin([{"params": [one]}, {"params": [two], "lr": 2.0}])
    for factor in (0.5, 0.5, 1.0, 0.25):
        handover.set_rate(factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 2.0 * factor]


class Mean(torch.optim.SGD):
    """An averaging optimiser of a user's own: it answers with a fixed weight."""

    def observe(self, loss, held_out):
        self.last = loss

    def averaged(self):
        from contextlib import contextmanager

        @contextmanager
        def inside():
            (weight,) = self.param_groups[0]["params"]
            before = weight.detach().clone()
            with torch.no_grad():
                weight.fill_(7.0)
            yield
            with torch.no_grad():
                weight.copy_(before)

        return inside()

    def finish(self):
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(7.0)


def test_any_optimiser_that_averages_is_asked_for_its_average():
    assert isinstance(NTASGD([nn.Parameter(torch.zeros(1))]), Averaging)
    assert not isinstance(torch.optim.Adam([nn.Parameter(torch.zeros(1))]), Averaging)
    weight = nn.Parameter(torch.zeros(2))
    handover = Handover(partial(Mean, lr=0.5), False)
    handover.begin(groups(weight))
    with handover.averaged():
        assert weight.tolist() == [7.0, 7.0]
    assert weight.tolist() == [0.0, 0.0]
    handover.end(lambda: groups(weight))
    assert weight.tolist() == [7.0, 7.0]


def test_without_averaging_nothing_happens_inside():
    weight = nn.Parameter(torch.ones(2))
    handover = Handover(torch.optim.Adam, False)
    with handover.averaged():
        assert weight.tolist() == [1.0, 1.0]
