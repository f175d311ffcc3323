"""Residual nets with a gated dense branch, of one mixer or of several in turn: Griffin, Hawk, HGRN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.mixers.hgrn import HGRN, LowerBounds
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Net
from clplat.learners.nets.residual import GatedDense, stacked
from clplat.streams.inputs import Inputs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
"""Activations of the gate by name: the dense branch is GeGLU or SwiGLU."""


def gated(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    mixers: Sequence[Callable[[int, int], Mixer]],
    hidden: int = 128,
    layers: int = 3,
    expansion: int = 3,
    activation: str = "gelu",
    dropout: float = 0.0,
    norm: str = "rms",
    pooling: str = "last",
) -> Net:
    """Residual net with gated dense branches; the mixers are taken in turn, and again from the first.

    Griffin (De et al. 2024, arXiv 2402.19427, sections 2 and 3) is two of `RGLRU` and one of `LocalAttention`, with
    RMSNorm, an expansion of 3 and a gate of GeLU. Biases and the initialisation of the dense branch are those of
    `nn.Linear`; embeddings are not scaled.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixers: each makes a mixer from its input width and its output width, both H. Layer k has number k modulo their
            number.
        hidden: H.
        layers: number of blocks.
        expansion: width of the dense branch in units of H.
        activation: of its gate, "gelu" or "silu".
        dropout: on the output of each branch of a block, in 0..1 without 1.
        norm: "layer", or "rms", which costs about a tenth more time on a CPU.
        pooling: "last" or "mean", see `Net`.
    """
    inputs.need_time("A gated net")
    checks.net_size(hidden, layers)
    checks.at_least(1, expansion=expansion)
    checks.one_of("activation", activation, tuple(ACTIVATIONS))
    if not mixers:
        raise ValueError("mixers: got none, a gated net needs at least 1.")
    dense = partial(GatedDense, expansion=expansion, activation=ACTIVATIONS[activation])
    in_turn = [mixers[k % len(mixers)] for k in range(layers)]
    return stacked(inputs, head, in_turn, dense, hidden, dropout, norm, pooling)


def hgrn(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    hidden: int = 128,
    layers: int = 2,
    phase: bool = True,
    expansion: int = 2,
    dropout: float = 0.0,
    norm: str = "layer",
    pooling: str = "last",
) -> Net:
    """HGRN (Qin et al. 2023, arXiv 2311.04823): a gated net whose forget gates share one matrix of lower bounds.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        hidden: H.
        layers: number of blocks; the bound of the first is 0.
        phase: False keeps the recurrence real, see `HGRN`.
        expansion: width of the dense branch in units of H.
        dropout: on the output of each branch of a block, in 0..1 without 1.
        norm: "layer", or "rms", which costs about a tenth more time on a CPU.
        pooling: "last" or "mean", see `Net`.
    """
    checks.net_size(hidden, layers)
    bounds = LowerBounds(layers, hidden)
    return gated(
        inputs,
        head,
        mixers=[partial(HGRN, bounds=bounds, layer=k, phase=phase) for k in range(layers)],
        hidden=hidden,
        layers=layers,
        expansion=expansion,
        activation="silu",
        dropout=dropout,
        norm=norm,
        pooling=pooling,
    )
