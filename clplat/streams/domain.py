"""Streams by domain: one speaker, writer or site an experience, the same classes in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.experience import Stream, StreamError
from clplat.streams.labelled import Labelled, Layout, hold_out, make_experience, make_stream, scenario_of
from clplat.streams.loader import stable_seed


def domain(
    source: Labelled,
    train_domain: Tensor | None = None,
    test_domain: Tensor | None = None,
    names: Sequence[str] | None = None,
    domain_order: Literal["natural", "random"] = "natural",
    order_seed: int = 0,
    task_incremental: bool = False,
    layout: Layout = "rows",
    valid_fraction: float = 0.0,
    data_seed: int = 0,
) -> Stream:
    """A data set cut by a column of domain numbers.

    Args:
        source: the data set.
        train_domain: [N] int64, the domain of each training example; None: the source's own column.
        test_domain: [N] int64, the domain of each test example; None: the source's own column.
        names: what domain d is called, `names[d]`; None: its number.
        domain_order: "natural" (ascending) or "random" (by `order_seed`).
        order_seed: of the random order; not the training seed.
        task_incremental: tell the learner which domain an example is from.
        layout: of the inputs (see `lay_out`).
        valid_fraction: share of the training examples of every class of every domain to hold out, 0..1.
        data_seed: of that choice.

    Raises:
        StreamError: no domain column, a column of the wrong length, or a domain in one of the two sets only.
    """
    if train_domain is not None or test_domain is not None:
        source = replace(source, train_domain=train_domain, test_domain=test_domain)  # checks their lengths
    if source.train_domain is None or source.test_domain is None:
        raise StreamError(f"{source.name} has no column of domains: give train_domain and test_domain.")
    checks.one_of("domain_order", domain_order, ("natural", "random"))
    found = source.train_domain.unique()
    if found.tolist() != source.test_domain.unique().tolist():
        raise StreamError(
            f"Every domain needs training and test examples, got domains {found.tolist()} for training and "
            f"{source.test_domain.unique().tolist()} for testing."
        )
    if domain_order == "random":
        generator = torch.Generator().manual_seed(stable_seed(order_seed, "domain order"))
        found = found[torch.randperm(len(found), generator=generator)]
    laid = source.laid_out(layout)
    balance = source.train_domain * source.classes + source.train_y
    train, valid = hold_out(balance, valid_fraction, data_seed)
    parts = []
    for index, number in enumerate(found.tolist()):
        parts.append(
            make_experience(
                laid,
                index,
                f"{source.name} {number if names is None else names[number]}",
                train[source.train_domain[train] == number],
                None if valid is None else valid[source.train_domain[valid] == number],
                (source.test_domain == number).nonzero().squeeze(1),
                task_label=index if task_incremental else None,
            )
        )
    return make_stream(f"domains_{source.name}", parts, scenario_of(task_incremental, "domain_incremental"), laid)
