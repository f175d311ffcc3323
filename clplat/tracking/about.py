"""Description of a run for MLflow's UI: its origin and its data sets."""

from __future__ import annotations

import getpass
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.report import provenance

if TYPE_CHECKING:
    from clplat.streams.experience import Stream


TABLE = json.dumps([{"path": "results_table.json", "type": "table"}])
"""Value of the tag by which MLflow's UI shows a json file as a table."""


@dataclass(frozen=True)
class DataInput:
    """A data set as MLflow shows it beside a run.

    Attributes:
        name: of the data set, up to 500 characters.
        digest: what tells two versions of it apart, up to 36 characters.
        source: where it came from: a path, an address, or the arguments of a generator.
        examples: number of examples.
        context: "train", "test" or another word.
    """

    name: str
    digest: str
    source: str
    examples: int
    context: str = "train"


def inputs(stream: Stream, params: Mapping[str, Any]) -> list[DataInput]:
    """Data sets of a stream, for training and for test, as MLflow shows them. Nothing is hashed but their description."""
    source = json.dumps(params.get("stream", {}), sort_keys=True, default=str)
    sizes = {
        "train": sum(len(experience.train) for experience in stream),
        "test": sum(len(experience.test) for experience in stream),
    }
    # The part is in the digest, because MLflow shows data of one name and digest only once.
    digests = {part: hashlib.sha256(f"{part} {size} {source}".encode()).hexdigest() for part, size in sizes.items()}
    return [DataInput(stream.name, digests[part][:16], source, size, part) for part, size in sizes.items()]


def origin() -> dict[str, str]:
    """Tags by which MLflow shows where a run came from."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a password file
        user = "unknown"
    commit = provenance.git("rev-parse", "HEAD") or provenance.own_commit()
    shown = {
        "mlflow.user": user,
        "mlflow.source.name": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:1000],
        "mlflow.source.type": "LOCAL",
        "clplat.version": provenance.version("clplat"),
        "torch.version": provenance.version("torch"),
    }
    return shown | ({"mlflow.source.git.commit": commit} if commit else {})
