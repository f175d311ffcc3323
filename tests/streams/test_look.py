"""Every row of every set is looked at before training; what is wrong is named by set and row."""

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.batch import UNSCORED, Batch, StreamError
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.examples import Examples
from clplat.streams.experience import Data, Experience, Stream
from clplat.streams.labelled import Labelled
from clplat.streams.permuted import permuted
from clplat.streams.reading import BadValues
from clplat.streams.rotated import rotated
from clplat.streams.split import split
from clplat.streams.workers import WorkerData

N, T, D = 50_000, 3, 2
NAN = float("nan")


class Own(Examples):
    """A user's own data, of which nothing is known but what it reads."""

    def __init__(self, x: Tensor, y: Tensor, **fields: Any) -> None:
        self.x, self.y, self.fields = x, y, fields

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.x[index], self.y[index], index=index, **{n: t[index] for n, t in self.fields.items()})


class Pairs(Dataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.y[index])


def as_ragged(x: Tensor, y: Tensor) -> RaggedData:
    return RaggedData(x.flatten(0, 1), torch.arange(len(x) + 1) * x.shape[1], y)


KINDS = {
    "tensors": TensorData,
    "transformed": partial(TensorData, transform=lambda x: x + 0.0),
    "ragged": as_ragged,
    "own": Own,
    "read": lambda x, y: WorkerData(Pairs(x, y)),
}


def stream_of(train: Data, test: Data, classes: tuple[int, ...] = (0, 1), **changes) -> Stream:
    fields = {"scenario": "class_incremental", "target": "class", "outputs": 3, "features": D} | changes
    return Stream("s", (Experience(0, "only", classes, train, test),), **fields)


def inputs(n: int = 100) -> tuple[Tensor, Tensor]:
    return torch.rand(n, T, D, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["train", "test"])
def test_values_that_are_not_finite_are_found_in_any_row(kind, value, part):
    x, y = inputs(5000 if kind != "read" else 300)
    row = len(x) - 7
    x[row, 1, 1] = value
    good, bad = TensorData(*inputs()), KINDS[kind](x, y)
    made = stream_of(bad, good) if part == "train" else stream_of(good, bad)
    with pytest.raises(StreamError, match=rf"{part} set, row {row}: inputs must be finite, got {value}"):
        made.check()


def test_a_row_is_named_by_its_place_in_the_set_and_in_the_arrays():
    x, y = torch.rand(40_100, T, D), torch.arange(40_100) % 4
    x[40_002, 0, 0] = NAN  # of class 2: every other row of the second experience
    source = Labelled("toy", torch.rand(8, T, D), torch.arange(8) % 4, x, y, 4)
    with pytest.raises(StreamError, match=r"experience 1 \(toy 2 3\), test set, row 20000 \(row 40002 of its arrays\)"):
        split(source, 2).check()
    with pytest.raises(StreamError, match=r"experience 0 .*, test set, row 40002: inputs"):
        permuted(source, 2).check()


def test_a_row_that_no_set_uses_may_hold_anything():
    x, y = inputs()
    x[3] = NAN
    rows = torch.tensor([0, 1, 2, 4, 5])
    stream_of(TensorData(x, y, rows), TensorData(x, y, rows)).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": 7}, r"labels must lie in 0\.\.2, got 7"),
        ({"y": -1}, r"labels must lie in 0\.\.2, got -1"),
        ({"y": 2}, r"class 2 is not among the experience's classes \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_out_of_range_and_classes_not_listed(kind, change, message):
    x, y = inputs()
    y[77] = change["y"]
    with pytest.raises(StreamError, match=f"train set, row 77: {message}"):
        stream_of(KINDS[kind](x, y), TensorData(*inputs())).check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_only_a_test_set_has_is_refused(kind):
    x, y = inputs()
    y[42] = 2
    with pytest.raises(
        StreamError, match=r"test set.*: class 2 occurs in no training set, so it can never be answered"
    ):
        stream_of(TensorData(*inputs()), KINDS[kind](x, y)).check()


def test_a_class_of_another_experience_may_be_tested_but_not_where_the_task_is_told():
    x, y = inputs()
    both = TensorData(x, torch.arange(100) % 3)
    parts = [
        Experience(0, "a", (0, 1), TensorData(x, y), both),
        Experience(1, "b", (2,), TensorData(x, y * 0 + 2), both),
    ]
    Stream("s", tuple(parts), "class_incremental", "class", 3, features=D).check()
    told = [
        replace(e, train=TensorData(x, e.train.targets(), task=k), test=TensorData(x, both.y, task=k), task_label=k)  # type: ignore[arg-type]  # classes
        for k, e in enumerate(parts)
    ]
    with pytest.raises(StreamError, match=r"test set, row 2: class 2 occurs in no training set of task 0"):
        Stream("s", tuple(told), "task_incremental", "class", 3, features=D).check()


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (Own(*inputs(), lengths=torch.arange(100) % 4), {}, r"row 0: lengths must lie in 1\.\.3, got 0"),
        (Own(*inputs(), lengths=torch.arange(100) + 1), {}, r"row 3: lengths must lie in 1\.\.3, got 4"),
        (Own(*inputs(), lengths=torch.ones(100)), {}, r"lengths must be integers \[32\], got torch.float32"),
        (Own(*inputs(), lengths=torch.ones(100).long()), {"length": T}, "all have 3 steps: leave Stream.length at None"),
        (Own(*inputs(), mask=torch.ones(100, T).long()), {}, r"a mask must be bool \[32, 3\]"),
        (Own(torch.rand(100, T, D), torch.full((100, T), UNSCORED)), {"target": "tag", "per_step": True}, "no step of it is scored"),
        (TensorData(torch.full((9, D), 1e300, dtype=torch.float64), torch.zeros(9).long()), {}, r"row 0: inputs must be finite, got 1e\+300"),
        (TensorData(torch.rand(9, D), torch.tensor([[0.0]] * 8 + [[NAN]])), {"target": "value", "outputs": 1}, "row 8: targets must be finite, got nan"),
        (Own(torch.rand(9, T, D), torch.full((9, T, 2), 2.0)), {"target": "bits", "outputs": 2, "per_step": True}, r"row 0: bits must lie in 0\.\.1"),
        (TensorData(torch.tensor([[0, 1], [2, 9]]), torch.zeros(2).long()), {"vocabulary": 5, "features": None}, r"row 1: token ids must lie in 0\.\.4, got 9"),
    ],
)  # fmt: skip
def test_lengths_masks_values_and_tokens_are_looked_at(data, changes, message):
    with pytest.raises(StreamError, match=f"train set.*{message}"):
        stream_of(data, data, () if changes else (0, 1), **changes).check()


def test_targets_that_are_not_scored_may_be_anything():
    y = torch.rand(9, T, 1)
    y[:, 2] = NAN
    mask = torch.tensor([True, True, False]).expand(9, T)
    data = TensorData(torch.rand(9, T, D), y, mask=mask)
    stream_of(data, data, (), target="value", outputs=1, per_step=True).check()


@pytest.mark.parametrize("classes", [(0, "cat"), (0, 1.0), (0, 3), (-1, 0)])
def test_classes_that_are_no_numbers_of_the_stream_are_refused(classes):
    data = TensorData(*inputs())
    with pytest.raises(StreamError, match=r"experience 0 \(only\): its classes must be whole numbers in 0\.\.2, got"):
        stream_of(data, data, classes).check()


# Number formats --------------------------------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64, torch.bool)


def first_batch(data: Data) -> Batch:
    return data.batch(torch.arange(4))


@pytest.mark.parametrize("kind", ["tensors", "ragged", "read"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_of_any_precision_are_trained(kind, dtype):
    x, y = inputs()
    data = KINDS[kind](x.to(dtype), y)
    stream = stream_of(data, data, length=None if kind == "ragged" else T)
    torch.manual_seed(0)
    net = recurrent(stream.inputs, tiny.head_for(stream), mixer=LSTM, hidden=4)
    learner = Learner(net, objective_for("class"))
    Run(stream, learner, quiet_trainer(), Training(batch_size=50, epochs=1)).go()
    assert first_batch(data).x.dtype in (torch.float32, torch.float64)
    assert torch.equal(first_batch(data).x.to(dtype), x[:4].to(dtype))


def test_every_stream_of_a_labelled_set_takes_floats_of_any_precision():
    x, y = torch.rand(20, 4, 4, dtype=torch.float64), torch.arange(20) % 2
    for dtype in (torch.float64, *FLOATS):
        source = Labelled("toy", x.to(dtype), y, x.to(dtype), y, 2)
        for stream in (split(source, 2), permuted(source, 2), rotated(source, [0, 30])):
            stream.check()
            trained = first_batch(stream[1].train).x
            assert trained.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_net_in_double_precision_takes_inputs_as_they_are():
    x = torch.rand(8, 5, dtype=torch.float64)
    net = tiny.learner().double().net
    exact = net(Batch(x, torch.zeros(8).long())).logits
    assert exact.dtype == torch.float64
    assert not torch.equal(exact, net(Batch(x.float(), torch.zeros(8).long())).logits)


@pytest.mark.parametrize("kind", ["tensors", "ragged"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_targets_of_any_size_are_read_as_int64(kind, dtype):
    x, y = inputs()
    data = KINDS[kind](x, y.to(dtype))
    stream_of(data, data).check()
    assert torch.equal(first_batch(data).y, y[:4])
    labels = data.targets()
    assert labels is not None
    assert labels.dtype == torch.int64
    labelled = Labelled("toy", x.to(torch.float64), y.to(dtype), x, y.to(dtype), 2)
    split(labelled, 2, labels_from_zero=True).check()


@pytest.mark.parametrize("kind", ["tensors", "ragged", "own"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_for_real_inputs_are_refused_by_name_with_what_to_do(kind, dtype):
    x, y = inputs()
    data = KINDS[kind]((x * 2).to(dtype), y)
    shown = r"torch\.(int64|uint\d+)" if "uint" in str(dtype) else str(dtype)  # torch computes little with some
    with pytest.raises(StreamError, match=rf"train set: inputs must be floats .*got {shown} .*: give x\.float\(\)"):
        stream_of(data, TensorData(*inputs())).check()


@pytest.mark.parametrize("kind", ["tensors", "ragged", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS], ids=str)
def test_floats_for_classes_are_refused_by_name_with_what_to_do(kind, dtype):
    x, y = inputs()
    data = KINDS[kind](x, y.to(dtype))
    with pytest.raises(StreamError, match=rf"targets are classes and must be torch\.int64, got {dtype}: give y\.long"):
        stream_of(data, data).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_a_users_own_data_are_refused_where_they_are_not_plain(dtype):
    x, y = inputs()
    data, message = Own(x.to(dtype), y), f"got {dtype}.*: give x.float"
    if not dtype.is_floating_point:
        data, message = Own(x, y.to(dtype)), f"got {dtype}: give y.long"
    with pytest.raises(StreamError, match=message):
        stream_of(data, data).check()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_tokens_of_any_integers_are_trained(dtype):
    tokens, y = (torch.arange(60).view(20, T) % 2).to(dtype), torch.arange(20) % 2
    data = TensorData(tokens, y)
    stream = stream_of(data, data, vocabulary=2, features=None, length=T)
    made = tiny.learner(of=stream)
    Run(stream, made, quiet_trainer(), Training(batch_size=8, epochs=1)).go()
    plain = TensorData(tokens.long(), y)
    twin = stream_of(plain, plain, vocabulary=2, features=None, length=T)
    assert torch.equal(tiny.flat(made), tiny.flat(tiny.trained(of=twin)))


# What a look costs, and what it reads ------------------------------------------------------------------------------


def test_shared_tensors_are_looked_at_once_and_lazy_data_in_small_batches():
    sizes = []

    class Counted(Own):
        def batch(self, index: Tensor) -> Batch:
            sizes.append(len(index))
            return super().batch(index)

    x, y = torch.rand(N, 64, D), torch.arange(N) % 2  # 26 MB
    data, test = Counted(x, y), TensorData(x[:9], y[:9])
    parts = tuple(Experience(k, str(k), (0, 1), data, test) for k in range(3))
    stream = Stream("s", parts, "domain_incremental", "class", 2, features=D)
    stream.check()
    stream.check()
    assert sum(sizes) - 2 * 32 - 256 == N  # three sets are one; shapes, repeats and padding are told by few
    assert max(sizes) * 64 * D * 4 <= 1 << 21


@pytest.mark.slow
def test_a_look_costs_less_than_reading_one_pass_of_an_experience():
    x, y = torch.rand(N, 784), torch.arange(N) % 2
    source = Labelled("big", x, y, x[:1000], y[:1000], 2)
    stream = permuted(source, 5, layout="pixels")
    before = time.perf_counter()
    stream.check()
    looked = time.perf_counter() - before
    before = time.perf_counter()
    for batch in stream[1].train.batches(torch.randperm(N).split(64)):
        batch.x.sum()
    assert looked < 3 * (time.perf_counter() - before)  # five experiences


# Padding -----------------------------------------------------------------------------------------------------------


def padded(value: float = 0.0, tokens: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.arange(60) % 9 + 2
    x = torch.randint(1, 7, (60, 10)) if tokens else torch.randn(60, 10, D)
    beyond = torch.arange(10) >= lengths[:, None]
    return x.masked_fill(beyond if tokens else beyond[..., None], value), torch.arange(60) % 2, lengths


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_padding_without_lengths_is_warned_about_with_what_to_give(value, caplog):
    x, y, lengths = padded(value)
    stream_of(TensorData(x, y), TensorData(x, y)).check()
    assert "train set: " in caplog.text
    assert "Give train_lengths and test_lengths to Labelled, or lengths to TensorData" in caplog.text
    caplog.clear()
    data = TensorData(x, y, lengths=lengths)
    stream_of(data, data).check()
    assert not caplog.text


def test_padded_tokens_are_warned_about_and_pictures_with_a_border_are_not(caplog):
    tokens, y, _ = padded(0, tokens=True)
    stream_of(TensorData(tokens, y), TensorData(tokens, y), vocabulary=7, features=None).check()
    assert "as padding does" in caplog.text
    caplog.clear()
    pictures, edge = torch.rand(60, 12, D), torch.arange(60) % 3
    for row, width in enumerate(edge.tolist()):
        pictures[row, : width + 1] = pictures[row, 11 - width :] = 0
    stream_of(TensorData(pictures, y), TensorData(pictures, y)).check()
    assert not caplog.text


# Bad values are the data's fault -------------------------------------------------------------------------------------


def test_values_that_a_transform_spoils_in_training_are_not_blamed_on_the_learning_rate():
    x, y = torch.rand(40, 5), torch.arange(40) % 2

    def spoiled(batch: Tensor) -> Tensor:
        return batch * (NAN if float(torch.rand(())) < 0.05 else 1.0)

    data = TensorData(x, y, transform=spoiled)
    stream = Stream(
        "s", (Experience(0, "only", (0, 1), data, TensorData(x, y)),), "class_incremental", "class", 2, 5, length=0
    )
    run = Run(stream, tiny.learner(of=stream), quiet_trainer(), Training(batch_size=4, epochs=40))
    with pytest.raises(
        BadValues, match=r"experience 0, train set, row \d+: inputs must be finite, got nan: mend"
    ) as caught:
        run.go()
    assert caught.value.code == 1


def test_a_transform_with_a_generator_of_its_own_is_named(caplog):
    generator = torch.Generator()
    x, y = inputs()
    data = TensorData(x, y, transform=lambda b: b + torch.rand((), generator=generator))
    with caplog.at_level(logging.WARNING):
        stream_of(data, TensorData(x, y)).check()
    assert "train set: an example that is read twice under the same seeds differs" in caplog.text
