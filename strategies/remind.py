"""REMIND: replay of compressed features through the upper part of a net (Hayes et al. 2020, arXiv 1910.02509)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Net, Output
from clplat.rehearsal.class_rate import mean_class_rate
from clplat.rehearsal.largest_first import LargestFirst
from clplat.rehearsal.policies import Reservoir
from clplat.rehearsal.product_quantizer import ProductQuantizer
from clplat.rehearsal.quantised import OTHER_MASK, OTHER_Y, Quantised, coded, decoded, mixed
from clplat.strategy import Session, Strategy
from clplat.streams.batch import concatenate
from clplat.streams.experience import Batch, Data, Experience, Stream
from clplat.streams.loader import stable_seed
from clplat.streams.union import UnionData

READ = 256  # examples of the base set encoded at once


class Remind(Strategy):
    """REMIND: a frozen, quantised front; only what lies above block `cut` goes on learning.

    1. Base initialisation: the first `base_experiences` experiences are trained together, the whole net and as usual.
    2. Then all below `cut` is frozen. A product quantiser is fitted to the features that enter block `cut` on the base
       training set, each valid time step one vector; the base set is encoded into the store.
    3. From then on each step encodes and decodes the current rows, decodes `rows` stored ones, and trains what is above
       on all of them with equal weight. After the step the current rows' codes enter the store. With `mixup` = a > 0
       twice as many rows are drawn and mixed in pairs, A and B, with one lambda ~ Beta(a, a) a step: features
       lambda A + (1 - lambda) B, loss lambda J(y_A) + (1 - lambda) J(y_B); see `clplat.rehearsal.quantised.mixed`.
    4. Features are quantised at test time as well.

    The learning rate is a function of how often a class was seen: for the row that is number k (from 0) of its class in
    the stream, that of the optimiser and schedule times final ** min(1, every * floor(k / every) / final_after). The
    defaults are the paper's steps, with `optimizer.lr=0.1`. A batch takes the mean of its current rows' rates.
    The paper's stream is `training.batch_size=1 training.epochs=1`; larger batches and more passes are an extension.
    Deviations: no random resized crops; the quantiser sees `fit_vectors` vectors, not all; the rate never falls below
    `final`, and is set before the step (the authors' code sets it after); among classes with equally many rows the one
    met first loses a row.

    Args:
        capacity: sequences stored.
        cut: the block before which the net is cut, 0 to the number of blocks (then only the head learns).
        parts: M bytes a time step; the width of the features must be a multiple of it (paper: 32 for width 512).
        codes: centroids a part, 2 to 256.
        fit_vectors: the quantiser is fitted to at most this many vectors, of whole sequences drawn at random.
        iterations: of its k-means, at most.
        rows: replayed rows a step, null: as many as the batch has, 0: none. Never more than are held (half, if mixed).
        mixup: a of Beta(a, a), 0: no mixing.
        policy: "class_balanced" (`LargestFirst`) or "reservoir" (for targets that are not one class a sequence).
        final: factor of the learning rate that a class ends with, in 0..1; 1: no schedule by class.
        final_after: rows of a class until then.
        every: the rate is lowered each time this many rows of a class were seen.
        base_experiences: experiences of the base, trained as the first one on their union.
        base_passes: passes over the base for each over other experiences.
        seed: of the quantiser, the store and mixup.
    """

    needs = frozenset({"boundaries"})
    not_carried = "its store holds the inside of a net that starts fresh"

    def __init__(
        self,
        capacity: int,
        cut: int = 1,
        parts: int = 16,
        codes: int = 256,
        fit_vectors: int = 16384,
        iterations: int = 25,
        rows: int | None = 50,
        mixup: float = 0.1,
        policy: str = "class_balanced",
        final: float = 0.01,
        final_after: int = 1300,
        every: int = 100,
        base_experiences: int = 1,
        base_passes: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(1, capacity=capacity, fit_vectors=fit_vectors, final_after=final_after, every=every)
        checks.at_least(1, base_experiences=base_experiences, base_passes=base_passes)
        checks.at_least(0, cut=cut, rows=rows, mixup=mixup)
        checks.above(0, final=final)
        checks.within(0, 1, "1: no schedule by class", final=final)
        checks.one_of("policy", policy, ("class_balanced", "reservoir"))
        self.quantizer = ProductQuantizer(parts, codes, iterations, seed)
        self.store = LargestFirst(capacity, seed) if policy == "class_balanced" else Reservoir(capacity, seed)
        self.cut, self.fit_vectors, self.rows, self.mixup = cut, fit_vectors, rows, mixup
        self.final, self.final_after, self.every = final, final_after, every
        self.base_experiences, self.base_passes, self.seed = base_experiences, base_passes, seed
        self.passes = 1.0 if rows == 0 else 2.0
        mixing = ["objective"] if mixup > 0 and rows != 0 else []
        self.claims = frozenset({"codes", "data", "layers", *mixing})
        self.met: Counter[int] = Counter()
        """How many rows of each class the stream has shown so far, the base not counted."""
        self._base: Data | None = None
        # Of the batch being learned: its classes, its codes, and the share of the batch's own targets.
        self._classes: Tensor | None = None
        self._fresh: Batch | None = None
        self._share = 1.0

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Put a net in place that can be frozen and quantised at the cut; refuse what cannot be combined."""
        net = learner.net
        if self.base_experiences >= len(stream):
            raise ValueError(
                f"base_experiences: got {self.base_experiences}, the stream has {len(stream)} and none would be left to "
                "learn from codes: choose fewer."
            )
        if type(net) is not Net:
            raise ValueError(
                f"cut: got a net of class {type(net).__name__}, whose forward is its own, and REMIND cuts nets of plain "
                "embedding, blocks and head: choose another learner."
            )
        if self.cut > len(net.blocks):
            raise ValueError(
                f"cut: got {self.cut}, the net has {len(net.blocks)} blocks and nothing lies above a cut after "
                f"them but the head: choose 0..{len(net.blocks)}."
            )
        made = Quantised(net, self.cut, self.quantizer)
        if not any(True for module in made.front() for _ in module.parameters()):
            raise ValueError(f"cut: got {self.cut}, nothing with weights lies below it: choose a higher one.")
        if not learner.objective.one_class and (isinstance(self.store, LargestFirst) or self.final != 1):
            raise ValueError(
                "policy: 'class_balanced', and final other than 1, need one class a sequence, and "
                f"{type(learner.objective).__name__} has none: set strategy.remind.policy=reservoir and "
                "strategy.remind.final=1."
            )
        with learner.evaluating():
            features = made.front_features(stream[0].train.batch(torch.arange(1)).to(learner.device))[0]
        self.quantizer.check_width(features.shape[-1])
        learner.net = made

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """Index 0: the whole base set; then nothing up to the end of the base; then the stream as it comes."""
        base = stream.experiences[: self.base_experiences]
        if index == 0:
            self._base = base[0].train if len(base) == 1 else UnionData([e.train for e in base])
            data = self._base if self.base_passes == 1 else UnionData([self._base] * self.base_passes)
            return Session(data, float(len(base) * self.base_passes), base[1:])
        if index < len(base):
            return Session(None, 0.0)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        net = _quantised(learner)
        if self.quantizer:
            net.freeze()

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """After the base: freeze, fit the quantiser, fill the store."""
        if self.quantizer:
            return
        data = experience.train if self._base is None else self._base
        net, self._base = _quantised(learner), None
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "remind"))
        order = torch.randperm(len(data), generator=generator).split(READ)
        with learner.evaluating():
            found, count = [], 0
            for batch in (b.to(learner.device) for b in data.batches(order)):
                hidden, valid = net.front_features(batch)[0], batch.valid()
                found.append(hidden.flatten(0, -2) if valid is None else hidden[valid])
                count += len(found[-1])
                if count >= self.fit_vectors:
                    break
            self.quantizer.fit(torch.cat(found)[: self.fit_vectors])
            for batch in data.batches(order):
                self._insert(coded(net, batch.to(learner.device)), None)
        net.freeze()
        learner.handover.forget()  # what a kept optimiser knows is of weights that do not learn any more

    def rate(self, step: int, steps: int, batch: Batch, factor: float) -> float:
        """The factor of the classes in the batch, on top of the schedule's own."""
        self._classes = batch.y if batch.y.ndim == 1 and not batch.y.is_floating_point() else None
        return (
            factor
            if self.final == 1 or not self.quantizer
            else factor * mean_class_rate(self._classes, self.met, self.final, self.final_after, self.every)
        )

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The decoded features of the current rows and, behind them, those of stored (and mixed) ones."""
        if not self.quantizer:
            return batch
        net = _quantised(learner)
        current = coded(net, batch)
        self._fresh, self._share = current, 1.0
        wanted = len(batch) if self.rows is None else self.rows
        drawn = min(2 * wanted if self.mixup else wanted, len(self.store))
        if self.mixup:
            drawn -= drawn % 2
        if not drawn:
            return decoded(current, self.quantizer.decode(current.x))
        joined = concatenate([current, self.store.sample(drawn).to(batch.x.device)])
        hidden = self.quantizer.decode(joined.x)
        if self.mixup:
            rng = np.random.default_rng(stable_seed(self.seed, "mixup", learner.steps))
            self._share = float(rng.beta(self.mixup, self.mixup))
            return mixed(learner, joined, hidden, drawn // 2, self._share)
        return decoded(joined, hidden)

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        """lambda J(y_A) + (1 - lambda) J(y_B); the learner's own where nothing is mixed."""
        own = learner.objective(output.logits, batch)
        if OTHER_Y not in batch.extra:
            return own
        other = replace(batch, y=batch.extra[OTHER_Y], mask=batch.extra.get(OTHER_MASK))
        return self._share * own + (1 - self._share) * learner.objective(output.logits, other)

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        """Count the current rows' classes and store their codes."""
        if self._fresh is None:
            return
        fresh, classes = self._fresh, self._classes
        self._fresh = self._classes = None
        if learner.objective.one_class and (self.final != 1 or isinstance(self.store, LargestFirst)):
            classes = fresh.y.cpu() if classes is None else classes
            self.met.update(classes.tolist())
        self._insert(fresh, classes)

    def stored_bytes(self) -> int:
        """Bytes of the codes held, their targets (and lengths, masks, task labels), and the centroids."""
        return self.store.stored_bytes() + self.quantizer.stored_bytes()

    def get_extra_state(self) -> dict[str, Any]:
        return {"met": dict(self.met)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.met = Counter(state["met"])

    def _insert(self, codes: Batch, classes: Tensor | None) -> None:
        if isinstance(self.store, LargestFirst):
            self.store.insert(codes, classes)
        else:
            self.store.insert(codes)


def _quantised(learner: Learner) -> Quantised:
    assert isinstance(learner.net, Quantised)  # by the claims, no other strategy puts one in its place
    return learner.net
