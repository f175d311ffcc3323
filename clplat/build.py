"""Parts of a run, built from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from clplat.composition import Composite
from clplat.config.refusing import ConfigError, refusing
from clplat.learners.learner import Learner
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets import heads
from clplat.lightning import pl
from clplat.progress import Progress
from clplat.settings import Evaluation, Training
from clplat.streams.experience import Stream
from clplat.streams.reading import seeded
from clplat.tracking.base import Tracker
from clplat.tracking.logger import RunLogger


@dataclass
class Parts:
    """What a run is made of.

    Attributes:
        stream: what is learned.
        learner: what learns, with its strategies.
        trainer: Lightning's.
        training: batch size and length.
        evaluation: how scores are taken.
        tracker: is told all metrics.
    """

    stream: Stream
    learner: Learner
    trainer: pl.Trainer
    training: Training
    evaluation: Evaluation
    tracker: Tracker

    @classmethod
    def build(cls, cfg: DictConfig, folder: Path, label: str) -> Parts:
        """Build what `cfg` describes.

        Args:
            cfg: checked configuration.
            folder: of the run.
            label: the run's name beside its progress bar.

        Raises:
            ConfigError, StreamError, TrackingError: a part cannot be built as it is configured.
        """
        with refusing(cfg, "stream"):
            with seeded(0):  # one that draws without a seed of its own holds the same data again after a resume
                stream = instantiate(cfg.stream)
            stream.check()
        pl.seed_everything(cfg.seed, verbose=False)
        with refusing(cfg, "learner"):
            learner = build_learner(cfg, stream)
        with refusing(cfg, "tracking"):
            tracker = instantiate(cfg.tracking, folder=folder)
        with refusing(cfg, "trainer"):
            trainer = _trainer(cfg, tracker, [Progress(label, len(stream))] if cfg.progress else [])
        with refusing(cfg, "optimizer"):  # its options meet its constructor only when it is made
            learner.handover.make([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
        with refusing(cfg, "schedule"):
            learner.make_schedule(1)(0)
        with refusing(cfg, "training"):
            training = instantiate(cfg.training)
        with refusing(cfg, "evaluation"):
            evaluation = instantiate(cfg.evaluation)
        return cls(stream, learner, trainer, training, evaluation, tracker)


def build_learner(cfg: DictConfig, stream: Stream) -> Learner:
    """The learner that `cfg.learner`, `.objective`, `.optimizer`, `.schedule` and `.strategy` describe, for a stream."""
    options = dict(cfg.learner)
    make_net, make_head = instantiate(options.pop("net")), heads.head_for(stream, options.pop("head"))
    objective = instantiate(cfg.objective)
    if isinstance(objective, partial):
        with refusing(cfg, "objective"):
            objective = objective(stream.target)
    parts = {name: instantiate(part) for name, part in cfg.strategy.items()}
    with refusing(cfg, "learner.net"):
        net = make_net(stream.inputs, make_head)
    if stream.target == "token" and any(isinstance(m, Mixer) and not m.causal for m in net.modules()):
        raise ConfigError(
            "This learner looks ahead and sees the next token, which is the target: choose a causal one "
            "(learner.net.causal=true for the transformer)."
        )
    return Learner(
        net=net,
        objective=objective,
        strategy=Composite(parts),
        optimizer=instantiate(cfg.optimizer),
        schedule=instantiate(cfg.schedule),
        **options,
    )


def _trainer(cfg: DictConfig, tracker: Tracker, callbacks: list[pl.Callback]) -> pl.Trainer:
    # Here, since Lightning cannot be imported before `clplat.lightning` is.
    from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator

    no_gpu = not (CUDAAccelerator.is_available() or MPSAccelerator.is_available())
    if cfg.trainer.get("accelerator") == "gpu" and no_gpu:
        raise ConfigError(
            "trainer.accelerator: got 'gpu', and no GPU is found here (`clplat doctor` says why): set trainer=cpu."
        )
    more = list(instantiate(cfg.trainer.get("callbacks")) or [])
    options = {k: v for k, v in cfg.trainer.items() if k != "callbacks"}
    return instantiate(
        options,
        logger=RunLogger(tracker),
        callbacks=[*callbacks, *more],
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,  # of Lightning's batches, our chunks; it warns when there are fewer
    )
