"""Selective copy: repeat the tokens that were scattered among blanks (Gu & Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.experience import UNSCORED, Batch, Experience, Stream
from clplat.streams.labelled import scenario_of
from clplat.streams.synthetic import Draws, generated_sets, relabelling


@dataclass(frozen=True)
class SelectiveCopy:
    """Makes batches of selective copy.

    In the natural alphabet 0 is blank, A - 1 the marker, 1..A - 2 are content.
    x [B, L + 2 M]: M content tokens, each uniform, at random places among L blanks, then M markers.
    y [B, L + 2 M]: at the m-th marker the m-th content token; `UNSCORED` elsewhere.

    Chance is 1 / (A - 2) of the tokens, that is ln(A - 2) nats; 100 % and 0 nats can be reached.

    Attributes:
        inputs: [A] what stands for each token of the natural alphabet in x.
        targets: [A] the same in y.
        tokens: M.
        blanks: L.
    """

    inputs: Tensor
    targets: Tensor
    tokens: int
    blanks: int

    def __call__(self, draws: Draws) -> Batch:
        """The batch of all examples of `draws`."""
        m, alphabet = self.tokens, len(self.inputs)
        content = 1 + draws.integers("content", alphabet - 2, m)
        # The M smallest of L + M random numbers are at M places, all sets of places equally likely.
        places = draws.bits64("places", self.blanks + m).topk(m, dim=1, largest=False).indices.sort(1).values
        rows, steps = len(content), self.blanks + 2 * m
        x = content.new_zeros(rows, steps).scatter_(1, places, content)
        x[:, self.blanks + m :] = alphabet - 1
        y = torch.full_like(x, UNSCORED)
        y[:, self.blanks + m :] = self.targets[content]
        return Batch(x=self.inputs[x], y=y)


def selective_copy(
    experiences: int = 5,
    vocabulary: int = 16,
    tokens: int = 16,
    blanks: int = 48,
    relabel: Literal["all", "inputs"] = "all",
    first_identity: bool = True,
    order_seed: int = 0,
    task_incremental: bool = False,
    train_size: int = 20_000,
    valid_size: int = 0,
    test_size: int = 1_000,
    data_seed: int = 0,
) -> Stream:
    """Selective copy with the alphabet relabelled in each experience; nothing else differs between them.

    Args:
        experiences: K.
        vocabulary: A, at least 3: blank, marker and content.
        tokens: M, content tokens a sequence.
        blanks: L, blanks a sequence.
        relabel: "all" permutes the whole alphabet in inputs and targets (another token is the blank, another the
            marker: one rule still solves all experiences); "inputs" permutes the content tokens in the inputs only
            (the answer to a token differs between experiences: without task labels only one can be right).
        first_identity: leave the first experience in the natural alphabet.
        order_seed: of the permutations; not the training seed.
        task_incremental: tell the learner which experience a sequence is from.
        train_size: sequences to train on, in each experience.
        valid_size: sequences to validate on; 0 for no such set.
        test_size: sequences to test on.
        data_seed: of the sequences.
    """
    checks.within(1, checks.EXPERIENCES, experiences=experiences)
    checks.at_least(1, tokens=tokens)
    checks.at_least(3, "blank, marker and content", vocabulary=vocabulary)
    checks.at_least(0, blanks=blanks)
    checks.one_of("relabel", relabel, ("all", "inputs"))
    natural = torch.arange(vocabulary)
    parts = []
    for index in range(experiences):
        inputs, targets = natural.clone(), natural
        if relabel == "all":
            inputs = targets = relabelling(vocabulary, index, order_seed, "selective copy", first_identity)
        else:
            order = relabelling(vocabulary - 2, index, order_seed, "selective copy", first_identity)
            inputs[1:-1] = 1 + order
        task = index if task_incremental else None
        generate = SelectiveCopy(inputs, targets, tokens, blanks)
        train, valid, test = generated_sets(
            generate, "selective copy", data_seed, train_size, test_size, valid_size, task
        )
        classes = tuple(sorted(targets[1:-1].tolist()))
        parts.append(Experience(index, f"selective copy alphabet {index}", classes, train, test, valid, task))
    return Stream(
        name="selective_copy",
        experiences=tuple(parts),
        scenario=scenario_of(task_incremental, "domain_incremental"),
        target="tag",
        outputs=vocabulary,
        vocabulary=vocabulary,
        length=blanks + 2 * tokens,
        per_step=True,
    )
