"""Options that `conf/` offers. Nothing heavy is imported here: `clplat list` answers at once."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).parents[1] / "conf"


def groups() -> list[str]:
    """Every group, those first that are chosen most."""
    found = sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))
    first = ["strategy", "learner", "stream", "experiment", "paper"]
    return first + [g for g in found if g not in first]


def options(folder: Path) -> dict[str, str]:
    """Name and description (the first comment that is no Hydra header) of every option in a group's folder."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        comments = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
        if not path.stem.startswith("_"):
            found[path.stem] = comments[0].removeprefix("#").strip() if comments else ""
    return found
