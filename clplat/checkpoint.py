"""Checkpoints: written whole or not at all, loaded without running pickled code, enough for an exact resume.

A checkpoint ends with a digest of all that stands before it, so that no damage goes unnoticed. The one that it takes the
place of stays beside it.
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from clplat.errors import UserError

FORMAT = 3
"""Number of the checkpoint's layout, raised when an old one can no longer be read."""

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""Names of a run's newest checkpoint, and of the one before it."""

T = TypeVar("T")

_SEAL = b"clplat\x00\x03"
_SEALED = len(_SEAL) + hashlib.sha256().digest_size


class CheckpointError(UserError):
    """Checkpoint that cannot be read, or folder without one; the message says what to do."""


class Notes(BaseModel):
    """What a run was begun with.

    Attributes:
        config: the resolved configuration.
        names: of the run.
        run_id: in the tracking store, "" or None without one.
        base: the working directory; relative to the run's folder where that lies in it.
    """

    model_config = ConfigDict(strict=True)
    config: dict[str, Any]
    names: dict[str, Any]
    run_id: str | None
    base: str


class State(BaseModel):
    """Parts of a checkpoint, as `clplat.resuming` makes and takes them."""

    model_config = ConfigDict(strict=True)
    experience: NonNegativeInt
    step: NonNegativeInt
    steps: NonNegativeInt
    complete: bool
    learner: dict[str, Any]
    optimizer: dict[str, Any] | None
    carried: Any
    terms: list[dict[str, Any]]
    random: dict[str, Any]
    results: dict[str, Any]
    data: dict[str, Any]
    notes: dict[str, Any]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` is always a whole checkpoint; keep the one before.

    Raises:
        OSError: no room, or no right to write; the old checkpoint is untouched and nothing else is left behind.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            digesting = _Digesting(file)
            torch.save({"format": FORMAT, **state}, digesting)  # type: ignore[arg-type]  # it needs write and flush
            file.write(_SEAL + digesting.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _keep(path)
        os.replace(part, path)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    except OSError:
        part.unlink(missing_ok=True)
        raise


class _Digesting:
    """A file that digests what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _keep(path: Path) -> None:
    """Give a checkpoint a second name, so that there is one under its first name at every moment."""
    previous = path.with_name(PREVIOUS)
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # no hard links in this file system
        os.replace(path, previous)


def load(path: Path) -> dict[str, Any]:
    """State that `save` wrote, on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, a damaged one, or one of another layout; says which older one
            there is.
    """
    try:
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {older(path)}") from error


def older(path: Path) -> str:
    """A sentence on the checkpoint before this one: which it is, or that there is none to go on from."""
    previous = path.with_name(PREVIOUS)
    if previous == path or not previous.exists():
        return "There is no older checkpoint beside it: begin the run anew."
    try:
        state = _read(previous)
    except CheckpointError:
        return f"The older checkpoint beside it ({PREVIOUS}) cannot be read either: begin the run anew."
    at = f"experience {state['experience']}, step {state['steps']}"
    return f"The checkpoint before it is whole ({at}): resume={previous}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}: give the folder of a run, its checkpoint file, or 'latest'.")
    damaged = f"{path} is damaged: its content is not what was written."
    sealed = _sealed(path)
    if sealed is False:
        raise CheckpointError(damaged)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the archive, or of the restricted unpickler
        raise CheckpointError(f"{path} cannot be read: it is damaged, or no checkpoint of clplat.") from error
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
    if sealed is None:
        raise CheckpointError(damaged)
    read_as(State, state, path)
    return state


def _sealed(path: Path) -> bool | None:
    """Whether a file's digest is that of its content; None if it has none."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _SEALED
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        seal = file.read()
    return seal == _SEAL + digest.digest() if seal.startswith(_SEAL) else None


def read_as(kind: type[T], parts: Any, path: Path) -> T:
    """Parts of a checkpoint as an object; refuse what is not as clplat writes it.

    Args:
        kind: a model or dataclass: `State`, `Notes`.
        parts: its fields.
        path: of the checkpoint.

    Raises:
        CheckpointError: names the part.
    """
    try:
        return TypeAdapter(kind).validate_python(parts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        part = ".".join(map(str, first["loc"]))
        wrong = "it is missing" if first["type"] == "missing" else first["msg"]
        raise CheckpointError(f"{path}: its part {part!r} is not as clplat writes it ({wrong}).") from error


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
