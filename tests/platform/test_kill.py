"""A real process, killed with SIGKILL at any moment and resumed by its command, against one that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clplat import checkpoint

COMMAND = [
    sys.executable, "-m", "clplat", "train", "strategy=[replay,ewc]", "strategy.ewc.examples=200", "seed=4", "threads=1",
    "progress=false", "learner.net.hidden=16", "learner.net.layers=2", "learner.net.dropout=0.2", "training.epochs=10",
    "training.checkpoint_every_n_steps=7", "training.log_every_n_steps=5", "evaluation.every_n_steps=10",
]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlruns.db'}", "OMP_NUM_THREADS": "1"}


def metrics_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every value of the folder's only MLflow run, by key, in the order of steps; times are not compared."""
    from clplat.tracking.store import open_store

    client = open_store(f"sqlite:///{folder / 'mlruns.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    found = {}
    for key in run.data.metrics:
        if not key.startswith("cost/") or key in ("cost/stored_bytes", "cost/passes_per_step"):
            values = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            found[key] = sorted(values)
            assert len({step for step, _ in values}) == len(values), f"{key} was logged twice at a step"
    return found


def finished(folder: Path) -> dict:
    (path,) = folder.rglob("last.ckpt")
    state = checkpoint.load(path)
    assert state["complete"]
    return state


@pytest.mark.slow
def test_sigkill_at_any_moment_then_resume_equals_uninterrupted(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    subprocess.run(COMMAND, cwd=whole, env=environment(whole), check=True, capture_output=True, timeout=200)

    kills = 0
    for wait in (0.05, 0.6, 1.7, 0.3):  # seconds after the first checkpoint of each life: anywhere
        command = COMMAND if kills == 0 else [*COMMAND[:4], "resume=latest", "progress=false"]
        before = {p: p.stat().st_mtime_ns for p in cut.rglob("last.ckpt")}
        process = subprocess.Popen(
            command, cwd=cut, env=environment(cut), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(p.stat().st_mtime_ns != before.get(p) for p in cut.rglob("last.ckpt")):
                break
            time.sleep(0.02)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2, "the run was over before it could be killed twice"
    # Once more from the checkpoint's own path, with the options repeated.
    (folder,) = {p.parent for p in cut.rglob("last.ckpt")}
    resume = [*COMMAND, f"resume={folder.relative_to(cut)}"]
    done = subprocess.run(resume, cwd=cut, env=environment(cut), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    a, b = finished(whole), finished(cut)
    tensors = {k for k, v in a["learner"].items() if torch.is_tensor(v)}
    assert all(torch.equal(a["learner"][k], b["learner"][k]) for k in tensors)
    assert torch.equal(a["results"]["all"]["rows"], b["results"]["all"]["rows"])
    assert a["results"]["all"]["step"] == b["results"]["all"]["step"]
    assert metrics_of(whole) == metrics_of(cut)
