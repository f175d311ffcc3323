"""Multi-layer perceptron: the whole input as one vector, the yardstick of most continual-learning papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, check_sizes
from clplat.streams.inputs import Inputs


class Flatten(nn.Module):
    """[B, T, D] or [B, D] to [B, T * D], token ids [B, T] through an embedding first.

    Args:
        width: T * D.
        embedding: of tokens, None for float inputs.
    """

    def __init__(self, width: int, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.width, self.embedding = width, embedding

    def forward(self, x: Tensor) -> Tensor:
        """[B, width].

        Raises:
            ValueError: a row has not `width` values.
        """
        flat = (x if self.embedding is None else self.embedding(x)).flatten(1)
        if flat.shape[1] != self.width:
            raise ValueError(
                f"This MLP was built for {self.width} values a row, got {flat.shape[1]} (inputs {list(x.shape)}): "
                "all sequences must have the length it was built for."
            )
        return flat


class DenseBlock(Block):
    """A linear layer, ReLU and dropout, [B, D] to [B, H].

    Args:
        features: D.
        hidden: H.
        dropout: the fraction of outputs set to zero in training.
    """

    def __init__(self, features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The layer's output [B, H]; there is no state.

        Raises:
            ValueError: given a reset or lengths, which a flattened sequence cannot respect.
        """
        if lengths is not None or reset is not None:
            raise ValueError(
                f"An MLP reads whole sequences of one length, got {'lengths' if reset is None else 'reset'}: "
                "use learner=lstm, gru, elman or transformer."
            )
        hidden = F.relu(self.linear(hidden))
        return (hidden if self.dropout is None else self.dropout(hidden)), None


def mlp(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    hidden: Sequence[int] = (400, 400),
    dropout: float = 0.0,
    embedding: int = 32,
    init: Literal["torch", "xavier"] = "torch",
) -> Net:
    """An MLP on the flattened input.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        hidden: H of each layer, in order; each layer is one block of the net. Empty: the head on the raw input.
        dropout: after every layer, in 0..1 without 1.
        embedding: width of the token embedding. Not read for float inputs.
        init: "torch" for torch's own of linear layers, or "xavier": uniform (Glorot & Bengio 2010) with zero biases,
            as in the DER paper's experiments (Buzzega et al. 2020).

    Raises:
        ValueError: a target at every step; sequences of different lengths; a size below 1; dropout outside 0..1; another init.
    """
    if init not in ("torch", "xavier"):
        raise ValueError(f"init: got {init!r}, allowed are 'torch' and 'xavier'.")
    if inputs.per_step:
        raise ValueError(
            "An MLP gives one answer a sequence, and this stream has a target at every step: "
            "use learner=lstm, gru, elman or transformer."
        )
    if inputs.length is None:
        raise ValueError(
            "An MLP needs sequences of one length, and this stream's lengths differ: "
            "use learner=lstm, gru, elman or transformer."
        )
    check_sizes(**{f"hidden[{i}]": size for i, size in enumerate(hidden)}, embedding=embedding)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, it must be at least 0 and less than 1.")
    if inputs.vocabulary is not None:
        embed = nn.Embedding(inputs.vocabulary, embedding)
        flatten = Flatten(inputs.length * embedding, embed)
    else:
        assert inputs.features is not None  # one of the two, by Inputs
        flatten = Flatten(max(inputs.length, 1) * inputs.features)
    blocks: list[Block] = []
    width = flatten.width
    for size in hidden:
        blocks.append(DenseBlock(width, size, dropout))
        width = size
    net = Net(flatten, blocks, head(width))
    if init == "xavier":
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    return net
