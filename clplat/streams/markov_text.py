"""Generated text of known entropy, another Markov source an experience.

Letters: K experiences, V letters, R regimes.
"""

from __future__ import annotations

import torch

from clplat import checks
from clplat.streams.experience import Experience, Stream
from clplat.streams.loader import stable_seed
from clplat.streams.markov import markov_seed, markov_source
from clplat.streams.segments import SegmentData
from clplat.streams.text import steps_of, token_stream


def markov_text(
    experiences: int = 3,
    letters: int = 8,
    regimes: int = 4,
    sharpness: float = 2.0,
    document: int = 200,
    bptt: int = 35,
    rows: int = 32,
    test_rows: int = 8,
    train_size: int = 500,
    valid_size: int = 0,
    test_size: int = 100,
    task_incremental: bool = False,
    order_seed: int = 0,
    data_seed: int = 0,
) -> Stream:
    """Generated text: each experience has a `MarkovSource` of its own over the same letters.

    The least bits a token that can be reached on experience k is `markov_source(letters, regimes, sharpness,
    markov_seed(order_seed, k)).entropy(document)`, as a mean over texts, with a state that is carried.

    Args:
        experiences: K.
        letters: V.
        regimes: R of each source.
        sharpness: of the transitions.
        document: letters of a document.
        bptt: steps of a segment.
        rows: of the training and validation text, read side by side; with a carried state the batch size.
        test_rows: of the test texts.
        train_size: documents to train on, in each experience.
        valid_size: documents to validate on; 0 for no such set.
        test_size: documents to test on.
        task_incremental: tell the learner which source a text is from.
        order_seed: of the sources.
        data_seed: of the documents.
    """
    checks.within(1, checks.EXPERIENCES, experiences=experiences)
    checks.at_least(1, document=document, train_size=train_size, test_size=test_size)
    checks.at_least(1, bptt=bptt, rows=rows, test_rows=test_rows)
    checks.at_least(0, valid_size=valid_size)
    parts = []
    for index in range(experiences):
        source = markov_source(letters, regimes, sharpness, markov_seed(order_seed, index))
        task, sets = (index if task_incremental else None), []
        for split, size in (("train", train_size), ("valid", valid_size), ("test", test_size)):
            generator = torch.Generator().manual_seed(stable_seed(data_seed, "markov text", index, split))
            documents = list(source.sample(size, document, generator)) if size else []
            side_by_side = test_rows if split == "test" else rows
            sets.append(SegmentData(*steps_of(documents, letters), side_by_side, bptt, task) if size else None)
        train, valid, test = sets
        assert train is not None
        assert test is not None
        parts.append(Experience(index, f"markov source {index}", (), train, test, valid, task))
    return token_stream("markov_text", parts, letters, task_incremental)
