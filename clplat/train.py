"""From a configuration to scores: compose -> build -> run -> report. Hydra ends here; all below takes plain values."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clplat.config import ConfigError, check, differences
from clplat.errors import UserError

VOLATILE = ("resume", "debug", "progress", "output_dir", "tracking", "threads")
"""Keys that may be given anew when a run is resumed; otherwise they are the run's own, as all others."""


@dataclass(frozen=True)
class Names:
    """What a run is called in tables and in MLflow.

    Attributes:
        stream: the option chosen in the group of that name.
        learner: likewise.
        strategy: the strategies in order, joined by "+".
        sweep: the sweep's identifier, None for a single run.
        varied: the options of this run that vary in its sweep, "" if none do.
    """

    stream: str
    learner: str
    strategy: str
    sweep: str | None = None
    varied: str = ""


def train(cfg: DictConfig, folder: Path, names: Names, given: Sequence[str] | None = None) -> dict[str, float]:
    """Run what `cfg` describes, in `folder`; returns the metrics after the last experience.

    Args:
        cfg: composed configuration (`conf/train.yaml`).
        folder: gets checkpoint, configuration, scores and whatever could not be sent to the tracking server.
        names: of the run.
        given: the keys that the user gave, None for all. A run that is resumed takes them where they may change
            (`VOLATILE`), and must have been given the same where they may not.

    Raises:
        ConfigError, StreamError, CheckpointError, TrackingError: something is wrong before the first training step.
        NonFiniteLoss: a loss became NaN or infinite in training.
    """
    from clplat import checkpoint

    state = checkpoint.load(folder / "last.ckpt") if cfg.resume else None
    if state is not None:
        cfg, names = _resumed(cfg, state["notes"], given), Names(**state["notes"]["names"])
    check(cfg)
    folder = _writable(folder)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]  # a mapping with string keys

    import numpy as np
    import torch

    from clplat.lightning import pl
    from clplat.progress import Progress
    from clplat.report import tables as report
    from clplat.run import Run

    # Its banners and hints are about loops that it runs itself.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    label = names.varied or f"{names.strategy}, seed {cfg.seed}"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with _refusing("stream"):
        stream = instantiate(cfg.stream)
        stream.check()
    pl.seed_everything(cfg.seed, verbose=False)
    with _refusing("learner"):
        learner = build_learner(cfg, stream)
    with _refusing("tracking"):
        tracker = instantiate(cfg.tracking, folder=folder)
    with _refusing("trainer"):
        trainer = _trainer(cfg, tracker, [Progress(label, len(stream))] if cfg.progress else [])
    notes = {"config": plain, "names": vars(names), "run_id": None if state is None else state["notes"]["run_id"]}
    with _refusing("optimizer"):
        learner.handover.make([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    with _refusing("schedule"):
        learner.make_schedule(1)(0)
    with _refusing(""):  # strategies name themselves
        training, evaluation = instantiate(cfg.training), instantiate(cfg.evaluation)
        run = Run(stream, learner, trainer, training, evaluation, tracker, folder, notes)
    if state is not None:
        run.resume(state)
    run.begin()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    notes["run_id"] = tracker.start(names, plain, stream, run_id=notes["run_id"] or None)
    if names.sweep is None:
        _announce(cfg, names, run, folder)
    try:
        results = run.go()
        summary = report.summarise(names, cfg.seed, results, run.seen_results)
        (folder / "where.txt").write_text(tracker.where() + "\n")
        (folder / "result.json").write_text(json.dumps(summary, indent=1))
        found = {name: value.numpy(force=True) for name, value in learner.strategy.report().items()}
        if found:
            np.savez(folder / "strategy.npz", allow_pickle=False, **found)
        tracker.finish(results, run.seen_results)
        tracker.log_checkpoint(folder / "last.ckpt")
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    tracker.close("FINISHED")
    if names.sweep is None:
        report.print_run(results, run.seen_results, names, tracker.where())
    else:
        shown = ", ".join(f"{name} {summary['metrics'][name]:.3f}" for name in ("average", "forgetting"))
        print(f"{label}: {shown}")
    return summary["metrics"]


def build_learner(cfg: DictConfig, stream: Any) -> Any:
    """The learner that `cfg.learner`, `.objective`, `.optimizer`, `.schedule` and `.strategy` describe, for a stream."""
    from clplat.composition import Composite
    from clplat.learners.learner import Learner
    from clplat.learners.mixers.mixer import Mixer
    from clplat.learners.nets import heads

    options = dict(cfg.learner)
    net, kind = instantiate(options.pop("net")), options.pop("head")
    if kind == "auto":
        kind = "task" if stream.scenario == "task_incremental" else "shared"
    tasks = [e.classes or tuple(range(stream.outputs)) for e in stream if e.task_label is not None]
    if kind == "task" and not tasks:
        raise ConfigError(
            f"learner.head=task needs a task-incremental stream, {stream.name!r} is {stream.scenario}: "
            "use learner.head=shared, or growing."
        )
    if kind == "growing" and stream.target != "class":
        raise ConfigError(
            f"learner.head=growing needs one class a sequence, {stream.name!r} has {stream.target!r} targets."
        )
    makers = {
        "shared": partial(heads.Head, outputs=stream.outputs),
        "growing": partial(heads.GrowingHead, outputs=stream.outputs),
        "task": partial(heads.TaskHead, outputs=stream.outputs, tasks=tasks),
    }
    if kind not in makers:
        raise ConfigError(f"learner.head: got {kind!r}, allowed are auto, {', '.join(makers)}.")
    inputs = stream.inputs
    objective = instantiate(cfg.objective)
    if isinstance(objective, partial):
        objective = objective(stream.target)
    parts = {name: instantiate(part) for name, part in cfg.strategy.items()}
    built = net(inputs, makers[kind])
    if stream.target == "token" and any(isinstance(m, Mixer) and not m.causal for m in built.modules()):
        raise ConfigError(
            "This learner looks ahead and sees the next token, which is the target: choose a causal one "
            "(learner.net.causal=true for the transformer)."
        )
    return Learner(
        net=built,
        objective=objective,
        strategy=Composite(parts),
        optimizer=instantiate(cfg.optimizer),
        schedule=instantiate(cfg.schedule),
        **options,
    )


def _announce(cfg: DictConfig, names: Names, run: Any, folder: Path) -> None:
    """Say what is about to be done."""
    from clplat.strategy import Session

    stream, learner, training = run.stream, run.learner, run.training
    weights = sum(p.numel() for p in learner.weights().values())
    examples = [len(e.train) for e in stream]
    steps = [training.length(Session(e.train)) for e in stream]
    print(f"{names.strategy} · {names.learner} · {names.stream}, seed {cfg.seed}" + (", resumed" if cfg.resume else ""))
    print(
        f"{len(stream)} experiences ({stream.scenario.replace('_', '-')}) of {_range(examples)} training examples; "
        f"{weights:,} weights; {_range(steps)} steps of batch {training.batch_size} an experience, on {cfg.trainer.accelerator}"
    )
    print(f"folder: {folder}", flush=True)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


@contextmanager
def _refusing(part: str) -> Iterator[None]:
    # Whatever a constructor will not take is the configuration's fault.
    try:
        yield
    except UserError:
        raise
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        where = re.search(r"full_key: (\S+)", str(error))
        raise ConfigError(_named(where[1] if where else part, cause)) from error
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(_named(part, error)) from error


def _named(key: str, error: BaseException) -> str:
    """The first line of an error behind the key it is about, unless it names that itself."""
    line = str(error).splitlines()[0]
    return line if not key or line.startswith(f"{key}.") else f"{key}: {line}"


def _trainer(cfg: DictConfig, tracker: Any, callbacks: list[Any]) -> Any:
    from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator
    from pytorch_lightning.loggers import Logger

    if cfg.trainer.get("accelerator") == "gpu" and not (
        CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    ):
        raise ConfigError(
            "trainer.accelerator: got 'gpu', and no GPU is found here (`clplat doctor` says why): set trainer=cpu."
        )
    for key, instead in (
        ("gradient_clip_val", "learner.clip_norm"),
        ("accumulate_grad_batches", "training.batch_size"),
    ):
        if cfg.trainer.get(key) is not None:
            raise ConfigError(f"trainer.{key}: the learner takes its own optimiser steps; set {instead} instead.")
    more = list(instantiate(cfg.trainer.get("callbacks")) or [])
    options = {k: v for k, v in cfg.trainer.items() if k != "callbacks"}
    return instantiate(
        options,
        logger=tracker if isinstance(tracker, Logger) else False,
        callbacks=[*callbacks, *more],
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,  # of Lightning's batches, our chunks; it warns when there are fewer
    )


def _resumed(cfg: DictConfig, notes: Mapping[str, Any], given: Sequence[str] | None) -> DictConfig:
    saved = DictConfig(notes["config"])
    keys = list(cfg) if given is None or "experiment" in given else given  # an experiment may set any key
    fixed = [k for k in keys if k.split(".")[0] not in VOLATILE]
    unlike = [d for d in differences(saved, cfg) if any(f"{d.split(':')[0]}.".startswith(f"{k}.") for k in fixed)]
    if unlike:
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise ConfigError(
            f"resume: the options given differ from the run's own: {'; '.join(unlike[:3])}{more}. "
            f"Give the same options, or none but {', '.join(VOLATILE)}."
        )
    for key in ["resume", *(k for k in keys if k.split(".")[0] in VOLATILE)]:
        OmegaConf.update(saved, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return saved


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
