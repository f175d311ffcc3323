"""Every shipped configuration composes, is accepted, builds and trains; and what the checks of `clplat.config` refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from clplat.cli import options
from clplat.config import ConfigError, _fits, check, differences, flatten, nearest
from clplat.learners.learner import Learner
from clplat.run import Silent
from clplat.streams.experience import Stream
from clplat.streams.labelled import Labelled, Layout
from clplat.train import Names, build_learner, train

CONF = Path(__file__).parents[2] / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
GROUPS = {
    folder.name: sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "__pycache__"
}
OPTIONS = [(group, name) for group, names in GROUPS.items() for name in names]

UNFINISHED = {
    ("strategy", "custom"): ("strategy.custom._target_", "clplat.strategy.Strategy"),
    ("stream", "avalanche"): ("stream.benchmark._target_", "builtins.object"),
}
"""Options that the user has to complete: the key without a value, and one that will do here."""

FAST = ["training.epochs=null", "training.steps=3", "training.batch_size=8", "tracking=none", "progress=false"]


def noted(group: str, word: str) -> dict[str, list[str]]:
    """The words behind `# word:` in the head of each yaml of a group that has such a line."""
    found = {}
    for name in GROUPS[group]:
        for line in (CONF / group / f"{name}.yaml").read_text().splitlines():
            if line.startswith(f"# {word}:"):
                found[name] = line.split()[2:]
    return found


STREAMS = {name: [f"++stream.{key}" for key in keys] for name, keys in noted("stream", "tiny").items()}
"""Streams that need no download, and what makes them small: `# tiny: key=value ...` in their yaml."""

DOWNLOADED = {name: folder for name, (folder,) in noted("stream", "data").items()}
"""Streams of data in a folder under the data root: `# data: FOLDER` in their yaml."""

SMALL: dict[str, list[str]] = {"mlp": ["++learner.net.hidden=[8]"], "transformer": ["++learner.net.heads=2"]}
"""What makes a learner small; where nothing is said, hidden=8."""


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_module("clplat.conf", version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose("train", overrides=list(overrides))


def composed(*overrides: str) -> DictConfig:
    return deepcopy(_composed(overrides))


def chosen(group: str, name: str) -> str:
    return f"{group}=[{name}]" if group == "strategy" else f"{group}={name}"


def small(learner: str) -> list[str]:
    more = SMALL.get(learner, [])
    return [f"learner={learner}", *more] + ([] if learner == "mlp" else ["++learner.net.hidden=8"])


@cache
def stream_of(name: str, *overrides: str) -> Stream:
    return instantiate(composed(f"stream={name}", *STREAMS[name], *overrides).stream)


# Every yaml


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_is_accepted(group: str, name: str) -> None:
    cfg = composed(chosen(group, name))
    if (group, name) in UNFINISHED:
        key, value = UNFINISHED[group, name]
        with pytest.raises(ConfigError, match=f"^{key}: no value given"):
            check(cfg)
        cfg = composed(chosen(group, name), f"{key}={value}")
    check(cfg)
    OmegaConf.resolve(cfg)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(CONF)))
def test_every_yaml_says_in_one_line_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    headers = [number for number, line in enumerate(lines) if "@package" in line]
    assert headers in ([], [0]), "Hydra reads its header on the first line only"
    line = lines[len(headers)]
    assert line.startswith("# ")
    assert 5 < len(line) <= 120
    group = path.parent
    if group != CONF and not path.stem.startswith("_"):
        assert options(group)[path.stem] == line[2:]
    if group.name == "strategy":
        assert lines[0] == f"# @package strategy.{path.stem}", "strategies compose: each has a key of its own"
    if group.name == "experiment":
        assert lines[0] == "# @package _global_"


def test_the_groups_here_are_those_that_are_known() -> None:
    assert set(GROUPS) == {
        "stream", "learner", "strategy", "objective", "optimizer", "schedule", "training", "evaluation", "trainer",
        "tracking", "experiment",
    }  # fmt: skip
    unfinished = {name for group, name in UNFINISHED if group == "stream"}
    assert set(GROUPS["stream"]) == STREAMS.keys() | DOWNLOADED.keys() | unfinished, (
        "say in the yaml what makes the stream small (# tiny: key=value ...), or which folder of data it needs (# data: FOLDER)"
    )


# Streams, and learners on them


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_that_needs_no_download_is_learnable(name: str) -> None:
    stream = stream_of(name)
    stream.check()
    assert len(stream) == {"joint_digits": 1, "regular": 1, "text": 3, "markov_text": 3}.get(name, 5)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_every_stream_of_downloaded_data_is_learnable(name: str, data_root: Path) -> None:
    if not (data_root / DOWNLOADED[name] / "raw").is_dir():
        pytest.skip(f"needs {DOWNLOADED[name]} under CLPLAT_DATA_ROOT")
    instantiate(composed(f"stream={name}", f"stream.source.data_root={data_root}").stream).check()


FITTING = {
    "class": ("split_digits", []),
    "class_of_various_lengths": ("parity", ["++stream.task_incremental=false"]),
    "class_by_task": ("split_digits", ["++stream.task_incremental=true"]),
    "bits": ("permuted_copy", ["++stream.task_incremental=false"]),
    "bits_by_task": ("permuted_copy", []),
    "tag": ("selective_copy", []),
    "tag_by_task": ("mqar", ["++stream.task_incremental=true"]),
    "token": ("selective_copy", []),
}
HEADS = ("auto", "shared", "growing", "task")


def refusal(learner: str, head: str, stream: Stream) -> str | None:
    """What a learner must say that does not fit a stream."""
    if head == "task" and stream.scenario != "task_incremental":
        return "learner.head=task needs a task-incremental stream"
    if head == "growing" and stream.target != "class":
        return "learner.head=growing needs one class a sequence"
    if learner == "bidirectional" and stream.target == "token":
        return "looks ahead and sees the next token"
    if learner == "mlp" and stream.per_step:
        return "An MLP gives one answer a sequence"
    if learner == "mlp" and stream.length is None:
        return "An MLP needs sequences of one length"
    return None


@pytest.mark.parametrize("kind", FITTING)
@pytest.mark.parametrize("name", GROUPS["learner"])
def test_every_learner_with_every_head_answers_in_the_right_shape_or_says_why_not(name: str, kind: str) -> None:
    stream_name, overrides = FITTING[kind]
    stream = stream_of(stream_name, *overrides)
    if kind == "token":
        stream = replace(stream, target="token")
    batch = stream[0].train.batch(torch.arange(5))
    shape = batch.x.shape[:2] if stream.per_step else batch.x.shape[:1]
    cfg = composed(*small(name))
    for head in HEADS:
        cfg.learner.head = head
        said = refusal(name, head, stream)
        if said is not None:
            with pytest.raises(ValueError, match=said):
                build_learner(cfg, stream)
            continue
        learner = build_learner(cfg, stream)
        assert isinstance(learner, Learner)
        assert learner.objective.kind == stream.target
        learner.shape_for(stream[0])
        output = learner(batch)
        assert output.logits.shape == (*shape, stream.outputs)
        loss = learner.objective(output.logits, batch)
        loss.backward()
        assert bool(loss.isfinite())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learner.weights().values())


# Whole runs


class Curve(Silent):
    """A tracker that keeps the loss of every step."""

    losses: list[float]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the run to come, in place of the tracker that keeps nothing."""
    Curve.losses = []
    monkeypatch.setattr("clplat.run.Silent", Curve)
    return Curve.losses


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    return train(cfg, folder, Names("stream", "learner", "+".join(cfg.strategy)))


PAIRS = [(name, "split_digits") for name in GROUPS["learner"]]
PAIRS += [("lstm", name) for name in ("permuted_copy", "parity", "regular", "selective_copy", "mqar")]
PAIRS += [("transformer", "mqar")]


@pytest.mark.parametrize(("learner", "stream"), PAIRS)
def test_every_learner_learns_something(learner: str, stream: str, tmp_path: Path, curve: list[float]) -> None:
    whole = ["++stream.classes_per_experience=10", "++stream.experiences=null"]
    one = {"split_digits": whole, "regular": []}.get(stream, ["++stream.experiences=1"])
    cfg = composed(
        *small(learner), f"stream={stream}", *STREAMS[stream], *one, *FAST, "strategy=[finetune]",
        "training.steps=24", "training.log_every_n_steps=1", "optimizer.lr=0.02",
    )  # fmt: skip
    metrics = run(cfg, tmp_path)
    assert len(curve) == 24
    assert all(map(math.isfinite, curve))
    assert 0 <= metrics["average"] <= 1
    # The first loss is that of guessing; on parity nothing can be learned so soon, it only must not grow.
    assert sum(curve[-4:]) / 4 < sum(curve[:4]) / 4 * (1.02 if stream in ("parity", "regular") else 1.0)


@pytest.mark.parametrize("learner", GROUPS["learner"])
@pytest.mark.parametrize("strategy", ["chunked_hypernetwork", "relevance_maps", "mir", "ewc"])
def test_every_learner_goes_with_strategies_that_reach_into_its_net(
    learner: str, strategy: str, tmp_path: Path, curve: list[float]
) -> None:
    """Generated weights (in bfloat16 too), masked weights, weights of a step not taken, gradients of single examples."""
    cfg = composed(
        *small(learner), f"strategy=[{strategy}]", "stream=split_digits", *STREAMS["split_digits"], *FAST,
        "++stream.experiences=2", "++stream.classes_per_experience=null", "++stream.task_incremental=true",
        "++trainer.precision=" + ("bf16-mixed" if strategy == "chunked_hypernetwork" else "32-true"),
        *(["strategy.ewc.examples=10"] if strategy == "ewc" else []),
    )  # fmt: skip
    run(cfg, tmp_path)
    assert len(curve) == 2
    assert all(map(math.isfinite, curve))


def tiny_images(data_root: str | None = None, download: bool = False) -> Labelled:
    """Stands for MNIST: 28x28, a fifth of the pixels lit as there (the published rates are as high as those bear)."""
    g = torch.Generator().manual_seed(0)
    images = [(torch.rand(n, 28, 28, generator=g) * 5 - 4).clamp_min(0) for n in (60, 20)]
    sets = [(x, torch.arange(len(x)) % 10) for x in images]
    return Labelled("tiny", *sets[0], *sets[1], classes=10)


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_is_accepted_and_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: list[float]
) -> None:
    """On its own data where they are here, and on stand-ins for MNIST; each configuration of its sweep is accepted."""
    for source in ("mnist", "fashion_mnist"):
        monkeypatch.setattr(f"clplat.streams.sources.{source}", tiny_images)
    whole = compose("train", overrides=[f"experiment={name}"], return_hydra_config=True)
    assert whole.hydra.runtime.choices.experiment == name
    sweep = OmegaConf.to_container(whole.hydra.sweeper.params or OmegaConf.create({}))
    assert isinstance(sweep, dict)
    for key, values in sweep.items():
        for value in str(values).split(","):
            picked = f"strategy=[{value}]" if key == "strategy" else f"{key}={value}"
            check(composed(f"experiment={name}", picked))
    check(composed(f"experiment={name}"))
    stream: str = whole.hydra.runtime.choices.stream
    if stream not in STREAMS and not stream.endswith("mnist"):
        pytest.skip(f"stream={stream} needs a download that nothing stands for here")
    fewer = [f"++stream.{'angles=[0,90]' if 'rotated' in stream else 'experiences=2'}"]
    cfg = composed(f"experiment={name}", *FAST, *STREAMS.get(stream, []), *fewer)
    metrics = run(cfg, tmp_path)
    assert math.isfinite(metrics["average"])
    assert curve
    assert all(map(math.isfinite, curve))


# The checks themselves


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int), (-1, int), (3, float), (0.5, float), (math.inf, float), (True, bool), (False, bool), ("a", str),
        (3, int | None), (None, int | None), (None, float | None), (2, float | None), ("rows", Layout),
        ("b", Literal["a", "b"]), ("b", Literal["a"] | Literal["b"]), (None, Literal["a"] | None),
        ([1, 2], list[int]), ("anything", list[int]), ("x", Path), (3, Path | None), ("x", Path | None),
        ([3], int | list[int]), (3, int | list[int]), ("natural", Literal["natural"] | list[int]),
        (0.5, float | list[float]), ([0.5], float | list[float]), ("x", Any),
    ],
)  # fmt: skip
def test_values_that_fit(value: Any, hint: Any) -> None:
    _fits("key", value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, "a whole number"),
        (3.0, int, "a whole number"),
        (True, int, "a whole number"),
        (None, int, "a whole number"),
        ("fast", float, "a number"),
        (False, float, "a number"),
        (None, float, "a number"),
        ("yes", bool, "true or false"),
        (1, bool, "true or false"),
        (3, str, "text"),
        ("many", int | None, "a whole number or null"),
        (2.5, int | None, "a whole number or null"),
        (True, float | None, "a number or null"),
        ("columns", Layout, "pixels, rows, steps"),
        (None, Layout, "pixels, rows, steps"),
        ("c", Literal["a", "b"] | None, "a, b or null"),
        ("half", float | list[float], "a number"),
    ],
)
def test_values_that_do_not_fit(value: Any, hint: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _fits("some.key", value, hint)
    assert str(refused.value) == f"some.key: got {value!r}, expected {expected}."


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stream.layout=columns"], "stream.layout: got 'columns', expected pixels, rows, steps."),
        (["learner.net.layers=two"], "learner.net.layers: got 'two', expected a whole number."),
        (["learner.net.mixer.forget_bias=high"], "learner.net.mixer.forget_bias: got 'high', expected a number."),
        (["+learner.net.wings=2"], "learner.net.wings: unknown key"),
        (["+learner.net.inputs=3"], "learner.net.inputs: clplat fills it in: leave it out. Allowed here: dropout, embedding"),
        (["+learner.net.mixer.hidden=3"], "learner.net.mixer.hidden: clplat fills it in: leave it out. Allowed here: forget_bias, w"),
        (["learner=griffin", "+learner.net.mixers.1.features=3"], "learner.net.mixers.1.features: clplat fills it in"),
        (["learner=bidirectional", "+learner.net.mixer.mixer.hidden=3"], "learner.net.mixer.mixer.hidden: clplat fills it in"),
        (["+optimizer.params=3"], "optimizer.params: clplat fills it in"),
        (["schedule=warmup_cosine", "+schedule.steps=3"], "schedule.steps: clplat fills it in"),
        (["+objective.target=class"], "objective.target: clplat fills it in"),
        (["learner=bidirectional", "learner.net.mixer.mixer._target_=gru.GRU"],
         "learner.net.mixer.mixer._target_: cannot import 'gru.GRU' (No module named 'gru'). Give an importable path"),
        (["trainer.precision=fp7"], "trainer.precision: got 'fp7', allowed are 32-true, 64-true and bf16-mixed (float16"),
        (["+learner.width=2"], "learner.width: unknown key"),
        (["+strategy.replay.capactiy=2"], "strategy.replay.capactiy: unknown key; did you mean 'capacity'? Allowed here"),
        (["strategy.replay.rows=many"], "strategy.replay.rows: got 'many', expected a whole number or null."),
        (["+stream.sauce=1"], "stream.sauce: unknown key; did you mean 'source'?"),
        (["stream.source.download=maybe"], "stream.source.download"),
        (["stream.source._target_=clplat.streams.sources.no"], "stream.source._target_: cannot import"),
        (["threads=few"], "threads: got 'few', expected a whole number or null."),
        (["progress=1"], "progress: got 1, expected true or false."),
        (["output_dir=3"], "output_dir: got 3, expected text."),
        (["seed=2.0"], "seed: got 2.0, expected a whole number."),
        (["seed=-1"], "seed: got -1, it must lie in 0..4294967295"),
        (["strategy=[]"], "strategy: got none, give at least one"),
        (["~training"], "training: it was taken out"),
        (["~seed"], "seed: it was taken out"),
        (["+colour=red"], "colour: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named(overrides: list[str], said: str, caplog: pytest.LogCaptureFixture) -> None:
    if any("download" in o for o in overrides):
        overrides = ["stream=split_mnist", *overrides]
    with pytest.raises(ConfigError) as refused:
        check(composed(*overrides))
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
    assert not caplog.records


def test_the_nearest_word_is_offered_only_if_it_is_near() -> None:
    assert nearest("lrr", ["lr", "betas"]) == "; did you mean 'lr'?"
    assert nearest("xyz", ["lr", "betas"]) == "."


def test_flatten_joins_keys_with_dots_and_leaves_lists() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": None}


def test_differences_name_the_key_and_both_values() -> None:
    ours = OmegaConf.create({"a": {"b": 1, "c": 2}, "d": [1, 2], "seed": 3, "s": "${seed}"})
    theirs = OmegaConf.create({"a": {"b": 1, "e": 5}, "d": [1, 3], "seed": 4, "s": "${seed}"})
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == [
        "a.c: 2 in the run, absent given",
        "a.e: absent in the run, 5 given",
        "d: [1, 2] in the run, [1, 3] given",
        "s: 3 in the run, 4 given",
        "seed: 3 in the run, 4 given",
    ]
