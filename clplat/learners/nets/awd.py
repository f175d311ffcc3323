"""The AWD-LSTM's net (Merity, Keskar & Socher 2018, arXiv 1708.02182): recurrent layers under every dropout there is.

Letters: B batch, T time, D input features, E embedding width, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clplat.learners.mixers.dropout import DroppedEmbedding, LockedDropout
from clplat.learners.mixers.mixer import Mixer
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, Output, State, check_sizes
from clplat.learners.nets.recurrent import RecurrentBlock
from clplat.streams.experience import Batch
from clplat.streams.inputs import Inputs


class LockedBlock(RecurrentBlock):
    """A mixer and, after it, dropout with one mask a sequence.

    Args:
        mixer: maps [B, T, D] to [B, T, H].
        dropout: the fraction of its outputs set to zero in training.
    """

    def __init__(self, mixer: Mixer, dropout: float) -> None:
        super().__init__(mixer)
        self.dropout = LockedDropout(dropout)


class OutputDropout(Block):
    """Dropout with one mask a sequence as a block of its own: the last one of an `AWDNet`.

    Args:
        dropout: the fraction of features set to zero in training.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.drop = LockedDropout(dropout)

    def forward(
        self, hidden: Tensor, state: State = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The sequence [B, T, H] under the mask; there is no state."""
        return self.drop(hidden), None


class AWDNet(Net):
    """A net whose last hidden sequence is kept small and slow (section 4.6; Merity, McCann & Socher 2017).

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
        readout: as for `Net`.
        activation: alpha.
        temporal_activation: beta.
    """

    def __init__(
        self,
        embedding: nn.Module,
        blocks: Sequence[Block],
        head: Head,
        per_step: bool,
        readout: str,
        activation: float,
        temporal_activation: float,
    ) -> None:
        super().__init__(embedding, blocks, head, per_step, readout)
        self.activation, self.temporal_activation = activation, temporal_activation

    def forward(self, batch: Batch, state: Sequence[State] | None = None, reset: Tensor | None = None) -> Output:
        """As for `Net.forward`, with the penalties in training mode."""
        return self.upper(self.embedding(batch.x), 0, batch, state, reset)

    def upper(
        self,
        hidden: Tensor,
        cut: int,
        batch: Batch,
        state: Sequence[State] | None = None,
        reset: Tensor | None = None,
    ) -> Output:
        """As for `Net.upper`; above the last recurrent layer there are no activations to penalise."""
        last = len(self.blocks) - 1
        if cut > last:
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
    """Over the features of the valid steps; 0 where there is none."""
    # Chosen, not multiplied by 0: on padding there may be anything.
    squares = x.square().masked_fill(~valid[..., None], 0)
    return squares.sum() / (valid.sum() * x.shape[-1]).clamp(min=1)


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
    readout: str = "last",
) -> Net:
    """The net of the AWD-LSTM; its other parts are `weight_drop` of the mixer and the optimiser `NTASGD`.

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
        readout: "last" or "mean", see `Net`.

    Raises:
        ValueError: inputs without a time axis; a size below 1; a fraction outside 0..1; a negative penalty; `tied` where
            classes are not the tokens, or a task has a head of its own; an unknown readout.
    """
    inputs.need_time("An AWD net")
    check_sizes(hidden=hidden, layers=layers, embedding=embedding)
    if not (activation >= 0 and temporal_activation >= 0):
        raise ValueError(
            f"AWD net: got activation={activation}, temporal_activation={temporal_activation}; both must be at least 0."
        )
    if tied and inputs.vocabulary is None:
        raise ValueError("tied: got true on float inputs, which have no embedding: set tied=false.")
    shared = head(embedding) if tied else None
    tokens: DroppedEmbedding | None = None
    embed: nn.Module = LockedDropout(input_dropout)
    if inputs.vocabulary is None:
        assert inputs.features is not None  # one of the two, by Inputs
        width = inputs.features
    else:
        marks = int(shared is not None and shared.outputs == inputs.vocabulary - 1)
        tokens, width = DroppedEmbedding(inputs.vocabulary - marks, embedding, embedding_dropout, marks), embedding
        for weight in tokens.parameters():
            nn.init.uniform_(weight, -0.1, 0.1)
        embed = nn.Sequential(tokens, embed)
    blocks: list[Block] = []
    for layer in range(layers):
        last = layer == layers - 1
        made = mixer(width, embedding if tied and last else hidden)
        blocks.append(RecurrentBlock(made) if last else LockedBlock(made, dropout))
        width = made.width
    answers = head(width) if shared is None else shared
    if tied and tokens is not None:
        if answers.linear.weight.shape != tokens.weight.shape:
            raise ValueError(
                f"tied: got true with a head {[*answers.linear.weight.shape]} and an embedding "
                f"{[*tokens.weight.shape]}; classes must be the tokens, and shared by all tasks: set tied=false."
            )
        answers.linear.weight = tokens.weight
    blocks.append(OutputDropout(output_dropout))
    return AWDNet(embed, blocks, answers, inputs.per_step, readout, activation, temporal_activation)
