"""Dropout with masks that stay the same over time. All masks come from torch's global generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks


def drop_recurrent(weights: Sequence[Tensor], p: float) -> list[Tensor]:
    """Weights W, U and biases of a recurrent layer, a fraction p of U set to zero and the rest scaled.

    DropConnect on recurrent weights (Merity, Keskar & Socher 2018, arXiv 1708.02182, section 2). The parameter itself
    stays as it is, so that gradients, optimisers and `functional_call` see one U.

    Args:
        weights: W, U and whatever follows.
        p: the fraction, 0 for none.
    """
    w, u, *rest = weights
    return [w, F.dropout(u, p) if p else u, *rest]


class LockedDropout(nn.Module):
    """Dropout with one mask a sequence: a feature is gone at all its steps or at none.

    Variational dropout (Gal & Ghahramani 2016, arXiv 1512.05287) on what goes into and out of recurrent layers; the
    form without its mask on h_{t-1} is that of Merity, Keskar & Socher 2018 (arXiv 1708.02182, section 4.2). Every row
    of a batch has a mask of its own, and so has every call: a sequence handed over in pieces gets one a piece.

    Args:
        p: the fraction of features set to zero in training, in 0..1 without 1; the rest is scaled by 1 / (1 - p).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        checks.within(0, 1, below=True, dropout=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] under a mask [B, 1, D]; x itself in evaluation mode."""
        if not (self.p and self.training):
            return x
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.p)


class DroppedEmbedding(nn.Embedding):
    """Token embeddings with dropout of whole tokens in training: one mask a call for all rows and steps.

    A dropped token is the zero vector wherever it occurs in the batch, the others are scaled by 1 / (1 - p)
    (Gal & Ghahramani 2016, arXiv 1512.05287; Merity, Keskar & Socher 2018, arXiv 1708.02182, section 4.3).

    Args:
        vocabulary: V.
        width: E.
        p: the fraction of the vocabulary dropped, in 0..1 without 1.
        marks: further tokens V, V + 1, ... (where a text starts) with rows of their own, never dropped: apart from
            `weight`, which a head may share.
    """

    def __init__(self, vocabulary: int, width: int, p: float, marks: int = 0) -> None:
        checks.within(0, 1, below=True, embedding_dropout=p)
        super().__init__(vocabulary, width)
        self.p = p
        self.marks = nn.Embedding(marks, width) if marks else None

    def forward(self, input: Tensor) -> Tensor:  # the base class's name
        """Embeddings [B, T, E] of tokens [B, T]."""
        known = input if self.marks is None else input.clamp(max=self.num_embeddings - 1)
        embedded = super().forward(known)
        if self.p and self.training:
            # Scaling what was looked up, not the whole table: T * B rows, where a vocabulary may be far larger.
            embedded = embedded * F.dropout(self.weight.new_ones(self.num_embeddings), self.p)[known][..., None]
        if self.marks is None:
            return embedded
        marks = self.marks((input - self.num_embeddings).clamp(min=0))
        return torch.where((input < self.num_embeddings)[..., None], embedded, marks)
