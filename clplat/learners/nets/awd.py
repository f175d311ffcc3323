"""Net of the AWD-LSTM (Merity, Keskar & Socher 2018, arXiv 1708.02182): recurrent layers with every kind of dropout.

Letters: B batch, T time, D input features, E embedding width, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clplat import checks
from clplat.learners.mixers.dropout import DroppedEmbedding, LockedDropout
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, Output, State
from clplat.learners.nets.recurrent import MixerBlock
from clplat.streams.experience import Batch
from clplat.streams.inputs import Inputs


def awd(
    inputs: Inputs,
    head: Callable[[int], Head],
    *,
    mixer: Callable[[int, int], Mixer],
    hidden: int = 1150,
    layers: int = 3,
    embedding: int = 400,
    embedding_dropout: float = 0.1,
    input_dropout: float = 0.4,
    dropout: float = 0.3,
    output_dropout: float = 0.4,
    activation: float = 2.0,
    temporal_activation: float = 1.0,
    tied: bool = False,
    pooling: str = "last",
) -> Net:
    """Net of the AWD-LSTM; its other parts are `weight_drop` of the mixer and the optimiser `NTASGD`.

    The paper's batches of variable length, with a learning rate that follows their length, belong to a stream and are
    not here. Embeddings start uniform in -0.1..0.1 (section 5). All dropout masks but those of single weights
    stay the same over time.

    Args:
        inputs: what the stream gives.
        head: makes the head for a feature width.
        mixer: makes a layer from its input width and its hidden width: `LSTM` with weight_drop=0.5 in the paper.
        hidden: H of every layer, the paper's 1150; with `tied` the last layer's is E.
        layers: number of layers.
        embedding: E of tokens. Not read for float inputs.
        embedding_dropout: the fraction of the vocabulary dropped. Not read for float inputs.
        input_dropout: of the first layer's inputs.
        dropout: between layers.
        output_dropout: of the last layer's outputs.
        activation: alpha, see `AWDNet`.
        temporal_activation: beta, see `AWDNet`.
        tied: True makes the head's weights those of the embedding (Inan et al. 2017; Press & Wolf 2017), as in the
            paper: for streams whose classes are the tokens (text; its mark of a start, which is never an answer,
            keeps an embedding of its own).
        pooling: "last" or "mean", see `Net`.

    Raises:
        ValueError: inputs without a time axis; `tied` where classes are not the tokens, or a task has a head of its own.
    """
    inputs.need_time("An AWD net")
    checks.net_size(hidden, layers)
    checks.at_least(1, embedding=embedding)
    checks.at_least(0, activation=activation, temporal_activation=temporal_activation)
    drops = {"embedding_dropout": embedding_dropout, "input_dropout": input_dropout, "output_dropout": output_dropout}
    checks.within(0, 1, below=True, dropout=dropout, **drops)
    if tied and inputs.vocabulary is None:
        raise ValueError("tied: got true on float inputs, which have no embedding: set tied=false.")
    tied_head = head(embedding) if tied else None
    tokens, embed, width = None, LockedDropout(input_dropout), inputs.features
    if inputs.vocabulary is not None:
        marks = int(tied_head is not None and tied_head.outputs == inputs.vocabulary - 1)
        tokens, width = DroppedEmbedding(inputs.vocabulary - marks, embedding, embedding_dropout, marks), embedding
        for weight in tokens.parameters():
            nn.init.uniform_(weight, -0.1, 0.1)
        embed = nn.Sequential(tokens, embed)
    assert width is not None  # features or vocabulary, by Inputs
    blocks: list[Block] = []
    for layer in range(layers):
        last = layer == layers - 1
        made = mixer(width, embedding if tied and last else hidden)
        blocks.append(MixerBlock(made, None if last else LockedDropout(dropout)))
        width = made.width
    blocks.append(OutputDropout(output_dropout))
    answers = head(width) if tied_head is None else tied_head
    if tied_head is not None and tokens is not None:
        _tie(tied_head, tokens)
    return AWDNet(embed, blocks, answers, inputs.per_step, pooling, activation, temporal_activation)


def _tie(head: Head, tokens: DroppedEmbedding) -> None:
    if head.linear.weight.shape != tokens.weight.shape:
        raise ValueError(
            f"tied: got true with a head {[*head.linear.weight.shape]} and an embedding {[*tokens.weight.shape]}; "
            "classes must be the tokens, and shared by all tasks: set tied=false."
        )
    head.linear.weight = tokens.weight


class OutputDropout(Block):
    """Dropout with one mask a sequence as a block of its own: the last one of an `AWDNet`.

    Args:
        dropout: the fraction of features set to zero in training.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.drop = LockedDropout(dropout)

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return self.drop(hidden), None


class AWDNet(Net):
    """Net with penalties on size and change of its last hidden sequence (section 4.6; Merity, McCann & Socher 2017).

        activation             alpha * mean of (m * h_t)^2
        temporal_activation    beta * mean of (h_t - h_{t+1})^2

    h is the output of the last recurrent layer, m its dropout mask; means are over all features of all valid steps,
    pairs across a reset left out. The paper writes L2 norms; means of squares are what the authors' code takes
    (salesforce/awd-lstm-lm). Both are penalties of the output in training mode, 0 strength leaves one out. A strategy
    that makes a net of its own of the blocks (REMIND) trains without them.

    Args:
        embedding: maps `Batch.x` to the first hidden sequence.
        blocks: in order; the last one is dropout on h.
        head: maps features to logits.
        per_step: as for `Net`.
        pooling: as for `Net`.
        activation: alpha.
        temporal_activation: beta.
    """

    def __init__(
        self,
        embedding: nn.Module,
        blocks: Sequence[Block],
        head: Head,
        per_step: bool,
        pooling: str,
        activation: float,
        temporal_activation: float,
    ) -> None:
        super().__init__(embedding, blocks, head, per_step, pooling)
        self.activation, self.temporal_activation = activation, temporal_activation

    def forward(self, batch: Batch, state: Sequence[State | None] | None = None, reset: Tensor | None = None) -> Output:
        return self.upper(self.embed(batch), 0, batch, state, reset)

    def upper(
        self,
        hidden: Tensor,
        cut: int,
        batch: Batch,
        state: Sequence[State | None] | None = None,
        reset: Tensor | None = None,
    ) -> Output:
        last = len(self.blocks) - 1
        if cut > last:  # above the last recurrent layer there are no activations to penalise
            return super().upper(hidden, cut, batch, state, reset)
        reset = batch.reset if reset is None else reset
        raw, new = self._through(hidden, cut, last, state, reset, batch.lengths)
        dropped, after = self._through(raw, last, last + 1, None, reset, batch.lengths)
        features = self.read(dropped, batch.lengths)
        penalties = self.penalties()
        if self.training:
            penalties |= self._of_activations(raw, dropped, batch.lengths, reset)
        return Output(self.head(features, batch.task), features, (*new, *after), penalties)

    def _of_activations(
        self, raw: Tensor, dropped: Tensor, lengths: Tensor | None, reset: Tensor | None
    ) -> dict[str, Tensor]:
        time = torch.arange(raw.shape[1], device=raw.device)
        valid = raw.new_ones(raw.shape[:2], dtype=torch.bool) if lengths is None else time < lengths[:, None]
        pairs = valid[:, 1:] if reset is None else valid[:, 1:] & ~reset[:, 1:]
        terms: dict[str, Tensor] = {}
        if self.activation:
            terms["activation"] = self.activation * _mean_square(dropped, valid)
        if self.temporal_activation:
            terms["temporal_activation"] = self.temporal_activation * _mean_square(raw[:, 1:] - raw[:, :-1], pairs)
        return terms


def _mean_square(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x^2 over the features of the valid steps; 0 where there is none."""
    # Chosen, not multiplied by 0: on padding there may be anything.
    squares = x.square().masked_fill(~valid[..., None], 0)
    return squares.sum() / (valid.sum() * x.shape[-1]).clamp(min=1)
