"""What is scored: test sets, or the sets that a stream holds out to search hyperparameters on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from clplat.cli import main
from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.objectives import Classification
from clplat.loop import Run
from clplat.settings import Evaluation, Training
from clplat.streams.experience import Data, Stream, StreamError
from clplat.streams.sources import digits
from clplat.streams.split import split


@pytest.fixture(scope="module")
def stream() -> Stream:
    return split(digits(), experiences=2, layout="pixels", valid_fraction=0.2)


def learner(stream: Stream) -> Learner:
    torch.manual_seed(1)
    net = mlp(stream.inputs, partial(Head, outputs=stream.outputs), hidden=[16])
    return Learner(net, Classification(), optimizer=partial(torch.optim.Adam, lr=1e-2))


def rows(data: Data | None) -> set[bytes]:
    assert data is not None
    return {row.numpy().tobytes() for row in data.batch(torch.arange(len(data))).x}


def test_no_validation_example_is_trained_on_or_tested(stream):
    used = [rows(data) for e in stream for data in (e.train, e.test)]
    for experience in stream:
        valid = rows(experience.valid)
        assert len(valid) > 20
        assert not any(valid & other for other in used)


def test_validation_scores_are_those_of_the_validation_sets_and_differ_from_test_scores(stream, trainer):
    made, on = learner(stream), Evaluation(on="valid")
    results = Run(stream, made, trainer(), Training(batch_size=16, epochs=2), on).go()
    made.eval()
    for j, experience in enumerate(stream):
        assert experience.valid is not None
        batch = experience.valid.batch(torch.arange(len(experience.valid)))
        right = (made.net(batch).logits.argmax(1) == batch.y).double().mean()
        assert float(results.R[-1, j]) == pytest.approx(float(right), abs=1e-12)
    tested, _ = evaluate(made, stream.experiences)
    assert results.R[-1].tolist() != tested
    assert results.on == "valid"

    same = learner(stream)  # what is scored changes nothing in what is learned
    assert Run(stream, same, trainer(), Training(batch_size=16, epochs=2)).go().R[-1].tolist() == tested


def test_a_stream_that_holds_nothing_out_is_refused_before_training(trainer):
    plain = split(digits(), experiences=2, layout="pixels")
    with pytest.raises(StreamError, match=r"evaluation\.on=valid: experience 0 .* \(stream\.valid_fraction=0\.1"):
        Run(plain, learner(plain), trainer(), Training(steps=1), Evaluation(on="valid"))


def test_the_command_refuses_it_and_records_what_was_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["learner=mlp", "training.epochs=null", "training.steps=2", "tracking=none", "threads=1", "progress=false"]
    assert main(["train", *small, "evaluation.on=valid"]) == 2
    assert "stream.valid_fraction=0.1" in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.*"))
    assert main(["train", *small, "evaluation.on=valid", "stream.valid_fraction=0.1"]) == 0
    assert "validated on (columns)" in capsys.readouterr().out
    (result,) = Path("runs").rglob("result.json")
    assert json.loads(result.read_text())["on"] == "valid"
    assert main(["train", *small, "evaluation.on=both"]) == 2
    assert "evaluation.on: got 'both'" in capsys.readouterr().err
