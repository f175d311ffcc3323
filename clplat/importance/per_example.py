"""Sums of squared or absolute gradients of single examples, from batched passes.

The gradient of one example by a weight matrix is a sum over time steps of (gradient by the layer's output) x (layer's
input). One batched backward pass gives the first factor for all examples at once, since the rows of a batch do not
depend on one another; the second is known from the forward pass (Goodfellow 2015, arXiv 1510.01799; with a sum over
time before squaring). Both come from `clplat.importance.recorder`. For uses of a parameter that it does not record,
`torch.func.vmap` runs the passes of single examples side by side: slower, and right for all that it can
run. What it cannot goes example by example.

Letters: B batch, S steps, M and N rows and columns of a weight matrix, V embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.importance.recorder import Recorder
from clplat.importance.use import Use, reached
from clplat.streams.experience import Batch
from clplat.weights import functional

Cotangents = Callable[[Tensor, Batch], Iterable[Tensor]]
"""From logits [B, ...] and their batch: tensors of the logits' shape, each the gradient of one scalar per example."""

CACHE = 2**20
"""Bytes of per-example gradients formed at once on a CPU: they are read again before they leave the cache."""

AT_ONCE = 2**24
"""Numbers of per-example gradients that `torch.func.vmap` makes at once; three times as many are held."""
STEPS_AT_ONCE = 2**15
"""Time steps of all examples together that it runs at once."""

Way = Literal["taps", "mapped", "single"]


class SquaredGradients:
    """The sum over examples, and over cotangents, of squared gradients of single examples.

    Args:
        module: maps a batch to something with `logits` [B, ...]; no row may depend on another (so: eval mode).
        weights: those of its parameters that are wanted, by any names.
        way: how to begin: by recorded layers ("taps"), by `torch.func.vmap` ("mapped") or example by example ("single").
            What turns out to be impossible is left for the next one.

    Attributes:
        total: the sums so far, by name, in the parameters' shapes.
        way: the one in use.
    """

    power = 2
    """2 sums squares, 1 absolute values."""

    def __init__(self, module: nn.Module, weights: Mapping[str, nn.Parameter], way: Way = "taps") -> None:
        self.module, self.weights = module, dict(weights)
        self.way, self._checked = way, False
        self.total = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.weights.items()}

    @torch.enable_grad()
    def add(self, batch: Batch, cotangents: Cotangents) -> None:
        """Add the examples of a batch."""
        if self.way == "taps" and not self._checked:
            self._check(batch)
        if self.way == "taps" and self._add_taps(batch, cotangents, self.total):
            return
        if self.way == "mapped" and self._add_mapped(batch, cotangents, self.total):
            return
        self._add_single(batch, cotangents, self.total)

    def _check(self, batch: Batch) -> None:
        # Two examples, the second with cotangent 0, against ordinary gradients of the first: this is what tells a
        # time-major layer from a batch-major one.
        self._checked = True
        pair, first = batch.rows(torch.arange(min(2, len(batch)))), batch.rows(torch.arange(1))
        tapped = {name: torch.zeros_like(total) for name, total in self.total.items()}
        plain = {name: torch.zeros_like(total) for name, total in self.total.items()}

        def ramp(logits: Tensor, batch: Batch) -> list[Tensor]:
            values = torch.linspace(1, 2, logits[0].numel(), dtype=logits.dtype, device=logits.device)
            cotangent = torch.zeros_like(logits)
            cotangent[0] = values.view_as(logits[0])
            return [cotangent]

        if not self._add_taps(pair, ramp, tapped):
            return
        self._add_single(first, ramp, plain)
        largest = max((float(p.max()) for p in plain.values() if p.numel()), default=0.0)
        for name, right in plain.items():
            if right.numel() and float((tapped[name] - right).abs().max()) > 1e-3 * float(right.max()) + 1e-8 * largest:
                self.way = "mapped"
                return

    def _add_taps(self, batch: Batch, cotangents: Cotangents, total: dict[str, Tensor]) -> bool:
        """Add a batch by recorded layers; False, and nothing added, where a parameter is used in another way."""
        with Recorder(self.weights, len(batch)) as recorder:
            logits = self.module(batch).logits
        if recorder.untapped() | reached(logits, self.weights):
            self.way = "mapped"
            return False
        uses = recorder.uses
        edges = list(dict.fromkeys(use.edge for several in uses.values() for use in several))
        if not edges:
            return True
        for cotangent in cotangents(logits.detach(), batch):
            found = torch.autograd.grad(logits, edges, cotangent, retain_graph=True, allow_unused=True)
            by_edge = dict(zip(edges, found, strict=True))
            for name, several in uses.items():
                pairs = [(use, delta) for use in several if (delta := by_edge[use.edge]) is not None]
                if pairs:
                    _add_powers(total[name], pairs, self.power)
        return True

    def _add_mapped(self, batch: Batch, cotangents: Cotangents, total: dict[str, Tensor]) -> bool:
        """Add a batch by passes of single examples side by side; False, and nothing added, where these cannot be."""
        with torch.no_grad():
            wanted = [v.detach() for v in cotangents(self.module(batch).logits, batch)]
        if not wanted:
            return True
        place = {id(p): name for name, p in self.module.named_parameters()}
        weights = {place[id(p)]: p.detach() for p in self.weights.values()}

        def powers(row: dict[str, Any], wanted: list[Tensor]) -> dict[str, Tensor]:
            def logits(weights: dict[str, Tensor]) -> Tensor:
                return functional.call(self.module, weights, _batch_of(row)).logits[0]

            pull = torch.func.vjp(logits, weights)[1]
            sums = {name: torch.zeros_like(w) for name, w in weights.items()}
            for cotangent in wanted:
                for name, gradient in pull(cotangent)[0].items():
                    sums[name] = sums[name] + gradient.abs().pow(self.power)
            return sums

        found = {name: torch.zeros_like(w) for name, w in weights.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # one op of many goes row by row
                for rows in self._parts(batch):
                    each = torch.func.vmap(powers)(_fields(batch.rows(rows)), [v[rows] for v in wanted])
                    for name, several in each.items():
                        found[name] += several.sum(0)
        except RuntimeError as error:
            self.way = "single"
            warnings.warn(
                "Per-example gradients go example by example, which is slow: torch.func.vmap cannot run this net "
                f"({str(error).splitlines()[0]})"
            )
            return False
        for name, p in self.weights.items():
            total[name] += found[place[id(p)]]
        return True

    def _parts(self, batch: Batch) -> Sequence[Tensor]:
        size = sum(p.numel() for p in self.weights.values())
        steps = batch.x.shape[1] if batch.x.ndim == 3 or not batch.x.is_floating_point() else 1
        return torch.arange(len(batch)).split(max(1, min(AT_ONCE // max(size, 1), STEPS_AT_ONCE // steps)))

    def _add_single(self, batch: Batch, cotangents: Cotangents, total: dict[str, Tensor]) -> None:
        with torch.no_grad():
            whole = [v.detach() for v in cotangents(self.module(batch).logits, batch)]
        parameters = list(self.weights.values())
        for i in torch.arange(len(batch)).split(1):
            logits = self.module(batch.rows(i)).logits
            if not logits.requires_grad:
                continue
            for cotangent in whole:
                found = torch.autograd.grad(logits, parameters, cotangent[i], retain_graph=True, allow_unused=True)
                for name, gradient in zip(self.weights, found, strict=True):
                    if gradient is not None:
                        _add_power(total[name], gradient, self.power)


class AbsoluteGradients(SquaredGradients):
    """Sums of absolute gradients; otherwise as the base."""

    power = 1


def _fields(batch: Batch) -> dict[str, Any]:
    return {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}


def _batch_of(row: dict[str, Any]) -> Batch:
    extra = {name: t[None] for name, t in row["extra"].items()}
    return Batch(**{name: t[None] for name, t in row.items() if name != "extra"}, extra=extra)


def _add_power(total: Tensor, gradient: Tensor, power: int) -> None:
    total.addcmul_(gradient, gradient) if power == 2 else total.add_(gradient.abs())


def _add_powers(total: Tensor, pairs: list[tuple[Use, Tensor]], power: int) -> None:
    """Add sum over b of |gradient of example b|^power to `total`, for all uses of one parameter together."""
    kinds = {use.kind for use, _ in pairs}
    if kinds <= {"scale", "shift"}:
        own = total.new_zeros(len(pairs[0][1]), *total.shape)
        for use, delta in pairs:
            each = delta if use.factor is None else delta * use.factor
            own += each.reshape(len(each), -1, *total.shape).sum(1)
        total.add_(own.abs_().pow_(power).sum(0))
    elif kinds == {"rows"}:
        _add_row_powers(total, pairs, power)
    else:
        left, right = zip(*(_factors(use, delta, len(total)) for use, delta in pairs), strict=True)
        _add_product_powers(total, torch.cat(left, 1), torch.cat(right, 1), power)


def _factors(use: Use, delta: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """[B, S, M] and [B, S, N], whose product over S is the gradient of each example."""
    assert use.factor is not None
    delta = delta.reshape(len(delta), -1, delta.shape[-1])
    if use.kind == "matrix":
        return delta, use.factor.reshape(len(delta), -1, use.factor.shape[-1])
    ids = use.factor.reshape(len(delta), -1)
    return F.one_hot(ids, rows).to(delta.dtype) * (ids != use.skip)[..., None], delta


def _add_product_powers(total: Tensor, left: Tensor, right: Tensor, power: int) -> None:
    if left.shape[1] == 1:
        total.addmm_(left[:, 0].abs().pow_(power).mT, right[:, 0].abs().pow_(power))
        return
    on_cpu = total.device.type == "cpu"
    chunk = max(1, (CACHE if on_cpu else 128 * CACHE) // (total.numel() * total.element_size()))
    for one, other in zip(left.split(chunk), right.split(chunk), strict=True):
        gradients = torch.bmm(one.mT, other)
        if on_cpu:
            for gradient in gradients:
                _add_power(total, gradient, power)
        else:
            total.add_(gradients.abs_().pow_(power).sum(0))


def _add_row_powers(total: Tensor, pairs: list[tuple[Use, Tensor]], power: int) -> None:
    ids = torch.cat([use.factor.reshape(len(delta), -1) for use, delta in pairs if use.factor is not None], 1)
    deltas = [
        delta.reshape(len(delta), -1, delta.shape[-1]) * (use.factor != use.skip).reshape(len(delta), -1, 1)
        for use, delta in pairs
        if use.factor is not None
    ]
    example = torch.arange(len(ids), device=ids.device)[:, None]
    keys, place = (example * len(total) + ids).flatten().unique(return_inverse=True)
    sums = total.new_zeros(len(keys), total.shape[1]).index_add_(0, place, torch.cat(deltas, 1).flatten(0, 1))
    total.index_add_(0, keys % len(total), sums.abs_().pow_(power))
