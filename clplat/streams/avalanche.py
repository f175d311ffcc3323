"""Any classification benchmark of Avalanche 0.6 as a stream. Only this file imports avalanche, inside functions.

Avalanche reads example by example through several layers of Python (some 50 microseconds each). Here every experience
is read once, and at once where the data set lies in memory and its transforms are known; what was read so is compared
with what Avalanche itself gives for some examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clplat._torchvision import ensure_importable
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Data, Experience, Scenario, Stream, StreamError
from clplat.streams.labelled import Layout, lay_out
from clplat.streams.loader import stable_seed
from clplat.streams.permuted import Permutation
from clplat.streams.workers import WorkerData

Reader = Callable[[Tensor], Tensor]
"""Reads the inputs of the examples `rows` [B] at once, transforms applied."""


@dataclass(frozen=True)
class _Options:
    layout: Layout
    vocabulary: int | None
    cache: bool
    workers: int

    def lay_out(self, x: Tensor) -> Tensor:
        return (x if self.vocabulary is not None else lay_out(x, self.layout)).contiguous()


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
        layout: of the inputs (see `lay_out`); images may be [channels, H, W].
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
            no tensors of one shape, or a random augmentation would be frozen by `cache`.
    """
    ensure_importable()
    options = _Options(layout, vocabulary, cache, workers)
    # Avalanche draws from (and seeds) the global generators.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(order_seed, "avalanche"))
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
        targets = [_targets(e.dataset) for e in train]
        classes = [tuple(y.unique().tolist()) for y in targets]
        scenario = scenario or _scenario(tasks, classes)
        if scenario == "task_incremental" and None in tasks:
            raise StreamError(f"{name}: a task-incremental stream needs one task label an experience, got {tasks}.")
        labels = tasks if scenario == "task_incremental" else [None] * len(train)
        # One test experience is read once and then shared, unless its task label differs each time.
        share = len(test) == 1 and labels[0] is None
        shared = _data(test[0].dataset.eval(), None, options, None, name) if share else None
        parts = [
            Experience(
                index=i,
                name=f"{name} {i}",
                classes=classes[i],
                train=_data(train[i].dataset.train(), targets[i], options, labels[i], name),
                test=shared or _data(test[i % len(test)].dataset.eval(), None, options, labels[i], name),
                valid=None if valid is None else _data(valid[i].dataset.eval(), None, options, labels[i], name),
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
        length=0 if first.ndim == 2 and vocabulary is None else first.shape[1],
    )


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


def _targets(dataset: Any) -> Tensor:
    """[N] the classes of an Avalanche data set, which it keeps apart from the examples."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise StreamError(
            "An Avalanche data set has no targets: make it with avalanche.benchmarks.utils.as_classification_dataset."
        )
    return torch.tensor([int(t) for t in targets], dtype=torch.int64)


# Reading ---------------------------------------------------------------------------------------------------------


def _data(dataset: Any, y: Tensor | None, options: _Options, task: int | None, name: str) -> Data:
    """An Avalanche data set, its transform group chosen already, as the fastest kind of data that gives the same."""
    if len(dataset) == 0:
        raise StreamError(f"{name}: an experience is empty, every set needs at least one example.")
    y = _targets(dataset) if y is None else y
    sample = torch.linspace(0, len(dataset) - 1, min(len(dataset), 16)).long()
    expected = _stack([dataset[i] for i in sample.tolist()])
    reader = _checked_reader(dataset, sample, expected)
    if not options.cache:
        if reader is None:
            return _ItemData(_Items(dataset, options), y, options.workers, task)
        return _LazyData(reader, y, options, task)
    if reader is not None:
        parts = torch.arange(len(dataset)).split(4096)  # what a transform makes in between stays in the cache
        return TensorData(torch.cat([options.lay_out(reader(rows)) for rows in parts]), y, task=task)
    if not torch.equal(expected, _stack([dataset[i] for i in sample.tolist()])):
        raise StreamError(
            f"{name}: reading an example twice gives two different inputs, so a transform is random. Reading once "
            "would freeze it: set stream.cache=false, or take the transform out of the benchmark."
        )
    loader = DataLoader(dataset, batch_size=512, num_workers=options.workers, collate_fn=_stack)
    return TensorData(options.lay_out(torch.cat(list(loader))), y, task=task)


def _stack(items: Sequence[Sequence[Any]]) -> Tensor:
    """[B, ...] the inputs of examples (input, class, ...)."""
    inputs = [item[0] for item in items]
    if not all(isinstance(x, Tensor) for x in inputs):
        raise StreamError(
            f"Avalanche examples must be tensors, got {type(inputs[0]).__name__}: add "
            "torchvision.transforms.ToTensor to the benchmark's transforms."
        )
    shapes = {tuple(x.shape) for x in inputs}
    if len(shapes) > 1:
        raise StreamError(f"Avalanche examples must have one shape, got {sorted(shapes)}.")
    return torch.stack(inputs)


class _LazyData:
    """Reads whole batches through a reader."""

    def __init__(self, reader: Reader, y: Tensor, options: _Options, task: int | None) -> None:
        self.reader, self.y, self.options, self.task = reader, y, options, task

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor) -> Batch:
        task = None if self.task is None else torch.full((len(index),), self.task)
        return Batch(x=self.options.lay_out(self.reader(index)), y=self.y[index], task=task, index=index)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return map(self.batch, indices)

    def targets(self) -> Tensor | None:
        return self.y


class _Items(Dataset):
    """(input in the layout, class) of one example of an Avalanche data set."""

    def __init__(self, dataset: Any, options: _Options) -> None:
        self.dataset, self.options = dataset, options

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.dataset[index]
        return self.options.lay_out(_stack([item]))[0], int(item[1])


class _ItemData(WorkerData):
    """Reads example by example, but knows the classes."""

    def __init__(self, dataset: Dataset, y: Tensor, workers: int, task: int | None) -> None:
        super().__init__(dataset, workers, task)
        self.y = y

    def targets(self) -> Tensor | None:
        return self.y


# Reading at once what Avalanche reads one by one -----------------------------------------------------------------


class _Unknown(Exception):
    """A data set or transform that is not known to be readable at once."""


def _checked_reader(dataset: Any, sample: Tensor, expected: Tensor) -> Reader | None:
    """A reader of the data set if there is one and it gives what Avalanche gives for some examples, else None."""
    flat = dataset._flat_data
    try:
        reader = _Node(flat, flat._transform_groups.current_group)
        got = reader(sample)
    except _Unknown:
        return None
    same = got.shape == expected.shape and got.dtype == expected.dtype and torch.allclose(got, expected, atol=1e-6)
    return reader if same else None


class _Node:
    """Reads a node of Avalanche's tree of subsets, concatenations and transforms."""

    def __init__(self, node: Any, group: str) -> None:
        from avalanche.benchmarks.utils.data import _FlatDataWithTransform
        from avalanche.benchmarks.utils.flat_data import FlatData

        self.children: list[Reader] = [_Node(d, group) if isinstance(d, FlatData) else _leaf(d) for d in node._datasets]
        self.ends = torch.tensor(node._cumulative_sizes)
        self.rows = None if node._indices is None else torch.tensor([int(i) for i in node._indices])
        self.transforms: list[Reader] = []
        if isinstance(node, _FlatDataWithTransform):
            for groups in (node._frozen_transform_groups, node._transform_groups):
                self.transforms += _at_once(groups[group])

    def __call__(self, rows: Tensor) -> Tensor:
        rows = rows if self.rows is None else self.rows[rows]
        child = torch.bucketize(rows, self.ends, right=True)
        places, pieces = [], []
        for c in child.unique().tolist():
            here = (child == c).nonzero().squeeze(1)
            places.append(here)
            pieces.append(self.children[c](rows[here] - (int(self.ends[c - 1]) if c else 0)))
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)[torch.cat(places).argsort()]
        for transform in self.transforms:
            x = transform(x)
        return x


def _leaf(dataset: Any) -> Reader:
    """Reader of a data set in memory; images that would be PIL images come as uint8 [B, channels, H, W]."""
    from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST
    from torchvision import datasets

    if type(dataset) is TensorDataset:
        return dataset.tensors[0].__getitem__
    known = (TensorMNIST, datasets.MNIST, datasets.FashionMNIST, datasets.KMNIST, datasets.CIFAR10, datasets.CIFAR100)
    if type(dataset) not in known:
        raise _Unknown
    images = torch.as_tensor(dataset.data)
    images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
    steps = _at_once(dataset.transform)
    if type(dataset) is TensorMNIST:
        steps = [_to_floats, *steps]

    def read(rows: Tensor) -> Tensor:
        x = images[rows]
        for step in steps:
            x = step(x)
        return x

    return read


def _at_once(transform: Any) -> list[Reader]:
    """The steps of a transform of one example, as functions of a whole batch."""
    from avalanche.benchmarks.classic.cmnist import PixelsPermutation
    from avalanche.benchmarks.utils.transforms import MultiParamCompose, TupleTransform
    from torchvision import transforms
    from torchvision.transforms import functional

    if transform is None:
        return []
    kind = type(transform)
    if kind is TupleTransform:
        return _at_once(transform.transforms[0])
    if kind in (transforms.Compose, MultiParamCompose):
        return [step for t in transform.transforms for step in _at_once(t)]
    if kind is transforms.ToTensor:
        return [_to_floats]
    if kind is transforms.Normalize:
        return [_floats_only(transform)]
    if kind is PixelsPermutation:
        return [_floats_only(Permutation(torch.as_tensor(transform.permutation)))]
    if kind is transforms.RandomRotation and transform.degrees[0] == transform.degrees[1]:
        angle, fill = float(transform.degrees[0]), transform.fill
        turn = partial(
            functional.rotate,
            angle=angle,
            interpolation=transform.interpolation,
            expand=transform.expand,
            center=transform.center,
            fill=[float(fill)] if isinstance(fill, (int, float)) else list(fill),
        )
        return [_floats_only(turn)]
    raise _Unknown


def _to_floats(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise _Unknown
    return images.float().div_(255)


def _floats_only(step: Reader) -> Reader:
    """PIL images are transformed by other code than tensors: known steps are those of tensors."""

    def checked(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise _Unknown
        return step(x)

    return checked
