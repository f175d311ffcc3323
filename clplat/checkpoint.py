"""Checkpoints: written whole or not at all, loaded without running pickled code, enough for an exact resume."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clplat.errors import UserError

FORMAT = 2
"""Number of the checkpoint's layout, raised when an old one can no longer be read."""


class CheckpointError(UserError):
    """Checkpoint that cannot be read, or folder without one; the message says what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` is always a whole checkpoint.

    Raises:
        OSError: no room, or no right to write; the old checkpoint is untouched and nothing else is left behind.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    except OSError:
        part.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """State that `save` wrote, on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one of another layout.
    """
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}: give the folder of a run, its checkpoint file, or 'latest'.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    layout = state.get("format") if isinstance(state, dict) else None
    if layout == 1:
        raise CheckpointError(
            f"{path} was written by clplat before 0.2: its state is called otherwise now. "
            "Finish that run with the version that began it."
        )
    if layout != FORMAT:
        raise CheckpointError(
            f"{path}: got layout {layout}, this version reads layout {FORMAT}. Go on with the version that wrote it."
        )
    return state


def random_state() -> dict[str, Any]:
    """State of the global random generators of torch (CPU and CUDA), numpy and Python, as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
