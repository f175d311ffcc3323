"""Documents of text files: read as they are, changed only as asked, cut at a separator."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from clplat import checks
from clplat.streams.batch import StreamError

log = logging.getLogger(__name__)

Form = Literal["newlines", "NFC", "NFKC", "casefold"]
"""What `normalize` can do to a text."""


def documents_of(
    files: Mapping[str, str | Sequence[str]], separator: str | None, normalize: Form | Sequence[Form] | None
) -> dict[str, list[str]]:
    """The documents of each experience.

    Args:
        files: see `clplat.streams.text.text`, as are the others.
        separator: likewise.
        normalize: likewise.

    Raises:
        ValueError: files that are no mapping of names to paths; a separator or a form that changes nothing in them.
        StreamError: a file that cannot be read.
    """
    forms: list[Form] = []
    if normalize is not None:
        forms = [cast(Form, normalize)] if isinstance(normalize, str) else list(normalize)
    for form in forms:
        checks.one_of("normalize", form, get_args(Form))
    if not isinstance(files, Mapping) or not all(map(_paths, files.values())):
        raise ValueError(
            f"files: got {files}, it must map each name to a path or a list of paths: set "
            "stream.files={name: path, ...}."
        )
    contents = _read({name: [f] if isinstance(f, str) else f for name, f in files.items()})
    contents = _normalized(contents, forms)
    _check_separator(contents, separator)
    return {name: [d for c in own for d in _cut(c, separator)] for name, own in contents.items()}


def _paths(value: object) -> bool:
    """Whether it is a path or a list of them."""
    several = isinstance(value, Sequence) and all(isinstance(one, str) for one in value)
    return isinstance(value, str) or several


def _read(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The contents of the files of each experience, as they are."""
    contents: dict[str, list[str]] = {}
    for name, paths in files.items():
        contents[name] = []
        for path in paths:
            try:
                contents[name].append(Path(path).read_bytes().decode("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise StreamError(f"files: cannot read {path} ({reason}): give paths of UTF-8 text files.") from error
    return contents


def _normalized(contents: dict[str, list[str]], forms: Sequence[Form]) -> dict[str, list[str]]:
    """The contents with each form applied; one that changes none of them is refused."""
    for form in forms:
        after = {name: [_changed(c, form) for c in own] for name, own in contents.items()}
        if after == contents:
            raise ValueError(f"normalize: got {form!r}, which changes nothing in these files: leave it out.")
        contents = after
    return contents


def _changed(content: str, form: Form) -> str:
    if form == "newlines":
        return content.replace("\r\n", "\n").replace("\r", "\n")
    return content.casefold() if form == "casefold" else unicodedata.normalize(form, content)


def _cut(content: str, separator: str | None) -> list[str]:
    return [content] if separator is None else content.split(separator)


def _check_separator(contents: Mapping[str, Sequence[str]], separator: str | None) -> None:
    """Refuse a separator that occurs in no file, and name the experiences where it does not."""
    if separator is None:
        return
    without = [name for name, own in contents.items() if not any(separator in c for c in own)]
    if len(without) == len(contents):
        lines = any("\r" in c for own in contents.values() for c in own)
        hint = "; their lines end in CR LF, which normalize=newlines changes" if lines and "\n" in separator else ""
        raise ValueError(
            f"separator: got {checks.shown(separator)}, which occurs in none of the files{hint}: give another, or null."
        )
    if without:
        log.warning(
            "stream.separator: %s does not occur in %s, whose files are one document each.",
            checks.shown(separator),
            ", ".join(without),
        )
