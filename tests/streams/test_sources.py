"""Labelled data sets, and torchvision made importable. MNIST is tested where CLPLAT_DATA_ROOT points to it."""

import gzip
import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
import torch

from clplat.streams.experience import StreamError
from clplat.streams.sources import digits, fashion_mnist, mnist, resolve_data_root

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(values: np.ndarray) -> bytes:
    """The IDX format as its author describes it: type 8 (unsigned byte), dimensions, sizes, bytes."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def write_mnist(root: Path, folder: str = "MNIST", zipped: bool = False) -> list[np.ndarray]:
    """Random images in torchvision's layout; returns what was written, in the order of FILES."""
    random = np.random.default_rng(0)
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    values = []
    for name in FILES:
        count = 12 if name.startswith("train") else 5
        shape = (count, 28, 28) if "images" in name else (count,)
        values.append(random.integers(0, 256 if "images" in name else 10, shape, np.uint8))
        content = idx(values[-1])
        (raw / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return values


def test_digits_are_scikit_learns_split_by_class():
    from sklearn.datasets import load_digits

    data = digits()
    assert (len(data.train_x), len(data.test_x)) == (1438, 359)
    assert data.train_x.dtype == torch.float32
    assert data.train_x.shape[1:] == (8, 8)
    assert float(data.train_x.min()) == 0
    assert float(data.train_x.max()) == 1
    images, labels = load_digits(return_X_y=True)
    expected = sorted((*x.tolist(), y) for x, y in zip(images, labels, strict=True))
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    assert sorted((*(v * 16).flatten().tolist(), int(c)) for v, c in zip(x, y, strict=True)) == expected
    counts = y.bincount()
    assert torch.allclose(data.test_y.bincount() / counts, torch.tensor(0.2), atol=0.5 / float(counts.min()))


def test_digits_split_follows_its_seed_alone():
    torch.manual_seed(1)
    first = digits(data_seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.test_x, digits(data_seed=3).test_x)
    assert not torch.equal(first.test_x, digits(data_seed=4).test_x)
    with pytest.raises(ValueError, match=r"test_fraction: got 0\.0, it must be above 0"):
        digits(test_fraction=0.0)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("read", "folder"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_idx_files_are_read_plain_or_zipped(tmp_path, read, folder, zipped):
    train_x, train_y, test_x, test_y = write_mnist(tmp_path, folder, zipped)
    before = set(tmp_path.rglob("*"))
    data = read(data_root=str(tmp_path))
    assert set(tmp_path.rglob("*")) == before, "wrote into the data root"
    assert torch.equal((data.train_x * 255).round().byte(), torch.from_numpy(train_x))
    assert torch.equal((data.test_x * 255).round().byte(), torch.from_numpy(test_x))
    assert data.train_y.tolist() == train_y.tolist()
    assert data.test_y.tolist() == test_y.tolist()
    assert float(data.train_x.max()) <= 1


def test_data_root_is_the_argument_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLPLAT_DATA_ROOT", str(tmp_path / "environment"))
    assert resolve_data_root("~/x") == Path.home() / "x"
    assert resolve_data_root() == tmp_path / "environment"
    monkeypatch.delenv("CLPLAT_DATA_ROOT")
    assert resolve_data_root() == Path.home() / ".cache" / "clplat"


def test_missing_data_are_reported_with_the_place_and_the_way_out(tmp_path):
    with pytest.raises(StreamError) as caught:
        mnist(data_root=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path / "MNIST" / "raw"), FILES[0], "CLPLAT_DATA_ROOT", "stream.source.data_root", "download"):
        assert part in message


def test_a_partly_present_data_set_names_the_missing_file(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / FILES[3]).unlink()
    with pytest.raises(StreamError, match=FILES[3]):
        mnist(data_root=str(tmp_path))


def test_a_failed_download_is_one_clear_error(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(StreamError) as caught:
        mnist(data_root=str(tmp_path), download=True)
    message = str(caught.value)
    assert "could not be downloaded" in message
    assert str(tmp_path / "MNIST" / "raw") in message
    assert "CLPLAT_DATA_ROOT" in message
    assert "\n" not in message


def test_download_is_not_tried_where_the_files_are(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setattr("clplat.streams.sources._download", lambda *_: pytest.fail("tried to download"))
    assert len(mnist(data_root=str(tmp_path), download=True).train_y) == 12


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "damaged"),
        (lambda content: b"\0\0\x08\x01" + content[4:], "no IDX file of 3 dimensions"),
        (lambda content: b"", "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / FILES[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StreamError, match=message) as caught:
        mnist(data_root=str(tmp_path))
    assert str(path) in str(caught.value)


def test_a_cut_gz_file_is_refused(tmp_path):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "MNIST" / "raw" / (FILES[0] + ".gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StreamError, match="cannot be read"):
        mnist(data_root=str(tmp_path))


@pytest.mark.skipif(
    not (Path(os.environ.get("CLPLAT_DATA_ROOT", "/nowhere")) / "MNIST").is_dir(),
    reason="CLPLAT_DATA_ROOT has no MNIST",
)
def test_the_real_mnist():
    data = mnist()
    assert data.train_y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(data.train_x.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(data.train_x.std()) == pytest.approx(0.3081, abs=1e-4)


# torchvision -----------------------------------------------------------------------------------------------------


def run(code: str, path: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CODE = """
import sys, torch
from clplat._torchvision import ensure_importable
ensure_importable(); ensure_importable()
print("torchvision" in sys.modules, end=" ")
try:
    torch.ops.torchvision.nms; torch.ops.torchvision.qnms
    print("declared")
except AttributeError:
    print("absent")
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder with a package torchvision that prints when it is imported."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("print('imported')")
    return tmp_path


@pytest.mark.slow
def test_torchvision_can_be_imported():
    assert (
        run("from clplat._torchvision import ensure_importable as e; e(); import torchvision; print('fine')") == "fine"
    )


def test_schemas_are_declared_where_the_operators_cannot_load(package):
    (package / "torchvision" / "_C.so").write_bytes(b"no library")
    assert run(CODE, package) == "False declared"


@pytest.mark.slow
def test_nothing_is_declared_where_the_operators_load(package):
    libm = find_library("m")
    folders = [Path(f) for f in ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib", "/lib/aarch64-linux-gnu")]
    library = next((f / str(libm) for f in folders if (f / str(libm)).is_file()), None)
    if library is None:
        pytest.skip("found no shared library that certainly loads")
    (package / "torchvision" / "_C.so").write_bytes(library.read_bytes())
    assert run(CODE, package) == "False absent"


@pytest.mark.slow
def test_schemas_that_somebody_else_declared_are_left_alone(package):
    (package / "torchvision" / "_C.so").write_bytes(b"no library")
    before = """
import torch
lib = torch.library.Library("torchvision", "FRAGMENT")
lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
    assert run(before + CODE, package) == "False declared"
