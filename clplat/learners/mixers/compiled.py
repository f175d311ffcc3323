"""Where the compiled CPU recurrences take the place of torch's."""

from __future__ import annotations

from torch import Tensor, nn

from clplat.kernels import backend


def compiled(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` is in training, on the CPU, and numba is there to compile `clplat.kernels.cells`."""
    return module.training and x.device.type == "cpu" and backend.HAS_NUMBA
