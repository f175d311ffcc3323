"""Layouts of inputs: vectors, rows or single values a time step.

Letters: N examples, H image rows, W image columns, T time steps, D features.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from clplat import checks
from clplat.streams.batch import StreamError

Layout = Literal["pixels", "rows", "steps"]
"""How an example is given to the learner: one vector, one row a time step, or one pixel a time step."""


def lay_out(x: Tensor, layout: Layout) -> Tensor:
    """Examples as vectors or as sequences; pixels keep their order, row by row.

    Args:
        x: [N, H, W], [N, channels, H, W], [N, T, D] or [N, D].
        layout: "pixels" gives [N, all values]; "rows" gives [N, H, W] (channels side by side: [N, H, channels * W]);
            "steps" gives [N, H * W, 1] ([N, H * W, channels]), one pixel a time step.

    Raises:
        StreamError: inputs of another shape, or rows of vectors, which have none.
    """
    checks.one_of("layout", layout, get_args(Layout))
    if x.ndim not in (2, 3, 4):
        raise StreamError(f"layout: inputs must be [N, D], [N, T, D] or [N, channels, H, W], got {list(x.shape)}.")
    if layout == "pixels":
        return x.flatten(1)
    if layout == "steps":
        return x.flatten(2).transpose(1, 2).contiguous() if x.ndim == 4 else x.flatten(1).unsqueeze(-1)
    if x.ndim == 2:
        raise ValueError(
            f"layout: got 'rows', and vectors {list(x.shape)} have none; use layout=pixels or layout=steps."
        )
    return x.transpose(1, 2).flatten(2) if x.ndim == 4 else x
