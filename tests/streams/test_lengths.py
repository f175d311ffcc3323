"""Sequences of different lengths, padded in the arrays that they come in."""

from pathlib import Path

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.batch import UNSCORED, StreamError
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.domain import domain
from clplat.streams.experience import Experience, Stream
from clplat.streams.joint import joint
from clplat.streams.labelled import Labelled
from clplat.streams.permuted import permuted
from clplat.streams.rotated import rotated
from clplat.streams.split import split
from clplat.streams.workers import WorkerData

LENGTHS = torch.arange(40) % 5 + 2


def padded(junk: float = 7.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 6, 3, generator=torch.Generator().manual_seed(0))
    return x.masked_fill((torch.arange(6) >= LENGTHS[:, None])[..., None], junk), torch.arange(40) % 4


def source(**changes) -> Labelled:
    x, y = padded()
    fields = {"train_x": x, "train_y": y, "test_x": x, "test_y": y, "train_lengths": LENGTHS, "test_lengths": LENGTHS}
    return Labelled("toy", classes=4, **(fields | changes))


def trained(stream: Stream) -> Learner:
    torch.manual_seed(0)
    net = recurrent(stream.inputs, tiny.head_for(stream), mixer=LSTM, hidden=8)
    learner = Learner(net, objective_for(stream.target))
    Run(stream, learner, quiet_trainer(), Training(batch_size=8, epochs=2)).go()
    return learner


def as_ragged(data: object) -> RaggedData:
    """The same sequences, stored one behind the other."""
    assert isinstance(data, TensorData)
    x, y = data.x[data.rows], data.y[data.rows]
    lengths = LENGTHS[data.rows]
    flat = torch.cat([row[:n] for row, n in zip(x, lengths.tolist(), strict=True)])
    return RaggedData(flat, torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]), y, task=data.task)


@pytest.mark.parametrize("junk", [0.0, 7.0, float("nan")])
def test_padded_rows_with_lengths_train_as_ragged_ones_do_whatever_the_padding_holds(junk):
    x, _ = padded(junk)
    stream = split(source(train_x=x, test_x=x), 2)
    parts = tuple(Experience(e.index, e.name, e.classes, as_ragged(e.train), as_ragged(e.test)) for e in stream)
    ragged = Stream("ragged", parts, stream.scenario, "class", 4, features=3)
    assert torch.equal(tiny.flat(trained(stream)), tiny.flat(trained(ragged)))
    assert stream.length is None


def test_lengths_go_through_split_domain_and_joint_and_into_held_out_sets():
    speakers = torch.arange(40) // 4 % 2
    for stream in (
        split(source(), 2, valid_fraction=0.2),
        domain(source(), speakers, speakers, valid_fraction=0.2),
        joint(split(source(), 2, valid_fraction=0.2)),
    ):
        stream.check()
        for e in stream:
            for data in (e.train, e.valid, e.test):
                assert isinstance(data, TensorData)
                batch = data.batch(torch.arange(len(data)))
                assert batch.lengths is not None
                assert torch.equal(batch.lengths, LENGTHS[data.rows])
                assert batch.x.shape[1] == int(LENGTHS[data.rows].max())
                valid = batch.valid()
                assert valid is not None
                assert bool((batch.x[~valid] == 0).all())


def test_lengths_follow_the_layout():
    steps = split(source(), 2, layout="steps")
    assert steps.features == 1
    data = steps[0].train
    assert isinstance(data, TensorData)
    lengths = data.batch(torch.arange(3)).lengths
    assert lengths is not None
    assert torch.equal(lengths, 3 * LENGTHS[data.rows[:3]])
    with pytest.raises(ValueError, match="layout: got 'pixels', one vector an example, and the sequences of toy have"):
        split(source(), 2, layout="pixels")


@pytest.mark.parametrize(
    "make", [lambda s: permuted(s, 2), lambda s: permuted(s, 2, "steps"), lambda s: rotated(s, [0])]
)
def test_what_would_move_padding_among_steps_is_refused(make):
    with pytest.raises(
        StreamError, match=r"toy: its sequences have lengths of their own, and a \w+ would move padding"
    ):
        make(source())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_lengths": LENGTHS - 2}, r"toy, train set, lengths: must lie in 1\.\.6, got 0 in row 0: leave empty"),
        ({"test_lengths": LENGTHS + 2}, r"toy, test set, lengths: must lie in 1\.\.6, got 7 in row 3"),
        ({"train_lengths": LENGTHS[:39]}, r"lengths: must be integers \[40\]"),
        ({"train_lengths": LENGTHS.float()}, r"lengths: must be integers \[40\].*got torch.float32"),
        ({"train_lengths": None}, "give train_lengths and test_lengths, or neither"),
        (
            {"train_domain": torch.rand(40), "test_domain": torch.rand(40)},
            "train set: domains must be whole numbers, got",
        ),
        ({"train_y": ["cat"] * 40}, "toy: train_y: must be a torch.Tensor, got list.*number classes that are words"),
        ({"train_x": padded()[0].numpy()}, "toy: train_x: must be a torch.Tensor, got ndarray: give torch.as_tensor"),
    ],
)
def test_labelled_refuses(change, message):
    with pytest.raises(StreamError, match=message):
        source(**change)


def test_targets_a_step_are_not_scored_on_padding():
    x, _ = padded()
    tags = torch.arange(6).expand(40, 6) % 3
    batch = TensorData(x, tags, lengths=LENGTHS.to(torch.int16)).batch(torch.arange(3))
    assert batch.y.tolist() == [[0, 1, UNSCORED, UNSCORED], [0, 1, 2, UNSCORED], [0, 1, 2, 0]]
    values = TensorData(x, x, lengths=LENGTHS).batch(torch.tensor([0, 4]))
    assert bool((values.y[0, 2:] == 0).all()) and bool((values.y[1] != 0).all())
    one_vector = TensorData(x, torch.ones(40, 6), lengths=LENGTHS).batch(torch.tensor([0]))  # [B, O] with O = T
    assert one_vector.y.tolist() == [[1.0] * 6]


def test_no_example_is_a_batch_too():
    data = TensorData(*padded(), lengths=LENGTHS)
    for empty in (data, as_ragged(data)):
        assert len(empty.batch(torch.empty(0, dtype=torch.int64))) == 0


class Sentences(Dataset):
    """Tokens of different lengths."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((index % 3 + 1,), index), index % 2


def test_worker_data_pad_examples_of_different_lengths():
    batch = WorkerData(Sentences()).batch(torch.tensor([4, 2, 0]))
    assert batch.x.tolist() == [[4, 4, 0], [2, 2, 2], [0, 0, 0]]
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [2, 3, 1]
    assert WorkerData(Sentences()).batch(torch.tensor([1, 4])).lengths is None


def test_the_pages_data_set_of_ones_own_is_learned():
    page = (Path(__file__).parents[2] / "docs" / "streams.md").read_text().split("<!-- own source -->")[1]
    code, options = (page.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml"))
    space: dict = {}
    exec(code, space)
    asked = OmegaConf.create(options)
    assert (asked._target_, asked.source._target_) == ("clplat.streams.split.split", "my_data.gestures")
    stream = split(space["gestures"](), experiences=asked.experiences)
    stream.check()
    assert (len(stream), stream.length) == (3, None)
    batch = stream[2].train.batch(torch.arange(100))
    assert batch.lengths is not None
    assert (int(batch.lengths.min()), int(batch.lengths.max())) == (5, 20)
    trained(stream)
