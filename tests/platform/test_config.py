"""Every shipped configuration composes, is accepted, builds and trains; and what the checks of `clplat.config` refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import pytest
import torch
from _pytest.mark import ParameterSet
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from clplat.build import build_learner
from clplat.catalogue import options
from clplat.config.check import check
from clplat.config.kinds import Built, Misfit, misfit
from clplat.config.refusing import ConfigError, nearest, refusing, root_keys, whole_key
from clplat.config.renamed import MOVED
from clplat.config.resume import differences
from clplat.learners.learner import Learner
from clplat.report.flatten import flatten
from clplat.report.summary import Names
from clplat.reproduce import read, words
from clplat.streams.experience import Stream
from clplat.streams.labelled import Labelled, Layout
from clplat.tracking.base import NoTracker
from clplat.train import train

CONF = Path(__file__).parents[2] / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
GROUPS = {
    folder.name: sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "__pycache__"
}

UNFINISHED = {
    ("strategy", "custom"): ("strategy.custom._target_", "clplat.strategy.Strategy"),
    ("stream", "avalanche"): ("stream.benchmark._target_", "avalanche.benchmarks.SplitMNIST"),
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
def _composed(chosen: tuple[str, ...]) -> DictConfig:
    return compose("train", overrides=list(chosen))


def composed(*overrides: str) -> DictConfig:
    """As Hydra does it, but what options are chosen is composed once; values are set in a copy."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    picks = [o.input_line for o in parsed if o.key_or_group in GROUPS and not o.type.name.startswith(("ADD", "DEL"))]
    cfg = deepcopy(_composed(tuple(filter(None, picks))))
    OmegaConf.set_struct(cfg, False)
    for override in parsed:
        if override.input_line in picks:
            continue
        if override.is_delete():
            above, _, last = override.key_or_group.rpartition(".")
            del (OmegaConf.select(cfg, above) if above else cfg)[last]
        else:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=True)
    return cfg


def chosen(group: str, name: str) -> str:
    return f"{group}=[{name}]" if group == "strategy" else f"{group}={name}"


def small(learner: str) -> list[str]:
    more = SMALL.get(learner, [])
    return [f"learner={learner}", *more] + ([] if learner == "mlp" else ["++learner.net.hidden=8"])


@cache
def stream_of(name: str, *overrides: str) -> Stream:
    return instantiate(composed(f"stream={name}", *STREAMS[name], *overrides).stream)


# Every yaml


MIXED = [group for group in GROUPS if group not in ("experiment", "paper")]


@pytest.mark.parametrize("number", range(max(len(GROUPS[group]) for group in MIXED)))
def test_every_option_composes_and_is_accepted(number: int) -> None:
    """The first of every group together, the second, and so on, from the start where a group has fewer."""
    picked = [(group, GROUPS[group][number % len(GROUPS[group])]) for group in MIXED]
    cfg = composed(*(chosen(*pick) for pick in picked))
    for key, value in [UNFINISHED[pick] for pick in picked if pick in UNFINISHED]:
        with pytest.raises(ConfigError, match=f"^{key}: no value given"):
            check(cfg)
        OmegaConf.update(cfg, key, value)
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
        "tracking", "experiment", "paper",
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
        return "head: got 'task', which needs a task-incremental stream"
    if head == "growing" and stream.target != "class":
        return "head: got 'growing', which needs one class a sequence"
    if learner == "bidirectional" and stream.target == "token":
        return "looks ahead and sees the next token"
    if learner == "mlp" and stream.per_step:
        return "An MLP gives one answer a sequence"
    if learner == "mlp" and stream.length is None:
        return "An MLP needs sequences of one length"
    return None


USUAL = ("lstm", "mlp", "transformer", "bidirectional", "griffin")
"""Learners that stand for all in the default run: a recurrence, none, attention, two directions, two mixers."""


def grid(pairs: Iterable[tuple[str, str]], default: Callable[[str, str], bool]) -> list[ParameterSet]:
    """Pairs as parameters; those that are not in the default run are slow."""
    return [pytest.param(*pair, marks=[] if default(*pair) else [pytest.mark.slow]) for pair in pairs]


@pytest.mark.parametrize(
    ("name", "kind"),
    grid(product(GROUPS["learner"], FITTING), lambda name, kind: name in USUAL or kind == "class"),
)
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
        assert stream.target in learner.objective.targets
        learner.shape_for(stream[0])
        output = learner(batch)
        assert output.logits.shape == (*shape, stream.outputs)
        loss = learner.objective(output.logits, batch)
        loss.backward()
        assert bool(loss.isfinite())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learner.weights().values())


# Whole runs


class Curve(NoTracker):
    """A tracker that keeps the loss of every step."""

    losses: list[float]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the run to come, in place of the tracker that keeps nothing."""
    Curve.losses = []
    monkeypatch.setattr("clplat.tracking.base.NoTracker", Curve)
    return Curve.losses


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    return train(cfg, folder, Names("stream", "learner", "+".join(cfg.strategy)))


PAIRS = [(name, "split_digits") for name in GROUPS["learner"]]
PAIRS += [("lstm", name) for name in ("permuted_copy", "parity", "regular", "selective_copy", "mqar")]
PAIRS += [("transformer", "mqar")]


@pytest.mark.parametrize(("learner", "stream"), grid(PAIRS, lambda learner, _: learner in USUAL))
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


REACHING = ("chunked_hypernetwork", "relevance_maps", "mir", "ewc")


@pytest.mark.parametrize(
    ("learner", "strategy"), grid(product(GROUPS["learner"], REACHING), lambda learner, _: learner == "lstm")
)
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
def test_every_configuration_of_an_experiments_sweep_is_accepted(name: str) -> None:
    whole = compose("train", overrides=[f"experiment={name}"], return_hydra_config=True)
    assert whole.hydra.runtime.choices.experiment == name
    sweep = OmegaConf.to_container(whole.hydra.sweeper.params or OmegaConf.create({}))
    assert isinstance(sweep, dict)
    for key, values in sweep.items():
        for value in str(values).split(","):
            picked = f"strategy=[{value}]" if key == "strategy" else f"{key}={value}"
            check(composed(f"experiment={name}", picked))
    check(composed(f"experiment={name}"))


ROWS = [(name, row, table) for name in GROUPS["paper"] for row, (table, _) in read(name).rows().items()]


@pytest.mark.parametrize(
    ("paper", "row"),
    grid([(name, row) for name, row, _ in ROWS], lambda name, row: row in ("permuted_copy", "split_mnist_icarl")),
)
def test_every_row_of_a_paper_trains(
    paper: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: list[float]
) -> None:
    """On stand-ins for MNIST."""
    for source in ("mnist", "fashion_mnist"):
        monkeypatch.setattr(f"clplat.streams.sources.{source}", tiny_images)
    table, own = read(paper).rows()[row]
    less = STREAMS["permuted_copy"] if table.base.startswith("permuted_copy") else []
    cfg = composed(*words(table, own), *FAST, *less, "stream.experiences=2")
    check(cfg)
    metrics = run(cfg, tmp_path)
    assert math.isfinite(metrics["average"])
    assert curve
    assert all(map(math.isfinite, curve))


# The checks themselves


ITEM = Built("some.Maker")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int), (-1, int), (3, float), (0.5, float), (True, bool), (False, bool), ("a", str),
        (3, int | None), (None, int | None), (None, float | None), (2, float | None), ("rows", Layout),
        ("b", Literal["a", "b"]), ("b", Literal["a"] | Literal["b"]), (None, Literal["a"] | None),
        ([1, 2], list[int]), ("x", Path), (None, Path | None), ("x", Path | None),
        ([3], int | list[int]), (3, int | list[int]), ("natural", Literal["natural"] | list[int]),
        (0.5, float | list[float]), ([0.5, 1], float | list[float]), ("x", Any), ([1], Any), (None, Any),
        ([[1, 6], [2]], Sequence[Sequence[int]]), ({"a": "b"}, Mapping[str, str | Sequence[str]]),
        ([0.9, 0.999], tuple[float, float]), ([1, 2, 3], tuple[int, ...]),
        (ITEM, Stream), (ITEM, int), (ITEM, Callable[[int], Learner]), ([ITEM, ITEM], Sequence[Callable[[int], Learner]]),
        (0.1, float | torch.Tensor), (None, Stream | None),
    ],
)  # fmt: skip
def test_values_that_fit(value: Any, hint: Any) -> None:
    assert misfit(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, "a whole number"),
        (3.0, int, "a whole number"),
        (True, int, "a whole number"),
        (None, int, "a whole number"),
        ([1, 2], int, "a whole number"),
        ({"a": 1}, int, "a whole number"),
        ("fast", float, "a number"),
        (False, float, "a number"),
        (None, float, "a number"),
        ("", float | None, "a number or null"),
        ("yes", bool, "true or false"),
        (1, bool, "true or false"),
        ([True], bool, "true or false"),
        (3, str, "text"),
        (3, Path | None, "text or null"),
        ("many", int | None, "a whole number or null"),
        (2.5, int | None, "a whole number or null"),
        (True, float | None, "a number or null"),
        ("columns", Layout, "pixels, rows or steps"),
        (None, Layout, "pixels, rows or steps"),
        ("c", Literal["a", "b"] | None, "a, b or null"),
        ("half", float | list[float], "a number or a list"),
        ("anything", list[int], "a list"),
        (50, Sequence[int], "a list"),
        (3, Stream, "an object (a mapping with _target_)"),
        ({"a": 1}, Stream, "an object (a mapping with _target_)"),
        ("fast", float | torch.Tensor, "a number or an object (a mapping with _target_)"),
        ([0.9], tuple[float, float], "a longer list"),
        ([0.9, 0.9, 0.9], tuple[float, float], "a shorter list"),
    ],
)
def test_values_that_do_not_fit(value: Any, hint: Any, expected: str) -> None:
    assert misfit(value, hint) == Misfit((), value, expected)


@pytest.mark.parametrize(
    ("value", "hint", "path", "given", "expected"),
    [
        ([1, "x"], float | Sequence[float], (1,), "x", "a number"),
        ([[1, 6], [2, "x"]], Sequence[Sequence[int]], (1, 1), "x", "a whole number"),
        ({"a": "b", "c": 3}, Mapping[str, str | Sequence[str]], ("c",), 3, "text or a list"),
        ({"a": ["b", None]}, Mapping[str, str | Sequence[str]], ("a", 1), None, "text"),
        ([0.9, "x"], tuple[float, float], (1,), "x", "a number"),
        ([ITEM, 3], Sequence[Callable[[int], Learner]], (1,), 3, "an object (a mapping with _target_)"),
        ([ITEM], Sequence[int], (0,), ITEM, "a whole number"),
    ],
)
def test_what_does_not_fit_is_found_inside_lists_and_mappings(
    value: Any, hint: Any, path: tuple, given: Any, expected: str
) -> None:
    assert misfit(value, hint) == Misfit(path, given, expected)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stream.layout=columns"], "stream.layout: got 'columns', expected pixels, rows or steps."),
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
        (["seed=-1"], "seed: got -1, a seed must be at least 0."),
        (["seed=4294967296"], "seed: got 4294967296, it must lie in 0..4294967295."),
        (["seed=[1]"], "seed: got [1], expected a whole number."),
        (["learner.net.layers=[1,2]"], "learner.net.layers: got [1, 2], expected a whole number."),
        (["learner.clip_norm=''"], "learner.clip_norm: got '', expected a number or null."),
        (["learner.head=[a]"], "learner.head: got ['a'], expected text."),
        (["learner.net=null"], "learner.net: got None, expected an object (a mapping with _target_)."),
        (["learner=retnet", "learner.net.mixer.base={a:1}"], "learner.net.mixer.base: got {'a': 1}, expected a number."),
        (["stream.task_incremental=[true]"], "stream.task_incremental: got [True], expected true or false."),
        (["stream.order_seed=[1,2]"], "stream.order_seed: got [1, 2], expected a whole number."),
        (["stream.order_seed=-1"], "stream.order_seed: got -1, a seed must be at least 0."),
        (["strategy=[mas]", "strategy.mas.seed={a:1}"], "strategy.mas.seed: got {'a': 1}, expected a whole number."),
        (["strategy=[mas]", "strategy.mas.seed=-2"], "strategy.mas.seed: got -2, a seed must be at least 0."),
        (["strategy=[gpm]", "strategy.gpm.batch_size={a:1}"], "strategy.gpm.batch_size: got {'a': 1}, expected a whole number."),
        (["strategy=[lagrangian]", "strategy.lagrangian.threshold=[1]"],
         "strategy.lagrangian.threshold: got [1], expected a number or null."),
        (["strategy=[lagrangian]", "strategy.lagrangian.rho=inf"], "strategy.lagrangian.rho: got inf, it must be a finite number."),
        (["optimizer.lr=nan"], "optimizer.lr: got nan, it must be a finite number."),
        (["optimizer.betas=[0.9]"], "optimizer.betas: got [0.9], expected a longer list."),
        (["optimizer.betas=3"], "optimizer.betas: got 3, expected a list."),
        ([f"strategy.replay.capacity={10**30}"], f"strategy.replay.capacity: got {10**30}, a whole number must fit into 64 bits."),
        ([f"seed={-(2**63) - 1}"], f"seed: got {-(2**63) - 1}, a whole number must fit into 64 bits."),
        (["+strategy.bogus=1"], "strategy.bogus: no strategy of that name was chosen. Chosen: replay;"),
        (["+strategy.bogus=[1]"], "strategy.bogus: no strategy of that name was chosen. Chosen: replay;"),
        (["~optimizer._target_"], "optimizer: got {'_partial_': True, 'lr': 0.001"),
        (["~training", "+training=5"], "training: got 5, it has no _target_: choose one of `clplat list training`."),
        (["training._target_=clplat.run.Training"],
         "training._target_: clplat.run.Training is called clplat.settings.Training since clplat 0.2: set training._target_=clplat."),
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


# Old names, and keys in front of refusals


@pytest.mark.parametrize("old", MOVED)
def test_an_import_path_of_the_first_edition_is_refused_with_the_new_one(old: str) -> None:
    cfg = composed("strategy=[custom]", f"strategy.custom._target_={old}.Thing")
    with pytest.raises(ConfigError, match=rf"{old}\.Thing is called {MOVED[old]}\.Thing since clplat 0\.2: set"):
        check(cfg)


@pytest.mark.parametrize("new", MOVED.values())
def test_what_old_import_paths_are_called_now_can_be_imported(new: str) -> None:
    assert locate(new) is not None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["++stream.as_=rows"], "stream.as_: it is called stream.layout since clplat 0.2."),
        (["stream=joint_digits", "++stream.stream.as_=rows"],
         "stream.stream.as_: it is called stream.stream.layout since clplat 0.2."),
        (["++learner.net.readout=last"], "learner.net.readout: it is called learner.net.pooling since clplat 0.2."),
        (["++optimizer.readout=last"], "optimizer.readout: unknown key"),
    ],
)  # fmt: skip
def test_a_key_of_the_first_edition_is_refused_with_the_new_one(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        check(composed(*overrides))


def test_every_key_is_one_of_the_yaml() -> None:
    assert root_keys() == (
        "stream", "learner", "strategy", "objective", "optimizer", "schedule", "training", "evaluation", "trainer",
        "tracking", "experiment", "seed", "output_dir", "resume", "threads", "progress", "debug", "sweep",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "line", "whole"),
    [
        ("strategy.ewc", "strength: got -1, no.", "strategy.ewc.strength: got -1, no."),
        ("strategy.ewc", "ewc.strength: got -1, no.", "strategy.ewc.strength: got -1, no."),
        ("strategy.ewc", "strategy.ewc.strength: got -1, no.", "strategy.ewc.strength: got -1, no."),
        ("strategy.ewc", "ewc: got this, no.", "strategy.ewc: got this, no."),
        ("strategy.ewc", "Two of a kind: drop one.", "strategy.ewc: Two of a kind: drop one."),
        ("strategy.ewc", "strength[1]: got x.", "strategy.ewc.strength[1]: got x."),
        ("strategy.replay", "capacity or capacity_per_class: got a.", "strategy.replay.capacity or capacity_per_class: got a."),
        ("strategy.custom", "limit: got 3.", "strategy.custom.limit: got 3."),
        ("strategy.ewc", "learner.optimizer_state: got kept.", "learner.optimizer_state: got kept."),
        ("strategy.rehearsal_environment", "schedule: got x.", "strategy.rehearsal_environment.schedule: got x."),
        ("training", "training.epochs: got 0.", "training.epochs: got 0."),
        ("training", "training: give one.", "training: give one."),
        ("training", "epochs: got 0.", "training.epochs: got 0."),
        ("learner", "clip_norm: got -1.", "learner.clip_norm: got -1."),
        ("learner.net", "layers: got 0.", "learner.net.layers: got 0."),
        ("learner.net", "learner.net.layers: got 0.", "learner.net.layers: got 0."),
        ("learner.net", "forget_bias: got x.", "learner.net.mixer.forget_bias: got x."),
        ("", "freeze.blocks: got 9.", "freeze.blocks: got 9."),
    ],
)  # fmt: skip
def test_a_refusal_begins_with_the_whole_key_once(key: str, line: str, whole: str) -> None:
    assert whole_key(composed("strategy=[replay,ewc,rehearsal_environment]"), key, line) == whole


def test_what_a_strategy_refuses_at_its_setup_is_refused_with_its_key() -> None:
    cfg = composed("strategy=[freeze]")
    error = ValueError("blocks: got 9, this net has 1.")
    error.add_note("strategy.freeze")
    with pytest.raises(ConfigError, match=r"^strategy\.freeze\.blocks: got 9"), refusing(cfg):
        raise error
