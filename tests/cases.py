"""Rows of the conformance test: how each strategy is run there.

A row stands beside the strategy's oracle, in `CASES` of `tests/strategies/test_NAME.py`, under the name of its yaml.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "strategies"


@dataclass(frozen=True)
class Case:
    """How a strategy is tested.

    Attributes:
        options: what differs from its yaml, so that it acts on 3 experiences of 50 sequences.
        off: further options with which it must equal finetuning bit for bit; None where the method has no such switch.
            {} says that it never changes a weight.
        tasks: True if it needs task labels.
        refused: what it cannot be combined with, and a pattern of the reason that is given: {"replay": "..."}.
        hidden_by: partners in whose company the weights are the same without it, and why: {"replay": "..."}.
        hides: partners that change no weight in its company, and why.
        not_counted: patterns of state keys that are no store of the past (scratch of the current experience).
        borrows: True if it reads old training sets from the stream: stored_bytes counts them, and no state holds them.
        saves: checkpoints that a run writes with one after every step, if fewer than 9: it may train nothing for a while.
    """

    options: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = None
    tasks: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    hidden_by: dict[str, str] = field(default_factory=dict)
    hides: dict[str, str] = field(default_factory=dict)
    not_counted: tuple[str, ...] = ()
    saves: int = 9
    borrows: bool = False


def collected() -> dict[str, Case]:
    """The rows of all test files of strategies, by name.

    Raises:
        ValueError: two files have a row of one name.
    """
    cases: dict[str, Case] = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        if "\nCASES = {" not in path.read_text():
            continue
        name = f"cases_of_{path.stem}"  # not pytest's own name for it: pytest rewrites its asserts when it imports
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if twice := sorted(cases.keys() & module.CASES.keys()):
            raise ValueError(f"{path.name}: another file has a row for {twice[0]!r} already: delete one.")
        cases |= module.CASES
    return cases
