"""Pre-norm transformer (Vaswani et al. 2017; Xiong et al. 2020) with rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.attention import Attention
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, check_sizes
from clplat.streams.inputs import Inputs

NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
"""Normalisations by name: RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016)."""


class TransformerBlock(Block):
    """x + mixer(norm(x)), then x + dense(norm(x)), dense being linear, GELU, linear; dropout on both branches.

    Args:
        mixer: maps [B, T, H] to [B, T, H].
        norm: makes a normalisation for width H.
        expansion: width of the dense branch in units of H; 0 for mixers that do without.
        dropout: the fraction of each branch's output set to zero in training.
    """

    def __init__(
        self, mixer: Mixer, norm: Callable[[int], nn.Module], expansion: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = mixer.width
        self.mixer = mixer
        self.norm_mixer = norm(width)
        self.norm_dense = norm(width) if expansion else None
        if expansion:
            self.expand, self.contract = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] and the mixer's state; arguments as for `Block.forward`.

        Raises:
            ValueError: the input has no time axis.
        """
        if hidden.ndim != 3:
            raise ValueError(f"A transformer block maps [B, T, H], got {list(hidden.shape)}: add the time axis.")
        mixed, state = self.mixer(self.norm_mixer(hidden), state, reset, lengths)
        hidden = hidden + self._drop(mixed)
        if self.norm_dense is None:
            return hidden, state
        dense = self.contract(F.gelu(self.expand(self.norm_dense(hidden))))
        return hidden + self._drop(dense), state

    def penalties(self) -> Mapping[str, Tensor]:
        """Those of the mixer."""
        return self.mixer.penalties()

    def _drop(self, branch: Tensor) -> Tensor:
        return branch if self.dropout is None else self.dropout(branch)


class NormBlock(Block):
    """A normalisation as a block of its own: the last one of a pre-norm transformer.

    Args:
        norm: maps [B, T, H] to the same shape.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The normalised sequence [B, T, H]; there is no state."""
        return self.norm(hidden), None


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
    readout: str = "last",
    base: float = 10_000.0,
) -> Net:
    """A transformer. Its blocks are `layers` transformer blocks and one final normalisation.

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
        readout: "last" or "mean", see `Net`; with `causal: false` "mean" is the better choice.
        base: of the rotary positions.

    Raises:
        ValueError: inputs without a time axis; a size below 1 (an expansion of 0 is none); dropout outside 0..1; an
            unknown norm or readout; hidden and heads that do not fit.
    """
    return residual(
        inputs,
        head,
        mixer=lambda width, hidden: Attention(width, hidden, heads, causal, base),
        hidden=hidden,
        layers=layers,
        expansion=expansion,
        dropout=dropout,
        norm=norm,
        readout=readout,
    )


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
    readout: str = "last",
) -> Net:
    """A transformer with another mixer in place of attention: pre-norm residual blocks, then one normalisation.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixer: makes a mixer from its input width and its output width, both H.
        hidden: H.
        layers: number of blocks.
        expansion: width of the dense branch in units of H; 0 for mixers that do without (Mamba, mLSTM).
        dropout: on the output of each branch of a block, in 0..1 without 1.
        norm: "layer", or "rms", which costs about a tenth more time on a CPU.
        readout: "last" or "mean", see `Net`.

    Raises:
        ValueError: inputs without a time axis; a size below 1 (an expansion of 0 is none); dropout outside 0..1; an
            unknown norm or readout.
    """
    inputs.need_time("A residual net")
    check_sizes(hidden=hidden, layers=layers)
    check_sizes(0, expansion=expansion)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, it must be at least 0 and less than 1.")
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, allowed are 'rms' and 'layer'.")
    if inputs.vocabulary is not None:
        embed: nn.Module = nn.Embedding(inputs.vocabulary, hidden)
    else:
        assert inputs.features is not None  # one of the two, by Inputs
        embed = nn.Linear(inputs.features, hidden)
    blocks: list[Block] = [
        TransformerBlock(mixer(hidden, hidden), NORMS[norm], expansion, dropout) for _ in range(layers)
    ]
    blocks.append(NormBlock(NORMS[norm](hidden)))
    return Net(embed, blocks, head(hidden), inputs.per_step, readout)
