"""Task-conditioned hypernetworks (von Oswald et al. 2020, arXiv 1906.00695), whole or chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.per_task.generated import GeneratedNet, TaskEmbeddings
from clplat.per_task.generators import ACTS, Chunked, Full, Generator, Piece
from clplat.per_task.regularizer import OutputRegularizer, orthogonality
from clplat.per_task.strategy import GeneratedWeights
from clplat.streams.experience import Batch, Stream
from clplat.streams.loader import stable_seed

KINDS = ("full", "chunked")


class Hypernetwork(GeneratedWeights):
    """One hypernetwork for the weights W_t = h(e_t, Theta) of every task, held where it is for old tasks (eq. 2):

        loss = task loss + beta / (t - 1) * sum_{j<t} || h(e_j, Theta*) - h(e_j, Theta + dTheta) ||^2

    Theta, the chunk codes in it and the current e_t are trained; the embeddings of learned tasks stay as they are. The
    second term is added to the gradients after the backward pass of the first, which also gives dTheta. Clipping, if
    any, is of the sum, while dTheta is the unclipped step. It is not among the logged terms of the loss. All weights of
    the learner's net are generated, its head's too. Works with every kind of target. Without task labels the task of a
    test row is the one with the lowest predictive entropy (HNET+ENT), which costs a forward pass for each.

    Deviations: all parameters share one optimiser (the paper's code steps e_t apart, with the same optimiser and
    learning rate). Initialisation is by hyperfan-in with the variances of the net's own initialisation. Vectors are
    generated as a difference to their initial values, as is all that the net's own initialisation does not draw.
    Weights of tensors other than the output layer are regularised alike; no Fisher weighting.

    Args:
        beta: strength of the regularisation; 0: none, so that learned tasks are forgotten.
        kind: "full" (an output for every weight) or "chunked".
        hidden: widths of the hypernetwork's hidden layers; none: it is linear.
        act: "relu", "elu", "tanh" or "sigmoid".
        embedding: width of e_t.
        embedding_std: standard deviation of the initial e_t.
        chunk: weights a chunk (of kind chunked).
        code: width of the chunk codes (of kind chunked).
        code_std: standard deviation of the initial chunk codes (of kind chunked).
        lookahead: False leaves out dTheta.
        subset: learned tasks regularised a step, drawn anew each step; null: all.
        targets: "weights" keeps Theta* (as large as the hypernetwork), "outputs" the generated weights (t - 1 times as
            large as the net).
        orthogonal: strength of || U^T U - I ||_F^2 on the generated recurrent matrices (Ehret et al. 2021).
        seed: of the hypernetwork's and the embeddings' initial values, and of the subsets.
    """

    def __init__(
        self,
        beta: float,
        kind: str = "full",
        hidden: Sequence[int] = (50, 50),
        act: str = "relu",
        embedding: int = 32,
        embedding_std: float = 1.0,
        chunk: int = 2500,
        code: int = 32,
        code_std: float = 1.0,
        lookahead: bool = True,
        subset: int | None = None,
        targets: str = "weights",
        orthogonal: float = 0.0,
        seed: int = 0,
    ) -> None:
        checks.one_of("kind", kind, KINDS)
        checks.one_of("act", act, tuple(ACTS))
        checks.at_least(1, embedding=embedding, chunk=chunk, code=code, hidden=min(hidden, default=None))
        checks.above(0, embedding_std=embedding_std, code_std=code_std)
        checks.at_least(0, orthogonal=orthogonal)
        super().__init__(
            TaskEmbeddings(embedding, embedding_std, seed),
            OutputRegularizer(beta, 0.0, lookahead, subset, targets, stable_seed(seed, "subset")),
        )
        self.kind, self.hidden, self.act, self.chunk = kind, tuple(hidden), act, chunk
        self.embedding, self.embedding_std, self.code, self.code_std = embedding, embedding_std, code, code_std
        self.orthogonal, self.seed = orthogonal, seed

    def setup(self, learner: Learner, stream: Stream) -> None:
        super().setup(learner, stream)
        if self.orthogonal:  # refuses a net without recurrent matrices
            assert isinstance(learner.net, GeneratedNet)
            orthogonality(learner.net.weights_for(0))

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        if not self.orthogonal:
            return {}
        assert isinstance(learner.net, GeneratedNet) and self.tasks.active is not None
        return {"orthogonal": self.orthogonal * orthogonality(learner.net.weights_for(self.tasks.active))}

    def generator(self, pieces: Sequence[Piece]) -> Generator:
        random = torch.Generator().manual_seed(stable_seed(self.seed, "hypernetwork"))
        sizes = (self.embedding, self.embedding_std, self.hidden, self.act)
        if self.kind == "full":
            return Full(pieces, *sizes, random)
        return Chunked(pieces, *sizes, self.chunk, self.code, self.code_std, random)
