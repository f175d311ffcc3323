"""The elementary functions of compiled kernels against numpy's in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from clplat.kernels.numba_math import FASTMATH, exp, expm1, log1p, sigmoid, tanh

SMALL = np.geomspace(1e-20, 1, 20_001)
SIGNED = np.concatenate([-SMALL, SMALL, np.linspace(-30, 30, 50_001)])
RANGES = {
    "exp": (exp, np.exp, np.linspace(-87, 88, 200_001)),
    "expm1": (expm1, np.expm1, np.concatenate([-SMALL, np.linspace(-87, -1e-6, 200_001)])),
    "tanh": (tanh, np.tanh, SIGNED),
    "log1p": (log1p, np.log1p, SMALL),
    "sigmoid": (sigmoid, lambda x: 1 / (1 + np.exp(-x)), np.linspace(-80, 80, 100_001)),
}


def applied(function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """In a loop as kernels have them."""

    @njit(fastmath=FASTMATH, error_model="numpy")
    def all_of(x, y):
        for i in range(len(x)):
            y[i] = function(x[i])

    y = np.empty_like(x)
    all_of(x, y)
    return y


@pytest.mark.parametrize(("kind", "tolerance"), [(np.float32, 3e-7), (np.float64, 1e-15)])
@pytest.mark.parametrize("name", RANGES)
def test_it_is_exact_to_the_last_digits(name: str, kind: type, tolerance: float) -> None:
    function, expected, x = RANGES[name]
    x = x.astype(kind)
    wide = expected(x.astype(np.float64))
    assert np.abs(applied(function, x) / wide - 1).max() < tolerance


def test_the_exponential_ends_at_0_and_infinity() -> None:
    edges = np.array([-np.inf, -1e30, -88, 0, 89, 1e30, np.inf, np.nan], np.float32)
    expected = np.array([0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(applied(exp, edges), expected)


def test_a_saturated_sigmoid_is_0_or_1_and_nan_stays() -> None:
    edges = np.array([-np.inf, -1e30, 1e30, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(applied(sigmoid, edges), np.array([0, 0, 1, 1, np.nan], np.float32))
