"""Evaluation leaves no trace: modes, random state and gradient mode are afterwards what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clplat.learners.modes import evaluating, preserving


def parts() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    made[2].eval()  # a part that was frozen before
    return made


@pytest.mark.parametrize("grad", [False, True])
def test_inside_everything_evaluates_and_afterwards_all_is_as_it_was(grad: bool) -> None:
    module = parts()
    modes, drawn = [m.training for m in module.modules()], torch.get_rng_state()
    with torch.set_grad_enabled(not grad):
        with evaluating(module, grad):
            assert not any(m.training for m in module.modules())
            assert module(torch.ones(2, 3)).requires_grad == grad
            torch.rand(3)
        assert torch.is_grad_enabled() == (not grad)
    assert [m.training for m in module.modules()] == modes
    assert modes == [True, True, True, False, False]
    assert torch.equal(torch.get_rng_state(), drawn)


def test_an_error_inside_leaves_no_trace_either() -> None:
    module, drawn = parts(), torch.get_rng_state()

    def fail() -> None:
        with preserving(module):
            module.eval()
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in module.modules()] == [True, True, True, False, False]
    assert torch.equal(torch.get_rng_state(), drawn)


def test_gradients_are_taken_in_full_precision_and_answers_in_the_trainers() -> None:
    module, x = nn.Linear(3, 3), torch.ones(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with evaluating(module, grad=True):
            assert module(x).dtype == torch.float32
        with evaluating(module):
            assert module(x).dtype == torch.bfloat16
