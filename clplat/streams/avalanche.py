"""Any classification benchmark of Avalanche 0.6 as a stream."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clplat._torchvision import ensure_importable
from clplat.streams.avalanche_data import Options, data_of, targets_of
from clplat.streams.batch import StreamError
from clplat.streams.data import TensorData
from clplat.streams.experience import Data, Experience, Scenario, Stream
from clplat.streams.labelled import Layout
from clplat.streams.loader import stable_seed
from clplat.streams.reading import seeded

LOOKED = 64
"""Examples by which it is told whether sequences have one length, where they are not in memory as one tensor."""


def from_avalanche(
    benchmark: Any,
    layout: Layout = "rows",
    scenario: Scenario | None = None,
    vocabulary: int | None = None,
    order_seed: int = 0,
    cache: bool = True,
    workers: int = 0,
    name: str = "avalanche",
) -> Stream:
    """A stream of the benchmark's train and test experiences, and of its stream "valid" if it has one.

    Train sets are read with Avalanche's "train" transforms, the others with "eval", as its strategies do.

    Args:
        benchmark: a benchmark (`avalanche.benchmarks.CLScenario`), or a function without arguments that makes one.
        layout: of the inputs (see `lay_out`); images may be [channels, H, W]. Sequences [T, D] may differ in T.
        scenario: what kind of stream it is. None: task-incremental if experiences have different task labels,
            domain-incremental if all have the same classes, else class-incremental.
        vocabulary: number of token ids if examples are [T] integers; None if they are floats.
        order_seed: if `benchmark` is a function (or a `functools.partial` of one) with a parameter `seed` that was
            not given, this is its value; not the training seed.
        cache: read every experience once and keep it in memory as floats (a permuted MNIST: 0.2 GB an experience).
            False reads batch by batch while training: for large data, and for random augmentations.
        workers: processes that read data whose transforms are not known.
        name: of the stream.

    Raises:
        StreamError: the benchmark cannot be made, its train and test streams do not fit each other, its examples are
            no tensors of one width, or a random augmentation would be frozen by `cache`.
    """
    ensure_importable()
    options = Options(layout, vocabulary, cache, workers)
    # Avalanche draws from (and seeds) the global generators.
    with seeded(stable_seed(order_seed, "avalanche")):
        if callable(benchmark):
            benchmark = _make(benchmark, order_seed)
        train, test = list(benchmark.train_stream), list(benchmark.test_stream)
        valid = list(benchmark.streams["valid"]) if "valid" in benchmark.streams else None
        if not train or len(test) not in (1, len(train)):
            raise StreamError(
                f"{name}: a benchmark needs one test experience for each training experience, or one in all, "
                f"got {len(train)} and {len(test)}."
            )
        if valid is not None and len(valid) != len(train):
            raise StreamError(f"{name}: got {len(train)} training experiences and {len(valid)} validation ones.")
        tasks = [_task_label(e) for e in train]
        targets = [targets_of(e.dataset) for e in train]
        classes = [tuple(y.unique().tolist()) for y in targets]
        scenario = scenario or _scenario(tasks, classes)
        if scenario == "task_incremental" and None in tasks:
            raise StreamError(f"{name}: a task-incremental stream needs one task label an experience, got {tasks}.")
        labels = tasks if scenario == "task_incremental" else [None] * len(train)
        # One test experience is read once and then shared, unless its task label differs each time.
        share = len(test) == 1 and labels[0] is None
        shared = data_of(test[0].dataset.eval(), None, options, None, name) if share else None
        parts = [
            Experience(
                index=i,
                name=f"{name} {i}",
                classes=classes[i],
                train=data_of(train[i].dataset.train(), targets[i], options, labels[i], name),
                test=shared or data_of(test[i % len(test)].dataset.eval(), None, options, labels[i], name),
                valid=None if valid is None else data_of(valid[i].dataset.eval(), None, options, labels[i], name),
                task_label=labels[i],
            )
            for i in range(len(train))
        ]
    first = parts[0].train.batch(torch.zeros(1, dtype=torch.int64)).x
    everything = [d for e in parts for d in (e.train, e.test, e.valid) if d is not None]
    return Stream(
        name=name,
        experiences=tuple(parts),
        scenario=scenario,
        target="class",
        outputs=1 + max(int(t.max()) for t in (d.targets() for d in everything) if t is not None),
        features=None if vocabulary is not None else first.shape[-1],
        vocabulary=vocabulary,
        length=_length(everything, first, vocabulary),
    )


def _length(sets: Sequence[Data], first: Tensor, vocabulary: int | None) -> int | None:
    """T of all sequences, 0 without a time axis; None where lengths differ."""
    if first.ndim == 2 and vocabulary is None:
        return 0
    lengths = set()
    for data in sets:
        if not isinstance(data, TensorData):
            batch = data.batch(torch.arange(min(len(data), LOOKED)))
            lengths |= {batch.x.shape[1]} if batch.lengths is None else set(batch.lengths.tolist())
        else:
            lengths.add(data.x.shape[1])
    return lengths.pop() if len(lengths) == 1 else None


def _make(function: Callable[..., Any], seed: int) -> Any:
    given = function.keywords if isinstance(function, partial) else {}
    seeded = "seed" in inspect.signature(function).parameters and given.get("seed") is None
    try:
        # An order that is given leaves nothing to draw, and some of Avalanche's functions refuse to have both.
        fixed = given.get("fixed_class_order") is not None or given.get("class_order") is not None
        return function(seed=seed) if seeded and not fixed else function()
    except Exception as error:
        target = function.func if isinstance(function, partial) else function
        raise StreamError(
            f"The Avalanche benchmark {getattr(target, '__name__', target)} could not be made "
            f"({type(error).__name__}: {error}). Check its arguments under stream.benchmark; if it wants to download "
            "data, copy them to the folder that it names and set stream.benchmark.dataset_root."
        ) from error


def _task_label(experience: Any) -> int | None:
    """The one task label of all examples of an experience; None if there are none or several."""
    labels = getattr(experience.dataset, "targets_task_labels", None)
    values = {int(v) for v in labels.uniques} if labels is not None else set()
    return values.pop() if len(values) == 1 else None


def _scenario(tasks: Sequence[int | None], classes: Sequence[tuple[int, ...]]) -> Scenario:
    if None not in tasks and len(set(tasks)) == len(tasks) > 1:
        return "task_incremental"
    return "domain_incremental" if len(set(classes)) == 1 and len(classes) > 1 else "class_incremental"
