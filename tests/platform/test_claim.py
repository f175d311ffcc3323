"""Folder of a run: one process at a time, one run for each, and a run that goes on is where it was begun."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from clplat.checkpoint import LAST, PREVIOUS, load
from clplat.claim import LOCK, OWNER, ClaimError, alive, check_unused, check_unused_below, claimed
from clplat.cli import main
from clplat.config import resume
from clplat.config.refusing import ConfigError
from clplat.loop import Run
from clplat.report.folder import WHERE
from clplat.report.summary import Names
from clplat.train import opened

QUICK = [
    "training.epochs=null", "training.steps=2", "progress=false", "learner.net.hidden=8", "tracking=none", "threads=1",
    "strategy=finetune", "stream.experiences=2",
]  # fmt: skip


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its time and size."""
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_process_is_refused_with_the_first_ones_number_and_host(tmp_path):
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with claimed(tmp_path):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        assert alive(tmp_path)
        with pytest.raises(ClaimError) as refused, claimed(tmp_path):
            pass
        assert f"process {child} on {socket.gethostname()}" in str(refused.value)
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
    assert not alive(tmp_path)
    with claimed(tmp_path):
        pass


def test_a_process_that_is_killed_holds_nothing(tmp_path):
    (tmp_path / LAST).touch()
    child = os.fork()
    if not child:
        with claimed(tmp_path):
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / OWNER).exists() and not alive(tmp_path)
    with claimed(tmp_path):
        assert (tmp_path / OWNER).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not (tmp_path / OWNER).exists()


def test_nothing_is_left_of_a_folder_that_stays_empty(tmp_path):
    with claimed(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK).exists()
    assert not (tmp_path / "new" / "run").exists()
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old"):
        pass
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("name", ["config.yaml", LAST, PREVIOUS, "result.json", "results.npz", WHERE, "multirun.yaml"])
def test_a_folder_with_a_trace_of_a_run_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").touch()  # of the user's own
    check_unused(tmp_path)
    check_unused_below(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ClaimError, match=name):
        check_unused(tmp_path)
    with pytest.raises(ClaimError, match=name):
        check_unused_below(tmp_path)


def test_a_sweep_is_refused_where_runs_lie_below(tmp_path):
    run = tmp_path / "2026" / "1"
    run.mkdir(parents=True)
    (run / LAST).touch()
    check_unused(tmp_path)
    with pytest.raises(ClaimError, match=r"hydra.sweep.dir: .* holds runs already"):
        check_unused_below(tmp_path)


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """A folder with a finished run in it, `runs/one`."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "hydra.run.dir=runs/one"]) == 0
    return tmp_path / "runs" / "one"


def test_nothing_is_written_over_a_run_or_a_sweep(begun, capsys):
    assert main(["train", *QUICK, "-m", "seed=0,1", "hydra.sweep.dir=runs/sweep"]) == 0
    before = listing(begun.parents[1])
    for again in (
        ["hydra.run.dir=runs/one"],
        ["hydra.run.dir=runs/sweep"],
        ["-m", "seed=5,6", "hydra.sweep.dir=runs/sweep"],
        ["-m", "seed=5,6", "hydra.sweep.dir=runs"],
        ["-m", "seed=5,6", "hydra.sweep.dir=runs/one"],
    ):
        capsys.readouterr()
        assert main(["train", *QUICK, *again]) == 2, again
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "choose another folder" in err
        assert listing(begun.parents[1]) == before, again


@pytest.mark.slow
def test_the_second_of_two_jobs_in_one_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "-m", "seed=0,1", "hydra.sweep.dir=s", "hydra.sweep.subdir=same"]) == 2
    said = capsys.readouterr()
    assert "holds a run already" in said.err
    assert "seed=0: average" in said.out and "seed=1: average" not in said.out


def test_latest_is_the_newest_that_is_neither_over_nor_in_training(tmp_path, capsys):
    for age, name in enumerate(["over", "live", "open", "older"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / LAST).touch()
        os.utime(tmp_path / name / LAST, (1000 - age, 1000 - age))
    (tmp_path / "over" / WHERE).touch()
    child = os.fork()
    if not child:
        with claimed(tmp_path / "live"):
            time.sleep(60)
        os._exit(0)
    try:
        while not alive(tmp_path / "live"):
            pass
        assert resume.find("latest", tmp_path) == tmp_path / "open"
        assert capsys.readouterr().out == f"resume=latest: {tmp_path / 'open'} (skipped: 1 in training, 1 complete)\n"
        (tmp_path / "open" / WHERE).touch()
        (tmp_path / "older" / WHERE).touch()
        assert resume.find("latest", tmp_path) == tmp_path / "over"
        assert "complete already" in capsys.readouterr().out
        with pytest.raises(ConfigError, match=r"every run under .* is in training"):
            resume.find("latest", tmp_path / "live")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_the_one_before_the_last_can_be_gone_on_with(begun, capsys):
    before = (begun / PREVIOUS).read_bytes()
    content = bytearray((begun / LAST).read_bytes())
    content[1000] ^= 1
    (begun / LAST).write_bytes(content)
    capsys.readouterr()
    assert main(["train", f"resume={begun}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"whole (experience 1, step 2): resume={begun / PREVIOUS}" in err
    assert (begun / PREVIOUS).read_bytes() == before
    assert main(["train", f"resume={begun / PREVIOUS}", "progress=false"]) == 0
    assert main(["train", f"resume={begun}", "progress=false"]) == 0
    assert main(["train", f"resume={begun / 'other.ckpt'}"]) == 2


def test_a_run_goes_on_where_it_was_begun_and_a_copy_in_its_own_place(begun, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [f"resume={begun}"])
    with opened(cfg, begun, Names("", "", ""), ["resume"]) as (_, folder, _, _):
        assert Path.cwd() == tmp_path and folder == begun
    assert Path.cwd() == tmp_path / "elsewhere"
    copy = tmp_path / "copied" / "runs" / "one"
    copy.parent.mkdir(parents=True)
    begun.rename(copy)
    with opened(cfg, copy, Names("", "", ""), ["resume"]) as (_, folder, _, _):
        assert Path.cwd() == tmp_path / "copied" and folder == copy


def test_a_store_that_is_given_anew_is_where_the_user_is(begun, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = [f"resume={begun}", "tracking=mlflow", "tracking.uri=sqlite:///mine.db"]
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", given)
    with opened(cfg, begun, Names("", "", ""), ["resume", "tracking", "tracking.uri"]) as (own, _, _, _):
        assert own.tracking.uri == f"sqlite:///{tmp_path / 'elsewhere' / 'mine.db'}"


@pytest.mark.slow
def test_a_run_on_files_of_its_project_goes_on_from_another_place(tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    for name, folder in (("a", home), ("b", home), ("a", away), ("b", away)):
        words = "a calm sea and a west wind took the old boat" if folder == home else "other words of another place"
        (folder / f"{name}.txt").write_text(f"{words} " * 200)
    options = [
        "stream=text", "stream.files={a: a.txt, b: b.txt}", "strategy=finetune", "learner.net.hidden=8", "threads=1",
        "training.batch_size=4", "training.epochs=null", "training.steps=6", "progress=false",
        "training.checkpoint_every_n_steps=2", "tracking.uri=sqlite:///store.db",
    ]  # fmt: skip
    monkeypatch.chdir(home)
    assert main(["train", *options, "hydra.run.dir=runs/whole"]) == 0
    save, saves = Run.save, []

    def signalled(run: Run) -> None:
        save(run)
        saves.append(run.step)
        if len(saves) == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", signalled)
        assert main(["train", *options, "hydra.run.dir=runs/one"]) == 143
    monkeypatch.chdir(away)
    run = home / "runs" / "one"
    assert main(["train", f"resume={run}", "progress=false"]) == 0, capsys.readouterr().err
    states = [load(folder / LAST)["learner"] for folder in (run, home / "runs" / "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True) if torch.is_tensor(a))
    assert sorted(path.name for path in away.iterdir()) == ["a.txt", "b.txt"]
