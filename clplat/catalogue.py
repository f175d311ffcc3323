"""Catalogue of what a configuration can name: from the head of each yaml, and from what its class declares.

The head of a yaml is its first comments: a Hydra header, one line that says what it is, and lines `# field: value`
that become columns of the generated tables ("stores", "kernel", "verified").
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CONF = Path(__file__).parent / "conf"
FIRST = ("strategy", "learner", "stream", "paper", "experiment")
HIDDEN = ("tiny",)
"""Fields that tests read and tables do not show."""

MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def groups() -> list[str]:
    """All groups of the configuration, those that a user chooses from first."""
    there = sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))
    return [g for g in FIRST if g in there] + [g for g in there if g not in FIRST]


def options(folder: Path) -> dict[str, str]:
    """Name and description of every option in a group's folder."""
    return {path.stem: head(path).get("what", "") for path in _files(folder)}


def head(path: Path) -> dict[str, str]:
    """Description ("what") and fields of a yaml's first comments."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if text.startswith("@package"):
            continue
        field = re.match(r"([a-z]+): (.*)", text)
        if "what" not in found:
            found["what"] = text
        elif field:
            found[field[1]] = field[2]
    return found


def table(group: str) -> str:
    """Markdown table of a group: a row an option, with its fields and, for strategies, what its class declares."""
    rows = {path.stem: head(path) for path in _files(CONF / group) if path.stem != "custom"}
    if group == "strategy":
        for name, row in rows.items():
            made = build(group, name)
            row["needs"] = ", ".join(sorted(made.needs)).replace("_", " ")
            row["claims"] = ", ".join(sorted(made.claims)).replace("_", " ")
    fields = [f for f in dict.fromkeys(key for row in rows.values() for key in row) if f != "what" and f not in HIDDEN]
    lines = [f"| {group} | what it is | " + "".join(f"{f} | " for f in fields), "|---" * (2 + len(fields)) + "|"]
    lines[0] = lines[0].rstrip()
    for name, row in rows.items():
        cells = [f"`{name}`", row.get("what", ""), *(row.get(f, "") for f in fields)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def update(text: str) -> str:
    """`text` with each table between `<!-- table: GROUP -->` and `<!-- end of table -->` made anew."""
    return MARK.sub(lambda mark: f"{mark[1]}{table(mark[2])}\n{mark[3]}", text)


def build(group: str, name: str) -> Any:
    """Object that an option of a group describes, with the defaults of the yaml."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    given = OmegaConf.load(CONF / group / f"{name}.yaml")
    return instantiate(OmegaConf.create({"seed": 0, "it": given}).it, _convert_="all")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.yaml")) if not path.stem.startswith("_")]
