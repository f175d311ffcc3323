"""Runs that a table is made of: each configuration and seed once, own classes apart, damaged files named."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from clplat import cli
from clplat.report.references import with_references
from clplat.report.runs import find_runs
from clplat.report.tables import group, print_sweep

PLAIN = {
    "stream": "split_digits", "learner": "lstm", "strategy": "custom", "seed": 0, "score": "accuracy",
    "higher_is_better": True, "on": "test", "seen": {},
}  # fmt: skip
CONFIG = {
    "seed": 0,
    "strategy": {"custom": {"_target_": "mine.A", "seed": 0}},
    "learner": {"net": {"mixer": {"_target_": "clplat.LSTM"}}},
    "stream": {"_target_": "s.split", "source": {"_target_": "s.digits"}},
}
WRITTEN = 1_000_000_000


def write(folder: Path, average: float = 0.5, at: int = 0, change: dict[str, Any] | None = None, **plain: Any) -> Path:
    """A finished run's files; `change` holds dotted keys of its configuration."""
    folder.mkdir(parents=True)
    metrics = {"average": average, "forgetting": 0.25}
    (folder / "result.json").write_text(json.dumps(PLAIN | {"metrics": metrics} | plain))
    config = json.loads(json.dumps(CONFIG))
    for key, value in (change or {}).items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part[name]
        part[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    os.utime(folder / "result.json", (WRITTEN + at, WRITTEN + at))
    return folder


@pytest.mark.parametrize(
    "key", ["strategy.custom._target_", "learner.net.mixer._target_", "stream._target_", "stream.source._target_"]
)
def test_two_classes_are_two_configurations(tmp_path, key):
    write(tmp_path / "a", 0.2)
    write(tmp_path / "b", 0.8, change={key: "mine.Other"})
    rows = group(find_runs([tmp_path]).runs)
    assert [(described[key], [run.metrics["average"] for run in members]) for described, members in rows] == [
        ("mine.Other", [0.8]),
        (rows[1][0][key], [0.2]),
    ]


def test_a_seed_that_was_run_twice_counts_once_the_latest_and_it_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b", 0.1, at=5)
    write(tmp_path / "a", 0.7, at=9)
    write(tmp_path / "c", 0.5, seed=1, change={"seed": 1, "strategy.custom.seed": 1})
    found = find_runs([tmp_path, tmp_path / "a"])
    assert [run.metrics["average"] for run in found.runs] == [0.7, 0.5]
    assert found.notes == ["1 run repeats the configuration and seed of a later one and is not counted: b."]
    assert cli.main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0.600 ± 0.141" in out
    assert found.notes[0] in out


def test_another_order_of_classes_is_another_draw(tmp_path):
    for seed in range(2):
        write(tmp_path / str(seed), change={"stream.order_seed": seed})
    ((_, members),) = group(find_runs([tmp_path]).runs)
    assert len(members) == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", b""),
        ("result.json", b'{"metrics": {"average": 0.5}, "se'),
        ("result.json", b"\xff\xfe\x00"),
        ("result.json", json.dumps(PLAIN | {"metrics": {"average": "high"}}).encode()),
        ("config.yaml", b"strategy: {custom: [1, 2"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", b""),
    ],
)
def test_a_damaged_run_is_named_and_the_rest_is_used(tmp_path, capsys, file, content):
    write(tmp_path / "whole", 0.4)
    damaged = write(tmp_path / "torn", 0.9, seed=1) / file
    damaged.write_bytes(content)
    assert cli.main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"Left out: {damaged} is not" in out
    assert "0.400" in out
    assert cli.main(["compare", str(tmp_path / "torn")]) == 2
    assert str(damaged) in capsys.readouterr().err


def test_a_run_whose_r_is_torn_has_no_references(tmp_path, caplog):
    runs = [write(tmp_path / "run", strategy="replay"), write(tmp_path / "reference", strategy="cumulative")]
    for folder in runs:
        np.savez(folder / "results.npz", R=np.eye(2))
    whole = (tmp_path / "run" / "results.npz").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PK\x03\x04"):
        (tmp_path / "reference" / "results.npz").write_bytes(content)
        caplog.clear()
        found = with_references(find_runs([tmp_path]).runs)
        assert [run.references for run in found] == [(), ()]
        assert str(tmp_path / "reference" / "results.npz") in caplog.text


def test_average_and_forgetting_are_shown_though_undefined(tmp_path):
    write(tmp_path / "a", metrics={"average": 0.5, "forgetting": None, "backward_transfer": None})
    out = io.StringIO()
    print_sweep(find_runs([tmp_path]).runs, console=Console(file=out, width=100))
    heading, row = [line.split() for line in out.getvalue().splitlines() if line.strip()][1::2]
    assert heading == ["strategy", "average", "accuracy", "forgetting", "seeds"]
    assert row == ["custom", "0.500", "-", "1"]


def test_any_metric_may_be_undefined_anywhere(tmp_path):
    write(tmp_path / "a", metrics={"average": None, "forgetting": None})
    write(tmp_path / "b", 0.3, seed=1)
    out = io.StringIO()
    print_sweep(find_runs([tmp_path]).runs, console=Console(file=out, width=100))
    assert math.isnan(find_runs([tmp_path]).runs[0].metrics["average"])
    assert out.getvalue().rstrip().splitlines()[-1].split() == ["custom", "-", "-", "2"]
