"""Checks of options: what passes, and the sentence that says why a value does not."""

from __future__ import annotations

import math

import pytest

from clplat import checks


def test_values_that_are_allowed_pass():
    checks.one_of("mode", "a", ("a", "b"))
    checks.at_least(0, strength=0.0, rows=None)
    checks.above(0, rate=1e-9, other=None)
    checks.within(0, 1, gamma=0.0, share=1.0, other=None)
    checks.within(0, 1, below=True, dropout=0.999)
    checks.exactly_one(epochs=None, steps=3)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.one_of("mode", "c", ("a", "b")), "mode: got 'c', allowed are 'a', 'b'."),
        (lambda: checks.at_least(1, rows=0), "rows: got 0, it must be at least 1."),
        (lambda: checks.at_least(0, "0 is off", b=1, s=-0.5), "s: got -0.5, it must be at least 0 (0 is off)."),
        (lambda: checks.at_least(0, s=math.nan), "s: got nan, it must be at least 0."),
        (lambda: checks.above(0, lr=0), "lr: got 0, it must be above 0."),
        (lambda: checks.above(0, lr=math.nan), "lr: got nan, it must be above 0."),
        (lambda: checks.within(0, 1, gamma=1.5), "gamma: got 1.5, it must lie in 0..1."),
        (lambda: checks.within(0, 1, gamma=math.nan), "gamma: got nan, it must lie in 0..1."),
        (
            lambda: checks.within(0, 1, below=True, dropout=1.0),
            "dropout: got 1.0, it must be at least 0 and below 1.",
        ),
        (
            lambda: checks.exactly_one(epochs=1, steps=2),
            "epochs or steps: got epochs=1, steps=2; give exactly one of them and set the other to null.",
        ),
        (
            lambda: checks.exactly_one(a=None, b=None),
            "a or b: got a=None, b=None; give exactly one of them and set the other to null.",
        ),
    ],
)
def test_others_are_refused_in_one_sentence(check, message):
    with pytest.raises(ValueError) as caught:
        check()
    assert str(caught.value) == message
