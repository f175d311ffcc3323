"""Arithmetic on states of a net: differences between two, and sums of these.

A state is what `net.state_dict()` gives. Floating tensors that all states hold in one shape take part. Anything else
(counters, masks, tensors of another vocabulary) stays as it is in the state that is added to. Sums are taken in float64
and rounded once, so that base + (state - base) is a float32 state again, bit for bit (unless a weight has shrunk by a
factor beyond 2^29).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> Weights:
    """tau = after - before, in float64.

    A task vector (Ilharco et al. 2023, arXiv 2212.04089) or, for a period of time, a time vector (Nylund et al. 2024,
    arXiv 2312.13401).
    """
    return {name: after[name].double() - before[name].double() for name in _comparable(before, after)}


def add(base: Mapping[str, Any], terms: Sequence[tuple[float, Mapping[str, Any]]]) -> dict[str, Any]:
    """base + sum_i c_i tau_i for pairs (c_i, tau_i), in the types of `base`.

    A tensor that one of the vectors lacks, or holds in another shape, stays that of `base`.
    """
    moved: dict[str, Tensor] = {}
    for name in _comparable(base, *(tau for _, tau in terms)):
        total: Tensor = base[name].double()
        for coefficient, tau in terms:
            total = total + coefficient * tau[name].double()
        moved[name] = total.to(base[name].dtype)
    return {name: moved.get(name, value) for name, value in base.items()}


def interpolate(
    base: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any], share: float
) -> dict[str, Any]:
    """base + share * tau_one + (1 - share) * tau_other for two states (Nylund et al. 2024).

    That is `one` at share 1, `other` at 0; any number in between or beyond will do. Since the two shares add up to 1 the base cancels; it only says what stays where the states are not comparable.
    """
    return add(base, [(share, difference(one, base)), (1 - share, difference(other, base))])


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The cosine of the angle between two vectors, over the tensors that both hold; NaN if one of them is 0."""
    names = _comparable(one, other)
    if not names:
        return float("nan")
    a, b = (torch.cat([v[n].double().flatten() for n in names]) for v in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


def _comparable(first: Mapping[str, Any], *others: Mapping[str, Any]) -> list[str]:
    def fits(name: str, value: Any) -> bool:
        return all(
            torch.is_tensor(t) and t.is_floating_point() and t.shape == value.shape
            for t in (value, *(state.get(name) for state in others))
        )

    return [name for name, value in first.items() if fits(name, value)]
