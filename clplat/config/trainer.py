"""Options of Lightning's Trainer that a run cannot leave to it, and what to set instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clplat.config.refusing import ConfigError

_LENGTH = "clplat decides how long an experience is trained: set training.steps or training.epochs"
_SCORES = "clplat scores the learner itself: see evaluation (`clplat list evaluation`)"
_STEPS = "the learner takes its own optimiser steps: set {} instead"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"), _LENGTH),
    **dict.fromkeys(("limit_train_batches", "overfit_batches", "fast_dev_run"), _LENGTH),
    **dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), _SCORES),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"), _SCORES),
    "gradient_clip_val": _STEPS.format("learner.clip_norm"),
    "gradient_clip_algorithm": _STEPS.format("learner.clip_norm"),
    "accumulate_grad_batches": _STEPS.format("training.batch_size"),
    "logger": "what is logged goes to the tracker: set tracking",
    "log_every_n_steps": "set training.log_every_n_steps instead",
    "enable_checkpointing": "clplat keeps checkpoints of its own: set training.checkpoint_every_n_steps",
    "enable_progress_bar": "set progress instead",
    "enable_model_summary": "clplat says itself how many weights there are",
    "default_root_dir": "set output_dir instead",
    "reload_dataloaders_every_n_epochs": "each experience has a loader of its own",
    "use_distributed_sampler": "clplat decides the order of the examples: see training.seed",
    "barebones": "it switches off what clplat needs",
    "model_registry": "set tracking.log_model instead",
}
"""Options that are refused: they end an experience early, would have no effect, or are clplat's to set."""


def check_trainer(options: Iterable[str]) -> None:
    """Refuse options of `trainer` that clplat sets itself.

    Args:
        options: that were given.

    Raises:
        ConfigError: names one, and what to set instead.
    """
    for key in options:
        if key in REFUSED:
            raise ConfigError(f"trainer.{key}: {REFUSED[key]}. Leave it out.")
