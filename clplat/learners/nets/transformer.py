"""Pre-norm transformer (Vaswani et al. 2017; Xiong et al. 2020) with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from clplat.learners.mixers.attention import Attention
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Net
from clplat.learners.nets.residual import residual
from clplat.streams.inputs import Inputs


def transformer(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    expansion: int = 4,
    causal: bool = True,
    dropout: float = 0.0,
    norm: str = "layer",
    pooling: str = "last",
    base: float = 10_000.0,
) -> Net:
    """Transformer: residual blocks of attention and a dense branch, then one normalisation.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        hidden: H.
        layers: number of transformer blocks.
        heads: attention heads; `hidden` must be a multiple of 2 * heads.
        expansion: width of the dense branch in units of H; 0: there is none.
        causal: False lets every step see the whole sequence. Never for streams that predict the next token.
        dropout: on the output of both branches of a block, in 0..1 without 1; attention weights see none.
        norm: "layer", or "rms", which costs about a tenth more time on a CPU.
        pooling: "last" or "mean", see `Net`; with `causal: false` "mean" is the better choice.
        base: of the rotary positions.
    """
    return residual(
        inputs,
        head,
        mixer=partial(Attention, heads=heads, causal=causal, base=base),
        hidden=hidden,
        layers=layers,
        expansion=expansion,
        dropout=dropout,
        norm=norm,
        pooling=pooling,
    )
