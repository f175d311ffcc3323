"""From a configuration to scores: check, build, run, report. Hydra ends here; all below takes plain values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from clplat import signals
from clplat.config import resume
from clplat.config.check import check
from clplat.config.refusing import ConfigError, refusing
from clplat.config.strangers import judge_notes
from clplat.config.trainer import check_trainer
from clplat.errors import UserError
from clplat.report.summary import Names

if TYPE_CHECKING:
    from clplat.build import Parts
    from clplat.learners.learner import Learner
    from clplat.loop import Run
    from clplat.streams.experience import Stream


class Unfinished(UserError):
    """A run that is trained to its end, and whose report could not be written."""

    code = 1


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
    path = folder / resume.file_name(cfg.resume)
    state = checkpoint.load(path)
    notes = checkpoint.read_as(checkpoint.Notes, state["notes"], path)
    judge_notes(notes.config, cfg)
    names = checkpoint.read_as(Names, notes.names, path)
    return resume.configuration(cfg, notes.config, given), names, state


@contextlib.contextmanager
def opened(
    cfg: DictConfig, folder: Path, names: Names, given: Sequence[str] | None = None
) -> Iterator[tuple[DictConfig, Path, Names, dict[str, Any] | None]]:
    """Hold the folder of a run that begins or goes on, and be where its relative paths begin.

    Gives what `trained` takes: checked configuration, absolute folder, names, and the checkpoint to go on from.

    Args:
        cfg: composed configuration.
        folder: of the run.
        names: of a run that begins.
        given: the keys that the user gave; see `resumed`.

    Raises:
        ClaimError: the folder is another run's, or another process works in it.
        ConfigError, CheckpointError: the configuration or the checkpoint cannot be.
    """
    from clplat.claim import check_unused, claimed

    with contextlib.ExitStack() as held:
        if cfg.resume:
            held.enter_context(claimed(folder))
        cfg, names, state = resumed(cfg, folder, names, given)
        check(cfg)
        check_trainer(cfg.trainer)
        if state is None:
            check_unused(folder)
            held.enter_context(claimed(folder))
            check_unused(folder)  # by now nobody else can begin a run in it
        folder = folder.resolve()
        if state is not None:
            if given is None or {"tracking", "tracking.uri"} & set(given):
                _absolute_store(cfg)  # of the user, who is here
            held.enter_context(contextlib.chdir(resume.base(folder, state["notes"]["base"])))
        yield cfg, folder, names, state


def _absolute_store(cfg: DictConfig) -> None:
    from clplat.tracking.store import absolute_uri

    if cfg.tracking.get("uri"):
        cfg.tracking.uri = absolute_uri(cfg.tracking.uri)


def build_learner(cfg: DictConfig, stream: Stream) -> Learner:
    """The learner that a configuration describes, for a stream."""
    from clplat import build

    return build.build_learner(cfg, stream)


def train(cfg: DictConfig, folder: Path, names: Names) -> dict[str, float]:
    """Run what `cfg` describes, in `folder`; returns the metrics after the last experience.

    Args:
        cfg: composed configuration (`conf/train.yaml`).
        folder: gets checkpoint, configuration, scores and whatever could not be sent to the tracking server. No other
            process may work in it at the same time, and unless a run is resumed, it may not hold one.
        names: of the run.

    Raises:
        ConfigError, StreamError, CheckpointError, TrackingError, ClaimError: something is wrong before the first
            training step.
        NonFiniteLoss: a loss became NaN or infinite in training.
        EndedEarly: fewer steps were taken than planned.
        Unfinished: the report could not be written.
        Stopped: a signal asked for an end.
    """
    with opened(cfg, folder, names) as parts:
        return trained(*parts)


def trained(cfg: DictConfig, folder: Path, names: Names, state: dict[str, Any] | None) -> dict[str, float]:
    """Run what was opened; see `opened` and `train`."""
    from clplat.build import Parts
    from clplat.loop import Run
    from clplat.report import folder as report

    parts = Parts.build(cfg, folder, _label(cfg, names))
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]  # a mapping with string keys
    run_id = None if state is None else state["notes"]["run_id"]
    notes = {"config": plain, "names": vars(names), "run_id": run_id, "base": resume.relative(Path.cwd(), folder)}
    with refusing(cfg):
        run = Run(**vars(parts), folder=folder, notes=notes)
        if state is not None:
            _take_up(run, state, folder / resume.file_name(cfg.resume))
        run.begin()
    try:
        _begin_folder(folder, OmegaConf.to_yaml(cfg, resolve=True), new=state is None)
        notes["run_id"] = parts.tracker.start(names, plain, parts.stream, run_id=run_id or None)
        if names.sweep is None:
            _announce(cfg, names, run, folder)
    except (UserError, signals.Stopped) as error:
        if isinstance(error, signals.Stopped):
            with signals.ending():
                parts.tracker.close("KILLED")
        if state is None:
            report.forget(folder)
        raise
    try:
        run.go()
        metrics = _finish(run, parts, cfg, names, folder)
    except BaseException as error:
        with signals.ending():
            parts.tracker.close("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        if isinstance(error, signals.Stopped):
            error.folder = folder
        raise
    return metrics


def _take_up(run: Run, state: dict[str, Any], path: Path) -> None:
    """Put a run where its checkpoint was; that one is its last from now on."""
    from clplat import checkpoint

    try:
        run.resume(state)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{path}: {error} {checkpoint.older(path)}") from error
    if path.name != checkpoint.LAST:
        os.replace(path, path.with_name(checkpoint.LAST))


def _begin_folder(folder: Path, config: str, new: bool) -> None:
    from clplat.report import folder as report

    try:
        report.begin(folder, config)
    except OSError as error:
        if new:
            report.forget(folder)
        raise ConfigError(
            f"output_dir: cannot write to {folder} ({os.strerror(error.errno or 0)}): make room, or choose another with "
            "output_dir=PATH."
        ) from error


def _finish(run: Run, parts: Parts, cfg: DictConfig, names: Names, folder: Path) -> dict[str, float]:
    """Write the report, then end the run in the tracker. A run whose report is written is complete."""
    from clplat.checkpoint import LAST
    from clplat.report import folder as report
    from clplat.report.summary import summarise
    from clplat.report.tables import ALWAYS, mean_and_spread, print_run

    tracker, results = parts.tracker, run.results
    summary = summarise(names, cfg.seed, results)
    found = {name: value.numpy(force=True) for name, value in run.learner.strategy.report().items()}
    try:
        report.finish(folder, summary, results, [e.name for e in parts.stream], tracker.where(), found)
    except OSError as error:
        raise Unfinished(
            f"output_dir: the run is trained, and its report cannot be written to {folder} "
            f"({os.strerror(error.errno or 0)}): make room, then `{resume.command(folder)}` writes it."
        ) from error
    with run.signals.waiting():
        tracker.finish(summary.metrics, results.all.finished)
        tracker.log_checkpoint(folder / LAST)
        tracker.close("FINISHED")
    if names.sweep is None:
        print_run(results, summary, names, tracker.where())
    else:
        shown = ", ".join(f"{name} {mean_and_spread([summary.metrics[name]])}" for name in ALWAYS)
        print(f"{_label(cfg, names)}: {shown}")
        run.signals.heed()
    return summary.metrics


def _label(cfg: DictConfig, names: Names) -> str:
    return names.varied or f"{names.strategy}, seed {cfg.seed}"


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
