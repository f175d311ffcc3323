"""Words of the command line: paths of any name, lists, lengths, strategies named twice, and what cannot be read."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from clplat.cli import main
from clplat.config.refusing import ConfigError
from clplat.config.words import hydra_line, parsed, prepared, quoted, strategies

NAMES = ["a,b", "it's", "x=1", "münchen", "p(1)", "a[1]", "{a}", "a b", "~", 'say "so"', "back\\slash", "end\\", "日本"]


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
def test_a_quoted_text_is_read_as_it_was(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


@pytest.mark.parametrize("name", NAMES)
def test_a_path_of_any_name_is_itself_plain_or_quoted(name: str) -> None:
    for word in (f"output_dir={name}", f"output_dir={quoted(name)}"):
        (found,) = parsed(prepared([word]))
        assert found.value() == name


def test_what_is_no_text_stays_what_it_is() -> None:
    assert prepared(["output_dir=2024"]) == ["output_dir=2024"]
    assert prepared(["resume=null"]) == ["resume=null"]
    assert prepared(["output_dir=[a]", "seed=1"]) == ["output_dir=[a]", "seed=1"]


@pytest.mark.parametrize("name", NAMES)
def test_resume_finds_a_folder_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / name / "2026-01-01" / "r"
    run.mkdir(parents=True)
    (run / "last.ckpt").touch()
    for words in (
        [f"resume={run}"],
        ["resume=latest", f"output_dir={name}"],
        ["resume=latest", f"output_dir={quoted(name)}"],
    ):
        assert parsed(prepared(words))[-1].value() == str(run)


def test_text_beyond_ascii_needs_no_quotes() -> None:
    (found,) = parsed(prepared(["tracking.experiment=größe"]))
    assert found.value() == "größe"
    with pytest.raises(ConfigError, match=r"tracking.experiment: cannot read '\[ü,b'.*two kinds of quotes"):
        prepared(["tracking.experiment=[ü,b"])


def test_one_length_of_training_takes_the_place_of_the_other() -> None:
    assert prepared(["training.steps=10"]) == ["++training.steps=10", "++training.epochs=null"]
    assert prepared(["training.epochs=3"]) == ["++training.epochs=3", "++training.steps=null"]
    both = ["training.steps=10", "training.epochs=null"]
    assert prepared(both) == [f"++{word}" for word in both]
    with pytest.raises(ConfigError, match="training: got epochs=1 and steps=2: give one of the two"):
        prepared(["training.epochs=1", "training.steps=2"])


def test_a_strategy_named_twice_is_refused() -> None:
    for word in ("strategy=[replay,replay]", "strategy=ewc,[replay,ewc,replay]"):
        with pytest.raises(ConfigError, match="replay stands twice"):
            prepared([word])
    assert strategies(parsed(["strategy=ewc,[replay,ewc]", "seed=1,2"])) == [["ewc"], ["replay", "ewc"]]


@pytest.mark.parametrize(
    ("name", "what"),
    [("joblib", "clplat[joblib]"), ("submitit_slurm", "clplat[slurm]"), ("jobib", "did you mean 'joblib'?")],
)
def test_a_launcher_that_is_not_installed_is_refused_with_the_extra(name: str, what: str) -> None:
    said = hydra_line(ValueError(f"In 'hydra/config': Could not find 'hydra/launcher/{name}'\n\nAvailable options:"))
    assert said.startswith(f"hydra/launcher={name}: ") and what in said


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", "tracking=none", "progress=false", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert list(Path().iterdir()) == []
    return line.removeprefix("clplat: ")


@pytest.fixture
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCRATCH", raising=False)


@pytest.mark.usefixtures("_empty")
@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "output_dir=${oc.env:SCRATCH}/runs",
            "output_dir: cannot resolve ${oc.env:SCRATCH}/runs (Environment variable",
        ),
        ("optimizer.lr=${training.lr}", "optimizer.lr: cannot resolve ${training.lr} (Interpolation key 'training.lr'"),
        ("training.batch_size=${oc.env:SCRATCH}", "training.batch_size: cannot resolve ${oc.env:SCRATCH} (Environment"),
        ("seed=${seed}", "seed: cannot resolve ${seed} (Recursive interpolation"),
        ('output_dir="x${y}"', "output_dir: cannot resolve"),
        ("output_dir=2024", "output_dir: got 2024, expected text"),
        ("learner=LSTM", "learner=LSTM: unknown; did you mean 'lstm'?"),
        ("sweep.objective=averge", "sweep.objective: got 'averge', it must be one of average"),
    ],
)
def test_what_cannot_be_resolved_is_refused_and_leaves_nothing(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, word).startswith(said)


@pytest.mark.usefixtures("_empty")
def test_options_of_a_strategy_go_to_the_runs_of_a_sweep_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["-m", "strategy=finetune,ewc", "strategy.ewc.strength=7", "stream.experiences=2", "training.steps=2"]
    assert main(["train", "tracking=none", "progress=false", "learner.net.hidden=8", *sweep]) == 0
    assert "a sweep of 2 runs (2 of strategy); folder: runs/" in capsys.readouterr().out
    found = {
        tuple(config["strategy"]): config["strategy"].get("ewc", {}).get("strength")
        for config in (yaml.safe_load(p.read_text()) for p in Path("runs").rglob("config.yaml"))
    }
    assert found == {("finetune",): None, ("ewc",): 7}
    assert main(["train", "tracking=none", "-m", "strategy=finetune,replay", "strategy.ewc.strength=7"]) == 2
    assert "strategy.ewc: no strategy of that name was chosen" in capsys.readouterr().err


@pytest.mark.usefixtures("_empty")
def test_a_yaml_without_its_package_is_refused_with_the_line_to_add(capsys: pytest.CaptureFixture[str]) -> None:
    Path("conf/strategy").mkdir(parents=True)
    for name, first in (("plain", ""), ("late", "# mine\n# @package strategy.late\n")):
        Path(f"conf/strategy/{name}.yaml").write_text(f"{first}_target_: clplat.strategies.ewc.EWC\n")
        assert main(["train", "--config-dir", "conf", f"strategy={name}", "tracking=none"]) == 2
        said = capsys.readouterr().err
        assert f"strategy={name}: its yaml" in said and f"`# @package strategy.{name}` the first line" in said
        assert not Path("runs").exists()


def test_a_pipe_that_closes_ends_a_command_silently_with_the_code_of_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from clplat.cli import main; sys.exit(main(['list']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_signs_that_a_terminal_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["list", "strategy"]) == 0
    assert b"?" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]  # the bytes below
