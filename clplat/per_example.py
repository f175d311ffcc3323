"""Squared gradients of single examples, from batched passes.

The gradient of one example by a weight matrix is a sum over time steps of (gradient by the layer's output) x (layer's
input). One batched backward pass gives the first factor for all examples at once, since the rows of a batch do not
depend on one another; the second is known from the forward pass (Goodfellow 2015, arXiv 1510.01799; with a sum over
time before squaring). To see both, the net runs under a `TorchFunctionMode` that records linear layers, embeddings,
normalisations and recurrences. Parameters used in any other way are found in the autograd graph, and then every
example gets passes of its own: slow, and right for everything.

Letters: B batch, S steps, M and N rows and columns of a weight matrix, V embeddings.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clplat.streams.experience import Batch

Cotangents = Callable[[Tensor, Batch], Iterable[Tensor]]
"""From logits [B, ...] and their batch: tensors of the logits' shape, each the gradient of one scalar per example."""

CACHE = 2**20
"""Bytes of per-example gradients formed at once on a CPU: they are read again before they leave the cache."""


class SquaredGradients:
    """The sum over examples, and over cotangents, of squared gradients of single examples.

    Args:
        forward: maps a batch to logits [B, ...]; no row may depend on another (so: eval mode).
        weights: the parameters, by name.
        taps: False gives every example passes of its own from the start.

    Attributes:
        total: the sums so far, by name, in the parameters' shapes.
    """

    def __init__(
        self, forward: Callable[[Batch], Tensor], weights: Mapping[str, nn.Parameter], taps: bool = True
    ) -> None:
        self.forward, self.weights = forward, dict(weights)
        self.taps, self._checked = taps, False
        self.total = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.weights.items()}

    @torch.enable_grad()
    def add(self, batch: Batch, cotangents: Cotangents) -> None:
        """Add the examples of a batch."""
        if self.taps and not self._checked:
            self._check(batch)
        if not (self.taps and self._add_taps(batch, cotangents, self.total)):
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
                self._give_up([name], "in a layer whose first dimension is not the batch")
                return

    def _add_taps(self, batch: Batch, cotangents: Cotangents, total: dict[str, Tensor]) -> bool:
        """Add a batch by recorded layers; False, and nothing added, where a parameter is used in another way."""
        with _Recorder(self.weights, len(batch)) as recorder:
            logits = self.forward(batch)
        other = recorder.untapped() | _reached(logits, self.weights)
        if other:
            self._give_up(sorted(other), "outside of recorded layers")
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
                    _add_squares(total[name], pairs)
        return True

    def _add_single(self, batch: Batch, cotangents: Cotangents, total: dict[str, Tensor]) -> None:
        with torch.no_grad():
            whole = [v.detach() for v in cotangents(self.forward(batch), batch)]
        parameters = list(self.weights.values())
        for i in torch.arange(len(batch)).split(1):
            logits = self.forward(batch.rows(i))
            if not logits.requires_grad:
                continue
            for cotangent in whole:
                found = torch.autograd.grad(logits, parameters, cotangent[i], retain_graph=True, allow_unused=True)
                for name, gradient in zip(self.weights, found, strict=True):
                    if gradient is not None:
                        total[name].addcmul_(gradient, gradient)

    def _give_up(self, names: Sequence[str], where: str) -> None:
        self.taps = False
        warnings.warn(
            f"Per-example gradients go example by example, which is slow: {', '.join(names)} is used {where} "
            "(fast ones: linear, embedding, layer_norm, rms_norm, batch_norm, LSTM, GRU, RNN, batch first)."
        )


Kind = Literal["matrix", "rows", "scale", "shift"]


@dataclass(frozen=True, slots=True)
class _Use:
    """One use of a parameter.

    Attributes:
        kind: what the parameter does: matrix (of a linear layer), rows (of an embedding), scale, shift.
        edge: where the gradient by the layer's output arrives, [B, ...].
        factor: what it is multiplied with: inputs [B, ..., N], ids [B, ...], normalised inputs; None for shifts.
        version: of the factor when it was used.
        skip: an embedding that gets no gradient, or -1.
    """

    kind: Kind
    edge: GradientEdge
    factor: Tensor | None
    version: int
    skip: int = -1


class _Recorder(TorchFunctionMode):
    """Runs layers with detached parameters and notes how each parameter was used."""

    def __init__(self, weights: Mapping[str, nn.Parameter], rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.uses: dict[str, list[_Use]] = defaultdict(list)
        self._names = {id(p): name for name, p in weights.items()}
        self._handlers: dict[Any, Callable[..., Any]] = {
            F.linear: self._linear,
            F.embedding: self._embedding,
            F.layer_norm: self._layer_norm,
            F.rms_norm: self._rms_norm,
            F.batch_norm: self._batch_norm,
            torch.lstm: lambda x, hx, *rest: self._recurrence(self._lstm, x, hx, *rest),
            torch.gru: lambda x, hx, *rest: self._recurrence(self._gru, x, (hx,), *rest),
            torch.rnn_tanh: lambda x, hx, *rest: self._recurrence(self._tanh, x, (hx,), *rest),
            torch.rnn_relu: lambda x, hx, *rest: self._recurrence(self._relu, x, (hx,), *rest),
            torch.lstm_cell: lambda x, hx, *rest: self._cell(self._lstm, x, hx, *rest),
            torch.gru_cell: lambda x, hx, *rest: self._cell(self._gru, x, (hx,), *rest),
            torch.rnn_tanh_cell: lambda x, hx, *rest: self._cell(self._tanh, x, (hx,), *rest),
            torch.rnn_relu_cell: lambda x, hx, *rest: self._cell(self._relu, x, (hx,), *rest),
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):  # the mode is off in here
        handler, kwargs = self._handlers.get(func), kwargs or {}
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def untapped(self) -> set[str]:
        """Parameters whose uses cannot be put together, or whose inputs were changed after use."""
        bad = set()
        for name, several in self.uses.items():
            kinds = {use.kind for use in several}
            changed = any(use.factor is not None and use.factor._version != use.version for use in several)
            if changed or not (kinds <= {"matrix", "rows"} or kinds <= {"scale", "shift"}):
                bad.add(name)
        return bad

    def _applies(self, x: Tensor, *parameters: Tensor | None) -> bool:
        return x.ndim >= 2 and len(x) == self.rows and any(id(p) in self._names for p in parameters)

    def _cut(self, parameter: Tensor) -> Tensor:
        return parameter.detach() if id(parameter) in self._names else parameter

    def _note(self, kind: Kind, out: Tensor, parameter: Tensor | None, factor: Tensor | None, skip: int = -1) -> None:
        if parameter is not None and id(parameter) in self._names:
            kept = None if factor is None else factor.detach()
            version = 0 if kept is None else kept._version
            self.uses[self._names[id(parameter)]].append(_Use(kind, get_gradient_edge(out), kept, version, skip))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if not self._applies(input, weight, bias):
            return NotImplemented
        out = F.linear(_seed(input), self._cut(weight), None if bias is None else self._cut(bias))
        if out._is_view():  # of a matrix [B * T, N]; an activation in place would turn the graph round to that
            out = torch.ops.aten._unsafe_view(out, out.shape)
        self._note("matrix", out, weight, input)
        self._note("shift", out, bias, None)
        return out

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        special = max_norm is not None or scale_grad_by_freq or sparse
        if special or id(weight) not in self._names or len(input) != self.rows:
            return NotImplemented
        out = F.embedding(input, _seed(weight.detach()))
        skip = -1 if padding_idx is None else padding_idx % len(weight)
        self._note("rows", out, weight, input, skip)
        return out

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        if not self._applies(input, weight, bias):
            return NotImplemented
        return self._affine(F.layer_norm(_seed(input), normalized_shape, None, None, eps), weight, bias)

    def _rms_norm(
        self, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Any:
        if not self._applies(input, weight):
            return NotImplemented
        return self._affine(F.rms_norm(_seed(input), normalized_shape, None, eps), weight, None)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if training or not self._applies(input, weight, bias):
            return NotImplemented
        normal = F.batch_norm(_seed(input), running_mean, running_var, None, None, False, momentum, eps)
        return self._affine(normal.movedim(1, -1), weight, bias).movedim(-1, 1)

    def _affine(self, normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = normal if weight is None else normal * self._cut(weight)
        out = out if bias is None else out + self._cut(bias)
        self._note("scale", out, weight, normal)
        self._note("shift", out, bias, None)
        return out

    def _recurrence(
        self,
        layer: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
        x: Tensor,
        hx: Sequence[Tensor],
        params: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(has_biases, bool):  # a packed sequence: other arguments in these places
            return NotImplemented
        x = x if batch_first else x.transpose(0, 1)
        width, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
        projected = len(params) != width * num_layers * directions
        if projected or (dropout and train) or not self._applies(x, *params):
            return NotImplemented
        finals: list[tuple[Tensor, ...]] = []
        for number in range(num_layers):
            outs = []
            for direction in range(directions):
                at = number * directions + direction
                state = tuple(h[at] for h in hx)
                y, state = layer(x.flip(1) if direction else x, state, *params[at * width : (at + 1) * width])
                outs.append(y.flip(1) if direction else y)
                finals.append(state)
            x = torch.cat(outs, -1)
        return (x if batch_first else x.transpose(0, 1), *(torch.stack(s) for s in zip(*finals, strict=True)))

    def _cell(self, layer: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], x: Tensor, hx: Any, *params: Any) -> Any:
        if not self._applies(x, *params):
            return NotImplemented
        _, state = layer(x[:, None], tuple(hx), *params)
        return state[0] if len(state) == 1 else state

    def _gates(self, x: Tensor, w: Tensor, b: Tensor | None, b_recurrent: Tensor | None) -> Tensor:
        """[B, T, M], the part of the gates that the recurrence is added to."""
        gates = F.linear(_seed(x), self._cut(w), None if b is None else self._cut(b))
        gates = gates if b_recurrent is None else gates + self._cut(b_recurrent)
        self._note("matrix", gates, w, x)
        for bias in (b, b_recurrent):
            self._note("shift", gates, bias, None)
        return gates

    def _lstm(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        w: Tensor,
        u: Tensor,
        b: Tensor | None = None,
        b_recurrent: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates, recurrent = self._gates(x, w, b, b_recurrent), self._cut(u).mT
        (h, c), hidden = state, [state[0]]
        for gate in gates.unbind(1):
            i, f, g, o = torch.addmm(gate, h, recurrent).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            hidden.append(h)
        # The recurrent product is added to the gates, so the gradient by it is the gradient by them.
        self._note("matrix", gates, u, torch.stack(hidden[:-1], 1))
        return torch.stack(hidden[1:], 1), (h, c)

    def _gru(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        w: Tensor,
        u: Tensor,
        b: Tensor | None = None,
        b_recurrent: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,), outs = state, []
        for gate in self._gates(x, w, b, None).unbind(1):
            own = F.linear(_seed(h), self._cut(u), None if b_recurrent is None else self._cut(b_recurrent))
            self._note("matrix", own, u, h)
            self._note("shift", own, b_recurrent, None)
            (r, z, n), (own_r, own_z, own_n) = gate.chunk(3, -1), own.chunk(3, -1)
            n = (n + (r + own_r).sigmoid() * own_n).tanh()
            h = n + (z + own_z).sigmoid() * (h - n)
            outs.append(h)
        return torch.stack(outs, 1), (h,)

    def _tanh(self, x: Tensor, state: tuple[Tensor, ...], *params: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._elman(torch.tanh, x, state, *params)

    def _relu(self, x: Tensor, state: tuple[Tensor, ...], *params: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._elman(torch.relu, x, state, *params)

    def _elman(
        self,
        activation: Callable[[Tensor], Tensor],
        x: Tensor,
        state: tuple[Tensor, ...],
        w: Tensor,
        u: Tensor,
        b: Tensor | None = None,
        b_recurrent: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates, recurrent = self._gates(x, w, b, b_recurrent), self._cut(u).mT
        hidden = [state[0]]
        for gate in gates.unbind(1):
            hidden.append(activation(torch.addmm(gate, hidden[-1], recurrent)))
        self._note("matrix", gates, u, torch.stack(hidden[:-1], 1))
        return torch.stack(hidden[1:], 1), (hidden[-1],)


def _seed(x: Tensor) -> Tensor:
    # A layer whose input needs no gradient would have an output that none arrives at.
    return x if x.requires_grad else x.detach().requires_grad_()


def _reached(logits: Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """The parameters that the graph of the logits ends in: those that no tap has cut off."""
    names = {id(p): name for name, p in weights.items()}
    found, seen, todo = set(), set(), [logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only the nodes of leaves have one
        if id(leaf) in names:
            found.add(names[id(leaf)])
        todo.extend(after for after, _ in node.next_functions)
    return found


def _add_squares(total: Tensor, pairs: list[tuple[_Use, Tensor]]) -> None:
    """Add sum over b of (gradient of example b)^2 to `total`, for all uses of one parameter together."""
    kinds = {use.kind for use, _ in pairs}
    if kinds <= {"scale", "shift"}:
        own = total.new_zeros(len(pairs[0][1]), *total.shape)
        for use, delta in pairs:
            each = delta if use.factor is None else delta * use.factor
            own += each.reshape(len(each), -1, *total.shape).sum(1)
        total.add_(own.square_().sum(0))
    elif kinds == {"rows"}:
        _add_row_squares(total, pairs)
    else:
        left, right = zip(*(_factors(use, delta, len(total)) for use, delta in pairs), strict=True)
        _add_product_squares(total, torch.cat(left, 1), torch.cat(right, 1))


def _factors(use: _Use, delta: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """[B, S, M] and [B, S, N], whose product over S is the gradient of each example."""
    assert use.factor is not None
    delta = delta.reshape(len(delta), -1, delta.shape[-1])
    if use.kind == "matrix":
        return delta, use.factor.reshape(len(delta), -1, use.factor.shape[-1])
    ids = use.factor.reshape(len(delta), -1)
    return F.one_hot(ids, rows).to(delta.dtype) * (ids != use.skip)[..., None], delta


def _add_product_squares(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.shape[1] == 1:
        total.addmm_(left[:, 0].square().mT, right[:, 0].square())
        return
    on_cpu = total.device.type == "cpu"
    chunk = max(1, (CACHE if on_cpu else 128 * CACHE) // (total.numel() * total.element_size()))
    for one, other in zip(left.split(chunk), right.split(chunk), strict=True):
        gradients = torch.bmm(one.mT, other)
        if on_cpu:
            for gradient in gradients:
                total.addcmul_(gradient, gradient)
        else:
            total.add_(gradients.square_().sum(0))


def _add_row_squares(total: Tensor, pairs: list[tuple[_Use, Tensor]]) -> None:
    ids = torch.cat([use.factor.reshape(len(delta), -1) for use, delta in pairs if use.factor is not None], 1)
    deltas = [
        delta.reshape(len(delta), -1, delta.shape[-1]) * (use.factor != use.skip).reshape(len(delta), -1, 1)
        for use, delta in pairs
        if use.factor is not None
    ]
    example = torch.arange(len(ids), device=ids.device)[:, None]
    keys, place = (example * len(total) + ids).flatten().unique(return_inverse=True)
    sums = total.new_zeros(len(keys), total.shape[1]).index_add_(0, place, torch.cat(deltas, 1).flatten(0, 1))
    total.index_add_(0, keys % len(total), sums.square_())
