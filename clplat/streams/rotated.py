"""Rotated images: the same examples in every experience, turned by another angle (Lopez-Paz & Ranzato, 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.streams.examples import FixedTransform
from clplat.streams.experience import Stream, StreamError
from clplat.streams.labelled import Labelled, Layout, hold_out, make_experience, make_stream, scenario_of


@dataclass(frozen=True)
class Rotation(FixedTransform):
    """Turns the images of a batch about their centre: [B, ...] -> [B, ...], in any layout of one channel.

    Attributes:
        places: [H * W, 4] the four pixels that each new pixel lies between.
        weights: [H * W, 4] their bilinear weights; 0 for pixels outside the image.
    """

    places: Tensor
    weights: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The batch x with each image turned."""
        # A weighted sum of rows of the transposed batch: 4 times faster than four gathers of columns.
        pixels = x.flatten(1).t().contiguous()
        turned = F.embedding_bag(self.places, pixels, mode="sum", per_sample_weights=self.weights.to(x.dtype))
        return turned.t().contiguous().view_as(x)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.places, self.weights)


def rotation(height: int, width: int, angle: float) -> Rotation:
    """The rotation by `angle` degrees, counter-clockwise, with bilinear interpolation and zeros outside."""
    radians = math.radians(angle)
    cos, sin = math.cos(radians), math.sin(radians)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - middle_y,
        torch.arange(width, dtype=torch.float64) - middle_x,
        indexing="ij",
    )
    from_y, from_x = (cos * y + sin * x + middle_y).flatten(), (cos * x - sin * y + middle_x).flatten()
    places, weights = [], []
    for step_y in (0, 1):
        for step_x in (0, 1):
            corner_y, corner_x = from_y.floor() + step_y, from_x.floor() + step_x
            weight = (1 - (from_y - corner_y).abs()) * (1 - (from_x - corner_x).abs())
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            place = corner_y.clamp(0, height - 1) * width + corner_x.clamp(0, width - 1)
            places.append(place.long())
            weights.append((weight * inside).float())
    return Rotation(torch.stack(places, 1), torch.stack(weights, 1))


def rotated(
    source: Labelled,
    angles: Sequence[float] = (0, 45, 90, 135, 180),
    task_incremental: bool = False,
    layout: Layout = "rows",
    valid_fraction: float = 0.0,
    data_seed: int = 0,
) -> Stream:
    """A data set of images turned by one angle an experience, batch by batch.

    Args:
        source: images [N, H, W].
        angles: degrees, counter-clockwise, one an experience.
        task_incremental: tell the learner which experience an example is from.
        layout: of the inputs (see `lay_out`), after the rotation.
        valid_fraction: share of every class's training examples to hold out, 0..1.
        data_seed: of that choice.

    Raises:
        ValueError: no angle.
        StreamError: a source without images.
    """
    if len(angles) == 0:
        raise ValueError("angles: got none; give one angle in degrees for each experience.")
    if source.train_x.ndim != 3:
        raise StreamError(f"Only images [N, H, W] can be rotated, {source.name} has {list(source.train_x.shape)}.")
    source.need_one_length("a rotation")
    height, width = source.train_x.shape[1:]
    laid = source.laid_out(layout)
    train, valid = hold_out(source.train_y, valid_fraction, data_seed)
    test = torch.arange(len(source.test_y))
    parts = []
    for index, angle in enumerate(angles):
        transform = None if angle % 360 == 0 else rotation(height, width, float(angle))
        task = index if task_incremental else None
        name = f"{source.name} {angle:g} degrees"
        parts.append(make_experience(laid, index, name, train, valid, test, transform, task))
    return make_stream(f"rotated_{source.name}", parts, scenario_of(task_incremental, "domain_incremental"), laid)
