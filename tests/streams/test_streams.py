"""Streams made of a labelled data set, and the kinds of data and loaders that they are made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from clplat.streams.batch import concatenate
from clplat.streams.data import RaggedData, TensorData
from clplat.streams.domain import domain
from clplat.streams.experience import UNSCORED, Batch, Chunks, Data, Experience, Stream, StreamError
from clplat.streams.joint import joint
from clplat.streams.labelled import Labelled, hold_out, lay_out
from clplat.streams.loader import stable_seed
from clplat.streams.order import Order
from clplat.streams.permuted import Permutation, permuted
from clplat.streams.rotated import rotated, rotation
from clplat.streams.split import split
from clplat.streams.union import UnionData
from clplat.streams.workers import WorkerData


def source(per_class: int = 20, classes: int = 4, height: int = 3, width: int = 5) -> Labelled:
    """Images whose values are all different: every value says which example and which pixel it is."""

    def part(count: int, start: int) -> tuple[Tensor, Tensor]:
        n = count * classes
        x = torch.arange(start, start + n * height * width, dtype=torch.float32).view(n, height, width)
        return x, torch.arange(n) % classes

    train_x, train_y = part(per_class, 1)
    test_x, test_y = part(5, 100_001)
    return Labelled("toy", train_x, train_y, test_x, test_y, classes)


def everything(data: Data | None) -> Batch:
    assert data is not None
    return data.batch(torch.arange(len(data)))


def ids(data: Data | None) -> set[float]:
    """The examples of a set, by their first value."""
    return set(everything(data).x.flatten(1)[:, 0].tolist())


# Split -----------------------------------------------------------------------------------------------------------


def test_split_deals_out_every_example_once_by_class():
    toy = source()
    stream = split(toy, experiences=2)
    stream.check()
    assert stream.scenario == "class_incremental"
    assert [e.classes for e in stream] == [(0, 1), (2, 3)]
    assert (stream.outputs, stream.features, stream.length) == (4, 5, 3)
    for e in stream:
        for data in (e.train, e.test):
            batch = everything(data)
            assert tuple(batch.y.unique().tolist()) == e.classes
            assert batch.task is None
    assert ids(stream[0].train) | ids(stream[1].train) == set(toy.train_x[:, 0, 0].tolist())
    assert not ids(stream[0].train) & ids(stream[1].train)
    assert sum(len(e.test) for e in stream) == len(toy.test_y)


def test_split_pairs_inputs_with_their_own_labels_and_copies_no_data():
    toy = source()
    stream = split(toy, experiences=4)
    label = {float(x[0, 0]): int(y) for x, y in zip(toy.train_x, toy.train_y, strict=True)}
    for e in stream:
        batch = everything(e.train)
        assert [label[v] for v in batch.x[:, 0, 0].tolist()] == batch.y.tolist()
        assert isinstance(e.train, TensorData)
        assert e.train.x.data_ptr() == toy.train_x.data_ptr()


def test_split_task_incremental_tells_the_task_everywhere():
    stream = split(source(), experiences=2, task_incremental=True, valid_fraction=0.1)
    assert stream.scenario == "task_incremental"
    for i, e in enumerate(stream):
        assert e.task_label == i
        for data in (e.train, e.valid, e.test):
            task = everything(data).task
            assert task is not None
            assert task.tolist() == [i] * len(task)


def test_split_with_labels_from_zero_asks_the_same_question_in_every_experience():
    toy = source()
    order = [2, 0, 1, 3]  # place in the experience: class 2 -> 0, 0 -> 1, 1 -> 0, 3 -> 1
    stream = split(toy, experiences=2, class_order=order, labels_from_zero=True, valid_fraction=0.1)
    stream.check()
    assert (stream.scenario, stream.outputs) == ("domain_incremental", 2)
    first = {float(x[0, 0]): int(y) for x, y in zip(toy.train_x, toy.train_y, strict=True)}
    first |= {float(x[0, 0]): int(y) for x, y in zip(toy.test_x, toy.test_y, strict=True)}
    for e, classes in zip(stream, ({2, 0}, {1, 3}), strict=True):
        assert e.classes == (0, 1)
        for data in (e.train, e.valid, e.test):
            batch = everything(data)
            was = [first[v] for v in batch.x[:, 0, 0].tolist()]
            assert set(was) == classes
            assert batch.y.tolist() == [{2: 0, 0: 1, 1: 0, 3: 1}[c] for c in was]
    assert split(toy, experiences=2, labels_from_zero=True, task_incremental=True).scenario == "task_incremental"
    with pytest.raises(ValueError, match=r"labels_from_zero: got true, and experiences of \[1, 3\] classes"):
        split(toy, classes_per_experience=[1, 3], labels_from_zero=True)


def test_split_orders():
    toy = source()
    assert [e.classes for e in split(toy, classes_per_experience=[1, 3], class_order=[2, 0, 1, 3])] == [
        (2,),
        (0, 1, 3),
    ]
    orders = {
        tuple(e.classes for e in split(toy, experiences=4, class_order="random", order_seed=s)) for s in range(20)
    }
    assert len(orders) > 5
    again = [split(toy, experiences=4, class_order="random", order_seed=3) for _ in range(2)]
    assert [e.classes for e in again[0]] == [e.classes for e in again[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "experiences or classes_per_experience: got"),
        ({"experiences": 3}, "experiences: got 3, among which 4 classes cannot be dealt out"),
        ({"experiences": 0}, "experiences: got 0"),
        ({"classes_per_experience": 3}, "classes_per_experience: got 3, it must"),
        ({"classes_per_experience": [4, 0]}, r"classes_per_experience: got \[4, 0\]"),
        ({"experiences": 2, "class_order": [0, 1, 2, 2]}, "class_order"),
        ({"experiences": 2, "class_order": "shuffled"}, "allowed are natural, random"),
        ({"experiences": 2, "layout": "columns"}, "layout: got 'columns', allowed are 'pixels', 'rows', 'steps'"),
        ({"experiences": 2, "valid_fraction": 1.0}, r"valid_fraction: got 1\.0, it must be at least 0 and below 1"),
        ({"experiences": 2, "valid_fraction": 0.01}, "empty valid set; lower or drop valid_fraction"),
    ],
)
def test_split_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(source(), **arguments)


def test_a_class_without_test_examples_is_refused():
    toy = source()
    lacking = Labelled("toy", toy.train_x, toy.train_y, toy.test_x[::4], toy.test_y[::4], 4)
    with pytest.raises(StreamError, match=r"Experience 1 \(toy 1\) would have an empty test set"):
        split(lacking, experiences=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": torch.full((80,), 4)}, r"labels must lie in 0\.\.3, got 4\.\.4"),
        ({"test_y": torch.full((20,), -1)}, r"test set: labels must lie in 0\.\.3, got -1"),
        ({"train_y": torch.zeros(79).long()}, r"labels must be int64 \[80\]"),
        ({"train_x": torch.zeros(80, 3, 5).int()}, "inputs must be floats"),
        ({"test_x": torch.zeros(20, 5, 3)}, "must have one shape"),
        ({"test_x": torch.zeros(0, 3, 5), "test_y": torch.zeros(0).long()}, "it is empty"),
    ],
)
def test_labelled_refuses(change, message):
    toy = source()
    fields = {"name": "toy", "classes": 4}
    fields |= {name: getattr(toy, name) for name in ("train_x", "train_y", "test_x", "test_y")}
    with pytest.raises(StreamError, match=message):
        Labelled(**{**fields, **change})


# Held-out rows, layouts ------------------------------------------------------------------------------------------


def test_hold_out_keeps_the_share_of_every_label_and_loses_nothing():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)
    kept, held = hold_out(labels, 0.2, seed=0)
    assert held is not None
    assert labels[held].bincount().tolist() == [20, 10, 2]
    assert sorted(kept.tolist() + held.tolist()) == list(range(160))
    other = hold_out(labels, 0.2, seed=1)[1]
    assert other is not None
    assert held.tolist() != other.tolist()
    assert hold_out(labels, 0.0, seed=0)[1] is None


def test_valid_is_disjoint_from_train_and_from_test_and_the_same_rows_in_every_permuted_experience():
    stream = permuted(source(), experiences=3, valid_fraction=0.25, first_identity=False)
    parts = [
        [set(everything(d).x.flatten(1).min(1).values.tolist()) for d in (e.train, e.valid, e.test)] for e in stream
    ]
    for train, valid, test in parts:
        assert len(train) == 60
        assert len(valid) == 20
        assert not train & valid
        assert not (train | valid) & test
    assert parts[0] == parts[1] == parts[2]


def test_layouts_keep_the_order_of_pixels():
    x = torch.arange(2 * 3 * 5.0).view(2, 3, 5)
    assert torch.equal(lay_out(x, "pixels"), x.reshape(2, 15))
    assert torch.equal(lay_out(x, "rows"), x)
    assert torch.equal(lay_out(x, "steps"), x.reshape(2, 15, 1))
    colour = torch.stack([x, x + 100], 1)  # [2, channels, 3, 5]
    assert lay_out(colour, "rows")[1, 2].tolist() == x[1, 2].tolist() + (x[1, 2] + 100).tolist()
    assert lay_out(colour, "steps")[0, 7].tolist() == [7.0, 107.0]
    with pytest.raises(ValueError, match=r"layout: got 'rows', and vectors .* have none"):
        lay_out(torch.zeros(2, 4), "rows")


@pytest.mark.parametrize(("layout", "steps", "features"), [("pixels", 0, 15), ("rows", 3, 5), ("steps", 15, 1)])
def test_streams_state_the_shape_of_their_inputs(layout, steps, features):
    for stream in (
        split(source(), 2, layout=layout),
        permuted(source(), 2, layout=layout),
        rotated(source(), [0, 30], layout=layout),
    ):
        stream.check()
        assert (stream.length, stream.features) == (steps, features)


# Permuted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pixels", "rows", "steps"])
@pytest.mark.parametrize("permute", ["pixels", "rows"])
def test_permuted_examples_hold_the_same_values_and_can_be_put_back(layout, permute):
    toy = source()
    stream = permuted(toy, experiences=3, permute=permute, layout=layout)
    natural = lay_out(toy.train_x, layout)
    assert torch.equal(everything(stream[0].train).x, natural)
    seen = []
    for e in list(stream)[1:]:
        assert isinstance(e.train, TensorData)
        transform = e.train.transform
        assert isinstance(transform, Permutation)
        x = everything(e.train).x
        assert not torch.equal(x, natural)
        assert torch.equal(Permutation(transform.index.argsort())(x), natural)
        seen.append(transform.index.tolist())
        assert torch.equal(everything(e.train).y, toy.train_y)
    assert seen[0] != seen[1]


def test_permuted_rows_and_steps_move_whole_steps():
    toy = source(height=7)
    for stream in (permuted(toy, 2, permute="rows"), permuted(toy, 2, permute="steps")):
        x = everything(stream[1].train).x
        places = [toy.train_x[3].tolist().index(row) for row in x[3].tolist()]
        assert sorted(places) == list(range(7))
        assert places != list(range(7))
        assert torch.equal(x, toy.train_x[:, places])
    # The permutation does not depend on the layout, and with one pixel a step, steps are pixels.
    rows = everything(permuted(toy, 2, permute="rows", layout="rows")[1].train).x
    flat = everything(permuted(toy, 2, permute="rows", layout="pixels")[1].train).x
    assert torch.equal(rows.flatten(1), flat)
    steps = everything(permuted(toy, 2, permute="steps", layout="steps")[1].train).x
    pixels = everything(permuted(toy, 2, permute="pixels", layout="steps")[1].train).x
    assert torch.equal(steps, pixels)


def test_permutations_follow_order_seed_and_no_global_generator():
    def first(seed: int) -> list[float]:
        torch.manual_seed(seed + 99)
        stream = permuted(source(), 2, order_seed=seed, first_identity=False)
        return everything(stream[0].test).x[0].flatten().tolist()

    state = torch.get_rng_state()
    permuted(source(), 5)
    split(source(), 2, class_order="random", valid_fraction=0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert first(0) == first(0)
    assert first(0) != first(1)


def test_permuted_refuses():
    with pytest.raises(ValueError, match="permute: got 'columns', allowed are 'pixels', 'rows', 'steps'"):
        permuted(source(), permute="columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"experiences: got 0, it must lie in 1\.\."):
        permuted(source(), experiences=0)
    with pytest.raises(ValueError, match="permute: got 'steps', and inputs"):
        permuted(source(), permute="steps", layout="pixels")


# Rotated ---------------------------------------------------------------------------------------------------------


def test_quarter_turns_are_exact():
    x = torch.rand(4, 9, 9)
    for quarters in (1, 2, 3, 5, -1):
        assert torch.equal(rotation(9, 9, 90 * quarters)(x), torch.rot90(x, quarters, (1, 2)))
    even = torch.rand(4, 8, 8)
    assert torch.equal(rotation(8, 8, 90)(even), torch.rot90(even, 1, (1, 2)))


@pytest.mark.parametrize("angle", [10, 45, 133.5, -70])
def test_rotation_equals_scipys(angle):
    from scipy.ndimage import rotate

    x = torch.rand(1, 11, 14)
    expected = rotate(x[0].numpy(), angle, reshape=False, order=1, mode="grid-constant")
    assert torch.allclose(rotation(11, 14, angle)(x)[0], torch.from_numpy(expected), atol=1e-5)


def test_rotated_stream_turns_each_experience_in_every_layout():
    toy = source(height=5, width=5)
    for layout in ("pixels", "rows", "steps"):
        stream = rotated(toy, [0, 90, 360], layout=layout)
        assert torch.equal(everything(stream[0].test).x, lay_out(toy.test_x, layout))
        assert torch.equal(everything(stream[1].test).x, lay_out(torch.rot90(toy.test_x, 1, (1, 2)), layout))
        assert torch.equal(everything(stream[2].test).x, lay_out(toy.test_x, layout))
        assert everything(stream[1].test).x.is_contiguous()
    with pytest.raises(ValueError, match="angles: got none"):
        rotated(toy, [])
    with pytest.raises(StreamError, match="Only images"):
        rotated(toy.laid_out("pixels"), [0])


# Domain, joint ---------------------------------------------------------------------------------------------------


def test_domain_cuts_by_the_column_and_keeps_all_classes():
    toy = source()
    speaker, test_speaker = torch.arange(80) // 4 % 3, torch.arange(20) // 4 % 3
    stream = domain(toy, speaker, test_speaker, names=["ann", "bob", "cy"], valid_fraction=0.2)
    stream.check()
    assert stream.scenario == "domain_incremental"
    assert [e.name for e in stream] == ["toy ann", "toy bob", "toy cy"]
    for d, e in enumerate(stream):
        assert ids(e.train) | ids(e.valid) == set(toy.train_x[speaker == d][:, 0, 0].tolist())
        assert ids(e.test) == set(toy.test_x[test_speaker == d][:, 0, 0].tolist())
        assert everything(e.valid).y.bincount().tolist() == [1, 1, 1, 1]
        assert e.classes == (0, 1, 2, 3)


def test_domains_of_small_integers_do_not_overflow():
    toy = source()
    speaker, tested = torch.arange(80) // 4 % 3 + 100, torch.arange(20) // 4 % 3 + 100
    small, large = (
        domain(toy, s.to(dtype), t.to(dtype), valid_fraction=0.2)
        for dtype, s, t in ((torch.uint8, speaker, tested), (torch.int64, speaker, tested))
    )
    for a, b in zip(small, large, strict=True):
        assert ids(a.valid) == ids(b.valid)


def test_domain_refuses():
    toy = source()
    with pytest.raises(StreamError, match="no column of domains"):
        domain(toy)
    with pytest.raises(StreamError, match=r"domains must be \[80\], got \[3\]"):
        domain(toy, torch.zeros(3).long(), torch.zeros(20).long())
    with pytest.raises(StreamError, match=r"domains \[0\] for training and \[1\] for testing"):
        domain(toy, torch.zeros(80).long(), torch.ones(20).long())


def test_joint_holds_every_example_of_the_stream_once():
    toy = source()
    stream = joint(split(toy, experiences=2, valid_fraction=0.1))
    stream.check()
    assert len(stream) == 1
    assert stream[0].classes == (0, 1, 2, 3)
    assert ids(stream[0].train) | ids(stream[0].valid) == set(toy.train_x[:, 0, 0].tolist())
    assert len(stream[0].train) + len(stream[0].valid or ()) == 80  # type: ignore[arg-type]
    assert isinstance(stream[0].train, TensorData)  # one gather, not one a part
    parts = permuted(toy, experiences=2)
    together = everything(joint(parts)[0].train).x
    assert torch.equal(together, torch.cat([everything(e.train).x for e in parts]))
    with pytest.raises(StreamError, match="task-incremental"):
        joint(split(toy, experiences=2, task_incremental=True))


# Data ------------------------------------------------------------------------------------------------------------


def test_tensor_data_gives_the_rows_asked_for():
    x, y = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    data = TensorData(x, y, rows=torch.tensor([5, 1, 3]), transform=lambda v: -v, task=7)
    batch = data.batch(torch.tensor([2, 0]))
    assert batch.x.tolist() == (-x[[3, 5]]).tolist()
    assert batch.y.tolist() == [0, 2]
    assert batch.index is not None
    assert batch.index.tolist() == [2, 0]
    assert batch.task is not None
    assert batch.task.tolist() == [7, 7]
    labels = data.targets()
    assert labels is not None
    assert labels.tolist() == [2, 1, 0]
    with pytest.raises(StreamError, match="got 6 and 5"):
        TensorData(x, y[:5])


def ragged(lengths: list[int], per_step: bool = False) -> RaggedData:
    total = sum(lengths)
    x = torch.arange(1.0, total + 1)[:, None]
    y = torch.arange(total) if per_step else torch.arange(len(lengths))
    return RaggedData(x, torch.tensor([0, *lengths]).cumsum(0), y, per_step=per_step)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.booleans(), st.randoms())
def test_ragged_batches_are_the_sequences_padded_to_the_longest(lengths, per_step, random):
    data = ragged(lengths, per_step)
    chosen = [random.randrange(len(lengths)) for _ in range(4)]
    batch = data.batch(torch.tensor(chosen))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [lengths[n] for n in chosen]
    assert batch.x.shape[1] == max(lengths[n] for n in chosen)
    for row, n in enumerate(chosen):
        t = lengths[n]
        assert batch.x[row, :t, 0].tolist() == [starts[n] + i + 1 for i in range(t)]
        assert batch.x[row, t:].eq(0).all()
        if per_step:
            assert batch.y[row, :t].tolist() == list(range(starts[n], starts[n] + t))
            assert batch.y[row, t:].eq(UNSCORED).all()
        else:
            assert int(batch.y[row]) == n


def test_ragged_refuses():
    x = torch.zeros(5, 1)
    with pytest.raises(StreamError, match="last offset must be the number of time steps 5, got 4"):
        RaggedData(x, torch.tensor([0, 4]), torch.zeros(1))
    with pytest.raises(StreamError, match="Expected 2 targets, got 5"):
        RaggedData(x, torch.tensor([0, 4, 5]), torch.zeros(5))
    with pytest.raises(StreamError, match="got an empty one"):
        RaggedData(x, torch.tensor([0, 5, 5]), torch.zeros(2))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms())
def test_union_equals_its_parts_one_after_the_other(sizes, random):
    parts = [TensorData(torch.rand(n, 3), torch.full((n,), i)) for i, n in enumerate(sizes)]
    union = UnionData(parts)
    assert len(union) == sum(sizes)
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    index = torch.tensor([random.randrange(len(union)) for _ in range(9)])
    batch = union.batch(index)
    assert torch.equal(batch.x, x[index])
    assert torch.equal(batch.y, y[index])
    assert batch.index is index
    labels = union.targets()
    assert labels is not None
    assert torch.equal(labels, y)


def test_union_of_ragged_parts_pads_to_the_longest():
    union = UnionData([ragged([2, 3]), ragged([5])])
    batch = union.batch(torch.tensor([2, 0]))
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [5, 2]
    assert batch.x[:, :, 0].tolist() == [[1, 2, 3, 4, 5], [1, 2, 0, 0, 0]]


def test_concatenate_fills_what_is_missing_with_what_its_absence_means():
    a = Batch(x=torch.ones(1, 2, 1), y=torch.ones(1, 2).long(), source=torch.ones(1, dtype=torch.uint8))
    b = Batch(
        x=torch.ones(2, 3, 1),
        y=torch.ones(2, 3).long(),
        mask=torch.tensor([[True, False, True]] * 2),
        weight=torch.tensor([0.5, 2.0]),
        lengths=torch.tensor([3, 1]),
    )
    both = concatenate([a, b])
    assert both.lengths is not None
    assert both.lengths.tolist() == [2, 3, 1]
    assert both.mask is not None
    assert both.mask.tolist() == [[True, True, False], [True, False, True], [True, False, True]]
    assert both.y[0].tolist() == [1, 1, UNSCORED]
    assert both.x[0, 2].tolist() == [0]
    assert both.source is not None
    assert both.source.tolist() == [1, 0, 0]
    assert both.weight is not None
    assert both.weight.tolist() == [1, 0.5, 2]
    assert both.task is None


def test_concatenate_refuses_to_guess_task_labels():
    plain = Batch(x=torch.ones(1, 2), y=torch.zeros(1).long())
    told = Batch(x=torch.ones(1, 2), y=torch.zeros(1).long(), task=torch.zeros(1).long())
    with pytest.raises(StreamError, match="one without"):
        concatenate([plain, told])


class Pairs(Dataset):
    """(input, class) pairs: input n is n everywhere."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)), index % 3


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_data_reads_the_batches_asked_for_and_draws_no_global_random_number(workers):
    data = WorkerData(Pairs(), workers=workers)
    state = torch.get_rng_state()
    batches = list(data.batches(iter([torch.tensor([3, 9]), torch.tensor([0])])))
    assert torch.equal(state, torch.get_rng_state())
    assert [b.x[:, 0].tolist() for b in batches] == [[3, 9], [0]]
    assert [b.y.tolist() for b in batches] == [[0, 0], [0]]


# Stream.check ----------------------------------------------------------------------------------------------------


def checked(train: Data, **changes) -> Stream:
    fields = {"name": "s", "scenario": "class_incremental", "target": "class", "outputs": 3, "features": 2}
    experience = Experience(0, "only", (0,), train, TensorData(torch.zeros(1, 2), torch.zeros(1).long()))
    return Stream(experiences=(experience,), **{**fields, **changes})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TensorData(torch.zeros(0, 2), torch.zeros(0).long()), r"experience 0 \(only\), train set: it is empty"),
        (TensorData(torch.zeros(4, 3), torch.zeros(4).long()), r"D = 2, got torch.float32 \[4, 3\]"),
        (TensorData(torch.zeros(4, 2).long(), torch.zeros(4).long()), "inputs must be floats"),
        (
            TensorData(torch.zeros(40, 2), torch.tensor([0] * 39 + [3])),
            r"train set, row 39: labels must lie in 0..2, got 3",
        ),
        (TensorData(torch.zeros(4, 2), torch.zeros(4, 1).long()), r"targets must be \[B\] = \[4\], got \[4, 1\]"),
    ],
)
def test_check_refuses_what_cannot_be_learned(train, message):
    with pytest.raises(StreamError, match=message):
        checked(train).check()


def test_check_refuses_a_stream_without_experiences_and_tokens_out_of_range():
    with pytest.raises(StreamError, match="no experience"):
        Stream("none", (), "class_incremental", "class", 2).check()
    tokens = TensorData(torch.full((4, 2), 9), torch.zeros(4).long())
    with pytest.raises(StreamError, match=r"row 0: token ids must lie in 0\.\.8, got 9"):
        checked(tokens, vocabulary=9, features=None).check()


# Batches to train on -----------------------------------------------------------------------------------------------------


def numbered(n: int) -> TensorData:
    return TensorData(torch.arange(float(n))[:, None], torch.zeros(n).long())


def rows(batches: list[Batch]) -> list[list[float]]:
    return [b.x[:, 0].tolist() for b in batches]


def flat(loader: Chunks) -> list[list[float]]:
    return rows([b for chunk in loader for b in chunk])


def test_a_pass_holds_every_example_once_and_passes_differ():
    order = flat(numbered(10).training(Order(4, steps=6, seed=0, experience=0)))
    passes = [[i for batch in part for i in batch] for part in (order[:3], order[3:])]
    assert [len(b) for b in order] == [4, 4, 2, 4, 4, 2]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), st.data())
def test_a_start_in_the_middle_gives_the_tail_of_the_uninterrupted_order(n, size, steps, data):
    start = data.draw(st.integers(0, steps))
    chunk = data.draw(st.integers(1, 5))
    whole = flat(numbered(n).training(Order(size, steps, seed=3, experience=1)))
    assert (
        flat(numbered(n).training(Order(size, steps, seed=3, experience=1, start=start, chunk=chunk))) == whole[start:]
    )


def test_order_depends_on_seed_and_experience_alone():
    def order(seed: int, experience: int) -> list[list[float]]:
        torch.manual_seed(torch.seed() % 1000)
        return flat(numbered(50).training(Order(10, 5, seed, experience)))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 40),
    st.integers(1, 8),
    st.lists(st.integers(1, 9), max_size=2),
    st.integers(0, 20),
)
def test_chunks_end_at_every_cut_and_are_never_too_long(start, more, chunk, cuts, offset):
    loader = numbered(4).training(Order(2, start + more, 0, 0, start, chunk, cuts, offset))
    sizes = [sum(1 for _ in chunk) for chunk in loader]
    assert len(loader) == len(sizes)
    assert sum(sizes) == more
    assert max(sizes) <= chunk
    ends = {start + sum(sizes[: i + 1]) for i in range(len(sizes))}
    assert all(step in ends for step in range(start + 1, start + more + 1) for c in cuts if (offset + step) % c == 0)


def test_stable_seed_is_the_same_everywhere():
    assert stable_seed(0, "order", 1, 2) == 9212999772791970778
    assert stable_seed(0, 1) != stable_seed(1, 0)
