"""Text streams: documents, vocabularies and cuts, and a source whose entropy is known to the last digit."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor, nn

from clplat.config.check import check
from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.net import Block, Net, State
from clplat.learners.objectives import NextToken
from clplat.loop import Run
from clplat.metrics import summary
from clplat.settings import Training
from clplat.streams.experience import StreamError
from clplat.streams.markov import MarkovSource, markov_seed, markov_source
from clplat.streams.markov_text import markov_text
from clplat.streams.segments import SegmentData
from clplat.streams.text import text, text_of, toy_text

DOMAINS = {"one": ["abcab", "", "cc"], "two": ["zabzab", "z"]}


def flat(data: object) -> tuple[list[int], list[int], list[bool]]:
    assert isinstance(data, SegmentData)
    return data.x.flatten().tolist(), data.y.flatten().tolist(), data.start.flatten().tolist()


def test_documents_are_laid_out_with_their_first_tokens_predicted_too():
    stream = text_of(DOMAINS, bptt=3, rows=1, test_rows=1, test_fraction=2 / 7)
    stream.check()
    a, b, c, z, start = range(5)
    assert (stream.outputs, stream.vocabulary, stream.target, stream.per_step) == (4, 5, "token", True)
    x, y, first = flat(stream[0].train)
    assert y == [a, b, c, a, b]
    assert x == [start, a, b, c, a]
    assert first == [True, False, False, False, False]
    x, y, first = flat(stream[0].test)
    assert (x, y, first) == ([start, c], [c, c], [True, False])
    x, y, first = flat(stream[1].test)  # the cut falls into a document: its next character follows the one before it
    assert (x, y, first) == ([a, start], [b, z], [False, True])
    assert [e.name for e in stream] == ["one", "two"]
    assert stream.scenario == "domain_incremental"


def test_sets_are_cut_by_position_and_lose_nothing():
    words = "".join(chr(97 + i % 26) for i in range(1000))
    stream = text_of({"all": [words]}, rows=1, test_rows=1, valid_fraction=0.1, test_fraction=0.2)
    parts = [flat(d)[1] for d in (stream[0].train, stream[0].valid, stream[0].test)]
    assert [len(p) for p in parts] == [700, 100, 200]
    assert "".join(chr(97 + t) for p in parts for t in p) == words
    assert text_of({"all": [words]}, rows=1)[0].valid is None


def test_bytes_need_no_vocabulary():
    stream = text_of({"x": ["né" * 20]}, "bytes", rows=1, test_fraction=0.5, test_rows=1)
    assert (stream.outputs, stream.vocabulary) == (256, 257)
    assert flat(stream[0].train)[1][:3] == list("né".encode())


def test_files_and_separators(tmp_path: Path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("first\n\nsecond\n\n")
    two.write_text("and a third one")
    stream = text({"both": [str(one), str(two)], "two": str(two)}, "\n\n", rows=1, test_rows=1, task_incremental=True)
    both = stream[0].train
    assert isinstance(both, SegmentData)
    assert int(both.start.sum()) == 3
    assert both.length == round(0.9 * (5 + 6 + 15))
    assert stream.scenario == "task_incremental"
    assert both.batch(torch.arange(1)).task is not None
    whole = text({"both": [str(one), str(two)]}, rows=1, test_rows=1)[0].train
    assert isinstance(whole, SegmentData)
    assert int(whole.start.sum()) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text({"a": "nowhere.txt"}), r"cannot read nowhere.txt \(No such file"),
        (lambda: text(separator=""), "separator: got an empty one"),
        (lambda: text("x.txt"), "files: got x.txt, it must map each name to a path"),  # type: ignore[arg-type]
        (lambda: text(["a.txt", "b.txt"]), r"files: got \['a.txt', 'b.txt'\]"),  # type: ignore[arg-type]
        (lambda: text({"a": 3}), r"files: got \{'a': 3\}"),  # type: ignore[dict-item]
        (lambda: text({"a": ["b.txt", 3]}), r"a path or a list of paths: set stream.files="),  # type: ignore[list-item]
        (lambda: text_of({}), "files: got none"),
        (lambda: text_of(DOMAINS, "words"), "unit: got 'words'"),  # type: ignore[arg-type]  # refused when it runs
        (lambda: text_of(DOMAINS, test_fraction=0.0), "test_fraction: got 0.0, it must be above 0"),
        (
            lambda: text_of(DOMAINS, test_fraction=0.5, valid_fraction=0.5),
            r"valid_fraction: got 0\.5, it must be at least 0 and below 0\.5",
        ),
        (lambda: text_of(DOMAINS, bptt=0), "bptt: got 0"),
        (lambda: markov_text(test_rows=0), "test_rows: got 0"),
        (lambda: text_of(DOMAINS), r"experience 0 \(one\): .* cannot be laid out in 32 rows"),
        (lambda: text_of({"empty": [""]}), r"\(empty\): .* 0 steps"),
        (lambda: markov_text(experiences=0), "experiences: got 0"),
        (lambda: markov_text(regimes=9), r"regimes: got 9, it must lie in 1\.\.8"),
    ],
)
def test_text_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def written(folder: Path, **contents: str) -> dict[str, str]:
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode())
    return {name: str(folder / name) for name in contents}


def symbols(files: dict[str, str], **options) -> str:
    return "".join(text(files, rows=1, test_rows=1, **options).symbols)


def test_files_are_read_as_they_are(tmp_path: Path):
    files = written(tmp_path, a="\ufeffone\r\ntwo\rthree\n" * 9, b="e\u0301tait\u00a0\u00c9t\u00e9\ufb01" * 9)
    assert symbols(files) == "".join(sorted(set("\ufeffone\r\ntwo\rthree\n" + "e\u0301tait\u00a0\u00c9t\u00e9\ufb01")))
    stream = text(files, rows=1, test_rows=1)
    train = stream[0].train
    assert isinstance(train, SegmentData)
    whole = "".join(stream.symbols[t] for t in train.y.flatten().tolist())
    assert ("\ufeffone\r\ntwo\rthree\n" * 9).startswith(whole)


def test_what_is_normalized_is_a_key(tmp_path: Path):
    files = written(tmp_path, a="one\r\ntwo\rthree\n" * 9, b="e\u0301t \u00c9t\u00e9\ufb01" * 9)
    assert "\r" not in symbols(files, normalize="newlines")
    assert "\u0301" not in symbols(files, normalize=["NFC"])
    assert "\ufb01" in symbols(files, normalize=["NFC"])
    assert "\ufb01" not in symbols(files, normalize=["newlines", "NFKC"])
    assert symbols(files, normalize=["casefold"]) == symbols(files, normalize=["casefold"]).casefold()
    one = text({"a": files["a"]}, rows=1, test_rows=1, normalize=["newlines"], separator="\n", test_fraction=0.3)
    assert set(one.symbols) == set("onetwothree")


def test_options_without_effect_are_refused_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = written(tmp_path, a="one,two\r\n\r\n" * 9, b="three;four" * 9)
    with pytest.raises(
        ValueError, match=r"separator: got '\|', which occurs in none of the files: give another, or null"
    ):
        text(files, separator="|")
    with pytest.raises(ValueError, match="lines end in CR LF, which normalize=newlines changes"):
        text(files, separator="\n\n")
    with pytest.raises(ValueError, match="normalize: got 'NFC', which changes nothing in these files"):
        text(files, normalize=["newlines", "NFC"])
    with pytest.raises(ValueError, match="normalize: got 'lower', allowed are 'newlines', 'NFC', 'NFKC', 'casefold'"):
        text(files, normalize="lower")  # type: ignore[arg-type]  # the point
    text(files, separator=",", rows=1, test_rows=1)
    assert "stream.separator: ',' does not occur in b, whose files are one document each" in caplog.text
    with pytest.raises(ValueError, match=r"separator: got .* and no files"):
        text(separator="\n")
    with pytest.raises(ValueError, match=r"normalize: got .* and no files"):
        text(normalize="newlines")


def test_the_toy_is_announced(caplog: pytest.LogCaptureFixture):
    text()
    assert "stream.files: none are given, so a generated toy text of 11 letters stands in" in caplog.text


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(StreamError, match="it is not UTF-8"):
        text({"b": str(tmp_path / "b")})


# The source ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("letters", "regimes", "length"), [(2, 1, 5), (3, 2, 4), (3, 3, 1)])
def test_entropy_is_the_sum_over_all_documents(letters, regimes, length):
    source = markov_source(letters, regimes, 1.5, 3)
    documents = torch.tensor([*product(range(letters), repeat=length)])
    bits = source.bits(documents).sum(1)
    p = torch.exp2(-bits)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert source.entropy(length) == pytest.approx(float((p * bits).sum()) / length, abs=1e-12)


def test_limits_of_the_entropy():
    assert markov_source(8, 4, 0.0, 0).entropy(50) == pytest.approx(3)
    certain = MarkovSource(torch.eye(4, dtype=torch.float64).roll(1, 1)[None])
    assert certain.entropy(10) == pytest.approx(2 / 10)
    assert certain.sample(3, 5, torch.Generator()).diff(dim=1).remainder(4).eq(1).all()


def test_drawn_documents_cost_their_entropy_within_a_standard_error():
    source = markov_source(8, 4, 2.0, 11)
    bits = source.bits(source.sample(3000, 60, torch.Generator().manual_seed(0))).mean(1)
    error = float(bits.std()) / len(bits) ** 0.5
    assert error < 0.02
    assert abs(float(bits.mean()) - source.entropy(60)) < 3 * error


class Regime(Block):
    """What the source itself remembers: the first letter of the document, from the last start on."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters = letters

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        rows, steps, start = len(hidden), hidden.shape[1], self.letters
        token = hidden.argmax(-1)
        first = torch.full((rows,), -1) if state is None else state[0]
        place = []
        for t in range(steps):
            if reset is not None:
                first = torch.where(reset[:, t], -1, first)
            after = (first < 0) & (token[:, t] != start)
            first = torch.where(after, token[:, t], first)
            place.append(torch.where(first < 0, start * start, first * start + token[:, t].clamp(max=start - 1)))
        return nn.functional.one_hot(torch.stack(place, 1), start * start + 1).to(hidden.dtype), (first,)


def true_learner(source: MarkovSource) -> Learner:
    """The net whose answers are the source's own probabilities."""
    regimes, letters = source.transitions.shape[:2]
    embedding = nn.Embedding(letters + 1, letters + 1).double()
    head = Head(letters * letters + 1, outputs=letters).double()
    with torch.no_grad():
        embedding.weight.copy_(torch.eye(letters + 1))
        table = source.transitions[torch.arange(letters) % regimes].log().flatten(0, 1)  # [first * V + last, V]
        head.linear.weight.copy_(torch.cat([table, torch.zeros(1, letters)]).T)
        head.linear.bias.zero_()
    return Learner(Net(embedding, [Regime(letters)], head, per_step=True), NextToken())


def test_the_true_source_scores_its_entropy_and_needs_its_state_for_it():
    """Documents of 40 letters in segments of 7: the regime of most segments is known from an earlier one only."""
    stream = markov_text(2, document=40, bptt=7, rows=4, test_rows=100, train_size=4, test_size=2000)
    for k, experience in enumerate(stream):
        source = markov_source(8, 4, 2.0, markov_seed(0, k))
        learner = true_learner(source)
        (score,), _ = evaluate(learner, [experience], carries=True)
        assert isinstance(experience.test, SegmentData)
        bits = source.bits(experience.test.y.reshape(2000, 40)).mean(1)
        assert score == pytest.approx(float(bits.mean()), abs=1e-9)
        error = float(bits.std()) / len(bits) ** 0.5
        assert error < 0.02
        assert abs(score - source.entropy(40)) < 3 * error
        (without,), _ = evaluate(learner, [experience])
        assert without > score + 0.1


def test_sources_differ_and_sets_do_not_overlap():
    stream = markov_text(2, document=30, rows=1, test_rows=1, train_size=20, valid_size=20, test_size=20)
    sets = [flat(d)[1] for e in stream for d in (e.train, e.valid, e.test)]
    assert len({tuple(s) for s in sets}) == 6
    again = markov_text(2, document=30, rows=1, test_rows=1, train_size=20, valid_size=20, test_size=20)
    assert flat(again[1].test) == flat(stream[1].test)
    assert flat(markov_text(1, rows=1, data_seed=1)[0].train) != flat(markov_text(1, rows=1)[0].train)


def test_lower_bits_are_better_and_forgetting_is_positive(trainer):
    """Finetuning on another source forgets the first: R in bits grows, the metric's sign says what was lost."""
    from clplat.learners.mixers.elman import Elman
    from clplat.learners.nets.recurrent import recurrent

    stream = markov_text(
        2, letters=4, regimes=1, sharpness=3.0, document=20, bptt=5, rows=4, train_size=40, test_size=8
    )
    inputs = stream.inputs
    net = recurrent(inputs, partial(Head, outputs=stream.outputs), mixer=Elman, hidden=8)
    learner = Learner(net, NextToken(), None, partial(torch.optim.Adam, lr=0.02))
    table = Run(stream, learner, trainer(), Training(batch_size=4, steps=60)).go().all
    assert table.score == "bits_per_token"
    assert table.R[0, 0] < table.baseline[0] - 0.3
    assert table.R[1, 0] > table.R[0, 0] + 0.3
    found = summary(table)
    assert found["forgetting"] == pytest.approx(float(table.R[1, 0] - table.R[0, 0]))


@pytest.mark.parametrize("name", ["text", "markov_text"])
def test_their_options_build_with_rows_as_wide_as_a_batch(name):
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", overrides=[f"stream={name}", "training.batch_size=6"])
        check(cfg)
        stream = instantiate(cfg.stream)
    stream.check()
    assert isinstance(stream[0].train, SegmentData)
    assert stream[0].train.rows == 6
    assert len(stream) == 3
    assert sum(len(t) for t in toy_text()["first"]) == 8000
