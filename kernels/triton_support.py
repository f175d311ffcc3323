"""What the Triton kernels share: functions that Triton lacks, and how a kernel is listed for compilation without a GPU.

Kernels use plain pointer arithmetic (block pointers are gone in Triton 3.9), float32 arithmetic right after every
load, runtime lengths and batches, and no autotuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from clplat.kernels.backend import interpreting


@triton.jit
def tanh(x):
    """tanh, which `tl` lacks; no overflow at any x."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of `tl.dot` for tensors of a dtype; the interpreter's products of bf16 are wrong."""
    if interpreting():
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


@dataclass(frozen=True)
class Compilation:
    """One kernel with one choice of constants, to be compiled ahead of time for a GPU that is not there.

    Attributes:
        kernel: a `triton.jit` function.
        pointers: name of each pointer argument -> "*fp32", "*bf16", ...
        constants: name of each `tl.constexpr` argument -> its value. All other arguments are 32-bit integers.
        warps: as launched.
        stages: as launched.
        vector: whether global loads have to be vectorised (128 bits of aligned inputs).
        scalars: name of each scalar argument that is not "i32" -> its type, such as "fp32".
        aligned_only: whether the launcher guarantees pointers and widths that are multiples of 16, by copies where they
            are not, so that there is no other variant to compile.
    """

    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1
    vector: bool = True
    scalars: Mapping[str, str] = field(default_factory=dict)
    aligned_only: bool = False

    @property
    def name(self) -> str:
        """The kernel's name and its constants."""
        return f"{self.kernel.__name__}({', '.join(f'{k}={v}' for k, v in self.constants.items())})"
