"""Streams cut by class: class-, task- or domain-incremental (van de Ven & Tolias, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from clplat import checks
from clplat.streams.experience import Stream
from clplat.streams.labelled import Labelled, Layout, hold_out, make_experience, make_stream, scenario_of
from clplat.streams.loader import stable_seed


def split(
    source: Labelled,
    experiences: int | None = None,
    classes_per_experience: int | Sequence[int] | None = None,
    class_order: Literal["natural", "random"] | Sequence[int] = "natural",
    order_seed: int = 0,
    task_incremental: bool = False,
    labels_from_zero: bool = False,
    layout: Layout = "rows",
    valid_fraction: float = 0.0,
    data_seed: int = 0,
) -> Stream:
    """A data set cut by class. Labels keep their meaning, class 7 is output 7 in every experience, unless they are to
    begin at 0 in each: the outputs are then shared, and the same question is asked of ever new classes (the
    domain-incremental scenario of van de Ven & Tolias; split MNIST: is the digit the first or the second of its pair?).

    Args:
        source: the data set, C classes.
        experiences: K; the classes are dealt out evenly. Give this or `classes_per_experience`.
        classes_per_experience: one number for all, or one for each experience; together C.
        class_order: "natural" (0, 1, ...), "random" (by `order_seed`) or all classes in the order wanted.
        order_seed: of the random order; not the training seed.
        task_incremental: tell the learner which experience an example is from.
        labels_from_zero: label classes by their place in their experience, 0, 1, ...; experiences of equal size only.
        layout: of the inputs (see `lay_out`).
        valid_fraction: share of every class's training examples to hold out, 0..1.
        data_seed: of that choice.

    Raises:
        ValueError: classes that cannot be dealt out as asked, an order that is not one of all classes, or labels
            from zero where experiences have different numbers of classes.
    """
    order = _order(source.classes, class_order, order_seed)
    sizes = _sizes(source.classes, experiences, classes_per_experience)
    source = source.laid_out(layout)
    data = _from_zero(source, order, sizes) if labels_from_zero else source
    train, valid = hold_out(source.train_y, valid_fraction, data_seed)
    parts = []
    for index, classes in enumerate(torch.tensor(order).split(sizes)):
        parts.append(
            make_experience(
                data,
                index,
                f"{source.name} {' '.join(map(str, sorted(classes.tolist())))}",
                train[torch.isin(source.train_y[train], classes)],
                None if valid is None else valid[torch.isin(source.train_y[valid], classes)],
                torch.isin(source.test_y, classes).nonzero().squeeze(1),
                task_label=index if task_incremental else None,
            )
        )
    scenario = scenario_of(task_incremental, "domain_incremental" if labels_from_zero else "class_incremental")
    return make_stream(f"split_{source.name}", parts, scenario, data)


def _from_zero(source: Labelled, order: Sequence[int], sizes: Sequence[int]) -> Labelled:
    """The data set with each class labelled by its place in its experience."""
    if len(set(sizes)) > 1:
        raise ValueError(
            f"labels_from_zero: got true, and experiences of {list(sizes)} classes; it needs as many in every one: "
            "use experiences=K, or one number in classes_per_experience."
        )
    place = torch.empty(source.classes, dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(source.classes) % sizes[0]
    return replace(source, train_y=place[source.train_y], test_y=place[source.test_y], classes=sizes[0])


def _order(classes: int, order: str | Sequence[int], seed: int) -> list[int]:
    if order == "natural":
        return list(range(classes))
    if order == "random":
        generator = torch.Generator().manual_seed(stable_seed(seed, "class order"))
        return torch.randperm(classes, generator=generator).tolist()
    if isinstance(order, str) or sorted(order) != list(range(classes)):
        raise ValueError(
            f"class_order: got {order if isinstance(order, str) else list(order)}, allowed are natural, random or "
            f"each class of 0..{classes - 1} once."
        )
    return list(order)


def _sizes(classes: int, experiences: int | None, each: int | Sequence[int] | None) -> list[int]:
    checks.exactly_one(experiences=experiences, classes_per_experience=each)
    if experiences is not None:
        if experiences < 1 or classes % experiences:
            raise ValueError(
                f"experiences: got {experiences}, among which {classes} classes cannot be dealt out evenly: use a "
                f"divisor of {classes}, or a list in classes_per_experience."
            )
        return [classes // experiences] * experiences
    sizes = [each] * (classes // max(each, 1)) if isinstance(each, int) else list(each or ())
    if sum(sizes) != classes or min(sizes, default=0) < 1:
        wanted = each if isinstance(each, int) else sizes
        raise ValueError(
            f"classes_per_experience: got {wanted}, it must be at least 1 each and give {classes} in total."
        )
    return sizes
