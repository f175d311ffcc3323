"""Origin of a run: code version and environment. What cannot be found out is left open; nothing here stops a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = ("clplat", "torch", "pytorch-lightning", "mlflow", "hydra-core", "triton", "numpy")


def code() -> dict[str, Any]:
    """Command line, commits of the working directory (with changed files) and of clplat, and versions of the rest."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    return {
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": None if changes is None else changes.splitlines(),
        "clplat_commit": own_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in SHOWN},
    }


def installed() -> str:
    """Every installed package with its version, as a requirements file."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def own_commit() -> str | None:
    """The commit of clplat's own code where it runs from a checkout; None where it was installed."""
    here = Path(__file__).resolve()
    tracked = git("-C", str(here.parent), "ls-files", "--error-unmatch", here.name)
    return None if tracked is None else git("-C", str(here.parent), "rev-parse", "HEAD")


def version(package: str) -> str:
    """Version of an installed package; "absent" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def git(*arguments: str) -> str | None:
    """Output of a git command in the working directory; None where there is no git, or no repository of the user's own.

    A repository's configuration can name programs that git runs; none of it is heeded.
    """
    if not _owned(Path(arguments[1]) if arguments[:1] == ("-C",) else Path.cwd()):
        return None
    filters = _git("config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|smudge|process)$", where=arguments)
    off = [word for name in (filters or "").split() for word in ("-c", f"{name}=")]
    return _git(*arguments, options=[*_QUIET, *off])


_QUIET = (
    "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.pager=cat", "-c", "core.sshCommand=false",
    "-c", "safe.bareRepository=explicit", "-c", "status.submoduleSummary=false", "--no-pager",
)  # fmt: skip


def _git(*arguments: str, options: Sequence[str] = _QUIET, where: Sequence[str] = ()) -> str | None:
    place = where[:2] if where[:1] == ("-C",) else ()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    closed = {
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
    }
    try:
        command = ["git", *options, *place, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=kept | closed)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _owned(folder: Path) -> bool:
    """Whether the first `.git` above a folder, and what holds it, belong to the user; True on systems without owners."""
    found = next((f for f in (folder, *folder.absolute().parents) if (f / ".git").exists()), None)
    if found is None or not hasattr(os, "geteuid"):
        return found is not None
    return all(path.stat().st_uid == os.geteuid() for path in (found, found / ".git"))
