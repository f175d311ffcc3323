"""Arithmetic on whole networks: differences between two states of a net, and what can be built from them.

A state is what `net.state_dict()` gives. Only what is comparable takes part: floating tensors that all states hold in
one shape. Anything else (counters, masks, tensors of another vocabulary) stays as it is in the state that is added to.
Sums are taken in float64 and rounded once, so that base + (state - base) is a float32 state again, bit for bit (unless
a weight has shrunk by a factor beyond 2^29). P is the number of floating values of a net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> Weights:
    """tau = after - before, in float64: a task vector (Ilharco et al. 2023, arXiv 2212.04089) or, for a period of
    time, a time vector (Nylund et al. 2024, arXiv 2312.13401)."""
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
    """base + share * tau_one + (1 - share) * tau_other for two states (Nylund et al. 2024): `one` at share 1, `other`
    at 0, and any number in between or beyond.

    Since the two shares add up to 1 the base cancels; it only says what stays where the states are not comparable.
    """
    return add(base, [(share, difference(one, base)), (1 - share, difference(other, base))])


def analogy(
    base: Mapping[str, Any],
    task: Mapping[str, Any],
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    task_scale: float = 1.0,
    new_scale: float = 1.0,
    old_scale: float = 1.0,
) -> dict[str, Any]:
    """base + c tau_task + (b tau_new - a tau_old): a task learned in an old period, moved to a new one of which there
    are unlabelled data only (Nylund et al. 2024).

    Args:
        base: the state before any finetuning.
        task: trained on the task in the old period.
        new: trained on unlabelled data of the new period.
        old: trained on unlabelled data of the old period.
        task_scale: c; the paper searches 0.6..2.2.
        new_scale: b; the paper searches 0.1..0.6.
        old_scale: a; likewise.
    """
    terms = [(task_scale, task), (new_scale, new), (-old_scale, old)]
    return add(base, [(c, difference(state, base)) for c, state in terms])


def greedy_soup(
    base: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    score: Callable[[dict[str, Any]], float],
    picks: int = 20,
) -> tuple[dict[str, Any], list[int]]:
    """The mean of states picked one by one, with repetition, each time the one that raises `score` the most; ends
    when none does or after `picks` of them (the greedy time soup of Nylund et al. 2024, after Wortsman et al. 2022).

    Args:
        base: the state before any finetuning; the answer if no state scores higher.
        states: at least one.
        score: of a state on held-out data, higher is better.
        picks: at most.

    Returns:
        The soup, and how often each state is in it.
    """
    vectors = [difference(state, base) for state in states]
    counts, soup = [0] * len(states), dict(base)
    best = score(soup)
    for _ in range(picks):
        tried = []
        for i in range(len(states)):
            more = [c + (i == j) for j, c in enumerate(counts)]
            mixed = add(base, [(c / sum(more), tau) for c, tau in zip(more, vectors, strict=True) if c])
            tried.append((score(mixed), mixed, more))
        reached, mixed, more = max(tried, key=lambda t: t[0])
        if not reached > best:
            break
        best, soup, counts = reached, mixed, more
    return soup, counts


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The cosine of the angle between two vectors, over the tensors that both hold; NaN if one of them is 0."""
    names = _comparable(one, other)
    if not names:
        return float("nan")
    a, b = (torch.cat([v[n].double().flatten() for n in names]) for v in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


def flatten(net: nn.Module) -> Tensor:
    """[P] all floating values of a net's state, a copy."""
    return torch.cat([t.detach().flatten() for t in _floating(net)]).clone()


def unflatten(net: nn.Module, vector: Tensor) -> Weights:
    """The state [P] by name, as views of `vector`; what is not floating is not in it.

    Raises:
        ValueError: another number of values than the net has.
    """
    names = [n for n, t in net.state_dict().items() if torch.is_tensor(t) and t.is_floating_point()]
    tensors = _floating(net)
    total = sum(t.numel() for t in tensors)
    if vector.shape != (total,):
        raise ValueError(
            f"A state of {list(vector.shape)} values does not fit a net of {total}: give one of the same net."
        )
    parts = vector.split([t.numel() for t in tensors])
    return {name: part.view(t.shape) for name, part, t in zip(names, parts, tensors, strict=True)}


@torch.no_grad()
def load_flat(net: nn.Module, vector: Tensor) -> None:
    """Set a net's floating values to the state [P], in place; all else in it stays.

    Raises:
        ValueError: another number of values than the net has.
    """
    for tensor, part in zip(_floating(net), unflatten(net, vector).values(), strict=True):
        tensor.copy_(part)


def _floating(net: nn.Module) -> list[Tensor]:
    return [t for t in net.state_dict().values() if torch.is_tensor(t) and t.is_floating_point()]


def _comparable(first: Mapping[str, Any], *others: Mapping[str, Any]) -> list[str]:
    def fits(name: str, value: Any) -> bool:
        return all(
            torch.is_tensor(t) and t.is_floating_point() and t.shape == value.shape
            for t in (value, *(state.get(name) for state in others))
        )

    return [name for name, value in first.items() if fits(name, value)]
