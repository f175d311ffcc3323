"""Dotted keys for nested values, as configurations are compared and logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"a": {"b": 1}} gives {"a.b": 1}. Lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
