"""Pre-norm residual nets: a mixer and a dense branch in every block (Vaswani et al. 2017; Xiong et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, dropout_of, embedding_for
from clplat.learners.nets.recurrent import MixerBlock
from clplat.streams.inputs import Inputs

NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
"""Normalisations by name: RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016)."""


class Dense(nn.Module):
    """Dense branch W_2 gelu(W_1 x), [B, T, H] to itself.

    Args:
        width: H.
        expansion: inner width in units of H.
    """

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, T, H]."""
        return self.contract(F.gelu(self.expand(x)))


class GatedDense(nn.Module):
    """Dense branch W_3( activation(W_1 x) * W_2 x ), [B, T, H] to itself: GeGLU, SwiGLU (Shazeer 2020, arXiv 2002.05202).

    Args:
        width: H.
        expansion: inner width in units of H.
        activation: of the gate.
    """

    def __init__(self, width: int, expansion: int = 3, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * expansion * width)  # gate, value
        self.contract = nn.Linear(expansion * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, T, H]."""
        gate, value = self.expand(x).chunk(2, -1)
        return self.contract(self.activation(gate) * value)


class ResidualBlock(MixerBlock):
    """x + mixer(norm(x)), then x + dense(norm(x)); dropout on both branches.

    Args:
        mixer: maps [B, T, H] to [B, T, H].
        norm: makes a normalisation for width H.
        dense: maps [B, T, H] to [B, T, H], step by step; None for mixers that do without.
        dropout: of each branch's output, None for none.
    """

    def __init__(
        self,
        mixer: Mixer,
        norm: Callable[[int], nn.Module],
        dense: nn.Module | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__(mixer, dropout)
        self.norm_mixer = norm(mixer.width)
        self.norm_dense = None if dense is None else norm(mixer.width)
        self.dense = dense

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        mixed, state = super().forward(self.norm_mixer(hidden), state, reset, lengths)
        hidden = hidden + mixed
        if self.dense is None or self.norm_dense is None:
            return hidden, state
        return hidden + self.dropout(self.dense(self.norm_dense(hidden))), state


class NormBlock(Block):
    """Normalisation as a block of its own: the last one of a pre-norm net.

    Args:
        norm: maps [B, T, H] to the same shape.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return self.norm(hidden), None


def stacked(
    inputs: Inputs,
    head: Callable[[int], Head],
    mixers: Sequence[Callable[[int, int], Mixer]],
    dense: Callable[[int], nn.Module] | None,
    hidden: int,
    dropout: float,
    norm: str,
    pooling: str,
) -> Net:
    """Residual blocks of one mixer each, then one normalisation; all residual nets are made here.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixers: one a block; each makes a mixer from its input width and its output width, both H.
        dense: makes a dense branch for width H, None for none.
        hidden: H.
        dropout: on the output of each branch of a block, in 0..1 without 1.
        norm: "layer" or "rms".
        pooling: "last" or "mean", see `Net`.
    """
    checks.within(0, 1, below=True, dropout=dropout)
    checks.one_of("norm", norm, tuple(NORMS))
    embed, make_norm = embedding_for(inputs, hidden), NORMS[norm]
    blocks: list[Block] = [
        ResidualBlock(mixer(hidden, hidden), make_norm, None if dense is None else dense(hidden), dropout_of(dropout))
        for mixer in mixers
    ]
    return Net(embed, [*blocks, NormBlock(make_norm(hidden))], head(hidden), inputs.per_step, pooling)


def residual(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    mixer: Callable[[int, int], Mixer],
    hidden: int = 128,
    layers: int = 2,
    expansion: int = 4,
    dropout: float = 0.0,
    norm: str = "layer",
    pooling: str = "last",
) -> Net:
    """Transformer with any mixer in place of attention.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixer: makes a mixer from its input width and its output width, both H.
        hidden: H.
        layers: number of blocks.
        expansion: width of the dense branch in units of H; 0 for mixers that do without (Mamba, mLSTM).
        dropout: on the output of each branch of a block, in 0..1 without 1.
        norm: "layer", or "rms", which costs about a tenth more time on a CPU.
        pooling: "last" or "mean", see `Net`.
    """
    inputs.need_time("A residual net")
    checks.net_size(hidden, layers)
    checks.at_least(0, expansion=expansion)
    dense = partial(Dense, expansion=expansion) if expansion else None
    return stacked(inputs, head, [mixer] * layers, dense, hidden, dropout, norm, pooling)
