"""exp for numba's kernels, in a form that LLVM turns into vector instructions; numba's own is a call a number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

FASTMATH = {"contract", "reassoc", "arcp", "nsz", "afn"}
"""Of numba's kernels with states of any size: without `nnan` and `ninf`, by which -inf and NaN would mean nothing."""


@njit(fastmath=FASTMATH)
def _exp_single(x):
    # exp(x) = 2^n exp(r) with |r| <= log(2) / 2. Below the smallest normal number it is 0, above 88 inf.
    bounded = np.float32(min(max(x, np.float32(-88.0)), np.float32(88.0)))
    n = np.float32(np.floor(bounded * np.float32(1.44269504) + np.float32(0.5)))
    # log(2) in two parts, the first with so few digits that its product with n is exact.
    r = bounded - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    y = p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    if x > np.float32(88.0):
        y = np.float32(np.inf)
    # NaN stays NaN.
    return y if x >= np.float32(-87.3) else (np.float32(0.0) if x < np.float32(-87.3) else x)


def exp(x: Any) -> Any:
    """exp(x) within numba's kernels: single precision to 2e-7 relative, 0 below -87.3,
    inf above 88; double precision is libm's."""
    raise NotImplementedError("only within functions compiled by numba")


@overload(exp)
def _exp(x):
    if x == types.float32:
        return lambda x: _exp_single(x)
    return lambda x: math.exp(x)
