"""CIFAR-10 (Krizhevsky, 2009): 50,000 and 10,000 colour images 32 x 32 of 10 classes."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.arrays import ArrayDataset
from nndefense.datasets.hdf5 import HDF5Dataset
from nndefense.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_cifar10(split: str, data_dir: Path, *, download: bool) -> ArrayDataset:
    """Return CIFAR-10, 3 x 32 x 32, from ``cifar10/<split>.h5`` or torchvision's files, else from the network.

    It is held in memory (150 MB), because training reads it in random order many times.

    Raises:
        DataError: the files are neither there nor to be had, or they are damaged.
    """
    file = data_dir / "cifar10" / f"{split}.h5"
    images, labels = _from_hdf5(file) if file.is_file() else _from_torchvision(split, data_dir, download=download)
    return ArrayDataset(images, labels, name=f"cifar10:{split}", classes=CLASSES)


def _from_hdf5(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    dataset = HDF5Dataset(file)
    if dataset.shape != (3, 32, 32) or (dataset.class_names_given and dataset.classes != CLASSES):
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
