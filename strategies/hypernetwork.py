"""Task-conditioned hypernetworks (von Oswald et al. 2020, arXiv 1906.00695), whole or chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.nets.hyper import ACTS, Chunked, Full, GeneratedNet, Generator, Piece, TaskEmbeddings
from clplat.learners.nets.net import Output
from clplat.learners.nets.per_task import label_of
from clplat.output_regularizer import OutputRegularizer, orthogonality
from clplat.proposed_step import check_known
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience
from clplat.streams.loader import stable_seed
from clplat.task_strategies import check_answer, check_company, surest

log = logging.getLogger(__name__)

KINDS = ("full", "chunked")


class Hypernetwork(Strategy):
    """Every task's weights W_t = h(e_t, Theta) come from one hypernetwork, which is held where it is for old tasks.

        loss = task loss + beta / (t - 1) * sum_{j<t} || h(e_j, Theta*) - h(e_j, Theta + dTheta) ||^2     (eq. 2)

    Theta, the chunk codes in it and the current e_t are trained; the embeddings of learned tasks stay as they are. The
    second term is added to the gradients after the backward pass of the first, which also gives dTheta; clipping, if
    any, is of the sum, while dTheta is the unclipped step. It is not among the logged terms of the loss. All weights of
    the learner's net are generated, its head's too. Works with every kind of target; without task labels the task of a
    test row is the one with the lowest predictive entropy (HNET+ENT), which costs a forward pass for each.

    Deviations: all parameters share one optimiser (the paper's code steps e_t apart, with the same optimiser and
    learning rate). Initialisation is by hyperfan-in with the variances of the net's own initialisation, and vectors
    are generated as a difference to their initial values. Weights of tensors other than the output layer are
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

    needs = frozenset({"boundaries"})

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
        super().__init__()
        self.name = "hypernetwork" if kind == "full" else "chunked_hypernetwork"
        if kind not in KINDS:
            raise ValueError(f"hypernetwork.kind: got {kind!r}, allowed are 'full' and 'chunked'.")
        if act not in ACTS:
            raise ValueError(f"{self.name}.act: got {act!r}, allowed are {', '.join(map(repr, ACTS))}.")
        for option, size in (
            ("embedding", embedding),
            ("chunk", chunk),
            ("code", code),
            *(("hidden", n) for n in hidden),
        ):
            if size < 1:
                raise ValueError(f"{self.name}.{option}: got {size}, it must be at least 1.")
        for option, size in (("embedding_std", embedding_std), ("code_std", code_std)):
            if not size > 0:
                raise ValueError(f"{self.name}.{option}: got {size}, it must be above 0.")
        if orthogonal < 0:
            raise ValueError(f"{self.name}.orthogonal: got {orthogonal}, it must be at least 0.")
        self.kind, self.hidden, self.act, self.chunk = kind, tuple(hidden), act, chunk
        self.embedding, self.embedding_std, self.code, self.code_std = embedding, embedding_std, code, code_std
        self.orthogonal, self.seed = orthogonal, seed
        self.tasks = TaskEmbeddings(embedding, embedding_std, seed)
        self.past = OutputRegularizer(self.name, beta, 0.0, lookahead, subset, targets, stable_seed(seed, "subset"))

    def wrap(self, learner: Learner) -> None:
        """Let the hypernetwork generate the weights of the learner's net."""
        check_company(self.name, learner)
        if self.past.lookahead and self.past.beta:
            check_known(f"{self.name}.lookahead", learner.make_optimizer)
        learner.net = net = GeneratedNet(learner.net, self.tasks, self._generator)
        if self.orthogonal:
            orthogonality(net.weights_for(0))
        size = sum(p.numel() for p in net.generator.parameters())
        log.info("%s: %d parameters generate %d weights", self.name, size, net.size)

    def enter(self, learner: Learner, experience: Experience) -> None:
        """The experience's task is the active one."""
        self.tasks.active = label_of(experience)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """A new embedding; what the learned ones give now is the target."""
        check_answer(self.name, learner, experience)
        self.tasks.start(label_of(experience))
        assert isinstance(learner.net, GeneratedNet)
        self.past.remember(learner.net)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """The orthogonality of recurrent matrices, if asked for."""
        if not self.orthogonal:
            return {}
        assert isinstance(learner.net, GeneratedNet) and self.tasks.active is not None
        return {"orthogonal": self.orthogonal * orthogonality(learner.net.weights_for(self.tasks.active))}

    def gradients(self, learner: Learner, batch: Batch) -> None:
        """Add those of the regularisation."""
        assert isinstance(learner.net, GeneratedNet) and learner.optimizer is not None
        self.past.add_gradients(learner.net, learner.optimizer)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """Without task labels: the answer of the task that is surest."""
        return surest(learner, batch, logits)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """The embedding stays as it is from now on."""
        self.tasks.finish()

    def _generator(self, pieces: Sequence[Piece]) -> Generator:
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
