"""The small sets that are known by name: scikit-learn's digits, MNIST, Fashion-MNIST and CIFAR-10.

``digits`` are 1,797 handwritten grey images 8 x 8 that come with scikit-learn: a test set of the UCI "Optical
Recognition of Handwritten Digits" data (Alpaydin and Kaynak, 1998). MNIST and Fashion-MNIST are read from their
original idx files (format: LeCun, Cortes and Burges, yann.lecun.com/exdb/mnist). CIFAR-10 (Krizhevsky, 2009) has 50,000
and 10,000 colour images 32 x 32 of 10 classes.
"""

from __future__ import annotations

import gzip
import textwrap
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.arrays import ArrayDataset, HDF5Dataset
from nndefense.datasets.base import stratified_rows
from nndefense.datasets.ids import NumberedIds, PickedIds
from nndefense.errors import DataError
from nndefense.images import shape_text

_DIGITS = tuple(str(digit) for digit in range(10))
_TEST_DIGITS = 500
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
# For each idx set: the name of torchvision's class, which is also the name of the folder that torchvision makes; and
# its classes.
_IDX = {"mnist": ("MNIST", _DIGITS), "fashion-mnist": ("FashionMNIST", tuple(_FASHION.split(",")))}
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# No image set of this family comes near this; a header that says more is damaged.
_MOST_BYTES = 2**31


def open_digits(split: str) -> ArrayDataset:
    """Return the 1,297 ``train`` or 500 ``test`` images, 1 x 8 x 8; a fixed split that keeps the shares of classes.

    The ids count through scikit-learn's order: ``digits/00000`` to ``digits/01796``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits data set comes with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    test = stratified_rows(labels, _TEST_DIGITS, seed=0)
    rows = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
    # Values are 0..16, so a sixteenth of them is exact in float32.
    images = (np.asarray(bunch.images)[rows, None] / 16).astype(np.float32)
    ids = PickedIds(NumberedIds("digits", len(labels)), rows)
    return ArrayDataset(images, labels[rows], name=f"digits:{split}", classes=_DIGITS, ids=ids)


def open_cifar10(split: str, data_dir: Path, *, download: bool) -> ArrayDataset:
    """Return CIFAR-10, 3 x 32 x 32, from ``cifar10/<split>.h5`` or torchvision's files, else from the network.

    It is held in memory (150 MB), because training reads it in random order many times.

    Raises:
        DataError: the files are neither there nor to be had, or they are damaged.
    """
    file = data_dir / "cifar10" / f"{split}.h5"
    images, labels = _from_hdf5(file) if file.is_file() else _from_torchvision(split, data_dir, download=download)
    return ArrayDataset(images, labels, name=f"cifar10:{split}", classes=_CIFAR10)


def _from_hdf5(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    dataset = HDF5Dataset(file)
    if dataset.shape != (3, 32, 32) or (dataset.class_names_given and dataset.classes != _CIFAR10):
        raise DataError(f"{file} does not hold CIFAR-10: open another data set as hdf5:{file}")
    images = dataset.stored(np.arange(len(dataset), dtype=np.int64))
    if images.dtype != np.uint8:
        raise DataError(f"{file} holds float images, but CIFAR-10 has 8-bit ones: open it as hdf5:{file}")
    return np.asarray(images, dtype=np.uint8), dataset.labels


def _from_torchvision(split: str, data_dir: Path, *, download: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from torchvision.datasets import CIFAR10

        # The batches are pickles, which could run any code. torchvision compares the md5 of each one with that of
        # the published file before it reads any, and raises RuntimeError if one differs.
        dataset = CIFAR10(root=data_dir, train=split == "train", download=download)
    except (ImportError, OSError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 120)
        raise DataError(
            f"cifar10:{split} is not in {data_dir} and could not be had ({reason}): put {split}.h5 into "
            f"{data_dir / 'cifar10'} or the folder cifar-10-batches-py of the original into {data_dir}"
        ) from error
    return np.asarray(dataset.data, dtype=np.uint8), np.asarray(dataset.targets, dtype=np.int64)


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
    classes = _IDX[name][1]
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
    for folder in (data_dir / name, data_dir / _IDX[name][0] / "raw"):
        candidates = [(folder / stem, folder / f"{stem}.gz") for stem in _FILES[split]]
        found = [next((file for file in pair if file.is_file()), None) for pair in candidates]
        if found[0] and found[1]:
            return found[0], found[1]
    return None


def _download(name: str, split: str, data_dir: Path) -> None:
    try:
        import torchvision

        getattr(torchvision.datasets, _IDX[name][0])(root=data_dir, train=split == "train", download=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 120)
        raise _missing(name, split, data_dir, f"could not be downloaded ({reason})") from error


def _missing(name: str, split: str, data_dir: Path, state: str) -> DataError:
    files = " and ".join(f"{stem}.gz" for stem in _FILES[split])
    return DataError(
        f"{name}:{split} {state}: put {files} into {data_dir / name}, or set NNDEFENSE_DATA to their place"
    )
