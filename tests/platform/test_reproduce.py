"""clplat reproduce: goes on where it was stopped, keeps what differs apart, and judges by what was published."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from clplat import reproduce
from clplat.catalogue import CONF, options
from clplat.cli import main
from clplat.config.check import check
from clplat.config.refusing import ConfigError
from clplat.reproduce import Row, composed, judged, read

PAPERS = list(options(CONF / "paper"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, DictConfig]]:
    """What would have been trained; training is replaced by a number for each seed."""
    done: list[tuple[Path, DictConfig]] = []

    def train(cfg: Any, folder: Path, names: Any) -> dict[str, float]:
        done.append((folder, cfg))
        return {"average": 0.5 + 0.1 * cfg.seed, "forgetting": 0.25}

    monkeypatch.setattr(reproduce, "train", train)
    monkeypatch.setattr(reproduce, "quiet", lambda threads: None)
    monkeypatch.setenv("COLUMNS", "300")
    return done


@pytest.mark.parametrize("paper", PAPERS)
def test_every_row_composes_and_is_accepted(paper: str) -> None:
    for name, (table, row) in read(paper).rows().items():
        cfg = composed(table, row)
        check(cfg)
        assert row.set or name == table.base, "a row without overrides is its base, and has its name"


def test_row_names_are_unique_over_all_papers() -> None:
    names = [name for paper in PAPERS for name in read(paper).rows()]
    assert len(names) == len(set(names)) == sum(len(table.rows) for paper in PAPERS for table in read(paper).tables)


def test_overrides_of_a_row_arrive() -> None:
    cfg = composed(*read("buzzega2020").rows()["split_mnist_class_der_500"])
    assert list(cfg.strategy) == ["der"]
    assert (cfg.strategy.der.capacity, cfg.strategy.der.alpha, cfg.strategy.der.rows) == (500, 1.0, 128)
    assert cfg.optimizer.lr == 0.03 and cfg.training.batch_size == 10


def test_it_goes_on_and_shows_mean_and_spread(
    trained: list[tuple[Path, DictConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> str:
        assert main(["reproduce", "row_mnist", "row_mnist_replay", "--output", str(tmp_path), *words]) in (0, 1)
        return capsys.readouterr().out

    assert "50.0" in call("--seeds", "0")
    shown = call("--seeds", "0", "1", "2")
    assert "60.0 ± 10.0" in shown and "0 1 2" in shown and "87.2 ± 0.6" in shown
    assert len(trained) == 3, "seed 0 was there"
    assert "60.0" not in call("--seeds", "0", "--set", "optimizer.lr=0.5")
    assert len(trained) == len({folder for folder, _ in trained}) == 4
    assert [(cfg.seed, cfg.optimizer.lr) for _, cfg in trained] == [(0, 0.001), (1, 0.001), (2, 0.001), (0, 0.5)]
    lines = [json.loads(line) for line in (tmp_path / "reproduce.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["overrides"]) for line in lines] == [
        (0, []), (1, []), (2, []), (0, ["optimizer.lr=0.5"]),
    ]  # fmt: skip
    assert "60.0 ± 10.0" in call("--list")
    assert len(trained) == 4, "--list trains nothing"


def test_all_seeds_of_the_table_by_default_and_rows_by_pattern(
    trained: list[tuple[Path, DictConfig]], tmp_path: Path
) -> None:
    main(["reproduce", "ehret2021", "permuted_copy_[rs]*", "--output", str(tmp_path)])
    assert [folder.relative_to(tmp_path).parts for folder, _ in trained] == [
        (row, str(seed)) for row in ("permuted_copy_si", "permuted_copy_replay") for seed in range(5)
    ]


def test_a_seed_that_was_stopped_goes_on_from_its_checkpoint(
    trained: list[tuple[Path, DictConfig]], tmp_path: Path
) -> None:
    begun = tmp_path / "row_mnist_ewc" / "1"
    begun.mkdir(parents=True)
    (begun / "last.ckpt").touch()
    main(["reproduce", "row_mnist", "row_mnist_ewc", "--seeds", "0", "1", "--output", str(tmp_path)])
    assert [cfg.resume for _, cfg in trained] == [None, str(begun)]


@pytest.mark.parametrize(
    ("published", "spread", "here", "verdict"),
    [
        ("60", None, [50.0, 60.0, 70.0], "as published"),
        ("80.6", None, [50.0, 60.0, 70.0], "deviates"),  # 20.6 > 2 * 10 + 0.05
        ("80.4", None, [50.0, 60.0, 70.0], "deviates"),
        ("80", None, [50.0, 60.0, 70.0], "as published"),
        ("99", None, [99.4, 99.4], "as published"),  # rounded to whole numbers
        ("99", None, [99.6, 99.6], "deviates"),
        ("99.0", None, [99.4, 99.4], "deviates"),
        ("99.0", 0.3, [99.4], "as published"),  # one seed, but a published spread
        ("99.0", 0.1, [99.4], "deviates"),
        ("99.0", None, [99.0], ""),
        ("99.0", 0.3, [], ""),
    ],
)
def test_a_difference_counts_beyond_two_standard_deviations_and_rounding(
    published: str, spread: float | None, here: list[float], verdict: str
) -> None:
    assert judged(Row(published=Decimal(published), spread=spread), here) == verdict


def test_the_exit_code_says_whether_a_deviation_is_unexplained(
    trained: list[tuple[Path, DictConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(paper: str, row: str) -> int:
        return main(["reproduce", paper, row, "--seeds", "0", "1", "--output", str(tmp_path)])

    assert code("row_mnist", "row_mnist_replay") == 1  # 55 against 87.2, no reason known
    assert "deviates" in capsys.readouterr().out
    assert code("vandeven2019", "split_mnist_icarl") == 0
    assert "deviates; known: 4 points lower" in capsys.readouterr().out
    assert code("vandeven2019", "split_mnist_domain") == 0  # 55 against 57.33
    assert "as published; known: " in capsys.readouterr().out


def test_unknown_papers_rows_and_options_are_refused(
    trained: list[tuple[Path, DictConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in [
        (["buzzega"], "clplat: buzzega: unknown paper; did you mean 'buzzega2020'?"),
        (["row_mnist", "row_mnist_replai"], "clplat: row_mnist_replai: no row of row_mnist; did you mean 'row_mnist_replay'?"),
        (["row_mnist", "--set", "optimizer.lrr=1"], "clplat: optimizer.lrr: unknown key; did you mean 'lr'?"),
    ]:  # fmt: skip
        assert main(["reproduce", *words, "--output", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(said)
    assert not trained


def test_without_a_paper_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    shown = capsys.readouterr().out
    assert all(paper in shown for paper in PAPERS)


def test_a_table_with_an_unknown_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paper").mkdir()
    text = "title: t\nseeds: [0]\ntables: [{where: w, base: b, rows: {r: {publish: 3}}}]\n"
    (tmp_path / "paper" / "mine.yaml").write_text(text)
    monkeypatch.setattr(reproduce, "CONF", tmp_path)
    with pytest.raises(ConfigError, match=r"conf/paper/mine\.yaml: tables\.0\.rows\.r\.publish: Extra inputs are not"):
        read("mine")
