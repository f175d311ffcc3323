"""Recurrent layers in half precision on CPUs whose oneDNN has no such kernel; such a CPU is asked for by environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clplat.learners.mixers.elman import Elman
from clplat.learners.mixers.gru import GRU
from clplat.learners.mixers.lstm import LSTM, fused_lstm

KINDS = {"lstm": LSTM, "gru": GRU, "elman": Elman}
PROGRAM = """
import torch
from test_reduced_precision import KINDS, torch_can, trained
for dtype in (torch.bfloat16, torch.float16):
    if torch_can(dtype):
        raise SystemExit("the kernel is there whatever is asked for")
    for kind in KINDS:
        for how in ("autocast", "weights"):
            for exact, found in zip(trained(kind, None, how), trained(kind, dtype, how), strict=True):
                torch.testing.assert_close(found.double(), exact.double(), rtol=0.05, atol=0.05, msg=f"{kind} {how}")
print("done")
"""


def trained(kind: str, dtype: torch.dtype | None, how: str) -> list[torch.Tensor]:
    """Outputs in training and in evaluation, the state, and gradients, with `dtype` in autocast or of all numbers."""
    torch.manual_seed(0)
    mixer, x = KINDS[kind](5, 7), torch.randn(3, 6, 5)
    if dtype is not None and how == "weights":
        mixer, x = mixer.to(dtype), x.to(dtype)
    x.requires_grad_()
    cast = torch.autocast("cpu", dtype=dtype) if dtype and how == "autocast" else contextlib.nullcontext()
    with cast:
        y, state = mixer(x)
        again, state = mixer(x, state)
        assert state is not None
        (y.float().sum() + again.float().square().sum()).backward()
        with torch.no_grad():
            still, _ = mixer.eval()(x)
    gradients = [p.grad for p in (x, *mixer.parameters())]
    return [y, again, *state, still, *(g for g in gradients if g is not None)]


def torch_can(dtype: torch.dtype) -> bool:
    """Whether torch's own LSTM trains in `dtype` under autocast here."""
    lstm = torch.nn.LSTM(1, 1)
    try:
        with torch.autocast("cpu", dtype=dtype):
            lstm(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


@pytest.mark.slow  # a process of its own that compiles
def test_recurrent_layers_train_in_half_precision_on_a_cpu_without_its_instructions() -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    if "the kernel is there" in done.stderr:
        pytest.skip("ONEDNN_MAX_CPU_ISA does not take the kernel away on this processor")
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(not torch_can(torch.bfloat16), reason="oneDNN has no LSTM in bf16 on this processor")
def test_the_lstm_is_torchs_own_to_the_bit_where_that_runs() -> None:
    torch.manual_seed(0)
    lstm, x = torch.nn.LSTM(5, 7, batch_first=True), torch.randn(3, 6, 5)
    h, c = torch.randn(3, 7), torch.randn(3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (last_h, last_c) = lstm(x, (h[None], c[None]))
        found = fused_lstm(x, h, c, lstm.all_weights[0])
    for a, b in zip((y, last_h[0], last_c[0]), found, strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a, b)
