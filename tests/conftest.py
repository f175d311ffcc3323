"""What all tests share: one thread each, since they run side by side, and a seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Read where functions of Triton's own and ours are defined, and Lightning imports Triton: so before any other import.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

import tiny as tiny_module

from clplat.lightning import pl, quiet_trainer

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process compile a kernel for all tests that run it: the tests of kernels in float32, of mixers in float64."""
    for item in items:
        if "cpu" in item.name and item.path.parent.name == "kernels":
            item.add_marker(pytest.mark.xdist_group("compiled"))
        elif item.path.name == "test_mixers.py":
            item.add_marker(pytest.mark.xdist_group("mixers"))


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
    return quiet_trainer


@pytest.fixture
def tiny() -> ModuleType:
    """Makes tiny streams and learners."""
    return tiny_module
