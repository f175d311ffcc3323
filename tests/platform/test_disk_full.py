"""A disk that is full: one line, no torn file, and a run that can be gone on with when there is room."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from clplat.cli import main
from clplat.report import folder as report

QUICK = [
    "train", "training.epochs=null", "training.steps=2", "progress=false", "learner.net.hidden=8", "tracking=none",
    "threads=1", "strategy=finetune", "stream.experiences=2", "hydra.run.dir=run",
]  # fmt: skip
IN_ORDER = ["result.json", "results.npz", "results_table.json", "table.md", "curves.png", "matrix.png", "figures.html"]


class Disk:
    """A disk on which some files, by name, find no room."""

    def __init__(self) -> None:
        self.full: set[str] = set()

    def check(self, path: Path) -> None:
        if path.name in self.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Disk:
    monkeypatch.chdir(tmp_path)
    made, whole = Disk(), report._whole

    def checked(path: Path):
        made.check(path)
        return whole(path)

    monkeypatch.setattr(report, "_whole", checked)
    return made


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", [pytest.param("result.json", marks=pytest.mark.slow), "curves.png"])
def test_at_the_end_it_is_one_line_and_a_resume_writes_what_is_missing(disk, capsys, name):
    disk.full = {name, *IN_ORDER[IN_ORDER.index(name) :], report.WHERE}
    assert main(QUICK) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("clplat: output_dir: the run is trained, and its report cannot be written to ")
    assert (
        f"(No space left on device): make room, then `clplat train resume={Path('run').resolve()}` writes it" in said[0]
    )
    there = IN_ORDER[: IN_ORDER.index(name)]
    assert files(Path("run")) == {*there, *report.ORIGIN, "last.ckpt", "previous.ckpt", ".lock"}
    before = np.load("run/results.npz")["R"] if there else None  # scores come first
    if there:
        assert json.loads(Path("run/result.json").read_text())["strategy"] == "finetune"
    disk.full = set()
    assert main(["train", "resume=latest", "output_dir=.", "progress=false"]) == 0
    assert "resume=latest: " in capsys.readouterr().out
    assert {*IN_ORDER, report.WHERE} <= files(Path("run"))
    if before is not None:
        assert np.array_equal(np.load("run/results.npz")["R"], before)


@pytest.mark.parametrize("name", report.ORIGIN)
def test_at_the_beginning_the_run_is_refused_and_leaves_nothing(disk, capsys, name):
    disk.full = {name}
    assert main(QUICK) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "output_dir: cannot write to " in said.err and "make room" in said.err
    assert said.out == ""
    assert not Path("run").exists()


def test_scores_come_first_and_what_makes_a_run_complete_last(disk, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(Disk, "check", lambda self, path: written.append(path.name))
    assert main(QUICK) == 0
    assert written == [*report.ORIGIN, *IN_ORDER, report.WHERE]


def test_torn_results_are_named_and_the_whole_ones_are_shown(disk, capsys):
    assert main(QUICK) == 0
    content = Path("run/result.json").read_text()
    for name, torn in (("half", content[: len(content) // 2]), ("empty", ""), ("list", "[]")):
        (Path("torn") / name).mkdir(parents=True)
        (Path("torn") / name / "result.json").write_text(torn)
    (Path("torn") / "r").mkdir()
    (Path("torn") / "r" / "result.json").write_text(content)
    (Path("torn") / "r" / "results.npz").write_bytes(Path("run/results.npz").read_bytes()[:100])
    (Path("torn") / "r" / "config.yaml").write_bytes(Path("run/config.yaml").read_bytes())
    capsys.readouterr()
    assert main(["compare", "run", "torn"]) == 0
    said = capsys.readouterr()
    assert "finetune" in said.out
    assert all(name in said.out for name in ("empty/result.json", "half/result.json", "list/result.json"))
    assert main(["compare", "torn/half"]) == 2
