"""The ideal continual learner of Peng, Giampouras & Vidal (2023, arXiv 2305.00316) for a linear head, solved exactly."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.strategy import Session, Strategy
from clplat.streams.experience import Batch, Experience, Stream
from clplat.weights.subspace import collect

MODES = ("null_space", "recursive_least_squares")
BASES = ("first", "initial")


class ICL(Strategy):
    """Closed-form solution of a linear head on frozen features, after each experience, which undoes nothing.

    The ideal continual learner takes K_t = argmin of L_t over K_{t-1}: minimisers of the new loss among the minimisers
    of all old ones. With squared error and a linear head, for features X [N, P] and targets Y [N, O] of an experience:

    - null_space: that definition, exactly. With N [P, d] an orthonormal basis of the directions that no old loss
      depends on, A = X N = U S V^T, W <- W + N pinv(A) (Y - X W), N <- N V_2 with V_2 the directions of A's null
      space. Where experiences agree, W is the minimum-norm solution of all together. d falls by rank(A) an experience;
      at d = 0 nothing can be learned any more (a warning says so).
    - recursive_least_squares: K = P X^T (ridge I + X P X^T)^-1, W <- W + K (Y - X W), P <- P - K X P from P = I and
      W = 0, which is the ridge solution of all experiences together, in any order, and never runs out of room. A ridge
      to 0 gives the minimum-norm solution.

    From then on no step is trained: the session of an experience is empty, and one pass over its training set solves
    it. Answers come from `predict`; the net's own head is left as it is. Targets are values as they are, +1 and -1 for
    bits, one-hot vectors for classes and tags (so the loss is squared error, not cross-entropy: the paper's linear
    case). Steps that are not scored do not take part. Another strategy acts during experience 0 only.

    Deviations: the paper solves its linear case on raw inputs. Random ReLU features are those of RanPAC (McDonnell et
    al. 2023, arXiv 2307.02251), here scaled by 1/sqrt(H), which matters for the ridge only.

    Args:
        mode: "null_space" or "recursive_least_squares".
        base: "first" (the whole net is trained on experience 0, then frozen) or "initial" (frozen as it was built).
        random_features: the head sees relu(features Z) of this width, Z Gaussian; null: the features themselves.
        bias: True adds a constant feature; the ridge acts on it too.
        ridge: of mode recursive_least_squares, above 0.
        tolerance: of mode null_space: singular values of A below this fraction of those of X count as 0. Larger ones
            truncate directions that hardly matter and keep room for later experiences.
        batch_size: examples a pass; no effect on the result but rounding.
        seed: of Z.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"data"})
    not_carried = "its head is solved for from features of each segment's fresh state"
    solution: Tensor | None  # [P, O]
    rest: Tensor | None  # [P, d] the basis N, or [P, P] the matrix P
    projection: Tensor | None  # [H, random_features]

    def __init__(
        self,
        mode: str = "recursive_least_squares",
        base: str = "first",
        random_features: int | None = None,
        bias: bool = True,
        ridge: float = 1.0,
        tolerance: float = 1e-10,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.one_of("mode", mode, MODES)
        checks.one_of("base", base, BASES)
        checks.at_least(1, random_features=random_features, batch_size=batch_size)
        checks.above(0, "1e-9 is close to none", ridge=ridge)
        checks.within(0, 1, tolerance=tolerance, below=True)
        self.mode, self.base, self.random_features, self.bias = mode, base, random_features, bias
        self.ridge, self.tolerance, self.batch_size, self.seed = ridge, tolerance, batch_size, seed
        for name in ("solution", "rest", "projection"):
            self.register_buffer(name, None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        if learner.objective.by_probability:
            name = type(learner.objective).__name__
            raise ValueError(
                f"icl: the solution of a regression is no probability, which {name} is scored by: use another strategy, or "
                "a stream with target class, tag, bits or value."
            )
        learner.objective.coded(torch.zeros(0, dtype=torch.int64), 1)
        if self.random_features is not None:
            width = learner.net.head.linear.in_features
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(width, self.random_features, generator=generator, dtype=torch.float64)
            self.projection = (drawn / width**0.5).to(learner.device)

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        return session if self.base == "first" and index == 0 else Session(None, 0.0)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        triangle = None
        with learner.evaluating():
            for batch in experience.train.batches(torch.arange(len(experience.train)).split(self.batch_size)):
                x, y = self._equations(learner, batch.to(learner.device))
                if self.solution is None or self.rest is None:
                    self.solution, self.rest = x.new_zeros(x.shape[1], y.shape[1]), torch.eye(x.shape[1]).to(x)
                if self.mode == "null_space":
                    triangle = collect(triangle, torch.cat([x, y], 1))
                else:
                    self._recur(x, y)
        if triangle is not None:
            self._descend(triangle)

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        if self.solution is None:
            return logits
        answer = self._expand(features) @ self.solution
        answer = answer.to(torch.promote_types(logits.dtype, torch.float32))
        # A class that the head does not offer keeps the lowest value.
        return answer.masked_fill(logits == torch.finfo(logits.dtype).min, torch.finfo(answer.dtype).min)

    def _expand(self, features: Tensor) -> Tensor:
        """[..., P] in float64, from features [..., H]."""
        expanded = features.double()
        if self.projection is not None:
            expanded = F.relu(expanded @ self.projection)
        return F.pad(expanded, [0, 1], value=1.0) if self.bias else expanded

    def _equations(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """X [N, P] and Y [N, O], a row for each scored target."""
        features, y, objective = learner.net(batch).features, batch.y, learner.objective
        if features.ndim == 3:
            scored = objective.scored(batch)
            scored = torch.ones(features.shape[:2], dtype=torch.bool, device=y.device) if scored is None else scored
            features, y = features[scored], y[scored]
        return self._expand(features), objective.coded(y, learner.net.head.outputs)

    def _recur(self, x: Tensor, y: Tensor) -> None:
        assert self.solution is not None
        assert self.rest is not None
        spread = self.rest @ x.mT  # [P, N]
        inner = x @ spread
        inner.diagonal().add_(self.ridge)
        gain = torch.linalg.solve(inner, spread.mT).mT
        self.solution = self.solution + gain @ (y - x @ self.solution)
        rest = self.rest - gain @ spread.mT
        self.rest = 0.5 * (rest + rest.mT)  # rounding would let it drift away from symmetry

    def _descend(self, triangle: Tensor) -> None:
        assert self.solution is not None
        assert self.rest is not None
        width = len(self.solution)
        x, y = triangle[:, :width], triangle[:, width:]
        if self.rest.shape[1] == 0:
            return
        left, sizes, right = torch.linalg.svd(x @ self.rest)
        rank = int((sizes > self.tolerance * torch.linalg.matrix_norm(x, 2)).sum())
        inside = left[:, :rank].mT @ (y - x @ self.solution) / sizes[:rank, None]
        self.solution = self.solution + self.rest @ (right[:rank].mT @ inside)
        self.rest = rest = self.rest @ right[rank:].mT
        if rest.shape[1] == 0:
            warnings.warn(
                f"icl: the null space of {width} features is used up, later experiences cannot be learned: raise "
                "random_features or tolerance, or set mode to recursive_least_squares."
            )
