"""From a configuration to scores: check, build, run, report. Hydra ends here; all below takes plain values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from clplat.config import resume
from clplat.config.check import check
from clplat.config.refusing import ConfigError, refusing
from clplat.report.summary import Names

if TYPE_CHECKING:
    from clplat.loop import Run


def resumed(
    cfg: DictConfig, folder: Path, names: Names, given: Sequence[str] | None = None
) -> tuple[DictConfig, Names, dict[str, Any] | None]:
    """Configuration, names and checkpoint to go on with; those given and None for a run that begins.

    Args:
        cfg: composed configuration.
        folder: of the run; with `cfg.resume`, the one that holds the checkpoint.
        names: of a run that begins.
        given: the keys that the user gave, None for all. They are taken where they may change on a resume, and must
            be the run's own where they may not.

    Raises:
        CheckpointError: there is no checkpoint that can be read.
        ConfigError: the options given are not the run's own.
    """
    from clplat import checkpoint

    if not cfg.resume:
        return cfg, names, None
    state = checkpoint.load(folder / "last.ckpt")
    notes = state["notes"]
    return resume.configuration(cfg, notes["config"], given), Names(**notes["names"]), state


def train(cfg: DictConfig, folder: Path, names: Names, state: dict[str, Any] | None = None) -> dict[str, float]:
    """Run what `cfg` describes, in `folder`; returns the metrics after the last experience.

    Args:
        cfg: composed configuration (`conf/train.yaml`).
        folder: gets checkpoint, configuration, scores and whatever could not be sent to the tracking server.
        names: of the run.
        state: the checkpoint to go on from, as `resumed` gave it with the other two.

    Raises:
        ConfigError, StreamError, CheckpointError, TrackingError: something is wrong before the first training step.
        NonFiniteLoss: a loss became NaN or infinite in training.
    """
    if state is None:
        cfg, names, state = resumed(cfg, folder, names)
    check(cfg)
    folder = _writable(folder)

    from clplat.build import Parts
    from clplat.loop import Run
    from clplat.report import folder as report
    from clplat.report.summary import summarise
    from clplat.report.tables import ALWAYS, mean_and_spread, print_run

    label = names.varied or f"{names.strategy}, seed {cfg.seed}"
    parts = Parts.build(cfg, folder, label)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]  # a mapping with string keys
    notes = {"config": plain, "names": vars(names), "run_id": None if state is None else state["notes"]["run_id"]}
    with refusing(cfg):
        run = Run(**vars(parts), folder=folder, notes=notes)
        if state is not None:
            run.resume(state)
        run.begin()
    tracker = parts.tracker
    report.begin(folder, OmegaConf.to_yaml(cfg, resolve=True))
    notes["run_id"] = tracker.start(names, plain, parts.stream, run_id=notes["run_id"] or None)
    if names.sweep is None:
        _announce(cfg, names, run, folder)
    try:
        results = run.go()
        summary = summarise(names, cfg.seed, results)
        found = {name: value.numpy(force=True) for name, value in run.learner.strategy.report().items()}
        report.finish(folder, summary, results, [e.name for e in parts.stream], tracker.where(), found)
        tracker.finish(summary.metrics, results.all.finished)
        tracker.log_checkpoint(folder / "last.ckpt")
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    tracker.close("FINISHED")
    if names.sweep is None:
        print_run(results, summary, names, tracker.where())
    else:
        shown = ", ".join(f"{name} {mean_and_spread([summary.metrics[name]])}" for name in ALWAYS)
        print(f"{label}: {shown}")
    return summary.metrics


def _announce(cfg: DictConfig, names: Names, run: Run, folder: Path) -> None:
    """Say what is about to be done."""
    from clplat.strategy import Session

    stream, training = run.stream, run.training
    weights = sum(p.numel() for p in run.learner.weights().values())
    examples = [len(e.train) for e in stream]
    choosing = [name for name, part in run.learner.strategy.named.items() if "data" in part.claims]
    if choosing:  # how many steps that makes is known only when an experience begins
        budget = f"{training.epochs} epochs" if training.steps is None else f"{training.steps:,} steps"
        length = f"{budget} of batch {training.batch_size} for an experience's worth of what {choosing[0]} trains on"
    else:
        steps = [training.length(Session(e.train)) for e in stream]
        length = f"{_range(steps)} steps of batch {training.batch_size} an experience"
    print(f"{names.strategy} · {names.learner} · {names.stream}, seed {cfg.seed}" + (", resumed" if cfg.resume else ""))
    print(
        f"{len(stream)} experiences ({stream.scenario.replace('_', '-')}) of {_range(examples)} training examples; "
        f"{weights:,} weights; {length}, on {cfg.trainer.accelerator}"
    )
    print(f"folder: {folder}", flush=True)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir: cannot write to {folder} ({os.strerror(error.errno or 0)}): choose another with output_dir=PATH."
        ) from error
    return folder.resolve()
