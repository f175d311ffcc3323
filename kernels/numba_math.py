"""Elementary functions for numba's kernels, in forms that LLVM turns into vector instructions; libm's are a call a number.

They are float32 polynomials; float64 takes libm's functions. Within compiled functions only: called from Python they
are those of the standard library.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from clplat.kernels.numba_cache import njit

FASTMATH = {"contract", "reassoc", "arcp", "nsz", "afn"}
"""Of kernels with states of any size: without `nnan` and `ninf`, by which -inf and NaN would mean nothing."""
_INNER: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy"}


@intrinsic
def _as_float32(typingctx: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), build


def exp(x: Any) -> Any:
    """exp(x); for float32 a polynomial, to 2e-7 relative: 0 below -87.3, inf above 88, and NaN stays NaN."""
    return math.exp(x)


@overload(exp, jit_options={"fastmath": {"contract"}, "forceinline": True})  # reassociation would join ln 2's two parts
def _exp(x: Any) -> Any:
    def exact(x: Any) -> Any:
        return math.exp(x)

    def polynomial(x: Any) -> Any:
        # exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; the first part of ln 2 has so few digits that n times it is exact.
        low, high = np.float32(-87.3), np.float32(88.0)
        y = low if x < low else x
        y = high if y > high else y
        n = np.int32(y * np.float32(1.44269504) + (np.float32(0.5) if y > np.float32(0) else np.float32(-0.5)))
        k = np.float32(n)
        r = (y - k * np.float32(0.693359375)) + k * np.float32(2.12194440e-4)
        p = np.float32(1 / 5040)
        p = p * r + np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1)
        p = p * r + np.float32(1)
        bits = np.int32((n + np.int32(127)) << np.int32(23))
        p = p * _as_float32(bits)  # pyright: ignore[reportCallIssue]  # numba adds the typing context
        p = np.float32(0) if x < low else p
        return np.float32(np.inf) if x > high else p

    return polynomial if x == types.float32 else exact


def expm1(x: Any) -> Any:
    """exp(x) - 1 for x <= 0 without cancellation; vectorises for float32."""
    return math.expm1(x)


@overload(expm1, jit_options={"fastmath": {"contract"}, "forceinline": True})
def _expm1(x: Any) -> Any:
    def exact(x: Any) -> Any:
        return math.expm1(x)

    def polynomial(x: Any) -> Any:
        p = np.float32(1 / 362880)
        p = p * x + np.float32(1 / 40320)
        p = p * x + np.float32(1 / 5040)
        p = p * x + np.float32(1 / 720)
        p = p * x + np.float32(1 / 120)
        p = p * x + np.float32(1 / 24)
        p = p * x + np.float32(1 / 6)
        p = p * x + np.float32(0.5)
        p = p * x + np.float32(1)
        return p * x if x > np.float32(-0.5) else exp(x) - np.float32(1)

    return polynomial if x == types.float32 else exact


def number(value: float, like: Any) -> Any:
    """A constant of another number's type; a Python one would turn float32 arithmetic into float64."""
    return value


@overload(number)
def _number(value: Any, like: Any) -> Any:
    def single(value: Any, like: Any) -> Any:
        return np.float32(value)

    def double(value: Any, like: Any) -> Any:
        return np.float64(value)

    return single if like == types.float32 else double


@njit(nogil=True, fastmath=FASTMATH, error_model="numpy", forceinline=True)
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)); small results keep their digits, so that 1 - sigmoid(x) is sigmoid(-x)."""
    one = number(1, x)
    e = exp(-abs(x))
    p = one / (one + e)
    return p if x >= number(0, x) else e * p


def tanh(x: Any) -> Any:
    """tanh(x); for float32 relatively exact for small x too."""
    return math.tanh(x)


@overload(tanh, jit_options=_INNER)  # pyright: ignore[reportArgumentType] a dict, as numba documents
def _tanh(x):
    if x != types.float32:
        return lambda x: np.tanh(x)

    def single(x):
        one, two = np.float32(1), np.float32(2)
        # A polynomial in x^2 (Cephes) where 1 - 2 / (exp(2 |x|) + 1) would cancel.
        a = abs(x)
        q = x * x
        p = np.float32(-5.70498872745e-3)
        p = p * q + np.float32(2.06390887954e-2)
        p = p * q + np.float32(-5.37397155531e-2)
        p = p * q + np.float32(1.33314422036e-1)
        p = p * q + np.float32(-3.33332819422e-1)
        small = x + x * q * p
        large = one - two / (exp(two * a) + one)
        return small if a < np.float32(0.625) else (large if x > np.float32(0) else -large)

    return single


def log1p(x: Any) -> Any:
    """log(1 + x) for 0 <= x <= 1."""
    return math.log1p(x)


@overload(log1p, jit_options=_INNER)  # pyright: ignore[reportArgumentType] a dict, as numba documents
def _log1p(x):
    if x != types.float32:
        return lambda x: np.log1p(x)

    def single(x):
        # 2 atanh(s) with s = x / (2 + x) <= 1/3, by its series.
        s = x / (np.float32(2) + x)
        q = s * s
        p = np.float32(1 / 15)
        p = p * q + np.float32(1 / 13)
        p = p * q + np.float32(1 / 11)
        p = p * q + np.float32(1 / 9)
        p = p * q + np.float32(1 / 7)
        p = p * q + np.float32(1 / 5)
        p = p * q + np.float32(1 / 3)
        return np.float32(2) * (s + s * q * p)

    return single
