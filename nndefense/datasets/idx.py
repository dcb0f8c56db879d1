"""MNIST and Fashion-MNIST in their original idx files (format: LeCun, Cortes and Burges, yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import textwrap
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import DataError
from nndefense.images import shape_text

# For each set: the name of torchvision's class, which is also the name of the folder that torchvision makes.
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_CLASSES = {
    "mnist": tuple(str(digit) for digit in range(10)),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# No image set of this family comes near this; a header that says more is damaged.
_MOST_BYTES = 2**31


def open_idx(name: str, split: str, data_dir: Path, *, download: bool) -> ArrayDataset:
    """Return ``mnist`` or ``fashion-mnist``, 1 x 28 x 28, from the files below ``data_dir``, else from the network.

    Raises:
        DataError: the files are neither there nor to be had, or they are damaged.
    """
    files = _find(name, split, data_dir)
    if files is None and download:
        _download(name, split, data_dir)
        files = _find(name, split, data_dir)
    if files is None:
        raise _missing(name, split, data_dir, "is not there")
    images_file, labels_file = files
    images = read_idx(images_file, 3)
    labels = read_idx(labels_file, 1)
    classes = _CLASSES[name]
    if len(images) != len(labels):
        raise DataError(
            f"{images_file} has {len(images)} images, but {labels_file} {len(labels)} labels: fetch both files again"
        )
    if len(labels) and labels.max() >= len(classes):
        raise DataError(
            f"{labels_file} has label {labels.max()}, but {name} has {len(classes)} classes: fetch it again"
        )
    return ArrayDataset(images[..., None], labels, name=f"{name}:{split}", classes=classes)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, packed with gzip or not, that has the given number of dimensions.

    Raises:
        DataError: the file is damaged or of another kind.
    """
    header_bytes = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_bytes)
            # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each dimension, big-endian.
            if len(header) < header_bytes or header[:4] != bytes([0, 0, 8, dimensions]):
                raise DataError(f"{path} is no idx file of {dimensions} dimensions: fetch it again")
            shape = tuple(int(side) for side in np.frombuffer(header, dtype=">u4", offset=4))
            count = int(np.prod(shape, dtype=object))
            if count > _MOST_BYTES:
                raise DataError(f"{path} is damaged (its header says {shape_text(shape)}): fetch it again")
            # One byte more than there should be: this also makes gzip verify its checksum at the end.
            data = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({' '.join(str(error).split())}): fetch it again") from error
    if len(data) != count:
        state = "cut short" if len(data) < count else "longer than its header says"
        raise DataError(f"{path} is {state}: fetch it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _find(name: str, split: str, data_dir: Path) -> tuple[Path, Path] | None:
    for folder in (data_dir / name, data_dir / _TORCHVISION[name] / "raw"):
        candidates = [(folder / stem, folder / f"{stem}.gz") for stem in _FILES[split]]
        found = [next((file for file in pair if file.is_file()), None) for pair in candidates]
        if found[0] and found[1]:
            return found[0], found[1]
    return None


def _download(name: str, split: str, data_dir: Path) -> None:
    try:
        import torchvision

        getattr(torchvision.datasets, _TORCHVISION[name])(root=data_dir, train=split == "train", download=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 120)
        raise _missing(name, split, data_dir, f"could not be downloaded ({reason})") from error


def _missing(name: str, split: str, data_dir: Path, state: str) -> DataError:
    files = " and ".join(f"{stem}.gz" for stem in _FILES[split])
    return DataError(
        f"{name}:{split} {state}: put {files} into {data_dir / name}, or set NNDEFENSE_DATA to their place"
    )
