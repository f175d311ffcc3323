"""Pre-norm residual nets with a gated dense branch, of one mixer or of several in turn: Griffin, HGRN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.mixers.hgrn import HGRN, LowerBounds
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, check_sizes
from clplat.learners.nets.transformer import NORMS, NormBlock
from clplat.streams.inputs import Inputs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
"""Of the gate, by name: with them the dense branch is GeGLU or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""


class GatedBlock(Block):
    """x + mixer(norm(x)), then x + W_3( activation(W_1 n) * W_2 n ) with n = norm(x); dropout on both branches.

    Args:
        mixer: maps [B, T, H] to [B, T, H].
        norm: makes a normalisation for width H.
        expansion: width of the dense branch in units of H.
        activation: of the gate.
        dropout: the fraction of each branch's output set to zero in training.
    """

    def __init__(
        self,
        mixer: Mixer,
        norm: Callable[[int], nn.Module],
        expansion: int = 3,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = mixer.width
        self.mixer = mixer
        self.norm_mixer, self.norm_dense = norm(width), norm(width)
        self.expand = nn.Linear(width, 2 * expansion * width)  # gate, value
        self.contract = nn.Linear(expansion * width, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs [B, T, H] and the mixer's state; arguments as for `Block.forward`.

        Raises:
            ValueError: the input has no time axis.
        """
        if hidden.ndim != 3:
            raise ValueError(f"A gated block maps [B, T, H], got {list(hidden.shape)}: add the time axis.")
        mixed, state = self.mixer(self.norm_mixer(hidden), state, reset, lengths)
        hidden = hidden + self._drop(mixed)
        gate, value = self.expand(self.norm_dense(hidden)).chunk(2, -1)
        return hidden + self._drop(self.contract(self.activation(gate) * value)), state

    def penalties(self) -> Mapping[str, Tensor]:
        """Those of the mixer."""
        return self.mixer.penalties()

    def _drop(self, branch: Tensor) -> Tensor:
        return branch if self.dropout is None else self.dropout(branch)


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
    readout: str = "last",
) -> Net:
    """Gated blocks, then one normalisation; the mixers are taken in turn, and again from the first.

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
        readout: "last" or "mean", see `Net`.

    Raises:
        ValueError: inputs without a time axis; no mixer; a size below 1; dropout outside 0..1; an unknown
            activation, norm or readout.
    """
    inputs.need_time("A gated net")
    if not mixers:
        raise ValueError("learner.net.mixers: got none, a gated net needs at least 1.")
    check_sizes(hidden=hidden, layers=layers, expansion=expansion)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, it must be at least 0 and less than 1.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, allowed are 'gelu' and 'silu'.")
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, allowed are 'rms' and 'layer'.")
    if inputs.vocabulary is not None:
        embed: nn.Module = nn.Embedding(inputs.vocabulary, hidden)
    else:
        assert inputs.features is not None  # one of the two, by Inputs
        embed = nn.Linear(inputs.features, hidden)
    blocks: list[Block] = [
        GatedBlock(mixers[k % len(mixers)](hidden, hidden), NORMS[norm], expansion, ACTIVATIONS[activation], dropout)
        for k in range(layers)
    ]
    blocks.append(NormBlock(NORMS[norm](hidden)))
    return Net(embed, blocks, head(hidden), inputs.per_step, readout)


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
    readout: str = "last",
) -> Net:
    """HGRN (Qin et al. 2023, arXiv 2311.04823): gated blocks whose forget gates share one matrix of lower bounds.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        hidden: H.
        layers: number of blocks; the bound of the first is 0.
        phase: False keeps the recurrence real, see `HGRN`.
        expansion: width of the dense branch in units of H.
        dropout: on the output of each branch of a block, in 0..1 without 1.
        norm: "layer", or "rms", which costs about a tenth more time on a CPU.
        readout: "last" or "mean", see `Net`.

    Raises:
        ValueError: see `gated`.
    """
    check_sizes(hidden=hidden, layers=layers)
    bounds = LowerBounds(layers, hidden)

    def layer(k: int) -> Callable[[int, int], Mixer]:
        return lambda features, width: HGRN(features, width, bounds, k, phase)

    return gated(
        inputs,
        head,
        mixers=[layer(k) for k in range(layers)],
        hidden=hidden,
        layers=layers,
        expansion=expansion,
        activation="silu",
        dropout=dropout,
        norm=norm,
        readout=readout,
    )
