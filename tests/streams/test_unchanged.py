"""A run goes on with the data that it began with, or not at all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from clplat import checkpoint
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.batch import Batch, StreamError
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.examples import Examples
from clplat.streams.experience import Data, Stream
from clplat.streams.labelled import Labelled
from clplat.streams.parity import parity
from clplat.streams.permuted import permuted
from clplat.streams.rotated import rotated
from clplat.streams.split import split
from clplat.streams.text import text
from clplat.streams.unchanged import check_unchanged


def changed(then: Stream, now: Stream) -> str:
    """What is said of the difference; empty if nothing is."""
    try:
        check_unchanged(now, then.fingerprint())
    except StreamError as error:
        return str(error)
    return ""


def with_train(data: Callable[[Tensor, Tensor], Data], x: Tensor, y: Tensor) -> Stream:
    stream = tiny.stream(experiences=1, features=x.shape[-1])
    return replace(stream, experiences=(replace(stream[0], train=data(x, y)),), length=None)


class Own(Examples):
    """A user's own data without tensors that anybody knows of."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.pairs = list(zip(x, y, strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, index: Tensor) -> Batch:
        x, y = zip(*(self.pairs[i] for i in index.tolist()), strict=True)
        return Batch(torch.stack(x), torch.stack(y), index=index)


KINDS = {
    "tensors": TensorData,
    "ragged": lambda x, y: RaggedData(x.flatten(0, 1), torch.arange(len(x) + 1) * x.shape[1], y),
    "own": Own,
    "transformed": lambda x, y: TensorData(x, y, transform=lambda v: v * 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_one_label_or_one_example_more_is_noticed(kind):
    x, y = torch.rand(50, 4, 3), torch.arange(50) % 2
    make = KINDS[kind]
    then = with_train(make, x, y)
    assert not changed(then, with_train(make, x.clone(), y.clone()))
    value, label = x.clone(), y.clone()
    value[41, 2, 1] += 1e-6
    label[17] = 1 - label[17]
    for other in (with_train(make, value, y), with_train(make, x, label), with_train(make, x.flip(0), y.flip(0))):
        assert "experience 0 (0), train set: as many examples (50), other contents" in changed(then, other)
    assert "train set: 50 examples then, 49 now" in changed(then, with_train(make, x[:49], y[:49]))


def test_a_transform_that_changed_is_noticed():
    x, y = torch.rand(50, 4, 3), torch.arange(50) % 2
    then = with_train(lambda x, y: TensorData(x, y, transform=lambda v: v * 2), x, y)
    assert "other contents" in changed(then, with_train(lambda x, y: TensorData(x, y, transform=lambda v: v * 3), x, y))
    source = Labelled("toy", torch.rand(20, 5, 5), torch.arange(20) % 2, torch.rand(8, 5, 5), torch.arange(8) % 2, 2)
    assert not changed(permuted(source, 3), permuted(source, 3))
    assert "experience 1 (toy permutation 1), train set" in changed(
        permuted(source, 3), permuted(source, 3, order_seed=1)
    )
    assert not changed(rotated(source, [0, 30]), rotated(source, [0, 30]))
    turned = changed(rotated(source, [0, 30]), rotated(source, [0, 31]))
    assert "experience 1 (toy 30 degrees), train set then, experience 1 (toy 31 degrees), train set now" in turned


def test_other_experiences_and_generated_data_of_another_seed_are_noticed():
    source = Labelled("toy", torch.rand(20, 5, 5), torch.arange(20) % 4, torch.rand(8, 5, 5), torch.arange(8) % 4, 4)
    assert "4 sets of examples then, 8 now" in changed(split(source, 2), split(source, 4))
    generated = [parity(experiences=2, train_size=30, test_size=10, data_seed=seed) for seed in (0, 0, 1)]
    assert not changed(generated[0], generated[1])
    assert "train set: as many examples (30), other contents" in changed(generated[0], generated[2])


WORDS = "a calm sea and a west wind took the old boat to an island of birds " * 30


def files(folder: Path, **contents: str) -> Stream:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content.encode())
    return text({name: str(folder / f"{name}.txt") for name in contents}, rows=4)


@pytest.mark.parametrize(
    ("content", "difference"),
    [
        (WORDS[: len(WORDS) // 2], "train set: 28 examples then, 16 now"),
        (WORDS + "XYZ", "other contents"),
        (WORDS + "a", "other contents"),
        (WORDS.upper(), "the stream's symbols: ' abcdefhiklmnorstw' then, ' ABCDEFHIKLMNORSTW' now"),
        (WORDS.replace("calm", "clam", 1), "other contents"),
        (WORDS.replace(" old ", " oId "), "other contents"),
        (WORDS[:-1] + "s", "other contents"),  # in the steps that no row has room for
    ],
)
def test_a_text_that_was_edited_is_noticed_and_one_that_moved_is_not(tmp_path, content, difference):
    then = files(tmp_path / "here", a=WORDS)
    assert not changed(then, files(tmp_path / "there", a=WORDS))
    assert difference in changed(then, files(tmp_path / "there", a=content))


def test_a_run_on_changed_data_is_refused_and_on_the_same_it_goes_on(tmp_path):
    stream = tiny.stream()

    def start(of: Stream) -> Run:
        return Run(of, tiny.learner(of=stream), quiet_trainer(), Training(batch_size=8, epochs=1), folder=tmp_path)

    run = start(stream)
    run.begin()
    run.save()
    state = checkpoint.load(tmp_path / "last.ckpt")
    other = tiny.stream(examples=41)
    with pytest.raises(StreamError, match=r"^resume: the data are not those that the run began with: experience 0"):
        start(other).resume(state)
    again = start(tiny.stream())
    again.resume(state)
    assert len(again.go().R) == 3
    old = {name: value for name, value in state.items() if name != "data"}
    start(other).resume(old)  # a checkpoint of 0.2 says nothing about its data
