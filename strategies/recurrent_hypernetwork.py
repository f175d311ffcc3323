"""Dependency-preserving hypernetworks: a recurrent generator that can grow (Chandra et al. 2023, arXiv 2209.07712)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clplat import checks
from clplat.learners.learner import Learner
from clplat.per_task.generated import GeneratedNet, TaskEmbeddings
from clplat.per_task.generators import Generator, Piece
from clplat.per_task.net import label_of
from clplat.per_task.recurrent import Recurrent
from clplat.per_task.regularizer import OutputRegularizer
from clplat.per_task.strategy import GeneratedWeights
from clplat.streams.experience import Experience, Stream
from clplat.streams.loader import stable_seed


class RecurrentHypernetwork(GeneratedWeights):
    """An LSTM generates each task's weights chunk by chunk, every chunk depending on those before it.

        s_l, c_l = LSTM([e_t; p_l], (s_{l-1}, c_{l-1})),   chunk_l of W_t = U s_l + b
        loss = task loss + 1 / (t - 1) * sum_{j<t} (beta * || W_j* - W_j ||^2 + beta_state * sum_l || s_{l,j}* - s_{l,j} ||^2)

    with W_j and s_{l,j} taken at Theta + dTheta as in task-conditioned hypernetworks. Before every task but the first
    the LSTM can gain units, which changes nothing that it generates.

    Unconfirmed: only the paper's abstract was read. It says that a recurrent hypernetwork keeps dependencies across
    layers, with a regularisation and a way of growing of its own; the equations above, the growth and all defaults are
    this project's. Hence `beta_state` and `grow` are options, off by default.

    Args:
        beta: strength on the generated weights; 0: none.
        beta_state: strength on the generator's hidden states; 0: none.
        hidden: width of the LSTM.
        embedding: width of e_t.
        embedding_std: standard deviation of the initial e_t.
        chunk: weights a step; every tensor of the net begins a new chunk.
        code: width of the learned codes p_l.
        code_std: standard deviation of their initial values.
        grow: units added before each new task.
        lookahead: False leaves out dTheta.
        subset: learned tasks regularised a step, drawn anew each step; null: all.
        targets: "weights" keeps Theta*, "outputs" the generated weights (and states) of learned tasks.
        seed: of initial values, of new units and of the subsets.
    """

    def __init__(
        self,
        beta: float,
        beta_state: float = 0.0,
        hidden: int = 64,
        embedding: int = 32,
        embedding_std: float = 1.0,
        chunk: int = 1000,
        code: int = 16,
        code_std: float = 1.0,
        grow: int = 0,
        lookahead: bool = True,
        subset: int | None = None,
        targets: str = "weights",
        seed: int = 0,
    ) -> None:
        checks.at_least(1, hidden=hidden, embedding=embedding, chunk=chunk, code=code)
        checks.above(0, embedding_std=embedding_std, code_std=code_std)
        checks.at_least(0, "0: it does not grow", grow=grow)
        super().__init__(
            TaskEmbeddings(embedding, embedding_std, seed),
            OutputRegularizer(beta, beta_state, lookahead, subset, targets, stable_seed(seed, "subset")),
        )
        self.hidden, self.embedding, self.embedding_std, self.chunk = hidden, embedding, embedding_std, chunk
        self.code, self.code_std, self.grow, self.seed = code, code_std, grow, seed
        self.claims = frozenset({"net", *(["growth"] if grow else [])})

    def setup(self, learner: Learner, stream: Stream) -> None:
        if self.grow and learner.optimizer_state == "kept":
            raise ValueError(
                f"grow: got {self.grow} with learner.optimizer_state=kept, and a kept state does "
                "not fit what has grown: set optimizer_state=fresh, or grow=0."
            )
        super().setup(learner, stream)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Grow; a new embedding; what the learned ones give now is the target."""
        net, label = learner.net, label_of(experience)
        assert isinstance(net, GeneratedNet) and isinstance(net.generator, Recurrent)
        if self.grow and self.tasks.labels and label not in self.tasks.labels:
            random = torch.Generator().manual_seed(stable_seed(self.seed, "growth", experience.index))
            net.generator.grow(self.grow, random)
        super().before_experience(learner, experience)

    def generator(self, pieces: Sequence[Piece]) -> Generator:
        """The LSTM."""
        random = torch.Generator().manual_seed(stable_seed(self.seed, "hypernetwork"))
        sizes = (self.embedding, self.embedding_std, self.hidden, self.chunk, self.code, self.code_std)
        return Recurrent(pieces, *sizes, random)
