"""Whole batches at once of what Avalanche reads one by one, where data set and transforms are known.

What is read so is compared with what Avalanche itself gives for some examples. Only this file imports avalanche, inside
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from clplat.streams.permuted import Permutation

Reader = Callable[[Tensor], Tensor]
"""Reads the inputs of the examples `rows` [B] at once, transforms applied."""


class _Unknown(Exception):
    """A data set or transform that is not known to be readable at once."""


def checked_reader(dataset: Any, sample: Tensor, expected: Tensor) -> Reader | None:
    """A reader of the data set if there is one and it gives what Avalanche gives for some examples, else None."""
    flat = dataset._flat_data
    try:
        reader = _Node(flat, flat._transform_groups.current_group)
        got = reader(sample)
    except _Unknown:
        return None
    same = (
        got.shape == expected.shape
        and got.dtype == expected.dtype
        and torch.allclose(got, expected, atol=1e-6, equal_nan=True)
    )
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
