"""Recurrent nets: layers of one mixer each, with dropout between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, check_sizes
from clplat.streams.inputs import Inputs


class RecurrentBlock(Block):
    """A mixer and, after it, dropout.

    Args:
        mixer: maps [B, T, D] to [B, T, H].
        dropout: the fraction of its outputs set to zero in training; the recurrence itself never sees dropout.
    """

    def __init__(self, mixer: Mixer, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The mixer's outputs [B, T, H] and its state; arguments as for `Block.forward`.

        Raises:
            ValueError: the input has no time axis.
        """
        if hidden.ndim != 3:
            # torch's fused kernels would read [B, D] as one sequence of B steps.
            raise ValueError(f"A recurrent block maps [B, T, D], got {list(hidden.shape)}: add the time axis.")
        hidden, state = self.mixer(hidden, state, reset, lengths)
        return (hidden if self.dropout is None else self.dropout(hidden)), state

    def penalties(self) -> Mapping[str, Tensor]:
        """Those of the mixer."""
        return self.mixer.penalties()


def recurrent(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    mixer: Callable[[int, int], Mixer],
    hidden: int = 128,
    layers: int = 1,
    dropout: float = 0.0,
    readout: str = "last",
    embedding: int | None = None,
) -> Net:
    """A net of recurrent layers. Float inputs enter the first layer as they are, tokens are embedded.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixer: makes a layer from its input width and its hidden width (`LSTM`, `GRU`, `Elman`, `Attention`, ...).
        hidden: H of every layer.
        layers: number of layers, each one block of the net.
        dropout: between layers, in 0..1 without 1 (Zaremba et al. 2014: never within the recurrence).
        readout: "last" or "mean", see `Net`.
        embedding: width of the token embedding, None for `hidden`. Not read for float inputs.

    Raises:
        ValueError: inputs without a time axis; a size below 1; dropout outside 0..1; an unknown readout.
    """
    inputs.need_time("A recurrent net")
    check_sizes(hidden=hidden, layers=layers, embedding=embedding)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, it must be at least 0 and less than 1.")
    if dropout and layers == 1:
        warnings.warn(f"dropout={dropout} acts between layers and does nothing with layers=1: set layers or dropout=0.")
    embed, width = nn.Identity(), inputs.features
    if width is None:
        assert inputs.vocabulary is not None  # one of the two, by Inputs
        width = hidden if embedding is None else embedding
        embed = nn.Embedding(inputs.vocabulary, width)
    blocks: list[Block] = []
    for layer in range(layers):
        made = mixer(width, hidden)
        blocks.append(RecurrentBlock(made, dropout if layer < layers - 1 else 0.0))
        width = made.width
    return Net(embed, blocks, head(width), inputs.per_step, readout)
