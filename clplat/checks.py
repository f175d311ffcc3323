"""Checks of options: each refuses a value in one sentence that says what was given and what is allowed.

A message begins with the option's name alone ("strength: got -1, ..."); whoever builds an object from a configuration
puts the rest of the key before it ("strategy.ewc.strength: ...").
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

LAYERS = 1_000
"""The most layers of a net."""

WIDTH = 100_000
"""The most features of a hidden layer: its square is the weights of a matrix."""

EXPERIENCES = 10_000
"""The most experiences of a generated stream: each is made before the first step."""


def shown(value: object) -> str:
    """A value as an error shows it: as Python writes it, with the middle left out where it is long."""
    short = reprlib.Repr()  # takes no arguments before Python 3.12
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlist = short.maxdict = 12
    return short.repr(value)


def one_of(name: str, given: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is none of `allowed`.

    Raises:
        ValueError: names all that are allowed.
    """
    if given not in allowed:
        raise ValueError(f"{name}: got {shown(given)}, allowed are {', '.join(map(repr, allowed))}.")


def at_least(least: float, hint: str = "", /, **given: float | None) -> None:
    """Refuse numbers below `least`, or not a number; None stands for a default that is found elsewhere.

    Args:
        least: the smallest that is allowed.
        hint: what the smallest value means ("0 is finetuning").
        given: numbers by the name of their option.

    Raises:
        ValueError: names the first that is too small.
    """
    for name, value in given.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}: got {value}, it must be at least {least:g}{f' ({hint})' if hint else ''}.")


def above(bound: float, hint: str = "", /, **given: float | None) -> None:
    """Refuse numbers that are not above `bound`; None stands for a default that is found elsewhere.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in given.items():
        if value is not None and not value > bound:
            raise ValueError(f"{name}: got {value}, it must be above {bound:g}{f' ({hint})' if hint else ''}.")


def within(low: float, high: float, hint: str = "", /, *, below: bool = False, **given: float | None) -> None:
    """Refuse numbers outside low..high; None stands for a default that is found elsewhere.

    Args:
        low: the smallest that is allowed.
        high: the largest that is allowed.
        hint: what to choose instead.
        below: `high` itself is not allowed.
        given: numbers by the name of their option.

    Raises:
        ValueError: names the first that lies outside.
    """
    for name, value in given.items():
        if value is not None and not (low <= value < high if below else low <= value <= high):
            bounds = f"be at least {low:g} and below {high:g}" if below else f"lie in {low:g}..{high:g}"
            raise ValueError(f"{name}: got {value}, it must {bounds}{f' ({hint})' if hint else ''}.")


def net_size(hidden: int, layers: int) -> None:
    """Refuse a net without features or layers, and one that no memory holds.

    Raises:
        ValueError: names `hidden` or `layers`.
    """
    within(1, WIDTH, hidden=hidden)
    within(1, LAYERS, layers=layers)


def exactly_one(**given: object) -> None:
    """Refuse options of which not exactly one is given.

    Raises:
        ValueError: names them all, with what was given.
    """
    if sum(value is not None for value in given.values()) != 1:
        names = " or ".join(given)
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{names}: got {shown}; give exactly one of them and set the other to null.")
