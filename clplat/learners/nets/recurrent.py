"""Recurrent nets: layers of one mixer each, with dropout between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from clplat import checks
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, dropout_of, embedding_for
from clplat.streams.inputs import Inputs


class MixerBlock(Block):
    """A mixer and, after it, dropout.

    Args:
        mixer: maps [B, T, D] to [B, T, H].
        dropout: of its outputs; the recurrence itself never sees dropout. None for none.
    """

    def __init__(self, mixer: Mixer, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.mixer = mixer
        self.dropout = nn.Identity() if dropout is None else dropout

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if hidden.ndim != 3:
            # torch's fused kernels would read [B, D] as one sequence of B steps.
            raise ValueError(f"A block around a mixer maps [B, T, D], got {list(hidden.shape)}: add the time axis.")
        hidden, state = self.mixer(hidden, state, reset, lengths)
        return self.dropout(hidden), state

    def penalties(self) -> Mapping[str, Tensor]:
        return self.mixer.penalties()


def recurrent(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    mixer: Callable[[int, int], Mixer],
    hidden: int = 128,
    layers: int = 1,
    dropout: float = 0.0,
    pooling: str = "last",
    embedding: int | None = None,
) -> Net:
    """Net of recurrent layers. Float inputs enter the first layer as they are, tokens are embedded.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixer: makes a layer from its input width and its hidden width (`LSTM`, `GRU`, `Elman`, `Attention`, ...).
        hidden: H of every layer.
        layers: number of layers, each one block of the net.
        dropout: between layers, in 0..1 without 1 (Zaremba et al. 2014: never within the recurrence).
        pooling: "last" or "mean", see `Net`.
        embedding: width of the token embedding, None for `hidden`. Not read for float inputs.
    """
    inputs.need_time("A recurrent net")
    checks.net_size(hidden, layers)
    checks.at_least(1, embedding=embedding)
    checks.within(0, 1, below=True, dropout=dropout)
    if dropout and layers == 1:
        warnings.warn(f"dropout={dropout} acts between layers and does nothing with layers=1: set layers or dropout=0.")
    if inputs.features is None:
        width = hidden if embedding is None else embedding
        embed = embedding_for(inputs, width)
    else:
        width, embed = inputs.features, nn.Identity()
    blocks: list[Block] = []
    for layer in range(layers):
        made = mixer(width, hidden)
        blocks.append(MixerBlock(made, dropout_of(dropout if layer < layers - 1 else 0.0)))
        width = made.width
    return Net(embed, blocks, head(width), inputs.per_step, pooling)
