"""Avalanche's benchmarks as streams: what is read at once equals what Avalanche reads one by one."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from clplat._torchvision import ensure_importable
from clplat.streams import avalanche_data, avalanche_reader
from clplat.streams.avalanche import from_avalanche
from clplat.streams.data import TensorData
from clplat.streams.experience import Data, StreamError
from clplat.streams.workers import WorkerData

ensure_importable()
pytest.importorskip("avalanche")

from avalanche.benchmarks import (  # noqa: E402
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    ni_benchmark,
    task_incremental_benchmark,
    tensors_benchmark,
)
from avalanche.benchmarks.classic import PermutedMNIST, RotatedMNIST, SplitFMNIST, SplitMNIST  # noqa: E402
from avalanche.benchmarks.utils import as_classification_dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own deprecations


def write_mnist(root: Path, folder: str) -> str:
    """An MNIST of 40 and 20 random images, every class in both, where torchvision looks for it; returns the root."""
    random = np.random.default_rng(0)
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        for kind, values in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28), np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, "MNIST")
    return write_mnist(folder, "FashionMNIST")


def tensors(count: int = 30, classes: int = 6) -> tuple[Tensor, Tensor]:
    return torch.arange(count * 8.0).view(count, 2, 4), torch.arange(count) % classes


def assert_same(data: Data, dataset, as_shape: tuple[int, ...]) -> None:
    """The data hold, in order, what Avalanche gives item by item."""
    assert len(data) == len(dataset)
    batch = data.batch(torch.arange(len(data)))
    for i in range(len(dataset)):
        x, y, *_ = dataset[i]
        assert torch.allclose(batch.x[i], x.reshape(as_shape), atol=1e-6)
        assert int(batch.y[i]) == int(y)


MNISTS = [
    pytest.param(SplitMNIST, {"n_experiences": 5, "seed": 3}, "class_incremental", id="split"),
    pytest.param(SplitMNIST, {"n_experiences": 2, "return_task_id": True, "seed": 3}, "task_incremental", id="tasks"),
    pytest.param(PermutedMNIST, {"n_experiences": 3, "seed": 3}, "domain_incremental", id="permuted"),
    pytest.param(RotatedMNIST, {"n_experiences": 3, "seed": 3}, "domain_incremental", id="rotated"),
    pytest.param(SplitFMNIST, {"n_experiences": 5, "seed": 3}, "class_incremental", id="fashion"),
]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("make", "arguments", "scenario"), MNISTS)
def test_classic_benchmarks_are_read_at_once_and_equal_avalanches_items(
    root, make, arguments, scenario, cache, monkeypatch
):
    monkeypatch.setattr(avalanche_data, "DataLoader", lambda *_, **__: pytest.fail("read one by one"))
    benchmark = make(dataset_root=root, **arguments)
    stream = from_avalanche(benchmark, cache=cache)
    stream.check()
    assert stream.scenario == scenario
    assert (len(stream), stream.outputs, stream.length, stream.features) == (arguments["n_experiences"], 10, 28, 28)
    for e, train, test in zip(stream, benchmark.train_stream, benchmark.test_stream, strict=True):
        assert not isinstance(e.train, WorkerData)
        assert e.classes == tuple(sorted(train.classes_in_this_experience))
        assert e.task_label == (train.task_label if scenario == "task_incremental" else None)
        assert_same(e.train, train.dataset.train(), (28, 28))
        assert_same(e.test, test.dataset.eval(), (28, 28))


@pytest.mark.parametrize(("layout", "shape"), [("pixels", (784,)), ("rows", (28, 28)), ("steps", (784, 1))])
def test_layouts(root, layout, shape):
    benchmark = SplitMNIST(5, dataset_root=root, seed=0)
    stream = from_avalanche(benchmark, layout=layout)
    stream.check()
    assert_same(stream[1].train, benchmark.train_stream[1].dataset, shape)
    assert stream.length == (0 if layout == "pixels" else shape[0])


def test_a_function_gets_the_order_seed_and_no_global_random_state_is_touched(root):
    def classes(order_seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        stream = from_avalanche(partial(SplitMNIST, n_experiences=5, dataset_root=root), order_seed=order_seed)
        assert torch.equal(state, torch.get_rng_state())
        return [e.classes for e in stream]

    assert classes(0) == classes(0)
    assert classes(0) != classes(1)
    # Avalanche takes these permutations from NumPy, and without a seed from the operating system.
    make = partial(PermutedMNIST, n_experiences=1, dataset_root=root)
    first, again = (from_avalanche(make)[0].test.batch(torch.arange(3)).x for _ in range(2))
    assert torch.equal(first, again)
    np.random.seed(1)  # a function that takes no seed draws the same again, whatever was drawn before
    drawn = [from_avalanche(lambda: of_list(list(torch.from_numpy(np.random.rand(2, 2, 2))))) for _ in range(2)]
    assert drawn[0].fingerprint() == drawn[1].fingerprint()
    fixed = partial(SplitMNIST, n_experiences=5, dataset_root=root, fixed_class_order=list(range(10)))
    assert from_avalanche(fixed)[4].classes == (8, 9)


def test_tensor_benchmarks():
    x, y = tensors()
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]
    benchmark = tensors_benchmark(parts, parts, task_labels=[0, 0], complete_test_set_only=False)
    stream = from_avalanche(benchmark)
    stream.check()
    assert (stream.length, stream.features, stream.outputs) == (2, 4, 6)
    assert stream.scenario == "domain_incremental"  # all classes in both
    for e, (values, labels) in zip(stream, parts, strict=True):
        batch = e.train.batch(torch.arange(len(e.train)))
        assert torch.equal(batch.x, values)
        assert torch.equal(batch.y, labels)
        assert batch.task is None


def test_one_test_experience_is_shared():
    x, y = tensors()
    data = TensorDataset(x, y)
    data.targets = y.tolist()  # type: ignore[attr-defined]
    benchmark = ni_benchmark(data, data, n_experiences=3, seed=0)
    stream = from_avalanche(benchmark)
    assert len(stream) == 3
    assert stream[0].test is stream[2].test
    assert torch.equal(stream[0].test.batch(torch.arange(30)).x, x)
    seen = torch.cat([e.train.batch(torch.arange(len(e.train))).x for e in stream])
    assert sorted(seen.flatten(1).tolist()) == sorted(x.flatten(1).tolist())


def test_new_style_benchmarks_with_validation_and_task_labels():
    x, y = tensors()
    sets = [_classification(x[rows], y[rows]) for rows in (y < 3, y >= 3)]
    benchmark = benchmark_with_validation_stream(
        benchmark_from_datasets(train=sets, test=sets), validation_size=0.2, shuffle=True, seed=0
    )
    stream = from_avalanche(benchmark)
    assert stream.scenario == "class_incremental"
    assert [e.classes for e in stream] == [(0, 1, 2), (3, 4, 5)]
    for e in stream:
        assert e.valid is not None
        assert (len(e.train), len(e.valid), len(e.test)) == (12, 3, 15)
        train, valid = (
            {tuple(v) for v in d.batch(torch.arange(len(d))).x.flatten(1).tolist()} for d in (e.train, e.valid)
        )
        assert not train & valid
    told = from_avalanche(task_incremental_benchmark(benchmark_from_datasets(train=sets, test=sets)))
    assert told.scenario == "task_incremental"
    for i, e in enumerate(told):
        task = e.test.batch(torch.arange(2)).task
        assert task is not None
        assert task.tolist() == [i, i]


def _classification(x: Tensor, y: Tensor):
    data = TensorDataset(x, y)
    data.targets = y.tolist()  # type: ignore[attr-defined]
    return as_classification_dataset(data)  # type: ignore[arg-type]  # which has targets now


def test_token_benchmarks():
    x, y = torch.arange(40).view(10, 4) % 7, torch.arange(10) % 2
    benchmark = tensors_benchmark([(x, y)], [(x, y)], task_labels=[0])
    stream = from_avalanche(benchmark, vocabulary=7)
    stream.check()
    assert (stream.vocabulary, stream.features, stream.length) == (7, None, 4)
    assert torch.equal(stream[0].train.batch(torch.arange(10)).x, x)


def twice(x: Tensor) -> Tensor:
    return 2 * x


class Coin:
    """A random augmentation."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


def test_an_unknown_transform_is_read_one_by_one_and_gives_the_same(root):
    benchmark = SplitMNIST(5, dataset_root=root, seed=0, train_transform=transforms.Lambda(twice))
    for cache in (True, False):
        stream = from_avalanche(benchmark, cache=cache)
        assert isinstance(stream[2].train, TensorData if cache else WorkerData)
        assert_same(stream[2].train, benchmark.train_stream[2].dataset, (28, 28))
        labels = stream[2].train.targets()
        assert labels is not None
        assert sorted(set(labels.tolist())) == list(stream[2].classes)


def test_a_random_augmentation_is_not_frozen(root):
    benchmark = SplitMNIST(5, dataset_root=root, seed=0, train_transform=Coin())
    with pytest.raises(StreamError, match="a transform is random"):
        from_avalanche(benchmark)
    data = from_avalanche(benchmark, cache=False)[0].train
    index = torch.arange(3)
    assert not torch.equal(data.batch(index).x, data.batch(index).x)


def test_a_reader_that_is_wrong_is_not_used(root, monkeypatch):
    monkeypatch.setattr(avalanche_reader, "_to_floats", lambda images: images.float())  # forgets the 255
    benchmark = SplitMNIST(5, dataset_root=root, seed=0)
    assert_same(from_avalanche(benchmark)[0].train, benchmark.train_stream[0].dataset, (28, 28))


class Listed(Dataset):
    """The examples of a list, with targets as given."""

    def __init__(self, examples: list, targets: list) -> None:
        self.examples, self.targets = examples, targets

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int):
        return self.examples[index], self.targets[index]


def of_list(examples: list, targets: list | None = None):
    data = as_classification_dataset(Listed(examples, targets or [0, 1]))  # type: ignore[arg-type]  # which has targets
    return benchmark_from_datasets(train=[data], test=[data])


@pytest.mark.parametrize(
    ("examples", "targets", "message"),
    [
        (
            [torch.zeros(1, 2), torch.zeros(1, 3)],
            None,
            r"must have one shape, or differ in their number of steps T alone",
        ),
        ([torch.zeros(2), torch.zeros(3)], None, r"must have one shape"),
        (["a picture", "another"], None, "must be tensors, got str"),
        ([torch.zeros(2, 2)] * 2, ["cat", "dog"], r"row 0: targets must be whole numbers, got 'cat' \(str\)"),
        ([torch.zeros(2, 2)] * 2, [0, 1.5], r"row 1: targets must be whole numbers, got 1\.5"),
    ],
)
def test_examples_and_targets_that_cannot_be_read_are_refused(examples, targets, message):
    with pytest.raises(StreamError, match=message):
        from_avalanche(of_list(examples, targets))


@pytest.mark.parametrize("cache", [True, False])
def test_sequences_of_different_lengths_keep_their_lengths(cache):
    examples = [torch.rand(n, 2) for n in (3, 5, 1)]
    stream = from_avalanche(of_list(examples, [0, 1, 1]), cache=cache)
    stream.check()
    assert stream.length is None
    batch = stream[0].train.batch(torch.arange(3))
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [3, 5, 1]
    assert torch.equal(batch.x[0, :3], examples[0])
    tokens = from_avalanche(of_list([torch.tensor([1, 2]), torch.tensor([3])]), vocabulary=4, cache=cache)
    tokens.check()
    assert tokens[0].train.batch(torch.arange(2)).x.tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32, torch.bool])
def test_number_formats_are_plain_or_refused_by_name(cache, dtype):
    x, y = tensors()
    x = (x % 3).to(dtype)
    stream = from_avalanche(tensors_benchmark([(x, y)], [(x, y)], task_labels=[0]), cache=cache)
    if dtype.is_floating_point:
        stream.check()
        assert torch.equal(stream[0].train.batch(torch.arange(30)).x, x.float())
    else:
        with pytest.raises(StreamError, match=rf"train set: inputs must be floats .*got {dtype} .*: give x\.float\(\)"):
            stream.check()
    targets = [n.to(torch.uint8) for n in y]
    assert from_avalanche(of_list(list(x.float()), targets))[0].train.targets().tolist() == y.tolist()  # type: ignore[union-attr]  # classes


@pytest.mark.parametrize("cache", [True, False])
def test_a_value_that_is_not_finite_is_named_by_its_row(cache):
    x, y = tensors()
    x[17, 0, 0] = float("nan")
    stream = from_avalanche(tensors_benchmark([(tensors()[0], y)], [(x, y)], task_labels=[0]), cache=cache)
    with pytest.raises(StreamError, match="test set, row 17: inputs must be finite, got nan"):
        stream.check()


def test_a_benchmark_that_cannot_be_made_is_one_clear_error(tmp_path):
    def unreachable(dataset_root: str, seed: int | None = None):
        raise OSError("no route to host")

    with pytest.raises(StreamError, match=r"unreachable could not be made \(OSError: no route to host\)") as caught:
        from_avalanche(partial(unreachable, dataset_root=str(tmp_path)))
    assert "stream.benchmark.dataset_root" in str(caught.value)


def test_streams_that_do_not_fit_each_other_are_refused():
    x, y = tensors()
    sets = [_classification(x[:10], y[:10]), _classification(x[10:20], y[10:20]), _classification(x[20:], y[20:])]
    with pytest.raises(StreamError, match="got 3 and 2"):
        from_avalanche(benchmark_from_datasets(train=sets, test=sets[:2]))
    with pytest.raises(StreamError, match="one task label an experience"):
        from_avalanche(benchmark_from_datasets(train=sets, test=sets), scenario="task_incremental")


@pytest.mark.slow
def test_a_benchmark_is_trained_from_the_command_line_in_a_fresh_process(root, tmp_path):
    """Beside a torchvision of which the operators may not load: nothing was imported before, unlike in these tests."""
    benchmark = "stream.benchmark._target_=avalanche.benchmarks.SplitMNIST"
    given = ("+stream.benchmark.n_experiences=2", f"+stream.benchmark.dataset_root={root}", "strategy=finetune")
    short = ("training.epochs=1", "tracking=none", "threads=1", "progress=false")
    command = [sys.executable, "-m", "clplat", "train", "stream=avalanche", benchmark, *given, *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["metrics"]["average"] is not None
    assert "2 experiences (class-incremental) of 20" in done.stdout
