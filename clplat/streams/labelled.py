"""Labelled data sets in memory, and what every stream made of one shares: layouts, held-out rows, experiences.

Letters: N examples, H image rows, W image columns, T time steps, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.data import TensorData, Transform
from clplat.streams.dtypes import is_integer
from clplat.streams.experience import Experience, Scenario, Stream, StreamError
from clplat.streams.layout import Layout as Layout
from clplat.streams.layout import lay_out as lay_out
from clplat.streams.loader import stable_seed
from clplat.streams.padding import checked_lengths, need_tensors


@dataclass(frozen=True)
class Labelled:
    """A data set with one class an example.

    Attributes:
        name: for the names of streams.
        train_x: [N, H, W] images, [N, T, D] sequences or [N, D] vectors, floats of any precision.
        train_y: [N] classes, integers of any kind.
        test_x: as train_x.
        test_y: as train_y.
        classes: C; labels lie in 0..C-1.
        train_domain: [N] int64, the domain (speaker, writer, site) of each training example, where there is one.
        test_domain: as train_domain.
        train_lengths: [N] time steps of each training sequence that are real, where they are padded to one length T.
        test_lengths: as train_lengths; give both or none.

    Raises:
        StreamError: sizes or number formats that do not fit each other, labels outside 0..C-1, lengths outside 1..T.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    train_domain: Tensor | None = None
    test_domain: Tensor | None = None
    train_lengths: Tensor | None = None
    test_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        self._plain()
        if (self.train_lengths is None) != (self.test_lengths is None):
            raise StreamError(f"{self.name}: give train_lengths and test_lengths, or neither; got one of them.")
        parts = (
            ("train", self.train_x, self.train_y, self.train_domain),
            ("test", self.test_x, self.test_y, self.test_domain),
        )
        for part, x, y, domain in parts:
            where = f"{self.name}, {part} set"
            if len(x) == 0:
                raise StreamError(f"{where}: it is empty, it needs at least one example.")
            if x.ndim not in (2, 3) or not x.is_floating_point():
                cure = f": give x.float(){' / 255' if x.dtype == torch.uint8 else ''}" if is_integer(x) else ""
                raise StreamError(
                    f"{where}: inputs must be floats [N, H, W], [N, T, D] or [N, D], got {x.dtype} {list(x.shape)}{cure}."
                )
            if y.dtype != torch.int64 or y.shape != x.shape[:1]:
                cure = "" if is_integer(y) else ": give y.long()"
                raise StreamError(f"{where}: labels must be int64 [{len(x)}], got {y.dtype} {list(y.shape)}{cure}.")
            if int(y.min()) < 0 or int(y.max()) >= self.classes:
                row = int(((y < 0) | (y >= self.classes)).nonzero()[0])
                raise StreamError(
                    f"{where}: labels must lie in 0..{self.classes - 1}, got {int(y.min())}..{int(y.max())}, first in "
                    f"row {row}."
                )
            if domain is not None and domain.shape != y.shape:
                raise StreamError(f"{where}: domains must be [{len(x)}], got {list(domain.shape)}.")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise StreamError(
                f"{self.name}: train and test inputs must have one shape, "
                f"got {list(self.train_x.shape[1:])} and {list(self.test_x.shape[1:])}."
            )

    def laid_out(self, layout: Layout) -> Labelled:
        """The same data set in another layout (see `lay_out`); lengths follow it.

        Raises:
            ValueError: sequences of different lengths as vectors.
        """
        train, test = self.train_lengths, self.test_lengths
        if train is not None and test is not None:
            if layout == "pixels":
                raise ValueError(
                    f"layout: got 'pixels', one vector an example, and the sequences of {self.name} have lengths of "
                    "their own; use layout=rows or layout=steps."
                )
            if layout == "steps" and self.train_x.ndim == 3:
                train, test = train * self.train_x.shape[2], test * self.test_x.shape[2]
        return replace(
            self,
            train_x=lay_out(self.train_x, layout),
            test_x=lay_out(self.test_x, layout),
            train_lengths=train,
            test_lengths=test,
        )

    def need_one_length(self, change: str) -> None:
        """Refuse sequences of different lengths.

        Raises:
            StreamError: names what would mix padding into them.
        """
        if self.train_lengths is not None:
            raise StreamError(
                f"{self.name}: its sequences have lengths of their own, and {change} would move padding among their "
                "steps: use a stream that leaves inputs as they are (split, domain), or a source without lengths."
            )

    def _plain(self) -> None:
        """Take labels and lengths of any integers."""
        for part in ("train", "test"):
            x, y, lengths = (getattr(self, f"{part}_{field}") for field in ("x", "y", "lengths"))
            need_tensors(**{f"{self.name}: {part}_x": x, f"{self.name}: {part}_y": y})
            if is_integer(y):
                object.__setattr__(self, f"{part}_y", y.long())
            domain = getattr(self, f"{part}_domain")
            if domain is not None:
                need_tensors(**{f"{self.name}: {part}_domain": domain})
                if not is_integer(domain):
                    raise StreamError(f"{self.name}, {part} set: domains must be whole numbers, got {domain.dtype}.")
                object.__setattr__(self, f"{part}_domain", domain.long())
            if lengths is not None:
                try:
                    object.__setattr__(self, f"{part}_lengths", checked_lengths(lengths, x))
                except StreamError as error:
                    raise StreamError(f"{self.name}, {part} set, {error}") from error


def hold_out(labels: Tensor, valid_fraction: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Rows to keep and rows to hold out, at random but with every label's share kept.

    Args:
        labels: [N] what to balance over.
        valid_fraction: of each label's examples, rounded, 0..1 (0 holds nothing out).
        seed: of the choice.

    Returns:
        The kept rows and the held-out rows, ascending; None for the latter when the fraction is 0.
    """
    checks.within(0, 1, below=True, valid_fraction=valid_fraction)
    if valid_fraction == 0:
        return torch.arange(len(labels)), None
    generator = torch.Generator().manual_seed(stable_seed(seed, "hold out"))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator)
        held[rows[order[: round(valid_fraction * len(rows))]]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def scenario_of(task_incremental: bool, otherwise: Scenario) -> Scenario:
    """Task-incremental where the learner is told the task, else what changes."""
    return "task_incremental" if task_incremental else otherwise


def make_experience(
    source: Labelled,
    index: int,
    name: str,
    train: Tensor,
    valid: Tensor | None,
    test: Tensor,
    transform: Transform | None = None,
    task_label: int | None = None,
) -> Experience:
    """An experience of some rows of a data set; the tensors are shared, only row numbers are new.

    Args:
        source: in the layout of the stream.
        index: place in the stream.
        name: of the experience.
        train: rows of the training part.
        valid: further rows of the training part, held out; None for none.
        test: rows of the test part.
        transform: of the inputs of each batch.
        task_label: where the learner is told.

    Raises:
        StreamError: a set would be empty.
    """
    for part, rows in (("train", train), ("valid", valid), ("test", test)):
        if rows is not None and len(rows) == 0:
            advice = "; lower or drop valid_fraction" if part == "valid" else ""
            raise StreamError(f"Experience {index} ({name}) would have an empty {part} set{advice}.")
    x, y, lengths = source.train_x, source.train_y, source.train_lengths
    return Experience(
        index=index,
        name=name,
        classes=tuple(y[train].unique().tolist()),
        train=TensorData(x, y, train, transform, task_label, lengths=lengths),
        test=TensorData(source.test_x, source.test_y, test, transform, task_label, lengths=source.test_lengths),
        valid=None if valid is None else TensorData(x, y, valid, transform, task_label, lengths=lengths),
        task_label=task_label,
    )


def make_stream(name: str, experiences: Sequence[Experience], scenario: Scenario, source: Labelled) -> Stream:
    """A stream of experiences of one data set, which is in the layout of the stream."""
    sequences = source.train_x.ndim == 3
    length = None if source.train_lengths is not None else source.train_x.shape[1] if sequences else 0
    return Stream(
        name=name,
        experiences=tuple(experiences),
        scenario=scenario,
        target="class",
        outputs=source.classes,
        features=source.train_x.shape[-1],
        length=length,
    )
