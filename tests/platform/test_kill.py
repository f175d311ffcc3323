"""Real runs, killed with SIGKILL at any moment and resumed by their commands, against ones that were never killed.

`benchmarks/faults.py` does the same for every strategy and every learner.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lives import assert_same, imported, killed, left_alone, unlike

COMMAND = [
    "strategy=[replay,ewc]", "strategy.ewc.examples=200", "seed=4", "threads=1", "progress=false",
    "learner.net.hidden=16", "learner.net.layers=2", "learner.net.dropout=0.2", "training.epochs=10",
    "training.checkpoint_every_n_steps=7", "training.log_every_n_steps=5", "evaluation.every_n_steps=10",
]  # fmt: skip
SHORT = [
    "strategy.ewc.examples=20",
    "training.epochs=1",
    "learner.net.layers=1",
    "stream.experiences=2",
    "tracking=none",
]


def test_killed_once_and_resumed_equals_left_alone(tmp_path, monkeypatch):
    imported()
    monkeypatch.chdir(tmp_path)
    words = [*COMMAND, *SHORT]
    length = left_alone(words, tmp_path / "whole")
    killed(words, tmp_path / "cut", random.Random(1), length, kills=1)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_killed_in_fresh_processes_and_resumed_equals_left_alone(tmp_path, monkeypatch):
    """Each process has hashes and random generators of its own."""
    train, whole, cut, kills = [sys.executable, "-m", "clplat", "train"], tmp_path / "whole", tmp_path / "cut", 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlruns.db'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    begin = [*train, *COMMAND, f"hydra.run.dir={cut}"]
    subprocess.run([*train, *COMMAND, f"hydra.run.dir={whole}"], check=True, capture_output=True, timeout=200)
    for wait in (0.05, 0.6, 1.7, 0.3):  # seconds after the first checkpoint of each life: anywhere
        command = [*train, "resume=latest", f"output_dir={cut}", "progress=false"] if kills else begin
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        _wait_for_checkpoint(cut, process)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2, "the run was over before it could be killed twice"
    # Once more from the checkpoint's own path, with the options repeated.
    resume = [*train, *COMMAND, f"resume={os.path.relpath(cut)}"]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same(whole, cut)


def _wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    def newest() -> int:
        return max((p.stat().st_mtime_ns for p in folder.glob("last.ckpt")), default=0)

    before, deadline = newest(), time.monotonic() + 120
    while process.poll() is None and newest() == before and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2]}, "/a/1"),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, "/a"),
        ({"a": np.zeros(2)}, {"a": np.zeros((1, 2))}, "/a"),
        ({"a": 1, "b": 2}, {"a": 1}, "/b"),
        ([1, 2], [1], ""),
    ],
)
def test_any_bit_that_differs_is_found(one, other, path):
    (line,) = unlike(one, other)
    assert line.startswith(f"{path}: ") or line == f"{path} is in one only"
    assert not list(unlike(one, one))
    assert not list(unlike([float("nan")], [float("nan")]))
