"""Deep streaming linear discriminant analysis (Hayes & Kanan 2020, arXiv 1909.01520)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.learners.learner import Learner
from clplat.strategy import Session, Strategy
from clplat.streams.experience import Batch, Experience, Stream

FIRST = ("oas", "stream")


class SLDA(Strategy):
    """The whole net is trained on experience 0 and then frozen; classes are told apart by running means and one
    covariance of the features, updated example by example.

    For the next example (x, y), with n examples and c_y of its class before it and d = x - mu_y (section 3 of the
    paper, details as in the authors' code):

        Sigma <- (n Sigma + n/(n+1) d d^T) / (n+1),    mu_y <- (c_y mu_y + x) / (c_y + 1)

    and the answer is score_k = x^T L mu_k - mu_k^T L mu_k / 2 with L = pinv((1 - shrinkage) Sigma + shrinkage I).
    The weight n/(n+1) counts all examples, and mu_y is 0 for a new class, so that the first example of a class adds
    x x^T. With `exact` the weight is c_y/(c_y+1), and Sigma is the pooled covariance about the class means, whatever
    the order.

    Each experience's training set is passed over once, after it, in the order of the data (the paper's stream is not
    stored either: only means, counts and Sigma are). With tags, every scored step is an example. Another strategy acts
    during experience 0 only. Classes not met yet are never answered.

    Deviation: the paper starts from a net trained on ImageNet or on a first set of classes; here on experience 0.

    Args:
        shrinkage: in 0..1.
        exact: True for the pooled covariance, False for the authors' recurrence.
        first: how experience 0 enters: "oas", the oracle approximating shrinkage of its pooled covariance (Chen et
            al. 2010; the authors' base initialisation), or "stream", like all others.
        batch_size: examples a pass; no effect on the result but rounding.
    """

    needs = frozenset({"boundaries"})
    claims = frozenset({"data"})
    not_carried = "its means are over features of each segment's fresh state"
    means: Tensor | None  # [C, H]
    counts: Tensor | None  # [C]
    scatter: Tensor | None  # [H, H], n Sigma
    weight: Tensor | None  # [C, H], the rows L mu_k
    offset: Tensor | None  # [C]

    def __init__(self, shrinkage: float = 1e-4, exact: bool = False, first: str = "oas", batch_size: int = 256) -> None:
        super().__init__()
        checks.within(0, 1, shrinkage=shrinkage)
        checks.one_of("first", first, FIRST)
        checks.at_least(1, batch_size=batch_size)
        self.shrinkage, self.exact, self.first, self.batch_size = shrinkage, exact, first, batch_size
        for name in ("means", "counts", "scatter", "weight", "offset"):
            self.register_buffer(name, None)

    def setup(self, learner: Learner, stream: Stream) -> None:
        if not learner.objective.classes or learner.objective.by_probability:
            raise ValueError(
                "slda: discriminant analysis tells classes apart and gives no probabilities, which does not do for "
                f"{type(learner.objective).__name__}: use a stream with target class or tag, or another strategy."
            )

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """Experience 0 as it is, then nothing to train on."""
        return session if index == 0 else Session(None, 0.0)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Take the experience's examples into means and covariance, and solve for the scores."""
        pooled = self.exact or (self.first == "oas" and experience.index == 0)
        with learner.evaluating():
            for batch in experience.train.batches(torch.arange(len(experience.train)).split(self.batch_size)):
                batch = batch.to(learner.device)
                features, y = learner.net(batch).features, batch.y
                if features.ndim == 3:
                    scored = learner.objective.scored(batch)
                    features, y = features[scored], y[scored]
                self.observe(features, y, learner.net.head.outputs, pooled)
        if self.first == "oas" and experience.index == 0 and self.scatter is not None and self.counts is not None:
            number = self.counts.sum()
            self.scatter = number * oracle_approximating_shrinkage(self.scatter / number, number)
        self._solve()

    def observe(self, x: Tensor, y: Tensor, classes: int, pooled: bool) -> None:
        """Take examples in, in their order.

        Args:
            x: [N, H] features.
            y: [N] their classes.
            classes: C.
            pooled: True weighs d d^T by c_y/(c_y+1), False by n/(n+1).
        """
        x = x.double()
        if self.means is None or self.counts is None or self.scatter is None:
            self.means, self.counts = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
            self.scatter = x.new_zeros(x.shape[1], x.shape[1])
        # Grouped by class and in order within: the examples before each of its own class are a range of a running sum.
        order = y.argsort(stable=True)
        x, y = x[order], y[order]
        at = torch.arange(len(y), device=y.device)
        start = torch.searchsorted(y, y)
        sums = torch.cat([torch.zeros_like(x[:1]), x.cumsum(0)])
        before = self.counts[y] + (at - start)
        mean = (self.counts[y, None] * self.means[y] + sums[at] - sums[start]) / before.clamp_min(1)[:, None]
        passed = before if pooled else self.counts.sum() + order
        apart = x - mean
        self.scatter = self.scatter + (apart * (passed / (passed + 1))[:, None]).mT @ apart
        counts = self.counts + torch.bincount(y, minlength=classes)
        total = self.counts[:, None] * self.means + F.one_hot(y, classes).to(x).mT @ x
        self.means, self.counts = total / counts.clamp_min(1)[:, None], counts

    def covariance(self) -> Tensor:
        """Sigma [H, H] in float64.

        Raises:
            ValueError: no example was taken in yet.
        """
        if self.scatter is None or self.counts is None:
            raise ValueError("slda: there is no covariance before the first experience has ended.")
        return self.scatter / self.counts.sum()

    def predict(self, learner: Learner, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        """The scores, once there are any; a class not met, or not offered by the head, gets the lowest value."""
        if self.weight is None or self.offset is None or self.counts is None:
            return logits
        scores = (features.double() @ self.weight.mT + self.offset).to(torch.promote_types(logits.dtype, torch.float32))
        hidden = (logits == torch.finfo(logits.dtype).min) | (self.counts == 0)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

    def _solve(self) -> None:
        mixed = (1 - self.shrinkage) * self.covariance()
        mixed.diagonal().add_(self.shrinkage)
        assert self.means is not None
        weight = self.means @ torch.linalg.pinv(mixed, hermitian=True)
        self.weight, self.offset = weight, -0.5 * (weight * self.means).sum(1)


def oracle_approximating_shrinkage(covariance: Tensor, number: Tensor) -> Tensor:
    """(1 - s) S + s tr(S)/p I with s = min(1, ((1 - 2/p) tr(S^2) + tr(S)^2) / ((n + 1 - 2/p) (tr(S^2) - tr(S)^2/p)))
    (Chen, Wiesel, Eldar & Hero 2010, eq. 23), in the form of scikit-learn, which leaves out both 2/p.

    Args:
        covariance: S [p, p], about a known mean.
        number: n, a scalar.
    """
    p = len(covariance)
    squares, trace = covariance.square().sum(), covariance.trace()
    s = (squares + trace.square()) / ((number + 1) * (squares - trace.square() / p)).clamp_min(1e-300)
    s = s.clamp_max(1)
    shrunk = (1 - s) * covariance
    shrunk.diagonal().add_(s * trace / p)
    return shrunk
