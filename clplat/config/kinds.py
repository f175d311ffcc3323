"""Kinds of values: whether a plain value fits the type hint of the parameter that will get it."""

from __future__ import annotations

import datetime
import os
import pathlib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, InstanceOf, Strict, TypeAdapter, ValidationError

_LISTS = (Sequence, Iterable, Collection, list, set, frozenset)
_CALLED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "missing": "a longer list",
    "too_long": "a shorter list",
    "is_instance_of": "an object (a mapping with _target_)",
}


class Built:
    """Stand-in for an object that is not there yet.

    Args:
        target: import path of the class or function that will make it.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def __repr__(self) -> str:
        return f"an object of {self.target}"


@dataclass(frozen=True)
class Misfit:
    """A value of the wrong kind.

    Attributes:
        path: keys and numbers that lead to it, () for the value itself.
        given: the value there.
        expected: what may be there, in words.
    """

    path: tuple[int | str, ...]
    given: Any
    expected: str


def misfit(value: Any, hint: Any) -> Misfit | None:
    """The innermost part of a value that does not fit a type hint, None if all of it does.

    Args:
        value: of plain values, lists, mappings and `Built`; nothing is converted, but a whole number is a number.
        hint: of the parameter; classes stand for objects that are built.
    """
    if isinstance(value, Built):
        return None  # what it makes cannot be known before
    try:
        _adapter(hint).validate_python(value)
    except ValidationError as error:
        errors = [(_place(value, e["loc"]), e) for e in error.errors(include_url=False)]
        place = max((p for p, _ in errors), key=len)
        inner = [e for p, e in errors if p == place]
        names = [name for e in inner for name in _names(e)]
        names = list(dict.fromkeys(names))
        given = value
        for key in place:
            given = given[key]
        return Misfit(place, given, " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names))
    return None


def whole(value: Any, hint: Any) -> Iterator[int]:
    """The whole numbers in a value that fits its hint; none where the hint takes any number, which needs no end."""
    if float not in _flat(hint):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for part in parts:
            yield from whole(part, hint)
        if isinstance(value, int) and not isinstance(value, bool):
            yield value


def _flat(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _flat(part)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_checkable(hint), config=ConfigDict(strict=True))


def _checkable(hint: Any) -> Any:
    """The hint with `Built` in place of classes, and `list` and `dict` in place of their protocols."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float, bool, str, Any) or origin is Literal:
        return hint
    if hint in (None, types.NoneType):
        return Literal[None]  # so that an error names it
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_checkable, arguments))]  # noqa: UP007  # of a tuple
    if origin in _LISTS:
        return list[_checkable(arguments[0])]  # type: ignore[misc]  # a hint that is made here
    if origin is tuple:
        inner = tuple(a if a is Ellipsis else _checkable(a) for a in arguments)
        return Annotated[tuple[inner], Strict(False)]  # type: ignore[valid-type]  # a list is given
    if origin in (Mapping, dict):
        return dict[_checkable(arguments[0]), _checkable(arguments[1])]  # type: ignore[misc]  # as above
    if hint in (pathlib.Path, os.PathLike) or origin is os.PathLike:
        return str
    if isinstance(hint, type) and hint is not object and hint not in (list, tuple, dict, datetime.timedelta):
        return InstanceOf[Built]
    return InstanceOf[Built] if origin is not None and origin is not Annotated else Any


def _place(value: Any, location: Iterable[int | str]) -> tuple[int | str, ...]:
    """The keys of an error's location that lead into the value; pydantic mixes in the branches of unions."""
    place = []
    for key in location:
        if (isinstance(value, dict) and key in value) or (isinstance(value, list) and key in range(len(value))):  # type: ignore[operator]
            place.append(key)
            value = value[key]  # type: ignore[index]  # as the line above found
    return tuple(place)


def _names(error: Any) -> list[str]:
    if error["type"] == "literal_error":
        allowed: str = error["ctx"]["expected"]
        return allowed.replace("'", "").replace("None", "null").replace(" or ", ", ").split(", ")
    return [_CALLED.get(error["type"]) or str(error["msg"])]
