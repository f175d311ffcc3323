"""What all tests share: one thread each, since they run side by side, and a tiny stream with a tiny learner."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from clplat.lightning import pl

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    root = os.environ.get("CLPLAT_DATA_ROOT")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST under CLPLAT_DATA_ROOT")
    return Path(root)


@pytest.fixture
def trainer() -> Callable[..., pl.Trainer]:
    """Makes a silent Trainer on the CPU."""
    return partial(
        pl.Trainer,
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
