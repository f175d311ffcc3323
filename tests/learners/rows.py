"""Rows that the tests of single mixers and nets give to the tests of all: a new mixer edits no table but its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from clplat.learners.mixers.mixer import Mixer


@dataclass(frozen=True)
class Learns:
    """What a learner of `conf/learner` must exceed on selective copy (T 24, chance 1/6), see `test_learning.py`.

    Attributes:
        copy: accuracy after `steps`, at a learning rate of 0.006 for 150 steps and of 0.003 for more.
        steps: optimiser steps.
        options: overrides for this task.
        digits: accuracy on the digits after 300 steps without these overrides; None where there are none.
    """

    copy: float
    steps: int = 150
    options: tuple[str, ...] = ()
    digits: float | None = None


def collected(table: str) -> dict[str, Any]:
    """The rows of every test module here that has a table of this name.

    Args:
        table: LAWS (causal mixers, by name: made from D and H), AHEAD (those that look ahead), LEARNS.
    """
    found: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if re.search(rf"^{table}\b.*= {{", path.read_text(), re.MULTILINE):
            rows = getattr(import_module(f"learners.{path.stem}"), table)
            twice = found.keys() & rows.keys()
            assert not twice, f"{path.name}: {table} has rows of another test module again: {sorted(twice)}"
            found |= rows
    return found


def warmed(mixer: Mixer) -> Mixer:
    """With every weight in use: some are zero at initialisation."""
    torch.manual_seed(8)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer
