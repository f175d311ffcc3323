"""What the README and the pages say is what happens: commands, code, tables, keys and links."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from clplat import checkpoint
from clplat.build import build_learner
from clplat.catalogue import head, update
from clplat.cli import HELP, main
from clplat.config.check import check
from clplat.learners.learner import Learner
from clplat.lightning import pl
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.experience import Batch, Stream

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text()
STRATEGIES = (ROOT / "docs" / "strategies.md").read_text()
LEARNERS = (ROOT / "docs" / "learners.md").read_text()
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
QUICK = ["training.epochs=1", "learner.net.hidden=8", "tracking=none", "progress=false", "stream.experiences=2"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def after(mark: str, page: str = README) -> str:
    """A page from a mark on, which has to be there once."""
    _, rest = page.split(mark)
    return rest


def commands(block: str) -> list[list[str]]:
    """Its lines as words, without comments."""
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


RUN_SOMETHING = commands(blocks(after("## Run something"), "bash")[0])
TRAINING = [words[2:] for words in RUN_SOMETHING if words[:2] == ["clplat", "train"]]


@pytest.mark.parametrize("overrides", TRAINING, ids=" ".join)
def test_every_training_command_composes(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "resume=latest" in overrides:
        folder = Path("runs/2026-01-01/12-00-00")
        folder.mkdir(parents=True)
        (folder / "last.ckpt").touch()
    # Hydra shows no configuration of a whole sweep; its values are those of single runs.
    single = [o.split(",")[0] if "[" not in o else o for o in overrides if o not in ("-m", "--multirun")]
    assert main(["train", "--cfg", "job", *single]) == 0, capsys.readouterr().err
    shown = "\n" + capsys.readouterr().out
    for override in single:
        key, value = override.split("=")
        if key == "strategy":
            assert all(f"\n  {name}:\n" in shown for name in value.strip("[]").split(","))
        elif key in ("seed", "resume"):
            assert f"\n{key}: {value}\n" in shown
        elif key == "strategy.ewc.strength":
            assert f"\n    strength: {value}\n" in shown


def test_the_block_has_every_kind_of_command() -> None:
    assert len(TRAINING) >= 4
    assert len(RUN_SOMETHING) == 5
    for words in RUN_SOMETHING:
        assert words[0] == "clplat"
        assert re.search(rf"^  {words[1]} ", HELP, flags=re.MULTILINE), f"`clplat --help` does not know {words[1]}"


@pytest.mark.parametrize("words", [w for w in RUN_SOMETHING if w[1] in ("ui", "compare")], ids=" ".join)
def test_the_other_commands_take_what_is_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--help"])
    assert ended.value.code == 0
    if words[1] == "compare":
        assert main(words[1:]) == 2, "there are no runs yet, and that is what it says"
        assert "no result.json under runs" in capsys.readouterr().err


def test_the_configuration_is_shown_wherever_the_flag_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"`clplat train --cfg job` the\s+whole configuration", README)
    shown = []
    for arguments in (["--cfg", "job", "seed=3"], ["seed=3", "--cfg", "job"], ["seed=3", "-c", "job"]):
        assert main(["train", *arguments]) == 0, capsys.readouterr().err
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith("seed: 3\n")
    assert shown[0] == shown[1] == shown[2]


def own_strategy(folder: Path) -> list[str]:
    """Write the page's strategy of one's own; returns the command that runs it."""
    text = after("<!-- own strategy -->", EXTENDING)
    code = blocks(text, "python")[0]
    name = re.match(r"# (\w+\.py)\n", code)
    assert name is not None, "the block's first line names its file"
    (folder / name[1]).write_text(code)
    (command,) = commands(blocks(text, "bash")[0])
    return command


def test_a_strategy_of_your_own_runs_from_your_own_folder(tmp_path: Path) -> None:
    command = own_strategy(tmp_path)
    assert command[:4] == ["python", "-m", "clplat", "train"]
    done = subprocess.run(
        [sys.executable, *command[1:], *QUICK], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["strategy"] == "custom"
    state = checkpoint.load(result.parent / "last.ckpt")
    weights = sum(v.numel() for k, v in state["learner"].items() if k.startswith("net.") and v.is_floating_point())
    assert state["learner"]["strategy.parts.custom.anchor"].shape == (weights,)


def test_the_readme_shows_the_same_strategy_and_command() -> None:
    text = after("<!-- own strategy -->", EXTENDING)
    shown = next(block for block in blocks(README, "python") if "L2Anchor" in block)
    assert shown in blocks(text, "python")[0]
    (command,) = commands(blocks(text, "bash")[0])
    assert f"`{' '.join(command)}`" in README


def test_a_stream_of_your_own_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_streams.py").write_text(blocks(after("<!-- own stream -->", EXTENDING), "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "my_conf" / "stream"
    folder.mkdir(parents=True)
    (folder / "waves.yaml").write_text("# Waves\n_target_: my_streams.waves\nexamples: 40\n")
    quick = [word for word in QUICK if not word.startswith("stream.")]
    assert main(["train", "--config-dir", "my_conf", "stream=waves", *quick]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["stream"] == "waves"


def test_a_yaml_of_your_own_gives_it_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = re.findall(r"`clplat (train --config-dir my_conf strategy=l2)`", EXTENDING)
    path = re.search(r"`(my_conf/strategy/l2\.yaml)`", EXTENDING)
    assert path is not None
    (tmp_path / path[1]).parent.mkdir(parents=True)
    (tmp_path / path[1]).write_text(
        "# @package strategy.l2\n# Anchors the weights\n_target_: my_pkg.L2Anchor\nstrength: 0.1\n"
    )
    command, *rest = words.split()
    assert main([command, "--cfg=job", *rest]) == 0
    assert "_target_: my_pkg.L2Anchor\n    strength: 0.1" in capsys.readouterr().out


def test_the_notebook_block_gives_scores(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(after("<!-- notebook -->"), "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    assert "epochs=5)" in code
    names: dict[str, Any] = {}
    exec(compile(code.replace("epochs=5)", "epochs=1)"), "README.md", "exec"), names)
    result = names["result"]
    assert result.R.shape == (5, 5)
    assert bool(result.R.isfinite().all())
    assert float(result.R[0, 0]) > 0.6  # more was learned than to answer with one of the two classes
    assert all(math.isfinite(result.metrics[m]) for m in ("average", "forgetting", "backward_transfer"))
    frame = result.frame()
    assert list(frame.index) == ["untrained", *frame.columns]
    assert frame.loc["digits 8 9", "digits 0 1"] == float(result.R[4, 0])
    (axes,) = result.plot().axes
    assert len(axes.lines) >= 5
    assert "average_incremental" in capsys.readouterr().out


def test_public_names_load_and_others_are_refused() -> None:
    import clplat

    for name in clplat.__all__:
        assert getattr(clplat, name).__name__ == name
    assert set(clplat.__all__) <= set(dir(clplat))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = clplat.nothing


def test_the_probes_block_finds_what_was_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(STRATEGIES[STRATEGIES.index("<!-- probe -->") :], "python")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/strategies.md", "exec"), names)
    assert names["recovery"].before < 0.1 < 0.5 < names["recovery"].after  # forgotten, and soon back
    assert "angle between" in capsys.readouterr().out


def test_a_mixer_of_ones_own_carries_its_state_and_forgets_it_at_resets() -> None:
    names: dict[str, Any] = {}
    exec(
        compile(blocks(LEARNERS[LEARNERS.index("<!-- own mixer -->") :], "python")[0], "docs/learners.md", "exec"),
        names,
    )
    net, x = names["net"], torch.randn(2, 9, 8)
    whole = net(Batch(x, torch.zeros(2)))
    early = net(Batch(x[:, :4], torch.zeros(2)))
    torch.testing.assert_close(net(Batch(x[:, 4:], torch.zeros(2)), early.state).logits, whole.logits)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    torch.testing.assert_close(
        net(Batch(x, torch.zeros(2), reset=reset)).logits, net(Batch(x[:, 4:], torch.zeros(2))).logits
    )
    assert not torch.allclose(net(Batch(x, torch.zeros(2), reset=reset)).logits, whole.logits)


@pytest.mark.parametrize(
    "line", [one for page in (STRATEGIES, LEARNERS) for block in blocks(page, "bash") for one in block.splitlines()]
)
def test_the_commands_of_the_pages_are_accepted(line: str) -> None:
    command, train_, *words = shlex.split(line, comments=True)
    assert (command, train_) == ("clplat", "train")
    with initialize_config_module("clplat.conf", version_base="1.3"):
        sweep = {
            w.split("=")[0]: w.split("=", 1)[1].split(",") for w in words if "," in w and "=" in w and "[" not in w
        }
        plain = [w for w in words if w != "-m" and w.split("=")[0] not in sweep]
        for key, values in (sweep or {"seed": ["0"]}).items():
            for value in values:
                picked = f"strategy=[{value}]" if key == "strategy" else f"{key}={value}"
                rest = [f"{k}={v[0]}" for k, v in sweep.items() if k not in (key, "strategy")]
                rest += [] if key == "strategy" or "strategy" not in sweep else [f"strategy=[{sweep['strategy'][0]}]"]
                lists = [re.sub(r"^strategy=(\w+)$", r"strategy=[\1]", w) for w in plain]
                check(compose("train", [*lists, *rest, picked]))


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_the_tables_are_those_of_the_yamls_and_classes(page: str) -> None:
    """Stale? `clplat list --update docs/*.md` makes them anew."""
    text = (ROOT / page).read_text()
    assert update(text) == text


@pytest.mark.parametrize("group", ["strategy", "learner", "stream"])
def test_every_option_says_what_it_is_and_stands_in_a_table(group: str) -> None:
    page = {"strategy": "strategies", "learner": "learners", "stream": "streams"}[group]
    text = (ROOT / "docs" / f"{page}.md").read_text()
    there = {p.stem: head(p) for p in (ROOT / "conf" / group).glob("*.yaml") if not p.stem.startswith("_")}
    for name, fields in there.items():
        assert fields.get("what"), name
        if name != "custom":
            assert f"| `{name}` | {fields['what']}" in text
            if group != "stream":
                assert fields.get("verified"), f"{name} does not say how it was verified"


def test_the_hooks_table_names_every_hook() -> None:
    from clplat.strategy import Strategy

    hooks = {name for name, value in vars(Strategy).items() if callable(value) and not name.startswith("_")}
    shown = set(
        re.findall(r"`(\w+)(?:\([\w, ]*\))?`", after("## The hooks and their laws", ARCHITECTURE).split("\n\n")[1])
    )
    assert shown == hooks


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", link):
            target = ROOT / page if link.startswith("#") else (ROOT / page).parent / link.split("#")[0]
            assert target.exists(), link
    for name in re.findall(
        r"(?<![\w/.-])(?:clplat|conf|tests|docs|strategies|kernels|benchmarks)/[\w/.]*(?![\w/.*])", text
    ):
        if "NAME" not in name and "/name." not in name:  # placeholders
            assert (ROOT / name.rstrip(".")).exists(), name


def test_the_first_commands_are_one_line_each() -> None:
    first = blocks(README, "bash")
    assert first[0].strip().endswith("clplat demo")
    tests = blocks(after("<!-- tests -->"), "bash")[0].strip()
    assert tests.startswith("python3 -m venv")  # .ci/run looks for it
    assert "\n" not in tests


KEYS = [
    (key, re.findall(r"`(\w+)`", values), default)
    for key, values, default in re.findall(r"^\| `([\w.]+)` \| (.+?) \| `(\w+)` \|$", SEMANTICS, flags=re.MULTILINE)
]


def built(cfg: DictConfig, stream: Stream | None = None) -> Learner:
    """The learner of a configuration that was checked first."""
    check(cfg)
    return build_learner(cfg, instantiate(cfg.stream) if stream is None else stream)


@pytest.mark.parametrize(("key", "values", "default"), KEYS, ids=[key for key, *_ in KEYS])
def test_the_keys_of_the_semantics(key: str, values: list[str], default: str) -> None:
    """Its default is the configuration's own; each value builds a run, and another one does not."""
    group = key.split(".")[0]
    by_task = ["stream.task_incremental=true"] if "task" in values else []
    base = [*(["objective=classification"] if group == "objective" else []), "strategy=[ewc,replay]", *by_task]
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", overrides=base)
    assert OmegaConf.select(cfg, key) == default
    assert default in values
    stream = instantiate(cfg.stream)
    for value in values:
        OmegaConf.update(cfg, key, value)
        built(cfg, None if group == "stream" else stream)
    OmegaConf.update(cfg, key, "backwards")
    with pytest.raises(Exception, match="backwards"):
        built(cfg)


def test_the_semantics_have_a_table_of_keys() -> None:
    assert len(KEYS) >= 10


class Counting(pl.Callback):
    """What a callback sees of a run."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(("start", trainer.current_epoch, trainer.global_step))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(("batch", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(("epoch", trainer.current_epoch, trainer.global_step))


def test_an_epoch_of_the_trainer_is_an_experience_and_its_batch_a_chunk(trainer: Callable[..., pl.Trainer]) -> None:
    assert "**an epoch of the Trainer is an experience**" in SEMANTICS
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", overrides=["strategy=[finetune]", "learner.net.hidden=4", "stream.experiences=2"])
    stream, counting = instantiate(cfg.stream), Counting()
    training = Training(batch_size=400, epochs=3, chunk=4, log_every_n_steps=5)  # 2 steps a pass: 6 an experience
    Run(stream, build_learner(cfg, stream), trainer(callbacks=[counting]), training).go()
    assert all(400 < len(e.train) <= 800 for e in stream)
    assert counting.seen == [
        ("start", 0, 0), ("batch", 0, 4), ("batch", 0, 5), ("batch", 0, 6), ("epoch", 0, 6),
        ("start", 1, 6), ("batch", 1, 10), ("batch", 1, 12), ("epoch", 1, 12),
    ]  # fmt: skip
