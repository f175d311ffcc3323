"""benchmarks/reproduce.py: goes on where it was stopped, and keeps what differs apart."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "reproduce.py"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program as a module; training is replaced by a number for each seed."""
    spec = importlib.util.spec_from_file_location("reproduce", PATH)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.folders = []

    def train(cfg: Any, folder: Path, names: Any) -> dict[str, float]:
        module.folders.append(folder)
        return {"average": 0.5 + 0.1 * cfg.seed, "forgetting": 0.25}

    monkeypatch.setattr(module, "train", train)
    return module


def test_it_goes_on_and_shows_mean_and_spread(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--output", str(tmp_path), *words])
        program.main()
        return capsys.readouterr().out

    assert "50.0" in call("row_mnist", "--seeds", "0")
    shown = call("row_mnist", "--seeds", "0", "1", "2")
    assert "60.0 ± 10.0" in shown and "0 1 2" in shown
    assert len(program.folders) == 3  # seed 0 was there
    call("row_mnist", "--seeds", "0", "--set", "optimizer.lr=0.5")
    assert len(program.folders) == len(set(program.folders)) == 4
    lines = [json.loads(line) for line in (tmp_path / "reproduce.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["overrides"]) for line in lines] == [
        (0, []), (1, []), (2, []), (0, ["optimizer.lr=0.5"]),
    ]  # fmt: skip
    assert "60.0 ± 10.0" in call("--table")
    with pytest.raises(SystemExit):
        call("no_such_experiment")
