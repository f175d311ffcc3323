"""Faults of data: what a net cannot read or be scored on, named by set and row.

Letters: B batch, T time steps, D input features, O outputs per step, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.dtypes import computable, is_integer

if TYPE_CHECKING:
    from clplat.streams.experience import Experience, Stream

FLOATS = (torch.float32, torch.float64)

LARGEST = torch.finfo(torch.float32).max

CURE = "mend the data, or leave such rows out"


def extremes(values: Tensor) -> tuple[float, float]:
    """The least and the greatest value; both NaN where one is."""
    if values.numel() == 0:
        return 0.0, 0.0
    low, high = computable(values).aminmax()
    return low.item(), high.item()


def finite(low: float, high: float) -> bool:
    """Whether all values between the extremes are finite numbers, in float32 too."""
    return abs(low) <= LARGEST and abs(high) <= LARGEST


@dataclass(frozen=True)
class Place:
    """A set of a stream, for messages and rules.

    Attributes:
        stream: that it belongs to.
        experience: likewise.
        part: "train", "valid" or "test".
    """

    stream: Stream
    experience: Experience
    part: str

    def __str__(self) -> str:
        return f"experience {self.experience.index} ({self.experience.name}), {self.part} set"


def check_kind(batch: Batch, place: Place, given: tuple[torch.dtype, torch.dtype] | None = None) -> None:
    """Refuse shapes and number formats that a stream's nets and objectives cannot take.

    Args:
        batch: some examples of the set.
        place: of the set.
        given: number formats of the inputs and targets that the set was made of; None: those of the batch.

    Raises:
        StreamError: says what was given, and what to give.
    """
    for name, t in (("inputs", batch.x), ("targets", batch.y)):
        if not isinstance(t, Tensor):
            raise StreamError(f"{place}: {name} must be a torch.Tensor, got {type(t).__name__}: use torch.as_tensor.")
    formats = given or (batch.x.dtype, batch.y.dtype)
    _check_inputs(batch.x, place, formats[0])
    _check_targets(batch, place, formats[1])
    rows, steps = len(batch.x), batch.x.shape[1]
    if batch.lengths is not None and (not is_integer(batch.lengths) or batch.lengths.shape != (rows,)):
        raise StreamError(
            f"{place}: lengths must be integers [{rows}], got {batch.lengths.dtype} {list(batch.lengths.shape)}."
        )
    if batch.lengths is not None and place.stream.length is not None:
        raise StreamError(
            f"{place}: its sequences have lengths of their own, and the stream says that all have {place.stream.length} "
            "steps: leave Stream.length at None."
        )
    if batch.mask is not None and (batch.mask.dtype != torch.bool or batch.mask.shape != (rows, steps)):
        raise StreamError(
            f"{place}: a mask must be bool [{rows}, {steps}], got {batch.mask.dtype} {list(batch.mask.shape)}."
        )


def _check_inputs(x: Tensor, place: Place, given: torch.dtype) -> None:
    stream, shape = place.stream, list(x.shape)
    if stream.vocabulary is not None:
        if x.ndim != 2 or not is_integer(x):
            raise StreamError(
                f"{place}: token inputs must be integers [B, T], got {given} {shape}: give x.long(), or a stream "
                "with features instead of a vocabulary."
            )
        return
    if x.ndim not in (2, 3) or not x.is_floating_point() or x.shape[-1] != stream.features:
        cure = "" if x.is_floating_point() else f": give x.float(){' / 255' if given == torch.uint8 else ''}"
        cure += ", or a stream with a vocabulary if these are token ids" if is_integer(x) else ""
        raise StreamError(
            f"{place}: inputs must be floats [B, D] or [B, T, D] with D = {stream.features}, got {given} {shape}{cure}."
        )
    if x.dtype not in FLOATS:
        raise StreamError(f"{place}: inputs must be torch.float32, got {given}: give x.float(), or use TensorData.")


def _check_targets(batch: Batch, place: Place, given: torch.dtype) -> None:
    stream, y, shape = place.stream, batch.y, list(batch.x.shape)
    if stream.target in ("class", "tag", "token"):
        wanted = shape[:1] if stream.target == "class" else shape[:2]
        names = "[B]" if stream.target == "class" else "[B, T]"
        if list(y.shape) != wanted:
            raise StreamError(f"{place}: targets must be {names} = {wanted}, got {list(y.shape)}.")
        if y.dtype != torch.int64:
            raise StreamError(
                f"{place}: targets are classes and must be torch.int64, got {given}: give y.long(), or a stream with "
                'target="value" if these are no classes.'
            )
        return
    if y.ndim == 0 or y.shape[-1] != stream.outputs:
        raise StreamError(f"{place}: targets must end in O = {stream.outputs}, got {list(y.shape)}.")
    if y.dtype not in FLOATS:
        raise StreamError(
            f"{place}: targets are {'bits' if stream.target == 'bits' else 'real values'} and must be torch.float32, "
            f"got {given}: give y.float()."
        )


def check_rows(batch: Batch, place: Place, origin: Callable[[int], tuple[int, int]]) -> None:
    """Refuse values that no net learns from.

    Args:
        batch: of the right kind.
        place: of the set.
        origin: of a row of the batch its number in the set, and in the arrays that the set was made of.

    Raises:
        StreamError: names the first such row.
    """
    for bad, message in _faults(batch, place):
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            in_set, in_arrays = origin(row)
            where = f"row {in_set}" + ("" if in_set == in_arrays else f" (row {in_arrays} of its arrays)")
            raise StreamError(f"{place}, {where}: {message(row)}.")


Fault = tuple[Tensor, Callable[[int], str]]
"""[B] bool, the rows that have it, and what is to be said of one."""


def _faults(batch: Batch, place: Place) -> Iterator[Fault]:
    stream, experience = place.stream, place.experience
    if batch.lengths is not None:
        yield from _length_faults(batch.lengths, batch.x.shape[1])
    yield from _input_faults(batch.x, stream.vocabulary)
    scored = scored_steps(batch)
    if stream.target in ("class", "tag", "token"):
        y = batch.y if scored is None else batch.y.where(scored, 0)
        yield from _label_faults(y, stream.outputs)
    else:
        y = batch.y if scored is None or batch.y.ndim < 3 else batch.y.where(scored[..., None], 0)
        yield from _value_faults(y, stream.target == "bits")
    if stream.target == "class" and place.part == "train" and experience.classes:
        listed = torch.tensor(experience.classes)
        yield (
            ~torch.isin(batch.y, listed),
            lambda row: (
                f"class {int(batch.y[row])} is not among the experience's classes {_few(experience.classes)}: list all "
                "that occur in its training set"
            ),
        )
    if stream.scenario == "task_incremental":
        yield from _task_faults(batch, experience.task_label)


def _length_faults(lengths: Tensor, steps: int) -> Iterator[Fault]:
    bad = (lengths < 1) | (lengths > steps)
    yield bad, lambda row: f"lengths must lie in 1..{steps}, got {int(lengths[row])}: leave empty sequences out"


def _input_faults(x: Tensor, vocabulary: int | None) -> Iterator[Fault]:
    low, high = extremes(x)
    if vocabulary is not None and (low < 0 or high >= vocabulary):
        ids = x.long()
        bad = (ids < 0) | (ids >= vocabulary)
        yield (
            bad.any(1),
            lambda row: f"token ids must lie in 0..{vocabulary - 1}, got {int(ids[row][bad[row]][0])}",
        )
    if vocabulary is None and not finite(low, high):
        yield _not_finite(x, "inputs")


def _label_faults(y: Tensor, outputs: int) -> Iterator[Fault]:
    low, high = extremes(y)
    if low < 0 or high >= outputs:
        bad = ((y < 0) | (y >= outputs)).view(len(y), -1)
        yield (
            bad.any(1),
            lambda row: f"labels must lie in 0..{outputs - 1}, got {int(y[row].reshape(-1)[bad[row]][0])}",
        )


def _value_faults(y: Tensor, bits: bool) -> Iterator[Fault]:
    low, high = extremes(y)
    if not finite(low, high):
        yield _not_finite(y, "targets")
    elif bits and (low < 0 or high > 1):
        yield ((y < 0) | (y > 1)).flatten(1).any(1), lambda row: "bits must lie in 0..1, got others"


def _not_finite(values: Tensor, name: str) -> Fault:
    bad = ~(values.abs() <= LARGEST).view(len(values), -1)

    def message(row: int) -> str:
        return f"{name} must be finite, got {float(values[row].reshape(-1)[bad[row]][0]):g}: {CURE}"

    return bad.any(1), message


def _task_faults(batch: Batch, label: int | None) -> Iterator[Fault]:
    task = batch.task
    if task is None:
        yield torch.ones(len(batch), dtype=torch.bool), lambda row: f"it carries no task label, expected {label}"
    else:
        yield task != label, lambda row: f"its task label is {int(task[row])}, the experience's is {label}"


def scored_steps(batch: Batch) -> Tensor | None:
    """[B, T] bool, the steps that are trained on and scored where there is a target a step; None: all."""
    if batch.y.ndim < 2 or (batch.y.ndim == 2 and batch.y.is_floating_point()):
        return None
    scored, within = batch.mask, batch.valid()
    if within is not None:
        scored = within if scored is None else scored & within
    if not batch.y.is_floating_point():
        counted = batch.y != UNSCORED
        scored = counted if scored is None else scored & counted
    return scored


def _few(classes: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, classes[:8]))
    return f"[{shown}{', ...' if len(classes) > 8 else ''}]"
