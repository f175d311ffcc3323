"""The folder of a run holds all that it leaves, whatever the tracker is."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module
from tracked import shared_store

from clplat.report import folder as report
from clplat.report.summary import Names, read_run
from clplat.tracking.base import TrackingError
from clplat.train import train

OPTIONS = [
    "strategy=[example_forgetting]", "learner=mlp", "training.epochs=null", "training.steps=3", "threads=1",
    "progress=false", "stream.experiences=2", "evaluation.every_n_steps=2", "evaluation.examples=10",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> dict[str, float]:
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [*OPTIONS, *overrides])
    return train(cfg, folder, Names("split_digits", "mlp", "example_forgetting"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one run, not tracked and tracked."""
    root = tmp_path_factory.mktemp("runs")
    run(root / "none", "tracking=none")
    run(root / "mlflow", f"tracking.uri={shared_store()}")
    return root / "none", root / "mlflow"


def test_it_holds_the_same_files_tracked_or_not(folders):
    listings = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert listings[0] == listings[1]
    kept = ["last.ckpt", "previous.ckpt", ".lock"]
    assert listings[0] == sorted([*report.ORIGIN, *report.OUTCOME, report.WHERE, *kept])


def test_the_files_say_the_same_tracked_or_not(folders):
    none, mlflow = folders
    for name in (*report.ORIGIN, *report.OUTCOME):
        if name.endswith(".npz"):
            with np.load(none / name) as a, np.load(mlflow / name) as b:
                assert {*a} == {*b}
                assert all(np.array_equal(a[key], b[key], equal_nan=True) for key in a)
        elif name == "config.yaml":
            a, b = (yaml.safe_load((folder / name).read_text()) for folder in folders)
            assert a.pop("tracking") != b.pop("tracking")
            assert a == b
        else:
            assert (none / name).read_bytes() == (mlflow / name).read_bytes(), name
    assert (none / "where.txt").read_text() == "not tracked (tracking=none)\n"
    assert "clplat ui" in (mlflow / "where.txt").read_text()


def test_r_and_its_metrics_are_there_without_a_tracker(folders):
    with np.load(folders[0] / "results.npz", allow_pickle=False) as arrays:
        r, rows, seen = arrays["R"], arrays["rows"], arrays["seen_R"]
    assert r.shape == seen.shape == (2, 2)
    assert len(rows) == 5  # untrained, and one inside and one after each experience
    found = read_run(folders[0] / "result.json")
    assert found.metrics["average"] == pytest.approx(r[-1].mean())
    assert found.metrics["backward_transfer"] == pytest.approx(r[1, 0] - r[0, 0])
    assert found.on == "test"
    table = json.loads((folders[0] / "results_table.json").read_text())
    assert table["data"][2][1:] == r[1].tolist()
    assert f"| average accuracy | {r[-1].mean():.4f} |" in (folders[0] / "table.md").read_text()


def test_a_run_whose_store_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(TrackingError, match="Cannot use the MLflow store"):
        run(tmp_path / "run", "tracking.uri=nonsense://x")
    assert list(tmp_path.iterdir()) == []


def test_the_origin_names_command_and_packages(folders):
    assert json.loads((folders[0] / "code.json").read_text())["command"] == sys.argv
    assert "torch==" in (folders[0] / "environment.txt").read_text()
