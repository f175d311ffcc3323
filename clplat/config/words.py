"""Words of a command line as Hydra wants them, and Hydra's refusals as ours.

A word that Hydra's grammar cannot read is text where it can only be text: the value of a path, or a word without any of
the grammar's signs. What it says about the rest is told in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError

from clplat.catalogue import CONF, groups, options
from clplat.checks import shown
from clplat.config.refusing import ConfigError, nearest, root_keys
from clplat.config.resume import find

PATHS = ("output_dir", "resume")
"""Keys whose values are paths."""

LENGTHS = {"training.epochs": "training.steps", "training.steps": "training.epochs"}
"""Keys of which one is given: the other becomes null."""

_SIGNS = re.compile(r"[\[\]{}(),'\"\\$]")


def prepared(arguments: Sequence[str]) -> list[str]:
    """The words as Hydra wants them: flags first, `++` before dotted keys, the folder of a run that is resumed.

    A key that the chosen option lacks is then refused by `clplat.config.check`, which knows what is allowed, and
    arguments of a user's own class need no plus sign.

    Raises:
        ConfigError: a word cannot be read; a group is set to what is no option's name, or a strategy is named twice;
            both lengths of training are given; there is nothing to resume.
    """
    words, paths = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if digits := re.search(r"\d{4000,}", value):  # Python reads no longer ones
            raise ConfigError(f"{key}: got a number of {len(digits[0])} digits, a whole number must fit into 64 bits.")
        if key in groups() and equals and not _may_be_chosen(value):
            if value == "null" and key == "experiment":  # the default
                continue
            raise ConfigError(_unknown(key, value))
        if key in PATHS and (text := _text(value)) is not None:
            paths[key], value = text, quoted(text)
        elif equals and not key.startswith("-"):
            value = _readable(key, value)
        dotted = "." in key and key[0].isalpha() and not key.startswith("hydra") and "@" not in key and "/" not in key
        words.append(("++" if equals and dotted else "") + key + equals + value)
    words.sort(key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~")))
    words += _other_length(words)
    _refuse_twice(words)
    if "resume" in paths:
        folder = find(paths["resume"], Path(_resolved("output_dir", paths.get("output_dir", "runs"))))
        words.append(f"hydra.run.dir={quoted(str(folder).replace('${', chr(92) + '${'))}")
    return words


def quoted(text: str) -> str:
    """Text in Hydra's quotes: a quote needs a backslash, and so does every backslash before it or at the end."""
    inner = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda m: m[1] * 2, inner) + "'"


def parsed(words: Sequence[str]) -> list[Override]:
    """Overrides among some words, as Hydra reads them."""
    return OverridesParser.create().parse_overrides([w for w in words if "=" in w and not w.startswith("-")])


def strategies(overrides: Sequence[Override]) -> list[list[str]]:
    """Names of the strategies of each choice among some overrides; a sweep has several choices."""
    chosen: list[Any] = []
    for override in overrides:
        if override.key_or_group == "strategy" and override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            chosen += options(CONF / "strategy")
        elif override.key_or_group == "strategy" and override.is_discrete_sweep():
            chosen += map(yaml.safe_load, override.sweep_string_iterator())
        elif override.key_or_group == "strategy" and not override.is_sweep_override():
            chosen.append(override.value())
    return [[str(name) for name in each] if isinstance(each, list) else [str(each)] for each in chosen]


@contextmanager
def resolving(words: Sequence[str]) -> Iterator[None]:
    """Turn an interpolation that has no value into a refusal of the key that holds it.

    Args:
        words: the overrides, where a key that Hydra makes from others is looked for.

    Raises:
        ConfigError: names the key, the interpolation if it was typed, and what is missing.
    """
    try:
        yield
    except (GrammarParseError, InterpolationResolutionError) as error:
        key, typed = str(error.full_key or ""), [w.lstrip("+") for w in words if "${" in w]
        given = next((w for w in typed if w.partition("=")[0] == key), typed[0] if typed else "")
        if given:
            key = given.partition("=")[0]
        what = re.sub(
            r'^\w+ raised while resolving interpolation: "(.*)"$', r"\1", str(error.msg or error).splitlines()[0]
        )
        value = given.partition("=")[2].strip("'\"")
        shown = f"cannot resolve {value} " if given else "cannot be resolved "
        raise ConfigError(f"{key}: {shown}({what}): set what it names, or give {key} a value.") from error


def hydra_line(error: Exception) -> str:
    """Hydra's refusal in one line, with the key in front where it is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if missing := re.match(r".*Could not find 'hydra/(launcher|sweeper)/([^']+)'", line):
            return _not_installed(*missing.groups())
        if missing := re.match(r".*Could not find '(\w+)/([^']+)'", line):
            return _unknown(*missing.groups())
        if key := re.match(r"Could not override '([\w.]+)'", line):
            return f"{key[1]}: unknown key{nearest(key[1], root_keys())} Allowed: {', '.join(root_keys())}."
        if key := re.match(r"You must specify '(\w+)', e.g", line):
            return f"{key[1]}: nothing chosen. `clplat list {key[1]}` shows what there is."
    return " ".join(lines)


def _not_installed(kind: str, name: str) -> str:
    extras = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm"}
    if name in extras:
        return f"hydra/{kind}={name}: not installed: pip install 'clplat[{extras[name]}]'."
    return (
        f"hydra/{kind}={name}: no such {kind} is installed{nearest(name, extras)} Allowed: basic; "
        "joblib (pip install 'clplat[joblib]'), submitit_slurm and submitit_local (pip install 'clplat[slurm]'), or "
        f"another {kind} of Hydra's once its package is installed."
    )


def _text(value: str) -> str | None:
    """The text that a path's value means; None for a number, a list or null, which are no paths."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:  # as it stands, then: it's, a[1], x=1
        return value
    read: Any = value if override.is_sweep_override() else override.value()
    return read if isinstance(read, str) else None


def _readable(key: str, value: str) -> str:
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException as error:
        if not _SIGNS.search(value):
            return quoted(value)
        raise ConfigError(
            f"{key.lstrip('+~')}: cannot read {shown(value)}: put text in two kinds of quotes, as in "
            f"{key}=\"'...'\"; lists are [a,b], mappings {{a:1}}."
        ) from error
    return value


def _other_length(words: Sequence[str]) -> list[str]:
    given = {w.lstrip("+").partition("=")[0]: w.partition("=")[2] for w in words if not w.startswith("-")}
    set_ = [key for key in LENGTHS if given.get(key, "null") != "null"]
    if len(set_) == 2:
        raise ConfigError(
            f"training: got epochs={given['training.epochs']} and steps={given['training.steps']}: give one of the two."
        )
    other = [LENGTHS[key] for key in set_]
    return [f"++{key}=null" for key in other if key not in given]


def _refuse_twice(words: Sequence[str]) -> None:
    for names in strategies(parsed([w for w in words if w.startswith("strategy=")])):
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"strategy: {name} stands twice in [{', '.join(names)}]: name each strategy once; a second one of a "
                    "kind needs a yaml, and so a name, of its own."
                )


def _resolved(key: str, text: str) -> str:
    with resolving([f"{key}={text}"]):
        return OmegaConf.create({"text": text}).text


def _may_be_chosen(value: str) -> bool:
    """Whether Hydra takes a value for a group: a name, or a list of them; and not a number, say, or null."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:  # Hydra's grammar has more
        return True
    return all(isinstance(name, str | dict) for name in (read if isinstance(read, list) else [read]))


def _unknown(group: str, name: str) -> str:
    known = options(CONF / group)
    given = name if len(name) < 80 else shown(name)
    return f"{group}={given}: unknown{nearest(name, known)} Allowed: {', '.join(known)}."
