"""Task-conditioned hypernetworks (von Oswald et al. 2020, arXiv 1906.00695), whole or chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
    """Every task's weights W_t = h(e_t, Theta) come from one hypernetwork, which is held where it is for old tasks.

        loss = task loss + beta / (t - 1) * sum_{j<t} || h(e_j, Theta*) - h(e_j, Theta + dTheta) ||^2     (eq. 2)

    Theta, the chunk codes in it and the current e_t are trained; the embeddings of learned tasks stay as they are. The
    second term is added to the gradients after the backward pass of the first, which also gives dTheta; clipping, if
    any, is of the sum, while dTheta is the unclipped step. It is not among the logged terms of the loss. All weights of
    the learner's net are generated, its head's too. Works with every kind of target; without task labels the task of a
    test row is the one with the lowest predictive entropy (HNET+ENT), which costs a forward pass for each.

    Deviations: all parameters share one optimiser (the paper's code steps e_t apart, with the same optimiser and
    learning rate). Initialisation is by hyperfan-in with the variances of the net's own initialisation, and vectors
    are generated as a difference to their initial values, as is all that the net's own initialisation does not draw. Weights of tensors other than the output layer are
    regularised alike; no Fisher weighting.

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

    Raises:
        ValueError: an option that is not allowed.
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
        name = "hypernetwork" if kind == "full" else "chunked_hypernetwork"
        if kind not in KINDS:
            raise ValueError(f"hypernetwork.kind: got {kind!r}, allowed are 'full' and 'chunked'.")
        if act not in ACTS:
            raise ValueError(f"{name}.act: got {act!r}, allowed are {', '.join(map(repr, ACTS))}.")
        for option, size in (
            ("embedding", embedding),
            ("chunk", chunk),
            ("code", code),
            *(("hidden", n) for n in hidden),
        ):
            if size < 1:
                raise ValueError(f"{name}.{option}: got {size}, it must be at least 1.")
        for option, size in (("embedding_std", embedding_std), ("code_std", code_std)):
            if not size > 0:
                raise ValueError(f"{name}.{option}: got {size}, it must be above 0.")
        if orthogonal < 0:
            raise ValueError(f"{name}.orthogonal: got {orthogonal}, it must be at least 0.")
        super().__init__(
            name,
            TaskEmbeddings(embedding, embedding_std, seed),
            OutputRegularizer(name, beta, 0.0, lookahead, subset, targets, stable_seed(seed, "subset")),
        )
        self.kind, self.hidden, self.act, self.chunk = kind, tuple(hidden), act, chunk
        self.embedding, self.embedding_std, self.code, self.code_std = embedding, embedding_std, code, code_std
        self.orthogonal, self.seed = orthogonal, seed

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Let the hypernetwork generate the weights of the learner's net.

        Raises:
            ValueError: `orthogonal` and a net without recurrent matrices; a company that cannot be (see
                `check_company`).
        """
        super().setup(learner, stream)
        if self.orthogonal:
            assert isinstance(learner.net, GeneratedNet)
            orthogonality(learner.net.weights_for(0))

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """The orthogonality of recurrent matrices, if asked for."""
        if not self.orthogonal:
            return {}
        assert isinstance(learner.net, GeneratedNet) and self.tasks.active is not None
        return {"orthogonal": self.orthogonal * orthogonality(learner.net.weights_for(self.tasks.active))}

    def generator(self, pieces: Sequence[Piece]) -> Generator:
        """An MLP, whole or chunk by chunk."""
        random = torch.Generator().manual_seed(stable_seed(self.seed, "hypernetwork"))
        if self.kind == "full":
            return Full(pieces, self.embedding, self.embedding_std, self.hidden, self.act, random)
        return Chunked(
            pieces,
            self.embedding,
            self.embedding_std,
            self.hidden,
            self.act,
            self.chunk,
            self.code,
            self.code_std,
            random,
        )
