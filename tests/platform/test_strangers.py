"""Files of somebody else's: what they ask for is refused in one line, and leaves no trace."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clplat import checkpoint
from clplat.cli import main
from clplat.report import provenance
from clplat.tracking import mlflow_run
from clplat.tracking.base import TrackingError
from clplat.tracking.store import absolute_uri, default_uri

QUICK = ["strategy=finetune", "learner.net.hidden=8", "training.epochs=1", "stream.experiences=2", "progress=false"]
MARK = "MARK"  # stands for the file that an attempt would leave
TOUCH = {"_target_": "torch.utils.collect_env.run", "command": f"touch {MARK}"}
CALLS: list[dict[str, Any]] = [
    TOUCH,
    {"_target_": "mlflow.utils.process._exec_cmd", "cmd": ["touch", MARK]},
    {"_target_": "setuptools._distutils.spawn.spawn", "cmd": ["touch", MARK]},
    {"_target_": "builtins.open", "file": MARK, "mode": "w"},
    {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [MARK]}},
    {"_target_": "pathlib.Path.write_text", "_args_": [{"_target_": "pathlib.Path", "_args_": [MARK]}, "x"]},
    {"_target_": "os.symlink", "src": "/", "dst": MARK},
    {"_target_": "os.mkdir", "path": MARK},
    {"_target_": "shutil.copyfile", "src": __file__, "dst": MARK},
    {"_target_": "os.system", "command": f"touch {MARK}"},
    {"_target_": "clplat.train.os.mkdir", "path": MARK},
    {"_target_": "clplat.reproduce.Path.touch", "self": MARK},
    {"_target_": "torch.nn.modules.module.torch.save", "obj": 1, "f": MARK},
    {"_target_": "clplat.checkpoint.save", "path": MARK, "state": {}},
    {"_target_": "evil.Touch"},
    {"_target_": "webbrowser.GenericBrowser.open", "self": None, "url": MARK},
]
"""What leaves a file wherever it is called; `evil` when it is imported."""


def marked(node: Any, mark: Path) -> Any:
    return json.loads(json.dumps(node).replace(MARK, str(mark)))


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that must not be there in the end; the working directory, importable, holds what would make it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("A_SECRET", "hunter2")
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nTouch = open\n")
    return mark


def refused(words: list[str], mark: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *QUICK, "tracking=none", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("clplat: ") and err.count("\n") == 1 and "hunter2" not in out + err
    assert not mark.exists() and not mark.is_symlink()
    assert not list(mark.parent.rglob("result.json"))
    return err


@pytest.fixture(scope="module")
def his(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that can be gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *QUICK, "tracking=none", f"output_dir={folder}"]) == 0
    return next(folder.rglob("last.ckpt")).parent


def stranger(his: Path, folder: Path, place: str, value: Any) -> list[str]:
    """The words that go on with a run of somebody's, whose notes hold `value` at `place`."""
    state = checkpoint.load(his / "last.ckpt")
    *above, last = place.split(".")
    node: Any = state["notes"]["config"]
    for key in above:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[last] = copy.deepcopy(value)
    (folder / "his").mkdir()
    state.pop("format")
    checkpoint.save(folder / "his" / "last.ckpt", state)
    return ["resume=his"]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c["_target_"])
def test_a_checkpoint_calls_nothing(
    call: dict[str, Any], his: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = stranger(his, mark.parent, "stream", marked(call, mark))
    assert main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "_target_" in err and not mark.exists()


PLACES = [
    "stream.source", "strategy.finetune", "strategy.x", "learner.net.mixer", "objective", "optimizer", "optimizer.lr",
    "schedule", "training", "trainer.plugins", "tracking",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_calls_nothing_anywhere(
    place: str, his: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *stranger(his, mark.parent, place, marked(TOUCH, mark))]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "_target_" in err and not mark.exists()


@pytest.mark.parametrize("place", ["tracking.experiment", "output_dir", "stream.name"])
def test_nothing_in_a_checkpoint_is_looked_up(
    place: str, his: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *stranger(his, mark.parent, place, "${oc.env:A_SECRET}")]) == 2
    out, err = capsys.readouterr()
    assert "holds an interpolation" in err and "hunter2" not in out + err


HYDRA: list[tuple[str, dict[str, Any]]] = [
    ("callbacks", {"x": TOUCH}),
    ("callbacks", {"sweep_report": TOUCH}),
    ("job_logging", {"version": 1, "handlers": {"f": {"class": "logging.FileHandler", "filename": MARK}}}),
    ("job_logging", {"version": 1, "handlers": {"f": {"()": "builtins.open", "file": MARK, "mode": "w"}}}),
    ("hydra_logging", {"version": 1, "handlers": {"f": {"class": "logging.FileHandler", "filename": MARK}}}),
    ("job", {"env_set": {"GIT_CONFIG_COUNT": "1"}}),
    ("job", {"chdir": True}),
    ("run", {"dir": MARK}),
    ("output_subdir", MARK),  # type: ignore[list-item]  # a plain value
    ("sweeper", {"_target_": "evil.Touch"}),
    ("sweeper", {"params": {"hydra.job.env_set.X": "1,2"}}),
    ("launcher", {"_target_": "evil.Touch"}),
    ("searchpath", ["file:///"]),  # type: ignore[list-item]
]


def experiment(mark: Path, content: dict[str, Any], name: str = "experiment/evil") -> list[str]:
    file = mark.parent / "conf" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("# @package _global_\n# Evil\n" + json.dumps(marked(content, mark)))
    return ["--config-dir", "conf", "experiment=evil"]


@pytest.mark.parametrize(("key", "value"), HYDRA)
def test_a_yaml_sets_nothing_of_hydra_s(key: str, value: Any, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config-dir may set" in refused(experiment(mark, {"hydra": {key: value}}), mark, capsys)


@pytest.mark.parametrize(("key", "value"), HYDRA[:3])
def test_nor_in_a_sweep_over_yamls(key: str, value: Any, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = experiment(mark, {"hydra": {key: value}})
    experiment(mark, {"seed": 1}, "experiment/good")
    assert main(["train", *QUICK, "tracking=none", "-m", *words[:2], "experiment=evil,good"]) == 2
    assert "--config-dir may set" in capsys.readouterr().err and not mark.exists()


@pytest.mark.parametrize(
    ("entry", "file"),
    [
        ({"override /hydra/job_logging": "evil"}, "hydra/job_logging/evil"),
        ({"/hydra/callbacks": "evil"}, "hydra/callbacks/evil"),
        ({"/parts@hydra": "evil"}, "parts/evil"),
        ({"/parts@_global_.hydra.callbacks": "evil"}, "parts/evil"),
        ({"/parts@_global_": "hydra"}, "parts/hydra"),
        ("/../elsewhere/evil@_global_", "../elsewhere/evil"),
    ],
)
def test_nor_by_its_defaults(entry: Any, file: str, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(mark, {"callbacks": {"x": TOUCH}, "x": TOUCH}, file)
    refused(experiment(mark, {"defaults": [entry]}), mark, capsys)


YAML: list[dict[str, Any]] = [
    {"trainer": {"callbacks": [TOUCH]}},
    {"trainer": {"plugins": [TOUCH]}},
    {"trainer": {"plugins": TOUCH}},
    {"trainer": {"callbacks": [{"_target_": "pytorch_lightning.callbacks.LambdaCallback", "on_fit_start": TOUCH}]}},
    {"optimizer": {"lr": TOUCH}},
    {"optimizer": {"_args_": [TOUCH]}},
    {"stream": {"source": {"_args_": [TOUCH]}}},
    {"stream": {"name": TOUCH}},
    {"strategy": {"finetune": {"x": TOUCH}}},
    {"strategy": {"x": TOUCH}},
    {"learner": {"net": {"mixer": TOUCH}}},
    {"learner": {"net": {"mixer": {"forget_bias": TOUCH}}}},
    {"learner": {"head": TOUCH}},
    {"evaluation": TOUCH},
    {"seed": TOUCH},
    {"schedule": {"_target_": "clplat.checkpoint.save", "path": MARK, "state": {}}},
    {"optimizer": {"_target_": "clplat.__main__.main"}},
]


@pytest.mark.parametrize("content", YAML, ids=json.dumps)
def test_a_yaml_calls_nothing(content: dict[str, Any], mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(experiment(mark, content), mark, capsys)


@pytest.mark.parametrize(
    "looked_up",
    [
        "${oc.env:A_SECRET}",
        "x${oc.env:A_SECRET}y",
        "${${tracking.curves[0]}:A_SECRET}",
        "${oc.decode:'${oc.env:A_SECRET}'}",
    ],
)
def test_a_yaml_that_names_a_store_looks_nothing_up(
    looked_up: str, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"tracking": {"uri": "http://127.0.0.1:9", "experiment": looked_up, "curves": ["oc.env"]}}
    assert main(["train", *QUICK, *experiment(mark, content)]) == 2
    out, err = capsys.readouterr()
    assert "names the store" in err and "hunter2" not in out + err


@pytest.mark.parametrize("flag", ["--config-path=conf", "-cn=evil", "--experimental-rerun=x", "--config-d=conf"])
def test_no_flag_leads_past_the_folder_of_files(flag: str, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([*experiment(mark, {"hydra": {"callbacks": {"x": TOUCH}}})[2:], flag], mark, capsys)


@pytest.mark.parametrize("path", ["../secret", "link", "folder", "/etc/hostname"])
def test_sync_sends_nothing_from_elsewhere(path: str, mark: Path) -> None:
    folder = mark.parent / "his"
    (folder / "folder").mkdir(parents=True)
    (mark.parent / "secret").write_text("hunter2")
    (folder / "link").symlink_to(mark.parent / "secret")
    (folder / "folder" / "inner").symlink_to(mark.parent / "secret")
    line = {"uri": "http://127.0.0.1:9", "run_id": "r", "kind": "artifact", "path": path, "to": None}
    (folder / "unsent.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(TrackingError, match="leads out of the run's folder"):
        mlflow_run.sync(folder)


def test_sync_makes_no_store_and_sends_to_one(mark: Path) -> None:
    line = {"uri": f"sqlite:///{mark}", "run_id": "r", "kind": "tag", "key": "a", "value": "b"}
    spill = mark.parent / "unsent.jsonl"
    spill.write_text(json.dumps(line) + "\n")
    with pytest.raises(TrackingError, match="which is not there"):
        mlflow_run.sync(mark.parent)
    spill.write_text(json.dumps(line) + "\n" + json.dumps({**line, "uri": "http://127.0.0.1:9"}) + "\n")
    with pytest.raises(TrackingError, match="several stores"):
        mlflow_run.sync(mark.parent)
    assert not mark.exists()


def test_sync_shows_where_it_sends_to_before_it_does(mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"uri": "http://127.0.0.1:9", "run_id": "r", "kind": "tag", "key": "a", "value": "b"}
    (mark.parent / "unsent.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["sync", str(mark.parent)]) == 1  # nobody answers there
    assert capsys.readouterr().out == f"{mark.parent}: sends to http://127.0.0.1:9\n"


def test_a_run_that_goes_on_sends_to_no_other_store_than_its_own(mark: Path) -> None:
    line = {"uri": "http://127.0.0.1:9", "run_id": "r", "kind": "tag", "key": "a", "value": "b"}
    spill = mark.parent / "unsent.jsonl"
    spill.write_text(json.dumps(line) + "\n")
    shown: list[str] = []
    with pytest.raises(TrackingError, match=r"waits for the store http://127\.0\.0\.1:9, and this run logs to http"):
        mlflow_run.sync(mark.parent, "http://127.0.0.1:8", shown.append)
    assert not shown and spill.exists()


@pytest.mark.parametrize(
    "uri",
    ["http://bob:hunter2@h:5", "https://hunter2@h", "postgresql://bob:hunter2@h/db", "mysql://h/db?password=hunter2"],
)
def test_a_password_in_an_address_is_refused_and_not_shown(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri: .*holds a password") as found:
        absolute_uri(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError) as again:
        default_uri()
    assert "hunter2" not in str(found.value) + str(again.value)


def repository(folder: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)

    git("init", "-q")
    (folder / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-qm", "a")
    (folder / "a.txt").write_text("b")


@pytest.mark.parametrize("way", ["fsmonitor", "clean", "process", "environment"])
def test_git_runs_nothing(way: str, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mark.parent
    repository(folder)
    script = folder / "run.sh"
    script.write_text(f"#!/bin/sh\ntouch {mark}\n")
    script.chmod(0o755)
    if way == "environment":
        for key, value in (("COUNT", "1"), ("KEY_0", "core.fsmonitor"), ("VALUE_0", str(script))):
            monkeypatch.setenv(f"GIT_CONFIG_{key}", value)
    else:
        key = "core.fsmonitor" if way == "fsmonitor" else f"filter.x.{way}"
        subprocess.run(["git", "config", key, str(script)], cwd=folder, check=True)
        (folder / ".gitattributes").write_text("*.txt filter=x\n")
    code = provenance.code()
    assert not mark.exists()
    assert code["git_changes"] == ["M a.txt"] and len(code["git_commit"]) == 40


def test_git_is_not_asked_in_somebody_else_s_folder(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(mark.parent)
    assert provenance.git("rev-parse", "HEAD") is not None
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert provenance.git("rev-parse", "HEAD") is None


def test_what_a_user_writes_goes_on_working(mark: Path) -> None:
    (mark.parent / "conf" / "optimizer").mkdir(parents=True)
    (mark.parent / "conf" / "optimizer" / "rms.yaml").write_text("_target_: torch.optim.RMSprop\n_partial_: true\n")
    callbacks = [{"_target_": "pytorch_lightning.callbacks.Timer"}]
    words = experiment(mark, {"trainer": {"callbacks": callbacks}, "output_dir": "${oc.env:A_SECRET}"})
    assert main(["train", *QUICK, "tracking=none", "optimizer=rms", *words]) == 0
    assert list((mark.parent / "hunter2").rglob("result.json"))


def test_a_run_with_a_class_of_one_s_own_goes_on_when_it_is_named_again(
    mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mark.parent / "mine.py").write_text("from clplat.strategy import Strategy\nclass Mine(Strategy): pass\n")
    words = ["strategy=custom", "strategy.custom._target_=mine.Mine"]
    assert main(["train", *QUICK[1:], "tracking=none", *words]) == 0
    assert main(["train", "resume=latest"]) == 2
    assert "strategy.custom._target_=mine.Mine" in capsys.readouterr().err
    assert main(["train", "resume=latest", *words]) == 0
