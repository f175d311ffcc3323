"""What a finished run left in its folder and in its tracking store, and whether two left the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lives import code_of, forked

from clplat import checkpoint
from clplat.tracking.store import default_uri, open_store

ADDRESSES = ("resume", "output_dir")
"""Keys that may be given anew when a run is resumed, and say where it lies."""


def assert_same(whole: Path, cut: Path) -> None:
    """Check that two runs left the same, bit for bit, apart from addresses, identifiers and times.

    It is looked at in a child: a process that has an SQLite store open should not be forked.
    """
    out = cut.with_suffix(".unlike")
    assert code_of(forked(lambda: _say_unlike(whole, cut), out)) == 0, out.read_text()


def _say_unlike(whole: Path, cut: Path) -> int:
    found = list(unlike(left(whole), left(cut)))
    print("\n".join(found), flush=True)
    return int(bool(found))


def left(folder: Path) -> dict[str, Any]:
    """What a finished run left in its folder and in its tracking store."""
    state = checkpoint.load(folder / checkpoint.LAST)
    assert state["complete"]
    config, run_id = state["notes"]["config"], state["notes"].pop("run_id")
    for key in ADDRESSES:
        config.pop(key)
    found: dict[str, Any] = {"names": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))}
    found |= {"checkpoint": state, "files": _contents(folder)}
    return found | ({"store": _stored(config["tracking"]["uri"] or default_uri(), run_id)} if run_id else {})


def _contents(folder: Path) -> dict[str, Any]:
    """Arrays and bytes of a run's files, but for those that tell where and how it was run."""
    own = (checkpoint.LAST, checkpoint.PREVIOUS, "code.json", "config.yaml", "where.txt")
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in own]
    return {p.name: dict(np.load(p)) if p.suffix == ".npz" else p.read_bytes() for p in paths}


def _stored(uri: str, run_id: str) -> dict[str, Any]:
    """What MLflow has of a run: of times only how many there are, of tags only which.

    The tag of the charts' lines is left out: of two runs that are the same, only the newer one has it.
    """
    client = open_store(uri)
    run = client.get_run(run_id)
    histories = {k: sorted((m.step, m.value) for m in client.get_metric_history(run_id, k)) for k in run.data.metrics}
    return {
        "status": run.info.status,
        "metrics": {k: len(v) if k.endswith("_seconds") else v for k, v in histories.items()},
        "params": {k: v for k, v in run.data.params.items() if k not in ADDRESSES},
        "tags": sorted(run.data.tags.keys() - {"line"}),
        "inputs": sorted((i.dataset.name, i.dataset.digest) for i in (run.inputs.dataset_inputs if run.inputs else [])),
        "artifacts": sorted(a.path for a in client.list_artifacts(run_id)),
    }


def unlike(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths at which two nested values are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{path}/{key} is in one only" for key in a.keys() ^ b.keys())
        for key in a.keys() & b.keys():
            yield from unlike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from unlike(one, other, f"{path}/{i}")
    elif _bits(a) != _bits(b):
        yield f"{path}: {str(a)[:80]} -> {str(b)[:80]}"


def _bits(value: Any) -> tuple[Any, ...]:
    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value), repr(value)
