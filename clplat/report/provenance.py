"""Origin of a run: code version and environment. What cannot be found out is left open; nothing here stops a run."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

SHOWN = ("clplat", "torch", "pytorch-lightning", "mlflow", "hydra-core", "triton", "numpy")


def code() -> dict[str, Any]:
    """Command line, commits of the working directory (with changed files) and of clplat, and versions of the rest."""
    changes = git("status", "--porcelain", "--untracked-files=no")
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
    """Output of a git command in the working directory; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
