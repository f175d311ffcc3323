"""Several strategies as one: the law of each hook, and which strategies go together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clplat.strategy import Closure, Session, Strategy, Update
from clplat.streams.experience import Batch, Experience, Stream, StreamError

if TYPE_CHECKING:
    from clplat.learners.learner import Learner
    from clplat.learners.nets.net import Output

NEEDS = {
    "boundaries": "experiences with known boundaries (any scenario but boundary_free)",
    "task_labels": "task labels (stream.task_incremental=true)",
    "classes": "one class a sequence (streams with target 'class')",
}
"""Needs that a strategy may declare of a stream, as an error calls them."""

CLAIMS = {
    "objective": "replaces the learner's objective",
    "data": "chooses what an experience is trained on",
    "mixture": "adds old data to an experience's",
    "net": "gives each task weights of its own",
    "layers": "works on the layers' own weights",
    "codes": "trains on stored codes in place of inputs",
    "raw_rows": "keeps raw rows of inputs",
    "weight_values": "keeps a value for each weight, in its shape",
    "growth": "changes the shapes of weights",
}
"""Claims that a strategy may declare, as an error calls them."""

APART = (
    ("objective", "objective"),
    ("data", "data"),
    ("data", "mixture"),
    ("net", "net"),
    ("net", "data"),
    ("net", "mixture"),
    ("net", "layers"),
    ("net", "codes"),
    ("codes", "raw_rows"),
    ("growth", "weight_values"),
)
"""Pairs of claims that two strategies of one list must not have."""


class Composite(Strategy):
    """Strategies in a list as one, by the law of each hook. One strategy is a list of one.

    Args:
        parts: the strategies by name, in order; none is finetuning.

    Raises:
        ValueError: two of them do not go together.
    """

    def __init__(self, parts: Mapping[str, Strategy]) -> None:
        super().__init__()
        check_compatible(parts)
        self.parts = nn.ModuleDict(dict(parts))

    @classmethod
    def of(cls, strategy: Strategy | None) -> Composite:
        """A strategy as a list of one, under the name of its class: "center_loss" for `CenterLoss`."""
        if isinstance(strategy, Composite):
            return strategy
        if strategy is None:
            return cls({})
        name = type(strategy).__name__
        return cls({re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower(): strategy})

    @property
    def named(self) -> dict[str, Strategy]:
        """The parts by name, in order."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Strategy)}

    @property
    def strategies(self) -> list[Strategy]:
        """The parts in order."""
        return list(self.named.values())

    @property
    def passes(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]  # those of GEM grow on the way
        """Passes a step: the product of the parts'."""
        return math.prod(part.passes for part in self.strategies)

    @property
    def replacing(self) -> Strategy | None:
        """The part that replaces the objective, if one does."""
        return next((part for part in self.strategies if "objective" in part.claims), None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        # A net that is replaced must be in place before others size their state by it, or copy it.
        for name, part in sorted(self.named.items(), key=lambda item: not item[1].claims & {"net", "codes"}):
            with _noting(name):
                part.setup(learner, stream)

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        for part in self.strategies:
            session = part.session(stream, index, session)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        for part in self.strategies:
            part.enter(learner, experience)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        for name, part in self.named.items():
            with _noting(name):
                part.before_experience(learner, experience)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        for part in self.strategies:
            part.after_experience(learner, experience)

    def rate(self, step: int, steps: int, batch: Batch, factor: float) -> float:
        for part in self.strategies:
            factor = part.rate(step, steps, batch, factor)
        return factor

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        for part in self.strategies:
            batch = part.batch(learner, batch)
        return batch

    def before_step(self, learner: Learner, batch: Batch) -> None:
        for part in self.strategies:
            part.before_step(learner, batch)

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        part = self.replacing
        return super().objective(learner, batch, output) if part is None else part.objective(learner, batch, output)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, part in self.named.items():
            for key, value in part.loss(learner, batch, output).items():
                if key in terms:
                    raise ValueError(
                        f"Strategy {name!r} adds a loss {key!r} that another one already adds: rename one."
                    )
                terms[key] = value
        return terms

    def gradients(self, learner: Learner, batch: Batch) -> None:
        for part in self.strategies:
            part.gradients(learner, batch)

    def step(self, learner: Learner, closure: Closure, update: Update) -> Output:
        for part in reversed(self.strategies):
            update = _inside(part, learner, update)
        return update(closure)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        for part in self.strategies:
            part.after_step(learner, batch, output)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        for part in self.strategies:
            logits = part.predict(learner, batch, logits, features)
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.strategies for group in part.parameter_groups()]

    def report(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, part in self.named.items() for key, value in part.report().items()}

    def stored_bytes(self) -> int:
        return sum(p.stored_bytes() for p in self.strategies)


@contextmanager
def _noting(name: str) -> Iterator[None]:
    """Note on an error which strategy refuses: the message of a ValueError begins with an option's name."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
        error.add_note(f"strategy.{name}")
        raise


def _inside(part: Strategy, learner: Learner, update: Update) -> Update:
    return lambda closure: part.step(learner, closure, update)


def check_compatible(parts: Mapping[str, Strategy]) -> None:
    """Refuse strategies that do not go together, by their claims.

    Raises:
        ValueError: names two of them, and what each of the two claims; or a claim that does not exist, or an attribute
            in the place of a hook.
    """
    for name, part in parts.items():
        if hidden := sorted(vars(Strategy).keys() & vars(part).keys() - {"needs", "claims", "not_carried", "passes"}):
            raise ValueError(f"strategy.{name}: its attribute {hidden[0]!r} hides the hook of that name: rename it.")
        if unknown := sorted(part.claims - CLAIMS.keys()):
            raise ValueError(f"strategy.{name}: claims {unknown[0]!r}, allowed are {', '.join(map(repr, CLAIMS))}.")
    for (one, first), (other, second) in combinations(parts.items(), 2):
        for a, b in APART:
            if b in first.claims and a in second.claims:
                a, b = b, a
            elif not (a in first.claims and b in second.claims):
                continue
            what = f"both: each {CLAIMS[a]}" if a == b else f"together: {one} {CLAIMS[a]}, {other} {CLAIMS[b]}"
            raise ValueError(f"strategy: {one} and {other} cannot be used {what}. Drop one.")


def check_stream(strategy: Composite, stream: Stream, carries: bool = False) -> None:
    """Refuse a strategy that needs what the stream lacks, before any training.

    Args:
        strategy: the list.
        stream: what is to be learned.
        carries: whether its examples are segments whose state is carried.

    Raises:
        StreamError: names the strategy, what it needs, and what the stream is.
    """
    offered = {
        "boundaries": stream.scenario != "boundary_free",
        "task_labels": stream.scenario == "task_incremental",
        "classes": stream.target == "class",
    }
    for name, part in strategy.named.items():
        if carries and part.not_carried:
            raise StreamError(
                f"Strategy {name!r} does not go with a state that is carried from segment to segment: "
                f"{part.not_carried}. Set training.carry_state=false, or choose another strategy."
            )
        for need in sorted(part.needs):
            if not offered[need]:
                raise StreamError(
                    f"Strategy {name!r} needs {NEEDS[need]}; stream {stream.name!r} is {stream.scenario} with target "
                    f"{stream.target!r}. Choose another stream or another strategy."
                )
