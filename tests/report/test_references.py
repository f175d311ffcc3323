"""Intransigence and omega against cumulative runs, which are found among the runs that are compared."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from clplat.cli import main
from clplat.report.references import with_references
from clplat.report.summary import RunSummary, read_run
from clplat.report.tables import print_sweep

R = [[0.9, 0.1], [0.5, 0.7]]
TOGETHER = [[1.0, 0.2], [0.8, 0.6]]


def run(folder: Path, strategy: str, r: list[list[float]], seed: int = 0, **more: Any) -> RunSummary:
    """A hand-made run, read back from its folder."""
    folder.mkdir()
    config = {"stream": {"order_seed": more.pop("order_seed", 0)}, "optimizer": {"lr": more.pop("lr", 0.1)}}
    config["strategy"] = {strategy: {"own": len(strategy)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"average": float(np.mean(r[-1])), "intransigence": None, "omega": None}
    plain = {"strategy": strategy, "stream": "s", "learner": "l", "seed": seed, "metrics": metrics, "seen": {}} | more
    (folder / "result.json").write_text(json.dumps(plain))
    np.savez(folder / "results.npz", R=np.array(r))
    return read_run(folder / "result.json")


def compared(*runs: RunSummary) -> tuple[float, float]:
    """Intransigence and omega of the first."""
    found = with_references(runs)[0].metrics
    return found["intransigence"], found["omega"]


def test_the_reference_of_the_same_seed_gives_its_diagonal_and_its_averages(tmp_path):
    mine = run(tmp_path / "a", "ewc", R)
    reference, other = run(tmp_path / "b", "cumulative", TOGETHER), run(tmp_path / "c", "cumulative", R, seed=1)
    intransigence, omega = compared(mine, other, reference)
    assert intransigence == pytest.approx(((1.0 - 0.9) + (0.6 - 0.7)) / 2)
    assert omega == pytest.approx((0.9 / 1.0 + 0.6 / 0.7) / 2)
    assert with_references([mine, other, reference])[0].references == (tmp_path / "b",)


def test_without_one_of_the_same_seed_it_is_the_mean_over_seeds(tmp_path):
    mine = run(tmp_path / "a", "ewc", R, seed=7)
    references = [run(tmp_path / f"b{s}", "cumulative", r, seed=s) for s, r in enumerate((TOGETHER, R))]
    intransigence, omega = compared(mine, *references)
    assert intransigence == pytest.approx(((0.95 - 0.9) + (0.65 - 0.7)) / 2)
    assert omega == pytest.approx((0.9 / 0.95 + 0.6 / 0.65) / 2)
    assert set(with_references([mine, *references])[0].references) == {tmp_path / "b0", tmp_path / "b1"}


@pytest.mark.parametrize(
    "more",
    [{"stream": "t"}, {"learner": "m"}, {"lr": 0.2}, {"order_seed": 1}, {"on": "valid"}, {"score": "bits_per_token"}],
)
def test_a_run_of_another_setting_is_no_reference(tmp_path, more):
    mine, reference = run(tmp_path / "a", "ewc", R), run(tmp_path / "b", "cumulative", TOGETHER, **more)
    assert all(map(math.isnan, compared(mine, reference)))


def test_only_cumulative_runs_are_references_and_have_none(tmp_path):
    mine = run(tmp_path / "a", "ewc", R)
    assert all(map(math.isnan, compared(mine, run(tmp_path / "b", "joint", TOGETHER))))
    assert all(map(math.isnan, compared(run(tmp_path / "c", "cumulative", TOGETHER))))


def test_losses_have_intransigence_and_no_omega(tmp_path):
    loss: dict[str, Any] = {"score": "bits_per_token", "higher_is_better": False}
    mine, reference = run(tmp_path / "a", "ewc", R, **loss), run(tmp_path / "b", "cumulative", TOGETHER, **loss)
    intransigence, omega = compared(mine, reference)
    assert intransigence == pytest.approx(((0.9 - 1.0) + (0.7 - 0.6)) / 2)
    assert math.isnan(omega)


def test_a_run_whose_r_is_not_there_is_left_as_it_is(tmp_path):
    mine, reference = run(tmp_path / "a", "ewc", R), run(tmp_path / "b", "cumulative", TOGETHER)
    (tmp_path / "a" / "results.npz").unlink()
    assert with_references([mine, reference])[0] is mine


def test_the_table_has_the_columns_and_names_the_run(tmp_path):
    mine, reference = run(tmp_path / "a", "ewc", R), run(tmp_path / "b", "cumulative", TOGETHER)
    out = io.StringIO()
    print_sweep(with_references([mine, reference]), Console(file=out, width=200))
    assert f"intransigence and omega against {tmp_path / 'b'}" in out.getvalue()
    assert "0.000" in next(line for line in out.getvalue().splitlines() if line.strip().startswith("ewc"))
    print_sweep(with_references([mine]), Console(file=(out := io.StringIO()), width=200))
    assert "intransigence" not in out.getvalue()


def test_compare_finds_the_references_of_a_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    small = ["learner=mlp", "stream.experiences=2", "training.epochs=2", "threads=1", "progress=false"]
    assert main(["train", "-m", "strategy=finetune,cumulative", "tracking=none", *small]) == 0
    capsys.readouterr()
    assert main(["compare", "runs"]) == 0
    said = capsys.readouterr().out
    folders = {read_run(f).strategy: f.parent for f in Path("runs").rglob("result.json")}
    r, together = (np.load(folders[name] / "results.npz")["R"] for name in ("finetune", "cumulative"))
    intransigence = np.mean(together.diagonal() - r.diagonal())
    omega = np.mean([r[i, : i + 1].mean() / together[i, : i + 1].mean() for i in range(2)])
    cells = next(line.split() for line in said.splitlines() if line.strip().startswith("finetune"))
    assert f"{intransigence:.3f}" in cells
    assert f"{omega:.3f}" in cells
    assert f"intransigence and omega against {folders['cumulative']}" in said
