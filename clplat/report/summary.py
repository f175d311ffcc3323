"""Summary of one run: its names and metrics, written to `result.json` and read from it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.report.flatten import flatten

if TYPE_CHECKING:
    from clplat.scores import Results

DIFFERENCES = (
    "stream", "learner", "strategy", "objective", "optimizer", "schedule", "training", "evaluation", "trainer",
)  # fmt: skip
"""Parts of the config that make two runs of one strategy different configurations; seeds do not."""


@dataclass(frozen=True)
class Names:
    """Names of a run in tables and in MLflow.

    Attributes:
        stream: the option chosen in the group of that name.
        learner: likewise.
        strategy: the strategies in order, joined by "+".
        sweep: the sweep's identifier, None for a single run.
        varied: the options of this run that vary in its sweep, "" if none do.
    """

    stream: str
    learner: str
    strategy: str
    sweep: str | None = None
    varied: str = ""


@dataclass(frozen=True)
class RunSummary:
    """One finished run.

    Attributes:
        strategy: the strategies in order, joined by "+".
        stream: its option.
        learner: its option.
        seed: of the training.
        metrics: `clplat.metrics.summary`, by name; NaN where undefined.
        seen: the same of the scores with unseen classes masked; empty where targets are not classes.
        score: what was scored.
        higher_is_better: False for losses.
        on: the sets that were scored, "test" or "valid".
        config: the flattened config of `DIFFERENCES` without seeds, every `_target_` included, from `config.yaml`
            beside `result.json`; empty if there is none.
        seeds: the seeds among it, likewise.
        folder: of the run, None if it was not read from one.
        references: folders of the runs that `intransigence` and `omega` compare it with.
    """

    strategy: str
    stream: str
    learner: str
    seed: int
    metrics: dict[str, float]
    seen: dict[str, float] = field(default_factory=dict)
    score: str = "accuracy"
    higher_is_better: bool = True
    on: str = "test"
    config: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    references: tuple[Path, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The content of `result.json`, NaN as null."""
        values = asdict(self)
        for part in ("config", "seeds", "folder", "references"):  # they stand elsewhere in the folder
            del values[part]
        for part in ("metrics", "seen"):
            values[part] = {name: None if math.isnan(value) else value for name, value in values[part].items()}
        return values


def summarise(names: Names, seed: int, results: Results) -> RunSummary:
    """Summarise the scores of a run.

    Args:
        names: of the run.
        seed: of the training.
        results: the scores.
    """
    from clplat.metrics import summary

    masked = summary(results.seen)
    return RunSummary(
        strategy=names.strategy,
        stream=names.stream,
        learner=names.learner,
        seed=seed,
        metrics=summary(results.all),
        seen={} if all(math.isnan(value) for value in masked.values()) else masked,
        score=results.all.score,
        higher_is_better=results.all.higher_is_better,
        on=results.on,
    )


def read_run(path: str | Path) -> RunSummary:
    """Read a `result.json`, and the `config.yaml` beside it.

    Raises:
        ValueError: it is not the result of a run.
    """
    from pydantic import TypeAdapter, ValidationError

    path = Path(path)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        for part in ("metrics", "seen"):
            plain[part] = {name: math.nan if value is None else value for name, value in plain[part].items()}
        run = TypeAdapter(RunSummary).validate_python(plain)
    except ValidationError as error:
        wrong = ", ".join(sorted({str(e["loc"][0]) for e in error.errors() if e["loc"]}))
        raise ValueError(f"{path} is not the result of a run (missing or wrong: {wrong or 'all of it'}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not the result of a run ({_reason(error)}).") from error
    config = _config(path.parent / "config.yaml")
    seeds = {key: value for key, value in config.items() if key.endswith("seed")}
    others = {key: value for key, value in config.items() if key not in seeds}
    return replace(run, config=others, seeds=seeds, folder=path.parent)


def _config(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        flat = flatten({part: config[part] for part in DIFFERENCES if part in config})
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({_reason(error)}).") from error
    return {key: str(value) for key, value in flat.items()}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
