"""REMIND: replay of compressed features through the upper part of a net (Hayes et al. 2020, arXiv 1910.02509)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from clplat.evaluate import evaluation
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Block, Net, Output, State
from clplat.rehearsal.buffer import Buffer
from clplat.rehearsal.policies import Reservoir
from clplat.rehearsal.product_quantizer import ProductQuantizer, QuantizerError
from clplat.strategy import Session, Strategy
from clplat.streams.data import UnionData
from clplat.streams.experience import Batch, Data, Experience, Stream, StreamError, concatenate
from clplat.streams.loader import stable_seed

READ = 256
"""Examples of the base set encoded at once."""

DECODED = "remind_decoded"
"""A field of `Batch.extra`, [B] bool: the inputs are no inputs but the decoded features that enter block `cut`."""

OTHER_Y, OTHER_MASK = "remind_y", "remind_mask"
"""Fields of `Batch.extra`: targets and mask of the rows that were mixed into the batch's own."""


class Remind(Strategy):
    """Learns a stream on a frozen, quantised front: only what lies above block `cut` goes on learning.

    1. Base initialisation: the first `base_experiences` experiences are trained together, the whole net and as usual.
    2. Then all below `cut` is frozen (weights, buffers, evaluation mode). A product quantiser is fitted to the features
       that enter block `cut` on the base training set, each valid time step one vector; the base set is encoded
       into the store.
    3. From then on each step encodes and decodes the current rows, decodes `rows` stored ones, and trains what is above
       on all of them with equal weight. After the step the current rows' codes enter the store. With `mixup` = a > 0
       twice as many rows are drawn and mixed in pairs, A and B, with one lambda ~ Beta(a, a) a step: features
       lambda A + (1 - lambda) B, loss lambda J(y_A) + (1 - lambda) J(y_B). Current rows are not mixed. A pair of
       different lengths is cropped to the first steps that both have; a pair of different tasks (or of different
       experiences, where only an experience's own classes compete) stays A alone.
    4. Features are quantised at test time as well.

    The learning rate is a function of how often a class was seen: for the row that is number k (from 0) of its class in
    the stream, that of the optimiser and schedule times final ** min(1, every * floor(k / every) / final_after): the
    paper's steps from 0.1 to 0.001 with the defaults and `optimizer.lr=0.1`. A batch of several rows takes the
    mean of its current rows' rates. It is set before the step, from numbers on the CPU: the classes are noted
    where a batch is read, before it goes to the device.

    The paper's stream is `training.batch_size=1 training.epochs=1`; larger batches, and more passes (which offer every
    row to the store again), are an extension. Deviations and open details: the paper's random resized crops of
    feature maps have no counterpart on sequences and are left out; the quantiser sees `fit_vectors` vectors, not all;
    the rate never falls below `final` (a class of the
    paper ends there); it is set before the step for the row's own class (the authors' code sets it after); among
    classes with equally many rows the one met first loses a row.

    Args:
        capacity: sequences stored.
        cut: the block before which the net is cut, 0 to the number of blocks (then only the head learns).
        parts: M bytes a time step; the width of the features must be a multiple of it (paper: 32 for width 512).
        codes: centroids a part, 2 to 256.
        fit_vectors: the quantiser is fitted to at most this many vectors, of whole sequences drawn at random.
        iterations: of its k-means, at most.
        rows: replayed rows a step, null: as many as the batch has, 0: none. Never more than are held (half, if mixed).
        mixup: a of Beta(a, a), 0: no mixing.
        policy: "class_balanced" (a full store drops a random row of the class with most rows, the new one included) or
            "reservoir" (a uniform sample of all, for targets that are not one class a sequence).
        final: factor of the learning rate that a class ends with, in 0..1; 1: no schedule by class.
        final_after: rows of a class until then.
        every: the rate is lowered each time this many rows of a class were seen.
        base_experiences: how many experiences are the base; they are trained as the first one, on their union.
        base_passes: the base is passed over this many times as often as other experiences.
        seed: of the quantiser, the store and mixup.

    Raises:
        ValueError: options that are not allowed.
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
        least = {
            "capacity": (capacity, 1),
            "cut": (cut, 0),
            "fit_vectors": (fit_vectors, 1),
            "rows": (0 if rows is None else rows, 0),
            "mixup": (mixup, 0),
            "final_after": (final_after, 1),
            "every": (every, 1),
            "base_experiences": (base_experiences, 1),
            "base_passes": (base_passes, 1),
        }
        for name, (given, lowest) in least.items():
            if not given >= lowest:
                raise ValueError(f"remind.{name}: got {given}, it must be at least {lowest}.")
        if not 0 < final <= 1:
            raise ValueError(f"remind.final: got {final}, it must be above 0 and at most 1 (1: no schedule by class).")
        if policy not in ("class_balanced", "reservoir"):
            raise ValueError(f"remind.policy: got {policy!r}, allowed are 'class_balanced' and 'reservoir'.")
        try:
            self.quantizer = ProductQuantizer(parts, codes, iterations, seed)
        except ValueError as error:
            raise ValueError(f"remind.{error}") from error
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
        # Of the batch being learned: its classes on the CPU, its codes, and the share of the batch's own targets.
        self._classes: Tensor | None = None
        self._fresh: Batch | None = None
        self._share = 1.0

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Put a net in place that can be frozen and quantised at the cut; refuse what cannot be combined."""
        net, kind = learner.net, learner.objective.kind
        if type(net) is not Net:
            raise ValueError(
                f"remind: got a net of class {type(net).__name__}, whose forward is its own (a hypernetwork's, say): "
                "REMIND cuts nets of plain embedding, blocks, readout and head; drop what replaces it."
            )
        if self.cut > len(net.blocks):
            raise ValueError(
                f"remind.cut: got {self.cut}, the net has {len(net.blocks)} blocks and nothing lies above a cut after "
                f"them but the head: choose 0..{len(net.blocks)}."
            )
        made = Quantised(net, self.cut, self.quantizer)
        if not any(True for module in made.front() for _ in module.parameters()):
            raise ValueError(f"remind.cut: got {self.cut}, nothing with weights lies below it: choose a higher one.")
        if kind != "class" and (isinstance(self.store, LargestFirst) or self.final != 1):
            raise ValueError(
                f"remind: policy 'class_balanced' and final other than 1 need one class a sequence, the targets are "
                f"{kind!r}: set strategy.remind.policy=reservoir and strategy.remind.final=1."
            )
        learner.net = made

    def session(self, stream: Stream, index: int, session: Session) -> Session:
        """Index 0: the whole base set; then nothing up to the end of the base; then the stream as it comes."""
        base = stream.experiences[: self.base_experiences]
        if len(base) == len(stream):
            raise StreamError(
                f"remind.base_experiences: got {self.base_experiences}, the stream has {len(stream)} and none would be "
                "left to learn from codes: choose fewer."
            )
        if index == 0:
            self._base = base[0].train if len(base) == 1 else UnionData([e.train for e in base])
            data = self._base if self.base_passes == 1 else UnionData([self._base] * self.base_passes)
            return Session(data, float(len(base) * self.base_passes), base[1:])
        if index < len(base):
            return Session(None, 0.0)
        return session

    def enter(self, learner: Learner, experience: Experience) -> None:
        """Freeze what lies below the cut, once the quantiser is there."""
        net = _quantised(learner)
        if self.quantizer:
            net.freeze()

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Before the first experience: does the width of the features fit?"""
        if experience.index > 0:
            return
        with evaluation(learner):
            one = experience.train.batch(torch.arange(1)).to(learner.device)
            features = _quantised(learner).front_features(one)[0]
        try:
            self.quantizer.check_width(features.shape[-1])
        except QuantizerError as error:
            raise QuantizerError(f"remind.{error}") from error

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """After the base: freeze, fit the quantiser, fill the store."""
        if self.quantizer:
            return
        data = experience.train if self._base is None else self._base
        net, self._base = _quantised(learner), None
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "remind"))
        order = torch.randperm(len(data), generator=generator).split(READ)
        with evaluation(learner):
            found, count = [], 0
            for batch in (b.to(learner.device) for b in data.batches(order)):
                hidden, valid = net.front_features(batch)[0], batch.valid()
                found.append(hidden.flatten(0, -2) if valid is None else hidden[valid])
                count += len(found[-1])
                if count >= self.fit_vectors:
                    break
            self.quantizer.fit(torch.cat(found)[: self.fit_vectors])
            for batch in data.batches(order):
                self._insert(_coded(net, batch.to(learner.device)), None)
        net.freeze()
        learner.handover.forget()  # what a kept optimiser knows is of weights that do not learn any more

    def rate(self, step: int, steps: int, batch: Batch, factor: float) -> float:
        """The factor of the classes in the batch, on top of the schedule's own."""
        self._classes = batch.y if batch.y.ndim == 1 and not batch.y.is_floating_point() else None
        return factor if self.final == 1 or not self.quantizer else factor * self.class_factor(self._classes)

    def class_factor(self, classes: Tensor | None) -> float:
        """The factor of the learning rate for rows of `classes` [B]: the mean of those of the single rows."""
        if classes is None or len(classes) == 0:
            return 1.0
        ahead, total = Counter(), 0.0
        for label in classes.tolist():
            seen = self.met[label] + ahead[label]
            total += class_rate(seen, self.final, self.final_after, self.every)
            ahead[label] += 1
        return total / len(classes)

    def batch(self, learner: Learner, batch: Batch) -> Batch:
        """The decoded features of the current rows and, behind them, those of stored (and mixed) ones."""
        if not self.quantizer:
            return batch
        net = _quantised(learner)
        current = _coded(net, batch)
        self._fresh, self._share = current, 1.0
        wanted = len(batch) if self.rows is None else self.rows
        drawn = min(2 * wanted if self.mixup else wanted, len(self.store))
        if self.mixup:
            drawn -= drawn % 2
        if not drawn:
            return _decoded(current, self.quantizer.decode(current.x))
        joined = concatenate([current, self.store.sample(drawn).to(batch.x.device)])
        hidden = self.quantizer.decode(joined.x)
        if self.mixup:
            rng = np.random.default_rng(stable_seed(self.seed, "mixup", learner.steps))
            self._share = float(rng.beta(self.mixup, self.mixup))
            return _mixed(learner, joined, hidden, drawn // 2, self._share)
        return _decoded(joined, hidden)

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
        if learner.objective.kind == "class" and (self.final != 1 or isinstance(self.store, LargestFirst)):
            classes = fresh.y.cpu() if classes is None else classes
            self.met.update(classes.tolist())
        self._insert(fresh, classes)

    def stored_bytes(self) -> int:
        """Bytes of the codes held, their targets (and lengths, masks, task labels), and the centroids."""
        return self.store.stored_bytes() + self.quantizer.stored_bytes()

    def get_extra_state(self) -> dict[str, Any]:
        """How many rows of each class were seen."""
        return {"met": dict(self.met)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        self.met = Counter(state["met"])

    def _insert(self, codes: Batch, classes: Tensor | None) -> None:
        if isinstance(self.store, LargestFirst):
            self.store.insert(codes, classes)
        else:
            self.store.insert(codes)


def class_rate(seen: int, final: float, final_after: int, every: int) -> float:
    """The factor of the learning rate for a class of which `seen` rows came before.

    gamma ** floor(seen / every) with gamma = final ** (every / final_after), and never below `final`.
    """
    return final ** min(1.0, every * (seen // every) / final_after)


class Quantised(Net):
    """A net cut before block `cut`, whose features at the cut go through a quantiser as soon as that is fitted.

    It shares the modules of the net it is made of, under the same names. Inputs of a batch marked as `DECODED` enter at
    the cut.

    Args:
        net: what is cut.
        cut: the block before which.
        quantizer: shared with the strategy, and part of the net so that a copy of the net has one.
    """

    def __init__(self, net: Net, cut: int, quantizer: ProductQuantizer) -> None:
        super().__init__(net.embedding, cast(list[Block], list(net.blocks)), net.head, net.per_step, net.readout)
        self.cut, self.quantizer, self.training = cut, quantizer, net.training

    def front(self) -> list[nn.Module]:
        """What lies below the cut."""
        return [self.embedding, *self.blocks[: self.cut]]

    def freeze(self) -> None:
        """No gradients below the cut, and evaluation mode, in which no module changes its buffers."""
        for module in self.front():
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Quantised:
        """As for any net; a frozen front stays in evaluation mode."""
        super().train(mode)
        if self.quantizer:
            self.freeze()
        return self

    def forward(self, batch: Batch, state: Sequence[State] | None = None, reset: Tensor | None = None) -> Output:
        """As for any net; `DECODED` batches have no states below the cut."""
        if not self.quantizer:
            return super().forward(batch, state, reset)
        hidden, below = batch.x, (None,) * self.cut
        if DECODED not in batch.extra:
            hidden, below = self.front_features(batch, state, reset)
            hidden = self.quantizer.decode(self.quantizer.encode(hidden))
        output = self.upper(hidden, self.cut, batch, None if state is None else state[self.cut :], reset)
        return replace(output, state=(*below, *output.state))

    @torch.no_grad()
    def front_features(
        self, batch: Batch, state: Sequence[State] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """What enters block `cut`, [B, T, H] or [B, H], without gradients, and the states below."""
        return self.lower(batch, self.cut, None if state is None else state[: self.cut], reset)


class LargestFirst(Buffer):
    """A store that, when full, drops a random row of the class that holds most, the new row counted among them.

    So it is always full once it was, and small classes are kept whole while larger ones shrink. That is another law
    than that of `clplat.rehearsal.policies.ClassBalanced`, whose classes have equal shares and leave room empty that they do not
    need. Among equally large classes the one met first loses a row.

    Args:
        capacity: rows held.
        seed: of the choice of what is dropped, and of what is sampled.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self.slots: dict[int, list[int]] = {}
        """The slots of each class held, in the order in which the classes came."""
        self._labels: Tensor | None = None

    def insert(self, batch: Batch, labels: Tensor | None = None) -> None:
        """Offer all rows, in order; `labels` [B] on the CPU, without which targets on a GPU are waited for."""
        self._labels = batch.y.cpu() if labels is None else labels
        super().insert(batch)

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._labels is not None
        held, kept = len(self), dict[int, int]()  # slot -> row
        draws = torch.rand(len(batch), generator=self._generator, dtype=torch.float64).tolist()
        for row, (label, draw) in enumerate(zip(self._labels.tolist(), draws, strict=True)):
            own = self.slots.setdefault(label, [])
            if held < self.capacity:
                slot, held = held, held + 1
            else:
                sizes = {c: len(slots) + (c == label) for c, slots in self.slots.items()}
                largest = max(sizes, key=sizes.__getitem__)
                dropped, at = self.slots[largest], int(draw * sizes[largest])
                if at == len(dropped):
                    continue  # the new row itself
                slot, last = dropped[at], dropped.pop()
                if at < len(dropped):
                    dropped[at] = last
            own.append(slot)
            kept[slot] = row
        self._filled = torch.arange(held)
        return torch.tensor(list(kept.values()), dtype=torch.int64), torch.tensor(list(kept), dtype=torch.int64)

    def get_extra_state(self) -> dict[str, Any]:
        """What every buffer has, and the slots of each class."""
        slots = {label: torch.tensor(slots, dtype=torch.int64) for label, slots in self.slots.items()}
        return super().get_extra_state() | {"slots": slots}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        super().set_extra_state(state)
        self.slots = {label: slots.tolist() for label, slots in state["slots"].items()}


def _quantised(learner: Learner) -> Quantised:
    net = learner.net
    if not isinstance(net, Quantised):
        raise ValueError(
            f"remind: another strategy put a net of class {type(net).__name__} in the place of the quantised one: "
            "drop one of the two."
        )
    return net


def _coded(net: Quantised, batch: Batch) -> Batch:
    """The rows with codes [B, T, M] for inputs."""
    codes = net.quantizer.encode(net.front_features(batch)[0])
    return replace(batch, x=codes, index=None, extra={})


def _decoded(batch: Batch, hidden: Tensor, extra: dict[str, Tensor] | None = None) -> Batch:
    """The rows with features [B, T, H] for inputs, marked as such."""
    marked = {DECODED: torch.ones(len(batch), dtype=torch.bool, device=hidden.device)}
    return replace(batch, x=hidden, extra=marked | (extra or {}))


def _mixed(learner: Learner, joined: Batch, hidden: Tensor, pairs: int, share: float) -> Batch:
    """The current rows and, behind them, `pairs` mixtures of the stored rows A and B at the end of `joined`."""
    device, current = hidden.device, len(joined) - 2 * pairs
    first = torch.arange(current + pairs, device=device)
    second = torch.where(first < current, first, first + pairs)
    alone = torch.zeros_like(first, dtype=torch.bool)
    if joined.task is not None:
        alone |= joined.task[first] != joined.task[second]
    if learner.logit_mask == "experience" and learner.objective.kind == "class":
        alone |= ~learner.same_experience[joined.y[first], joined.y[second]]
    second = torch.where(alone, first, second)
    one, two = joined.rows(first), joined.rows(second)
    if one.lengths is not None and two.lengths is not None:
        one = replace(one, lengths=torch.minimum(one.lengths, two.lengths))
    mixed = torch.lerp(hidden[second[current:]], hidden[current : current + pairs], share)
    other = {OTHER_Y: two.y} | ({} if two.mask is None else {OTHER_MASK: two.mask})
    return _decoded(one, torch.cat([hidden[:current], mixed]), other)
