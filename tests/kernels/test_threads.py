"""Kernels on one thread and on several: the same jobs done, and the second form compiled only where it is wanted."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from numba import prange

from clplat.kernels.threads import kernel, threads_worth


def _count(first: int, to: np.ndarray) -> None:
    for job in prange(len(to)):
        to[job] += first + job


def test_the_form_for_several_threads_is_compiled_when_several_are_wanted() -> None:
    compiled, to = kernel()(_count), np.zeros(7, np.int64)  # type: ignore[arg-type]  # a plain function is a FunctionType
    compiled(1, 10, to)
    assert to.tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert len(compiled._serial.signatures) == 1
    assert len(compiled._parallel.signatures) == 0
    compiled(2, 10, to)
    assert to.tolist() == [20, 22, 24, 26, 28, 30, 32]
    assert len(compiled._parallel.signatures) == 1


def test_small_work_gets_one_thread_and_large_work_all_that_torch_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    most: int = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    for threads in (1, most, most + 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert [threads_worth(work, 100) for work in (0, 99, 100)] == [1, 1, min(threads, most)]
