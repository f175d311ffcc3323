"""Multi-layer perceptron: the whole input as one vector, the yardstick of most continual-learning papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State, dropout_of
from clplat.streams.inputs import Inputs


class Flatten(nn.Module):
    """Inputs [B, T, D] or [B, D] as [B, T * D]; token ids [B, T] go through an embedding first.

    Args:
        width: T * D.
        embedding: of tokens, None for float inputs.
    """

    def __init__(self, width: int, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.width, self.embedding = width, embedding

    def forward(self, x: Tensor) -> Tensor:
        """Flat inputs [B, width]; rows with another number of values are refused."""
        flat = (x if self.embedding is None else self.embedding(x)).flatten(1)
        if flat.shape[1] != self.width:
            raise ValueError(
                f"This MLP was built for {self.width} values a row, got {flat.shape[1]} (inputs {list(x.shape)}): "
                "all sequences must have the length it was built for."
            )
        return flat


class DenseBlock(Block):
    """A linear layer, ReLU and dropout, [B, D] to [B, H]; it refuses lengths and resets.

    Args:
        features: D.
        hidden: H.
        dropout: the fraction of outputs set to zero in training.
    """

    def __init__(self, features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, hidden)
        self.dropout = dropout_of(dropout)

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if lengths is not None or reset is not None:
            raise ValueError(
                f"An MLP reads whole sequences of one length, got {'lengths' if reset is None else 'reset'}: "
                "use learner=lstm, gru, elman or transformer."
            )
        return self.dropout(F.relu(self.linear(hidden))), None


def mlp(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    hidden: Sequence[int] = (400, 400),
    dropout: float = 0.0,
    embedding: int = 32,
    init: Literal["torch", "xavier"] = "torch",
) -> Net:
    """Multi-layer perceptron on the flattened input.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        hidden: H of each layer, in order; each layer is one block of the net. Empty: the head on the raw input.
        dropout: after every layer, in 0..1 without 1.
        embedding: width of the token embedding. Not read for float inputs.
        init: "torch" for torch's own of linear layers, or "xavier": uniform (Glorot & Bengio 2010) with zero biases,
            as in the DER paper's experiments (Buzzega et al. 2020).
    """
    checks.one_of("init", init, ("torch", "xavier"))
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
    checks.at_least(1, **{f"hidden[{i}]": size for i, size in enumerate(hidden)}, embedding=embedding)
    checks.within(0, 1, below=True, dropout=dropout)
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
