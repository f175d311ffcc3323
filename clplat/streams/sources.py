"""Labelled data sets: the embedded digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from clplat import checks
from clplat._torchvision import ensure_importable
from clplat.streams.experience import StreamError
from clplat.streams.labelled import Labelled, hold_out

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def digits(test_fraction: float = 0.2, data_seed: int = 0) -> Labelled:
    """The 1797 handwritten digits that come with scikit-learn, 8x8, grey levels 0..1; nothing is downloaded.

    Args:
        test_fraction: share of every class that is the test set, in (0, 1).
        data_seed: of the choice of test examples.
    """
    from sklearn.datasets import load_digits

    checks.above(0, "without test examples nothing can be measured", test_fraction=test_fraction)
    checks.within(0, 1, below=True, test_fraction=test_fraction)
    data = load_digits()
    x = torch.from_numpy(data.images).float() / 16  # type: ignore[attr-defined]  # a Bunch declares no fields
    y = torch.from_numpy(data.target).long()  # type: ignore[attr-defined]
    train, test = hold_out(y, test_fraction, data_seed)
    assert test is not None
    return Labelled("digits", x[train], y[train], x[test], y[test], classes=10)


def mnist(data_root: str | None = None, download: bool = False) -> Labelled:
    """MNIST: 60000 and 10000 images of digits, 28x28, grey levels 0..1 (LeCun et al. 1998).

    Args:
        data_root: the folder that holds MNIST/raw; None: the environment's CLPLAT_DATA_ROOT, else ~/.cache/clplat.
        download: fetch the files with torchvision if they are missing.

    Raises:
        StreamError: the files are missing or damaged, or could not be downloaded.
    """
    return _idx_data_set("mnist", "MNIST", data_root, download)


def fashion_mnist(data_root: str | None = None, download: bool = False) -> Labelled:
    """Fashion-MNIST: 60000 and 10000 images of clothes, 28x28, grey levels 0..1 (Xiao et al. 2017).

    Args:
        data_root: the folder that holds FashionMNIST/raw; None: CLPLAT_DATA_ROOT, else ~/.cache/clplat.
        download: fetch the files with torchvision if they are missing.

    Raises:
        StreamError: the files are missing or damaged, or could not be downloaded.
    """
    return _idx_data_set("fashion_mnist", "FashionMNIST", data_root, download)


def resolve_data_root(data_root: str | None = None) -> Path:
    """The folder of data sets: the argument, else CLPLAT_DATA_ROOT, else ~/.cache/clplat."""
    return Path(data_root or os.environ.get("CLPLAT_DATA_ROOT") or "~/.cache/clplat").expanduser()


def _idx_data_set(
    name: str, folder: Literal["MNIST", "FashionMNIST"], data_root: str | None, download: bool
) -> Labelled:
    root = resolve_data_root(data_root)
    raw = root / folder / "raw"
    stems = [f"{part}-{kind}" for part in ("train", "t10k") for kind in (IMAGES, LABELS)]
    missing = [stem for stem in stems if _find(raw, stem) is None]
    if missing and download:
        _download(folder, root)
        missing = [stem for stem in stems if _find(raw, stem) is None]
    if missing:
        raise StreamError(
            f"{folder} is not in {raw}: {missing[0]} or {missing[0]}.gz was looked for. Point to a folder that holds "
            f"{folder}/raw with CLPLAT_DATA_ROOT=DIR or stream.source.data_root=DIR, or let torchvision fetch it with "
            "stream.source.download=true."
        )
    parts = [_read_idx(raw, stem) for stem in stems]
    train_x, train_y, test_x, test_y = (p.float().div_(255) if i % 2 == 0 else p.long() for i, p in enumerate(parts))
    return Labelled(name, train_x, train_y, test_x, test_y, classes=10)


def _find(raw: Path, stem: str) -> Path | None:
    return next((path for path in (raw / stem, raw / f"{stem}.gz") if path.is_file()), None)


def _read_idx(raw: Path, stem: str) -> Tensor:
    """The unsigned bytes of an IDX file, in the shape that its header states."""
    # torchvision's reader wants the files unpacked: 55 MB beside the gz, in a folder that may be read-only or shared.
    path = _find(raw, stem)
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise StreamError(f"{path} cannot be read ({error}): delete it and get it again.") from error
    ndim = 3 if stem.endswith(IMAGES) else 1
    header = 4 * (1 + ndim)
    magic, *shape = np.frombuffer(content[:header], ">i4").tolist() or [0]
    if magic != 0x0800 + ndim or len(content) != header + int(np.prod(shape)):
        raise StreamError(f"{path} is damaged or no IDX file of {ndim} dimensions: delete it and get it again.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _download(folder: Literal["MNIST", "FashionMNIST"], root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        ensure_importable()
        from torchvision import datasets

        kind = {"MNIST": datasets.MNIST, "FashionMNIST": datasets.FashionMNIST}[folder]
        with FileLock(root / f".{folder}.lock"):  # the processes of a sweep start together
            kind(str(root), train=True, download=True)
    except Exception as error:
        raise StreamError(
            f"{folder} is not in {root / folder / 'raw'} and could not be downloaded there "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). Copy the four "
            f"files named *-ubyte or *-ubyte.gz there, or point to a folder that holds {folder}/raw with "
            "CLPLAT_DATA_ROOT=DIR or stream.source.data_root=DIR."
        ) from error
