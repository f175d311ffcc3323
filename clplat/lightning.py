"""Adapter to Lightning: importable beside any torchvision, and the only file that touches its inside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from clplat._home import unheard
from clplat._torchvision import ensure_importable

ensure_importable()

with unheard():  # both only after the line above
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_only

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "Logger",
    "convert_weights",
    "forward_context",
    "one_fit",
    "pl",
    "quiet_trainer",
    "rank_zero_only",
    "root_device",
    "silenced",
    "tell_steps",
    "weights_precision",
]


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A Trainer for a run: no logger, checkpoint, progress bar or summary of its own; `options` come on top."""
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**plain | options)


@contextmanager
def silenced() -> Iterator[None]:
    """Keep Lightning's banners and hints back; they are about loops that it runs itself."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def one_fit(trainer: pl.Trainer, callback: pl.Callback) -> Iterator[None]:
    """Let the next `fit` train for one more of Lightning's epochs, with one more callback.

    A second `fit` on one Trainer trains nothing unless its number of epochs is moved on.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a plain list, set by Lightning
    callbacks.append(callback)
    trainer.fit_loop.max_epochs = trainer.current_epoch + 1
    try:
        yield
    finally:
        callbacks.remove(callback)


def root_device(trainer: pl.Trainer) -> torch.device:
    """Device that the Trainer trains on."""
    return trainer.strategy.root_device


@contextmanager
def weights_precision(trainer: pl.Trainer) -> Iterator[None]:
    """Inside, new tensors of floats have the precision of the weights, in single or double precision."""
    with trainer.precision_plugin.tensor_init_context():
        yield


def convert_weights(trainer: pl.Trainer, module: nn.Module) -> None:
    """Bring the weights to the precision that the Trainer trains them in."""
    trainer.precision_plugin.convert_module(module)


def forward_context(trainer: pl.Trainer) -> AbstractContextManager[None]:
    """Context of a forward pass in the Trainer's precision (autocast)."""
    return trainer.precision_plugin.forward_context()


def tell_steps(trainer: pl.Trainer, steps: int) -> None:
    """Set the number of optimiser steps where Lightning and its callbacks look for it."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.total.ready = progress.total.completed = steps
