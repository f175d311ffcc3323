"""Text, one domain an experience: characters of files or of strings, and a generated source whose entropy is known.

Documents stand one behind the other and are read in segments (`clplat.streams.segments`); at each step the next token is
to be predicted. A document of n tokens c gives n steps: inputs <start>, c_1, ..., c_{n-1}, targets c_1, ..., c_n. So the
first token of a document is predicted too, from nothing, and the score, bits a token, is the bits of all tokens over
their number: bits per character, or per byte.

Letters: N steps, V tokens, R regimes, K experiences.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from clplat import checks
from clplat.streams.experience import Experience, Stream, StreamError
from clplat.streams.labelled import scenario_of
from clplat.streams.markov import markov_seed, markov_source
from clplat.streams.segments import SegmentData
from clplat.streams.text_files import Form, documents_of

TOY = "abcdefgh .,"
"""The letters of the text that stands in where no file is given."""


log = logging.getLogger(__name__)


def text(
    files: Mapping[str, str | Sequence[str]] | None = None,
    separator: str | None = None,
    unit: Literal["characters", "bytes"] = "characters",
    bptt: int = 70,
    rows: int = 32,
    test_rows: int = 8,
    valid_fraction: float = 0.0,
    test_fraction: float = 0.1,
    task_incremental: bool = False,
    normalize: Form | Sequence[Form] | None = None,
) -> Stream:
    """A stream of files: one author, book or domain an experience.

    Args:
        files: for each experience, by name and in order, a UTF-8 file or several. None: a generated text of three
            domains stands in, which needs no file; a warning says so.
        separator: what stands between the documents of a file ("\\n\\n", say; it is left out); None: a file is one
            document. Empty documents are left out. A shell makes line breaks by $'stream.separator="\\n\\n"'.
        unit: see `text_of`, as are all to `task_incremental`.
        normalize: what is changed in files before they are cut, one or several in order: "newlines" makes CR LF and CR
            one LF, "NFC" and "NFKC" are Unicode's forms, "casefold" makes letters small. None: nothing at all, files
            are read as they are.

    Raises:
        ValueError: files that are no mapping of names to paths; a separator or a form that changes nothing in them.
        StreamError: one that cannot be read, or with too little text.
    """
    if separator == "":
        raise ValueError("separator: got an empty one: give the characters between documents, or null for none.")
    if files is None:
        for name, value in (("separator", separator), ("normalize", normalize)):
            if value:
                raise ValueError(
                    f"{name}: got {checks.shown(value)} and no files, to which it has nothing to say: give files, or null."
                )
        log.warning(
            "stream.files: none are given, so a generated toy text of %d letters stands in; stream.files={name: path, "
            "other: path} trains on yours.",
            len(TOY),
        )
        domains: Mapping[str, Sequence[str]] = toy_text()
    else:
        domains = documents_of(files, separator, normalize)
    return text_of(domains, unit, bptt, rows, test_rows, valid_fraction, test_fraction, task_incremental)


def text_of(
    domains: Mapping[str, Sequence[str]],
    unit: Literal["characters", "bytes"] = "characters",
    bptt: int = 70,
    rows: int = 32,
    test_rows: int = 8,
    valid_fraction: float = 0.0,
    test_fraction: float = 0.1,
    task_incremental: bool = False,
    name: str = "text",
) -> Stream:
    """A stream of strings, one domain an experience.

    The text of a domain is cut by position: training text first, then validation, then test text. Where a cut falls
    into a document its second part starts with the character before the cut as input, and a fresh state.

    Args:
        domains: the documents of each experience, by name and in order.
        unit: what a token is. "characters": those that occur anywhere in the texts, one vocabulary for all
            experiences, fixed before training (test texts count, so that no character is unknown). "bytes": all 256 of
            UTF-8.
        bptt: steps of a segment.
        rows: of the training and validation text, read side by side; with a carried state the batch size.
        test_rows: of the test texts. Each row starts fresh: 1 is exact and slow, more cost a little context each.
        valid_fraction: of each domain's steps, from 0.
        test_fraction: of each domain's steps, above 0.
        task_incremental: tell the learner which domain a text is from.
        name: of the stream.

    Raises:
        ValueError: no domain.
        StreamError: one with too little text.
    """
    if not domains:
        raise ValueError("files: got none, a text needs at least one domain: set stream.files={name: path, ...}.")
    checks.at_least(1, bptt=bptt, rows=rows, test_rows=test_rows)
    checks.one_of("unit", unit, ("characters", "bytes"))
    checks.at_least(0, valid_fraction=valid_fraction)
    checks.above(0, test_fraction=test_fraction)
    checks.within(0, 1 - test_fraction, "1 - test_fraction", below=True, valid_fraction=valid_fraction)
    encoded = {n: [_codes(d, unit) for d in documents if d] for n, documents in domains.items()}
    vocabulary = torch.arange(256)
    if unit == "characters":
        vocabulary = torch.cat([d for documents in encoded.values() for d in documents] or [vocabulary]).unique()
    parts = []
    for index, (domain, documents) in enumerate(encoded.items()):
        x, y, first = steps_of([torch.searchsorted(vocabulary, d) for d in documents], len(vocabulary))
        tested, held = round(test_fraction * len(y)), round(valid_fraction * len(y))
        task = index if task_incremental else None
        ends = [0, len(y) - tested - held, len(y) - tested, len(y)]
        pieces = [(x[a:b], y[a:b], first[a:b]) for a, b in pairwise(ends)]
        try:
            train = SegmentData(*pieces[0], rows, bptt, task)
            valid = SegmentData(*pieces[1], rows, bptt, task) if valid_fraction else None
            test = SegmentData(*pieces[2], test_rows, bptt, task)
        except StreamError as error:
            raise StreamError(f"text, experience {index} ({domain}): {error}") from error
        parts.append(Experience(index, domain, (), train, test, valid, task))
    symbols = tuple(map(chr, vocabulary.tolist())) if unit == "characters" else ()
    return token_stream(name, parts, len(vocabulary), task_incremental, symbols)


def toy_text() -> dict[str, list[str]]:
    """Three domains of forty documents of 200 characters each, from Markov sources with fixed seeds."""
    domains = {}
    for index, name in enumerate(("first", "second", "third")):
        source = markov_source(len(TOY), 2, 2.0, markov_seed(0, index))
        documents = source.sample(40, 200, torch.Generator().manual_seed(index))
        domains[name] = ["".join(TOY[c] for c in d) for d in documents.tolist()]
    return domains


def _codes(document: str, unit: str) -> Tensor:
    if unit == "bytes":
        return torch.frombuffer(bytearray(document.encode()), dtype=torch.uint8).long()
    return torch.tensor([*map(ord, document)])


def steps_of(documents: Sequence[Tensor], start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [N], targets [N] and marks of first steps [N] of documents, one behind the other."""
    if not documents:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    y = torch.cat(list(documents))
    first = torch.zeros(len(y), dtype=torch.bool)
    first[torch.tensor([0, *map(len, documents)]).cumsum(0)[:-1]] = True
    return torch.where(first, start, y.roll(1)), y, first


def token_stream(
    name: str, parts: Sequence[Experience], tokens: int, task_incremental: bool, symbols: tuple[str, ...] = ()
) -> Stream:
    return Stream(
        name=name,
        experiences=tuple(parts),
        scenario=scenario_of(task_incremental, "domain_incremental"),
        target="token",
        outputs=tokens,
        vocabulary=tokens + 1,  # the start of a document is read, and never to be predicted
        per_step=True,
        symbols=symbols,
    )
