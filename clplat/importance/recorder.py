"""Where the parameters of a net act: a record of one forward pass, for per-example gradients.

The net runs under a `TorchFunctionMode`. Linear layers, embeddings, normalisations and recurrences (these as a loop
over time) run with detached parameters, and it is noted what each parameter was multiplied with and where the gradient
by the product will arrive. A parameter that the graph of the output still ends in was used in some other way.

Letters: B batch, T time, D input features, H hidden, M and N rows and columns of a weight matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clplat.importance.use import Kind, Use, seeded


class Recorder(TorchFunctionMode):
    """Runs layers with detached parameters and notes how each parameter was used."""

    def __init__(self, weights: Mapping[str, nn.Parameter], rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.uses: dict[str, list[Use]] = defaultdict(list)
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
        bad = set()
        for name, several in self.uses.items():
            kinds = {use.kind for use in several}
            if not (kinds <= {"matrix", "rows"} or kinds <= {"scale", "shift"}):
                bad.add(name)
        return bad

    def _applies(self, x: Tensor, *parameters: Tensor | None) -> bool:
        return x.ndim >= 2 and len(x) == self.rows and any(id(p) in self._names for p in parameters)

    def _cut(self, parameter: Tensor) -> Tensor:
        return parameter.detach() if id(parameter) in self._names else parameter

    def _note(self, kind: Kind, out: Tensor, parameter: Tensor | None, factor: Tensor | None, skip: int = -1) -> None:
        if parameter is not None and id(parameter) in self._names:
            kept = None if factor is None else factor.detach()
            self.uses[self._names[id(parameter)]].append(Use(kind, get_gradient_edge(out), kept, skip))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if not self._applies(input, weight, bias):
            return NotImplemented
        out = F.linear(seeded(input), self._cut(weight), None if bias is None else self._cut(bias))
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
        out = F.embedding(input, seeded(weight.detach()))
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
        return self._affine(F.layer_norm(seeded(input), normalized_shape, None, None, eps), weight, bias)

    def _rms_norm(
        self, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Any:
        if not self._applies(input, weight):
            return NotImplemented
        return self._affine(F.rms_norm(seeded(input), normalized_shape, None, eps), weight, None)

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
        normal = F.batch_norm(seeded(input), running_mean, running_var, None, None, False, momentum, eps)
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
        gates = F.linear(seeded(x), self._cut(w), None if b is None else self._cut(b))
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
            own = F.linear(seeded(h), self._cut(u), None if b_recurrent is None else self._cut(b_recurrent))
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
