"""Permuted copy: remember bits, then give them back reordered (Ehret et al. 2021, arXiv 2006.12109)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.labelled import scenario_of
from clplat.streams.synthetic import Draws, generated_sets, relabelling


@dataclass(frozen=True)
class PermutedCopy:
    """Makes batches of the copy task.

    x [B, i + 1 + p, w + 1]: i input steps whose first p hold w random bits each (zeros after them: the padded
    variant), one step with only the last channel, the stop bit, set, and p empty recall steps.
    y [B, i + 1 + p, w]: the pattern with its bits reordered, on the recall steps; only these are in the mask.

    Chance is 50 % of the bits, 100 % can be reached. Experiences differ in the output rule alone, so without task
    labels only one of them can be right at a time.

    Attributes:
        order: [p * w] flat place in the pattern of each bit of the answer.
        pattern_steps: p.
        input_steps: i, at least p.
        width: w.
    """

    order: Tensor
    pattern_steps: int
    input_steps: int
    width: int

    def __call__(self, draws: Draws) -> Batch:
        """The batch of all examples of `draws`."""
        p, i, w = self.pattern_steps, self.input_steps, self.width
        pattern = draws.coins("pattern", p * w).float()
        rows, steps = len(pattern), i + 1 + p
        x = pattern.new_zeros(rows, steps, w + 1)
        x[:, :p, :w] = pattern.view(rows, p, w)
        x[:, i, w] = 1
        y = pattern.new_zeros(rows, steps, w)
        y[:, i + 1 :] = pattern.index_select(1, self.order).view(rows, p, w)
        mask = (torch.arange(steps) > i).expand(rows, -1)
        return Batch(x=x, y=y, mask=mask)


def permuted_copy(
    experiences: int = 5,
    pattern_steps: int = 5,
    input_steps: int | None = None,
    width: int = 7,
    permute: Literal["steps", "channels", "bits"] = "steps",
    first_identity: bool = False,
    order_seed: int = 0,
    task_incremental: bool = True,
    train_size: int = 100_000,
    valid_size: int = 0,
    test_size: int = 1_000,
    data_seed: int = 42,
) -> Stream:
    """The copy task with one permutation of the answer an experience; inputs are identical in all experiences.

    Args:
        experiences: K.
        pattern_steps: p, steps to remember.
        input_steps: i, steps before the stop bit; None: p.
        width: w, bits a step.
        permute: what changes places in the answer: its time "steps", the "channels" of every step, or all "bits".
        first_identity: let the first experience be the plain copy.
        order_seed: of the permutations; not the training seed.
        task_incremental: tell the learner which experience an example is from, as in the paper.
        train_size: examples to train on, in each experience.
        valid_size: examples to validate on; 0 for no such set.
        test_size: examples to test on.
        data_seed: of the patterns.
    """
    input_steps = pattern_steps if input_steps is None else input_steps
    checks.within(1, checks.EXPERIENCES, experiences=experiences)
    checks.at_least(1, pattern_steps=pattern_steps, width=width)
    checks.at_least(pattern_steps, "pattern_steps", input_steps=input_steps)
    pieces = {"steps": pattern_steps, "channels": width, "bits": pattern_steps * width}
    checks.one_of("permute", permute, tuple(pieces))
    places = torch.arange(pattern_steps * width).view(pattern_steps, width)
    parts = []
    for index in range(experiences):
        order = relabelling(pieces[permute], index, order_seed, "permuted copy", first_identity)
        if permute == "bits":
            answer = places.flatten()[order]
        else:
            answer = (places[order] if permute == "steps" else places[:, order]).flatten()
        task = index if task_incremental else None
        generate = PermutedCopy(answer, pattern_steps, input_steps, width)
        train, valid, test = generated_sets(
            generate, "permuted copy", data_seed, train_size, test_size, valid_size, task
        )
        parts.append(Experience(index, f"copy permutation {index}", (), train, test, valid, task))
    return Stream(
        name="permuted_copy",
        experiences=tuple(parts),
        scenario=scenario_of(task_incremental, "domain_incremental"),
        target="bits",
        outputs=width,
        features=width + 1,
        length=input_steps + 1 + pattern_steps,
        per_step=True,
    )
