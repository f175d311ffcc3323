"""Limits of MLflow, and text cut to fit them. They are MLflow's own (3.17), of its API and of its smallest database."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping

KEY, PARAM, TAG, EXPERIMENT_TAG, EXPERIMENT_NAME = 250, 6000, 8000, 20_000, 500
"""Characters of a metric's, param's or tag's key, of their values, and of an experiment's name."""

DATASET_NAME, DATASET_DIGEST, DATASET_SOURCE = 500, 36, 65_535
"""Characters that describe a data set; the source is a column of bytes in MySQL."""

PARAMS, REQUEST = 100, 900_000
"""Params in a request, and its bytes: MLflow takes 1e6, with what it adds."""

STEP = 2**63 - 1
"""The largest step."""


def metric_key(name: str) -> str:
    """The nearest key that MLflow accepts: letters, digits, `_ - . : /` and blanks, no path detours, 250 characters."""
    clean = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(re.sub(r"\.\.+", "_", clean).strip("/") or "_")[:KEY].strip("/") or "_"


def check_name(experiment: str) -> None:
    """Refuse a name that MLflow takes for no experiment.

    Raises:
        ValueError: it is empty or too long.
    """
    if not 1 <= len(experiment.strip()) <= EXPERIMENT_NAME:
        raise ValueError(f"experiment: got {cut(experiment, 40)!r}, it must have 1 to {EXPERIMENT_NAME} characters.")


def cut(text: str, length: int) -> str:
    """Text of at most `length` characters; what was longer ends in "..."."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def params(values: Mapping[str, str]) -> dict[str, str]:
    """Params as MLflow accepts them; of keys that become equal all but the first get a number."""
    items: dict[str, str] = {}
    for name, value in values.items():
        key, number = metric_key(name), 2
        while key in items:
            key = f"{metric_key(name)[: KEY - 8]}_{number}"
            number += 1
        items[key] = cut(value, PARAM)
    return items


def batches(items: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    """Params in requests that MLflow takes: so many, and so many bytes (a letter beyond ASCII is sent as up to twelve)."""
    batch: list[tuple[str, str]] = []
    size = 0
    for key, value in items.items():
        more = len(json.dumps(key + value)) + 50
        if batch and (len(batch) == PARAMS or size + more > REQUEST):
            yield batch
            batch, size = [], 0
        batch.append((key, value))
        size += more
    if batch:
        yield batch


def dataset_source(text: str) -> str:
    """Where data came from, as json (ASCII, so that characters are bytes)."""
    encoded = json.dumps({"source": text})
    while len(encoded) > DATASET_SOURCE:
        text = cut(text, len(text) - max(1, (len(encoded) - DATASET_SOURCE) // 6))
        encoded = json.dumps({"source": text})
    return encoded
