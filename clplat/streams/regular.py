"""Regular languages whose rule holds at every length: train on short strings, be asked about long ones.

Even pairs, parity and cycle navigation, the regular tasks of Deletang et al., "Neural networks and the Chomsky
hierarchy", ICLR 2023 (arXiv 2207.02098). Recurrent nets generalise to lengths they never saw, transformers do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.labelled import scenario_of
from clplat.streams.synthetic import Draws, generated_sets

LANGUAGES = {"even_pairs": (2, 2), "parity": (2, 2), "cycle_navigation": (3, 5)}
"""Symbols of the alphabet and classes of each language."""


@dataclass(frozen=True)
class Language:
    """Makes batches of strings of one language and the class of each.

    x [B, T] int64: uniform symbols; the length of each string is uniform in shortest..longest, the rest is padding.
    y [B]: even_pairs: how many neighbours differ, modulo 2 (so: whether first and last symbol differ); parity: the
    number of ones modulo 2; cycle_navigation: where steps -1, 0, +1 (symbols 0, 1, 2) lead on a ring of 5.

    All classes are equally likely but for the shortest strings; 100 % can be reached. Every shorter string is a
    prefix of a longer one, so nothing but the rule can tell the class of a string of unseen length.

    Attributes:
        name: a key of `LANGUAGES`.
        shortest: least length, at least 1.
        longest: greatest length.
    """

    name: str
    shortest: int
    longest: int

    def __call__(self, draws: Draws) -> Batch:
        """The batch of all examples of `draws`, as wide as its longest string."""
        lengths = self.shortest + draws.integers("length", self.longest - self.shortest + 1, 1).squeeze(1)
        x = draws.integers("symbols", LANGUAGES[self.name][0], self.longest)
        time = torch.arange(int(lengths.max()))
        valid = time < lengths[:, None]
        x = x[:, : len(time)] * valid
        return Batch(x=x, y=self._classes(x, valid), lengths=lengths)

    def _classes(self, x: Tensor, valid: Tensor) -> Tensor:
        if self.name == "even_pairs":
            return ((x[:, 1:] != x[:, :-1]) & valid[:, 1:]).sum(1) % 2
        if self.name == "parity":
            return x.sum(1) % 2
        return ((x - 1) * valid).sum(1) % 5


def regular(
    language: str = "parity",
    lengths: Sequence[Sequence[int]] = ((1, 40),),
    test_lengths: Sequence[int] | None = (41, 100),
    task_incremental: bool = False,
    train_size: int = 20_000,
    valid_size: int = 0,
    test_size: int = 1_000,
    data_seed: int = 0,
) -> Stream:
    """One regular language, with strings of other lengths in each experience.

    Args:
        language: "even_pairs", "parity" or "cycle_navigation".
        lengths: the least and greatest length of the training strings, one pair an experience.
        test_lengths: of the test strings of all experiences; None for the lengths of the experience itself. The
            published protocol trains on 1 to 40 and tests on longer ones.
        task_incremental: tell the learner which experience a string is from.
        train_size: strings to train on, in each experience.
        valid_size: strings to validate on, of the training lengths; 0 for no such set.
        test_size: strings to test on.
        data_seed: of the strings.

    Raises:
        ValueError: no experience, or lengths that are no range from 1 up.
    """
    checks.one_of("language", language, tuple(LANGUAGES))
    if not lengths:
        raise ValueError("lengths: got none; give one pair [least, greatest] for each experience.")
    for pair in [*lengths, *([] if test_lengths is None else [test_lengths])]:
        if len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
            raise ValueError(f"lengths: got {list(pair)}; give [least, greatest] with 1 <= least <= greatest.")
    classes = LANGUAGES[language][1]
    parts = []
    for index, pair in enumerate(lengths):
        task = index if task_incremental else None
        shortest, longest = pair
        name = f"{language} {shortest} to {longest}"
        train, valid, test = generated_sets(
            Language(language, shortest, longest), name, data_seed, train_size, test_size, valid_size, task
        )
        if test_lengths is not None:
            longer = Language(language, *test_lengths)
            _, _, test = generated_sets(longer, f"{language} {index}", data_seed, 1, test_size, 0, task)
        parts.append(Experience(index, name, tuple(range(classes)), train, test, valid, task))
    return Stream(
        name=f"regular_{language}",
        experiences=tuple(parts),
        scenario=scenario_of(task_incremental, "domain_incremental"),
        target="class",
        outputs=classes,
        vocabulary=LANGUAGES[language][0],
    )
