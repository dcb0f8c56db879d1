"""Data sets whose images are stored as arrays: in memory, or in HDF5 files that may be far larger than the memory."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.ids import Ids, NumberedIds, RowNumbers
from nndefense.datasets.labels import check_class_count, class_number, numbered_classes
from nndefense.datasets.pixels import Pixels
from nndefense.datasets.rejected import BadImage, SourceError
from nndefense.datasets.remote import open_store
from nndefense.datasets.store import LocalStore
from nndefense.errors import DataError, InputError, one_line
from nndefense.files import HDF5_ERRORS, held_array, not_read, open_hdf5, write_atomically
from nndefense.images import check_images, shape_text

if TYPE_CHECKING:
    import h5py


SUFFIXES = (".h5", ".hdf5")
_REMEDY = "write or fetch the file again"
_FINGERPRINT_IMAGES = 1000
# Unpacked images may be so many times their file (all that deflate can do), since they are read batch by batch. Labels
# are held in memory: of few images, or at least this share of a byte of the file for each.
_DENSE, _FEW, _SHARE = 1100, 1 << 23, 12
# Rows up to this far apart are read in one go: reading a few rows too many is cheaper than another call.
_NEAR = 4


class ArrayDataset(ImageDataset):
    """Images in memory.

    Args:
        images: uint8 N x H x W x C in 0..255, kept as bytes and converted batch by batch;
            or floats N x C x H x W in [0, 1], kept as float32.
        labels: N class numbers, -1 where unknown.
        classes: the names of the classes.
        ids: N ids; left out, ``<name>/00000`` and so on.

    Raises:
        DataError: shapes, types or ranges do not fit.
    """

    def __init__(
        self,
        images: Pixels,
        labels: ArrayLike,
        *,
        name: str,
        classes: Sequence[str],
        ids: Sequence[str] | None = None,
    ) -> None:
        if images.dtype.kind == "f":
            images = images.astype(np.float32, copy=False)
        self._images = images
        shape = image_shape(images.shape, images.dtype, name)
        super().__init__(
            name=name,
            classes=classes,
            shape=shape,
            ids=ids if ids is not None else NumberedIds(name, len(images)),
            labels=labels,
        )
        if images.dtype == np.float32:
            try:
                check_images(torch.from_numpy(images), name=f"the images of {name}")
            except InputError as error:
                raise DataError(str(error)) from error

    @property
    def usable(self) -> ImageDataset:
        """Itself: its images were looked at when it was made."""
        return self

    def _read(self, rows: RowNumbers) -> Tensor:
        return to_float(self._images[rows])

    def _digest(self) -> str:
        digest = hashlib.sha256(f"array {self._images.shape} {self._images.dtype.name}\n".encode())
        digest.update(np.ascontiguousarray(self._images).data)
        digest.update(self.labels.astype("<i8").tobytes())
        update_with_strings(digest, self.classes)
        return digest.hexdigest()


def image_shape(shape: tuple[int, ...], dtype: np.dtype[np.generic], name: str) -> tuple[int, int, int]:
    """Return C, H, W of stored images: uint8 N x H x W x C or float32 N x C x H x W, with 1 or 3 channels.

    Raises:
        DataError: the images have another form; ``name`` says whose.
    """
    forms = {"uint8": ("N x H x W x C", 3), "float32": ("N x C x H x W", 1)}
    if dtype.name not in forms:
        raise DataError(
            f"{name} has images of type {dtype.name}: store them as uint8 N x H x W x C, "
            "or as float32 N x C x H x W in [0, 1]"
        )
    layout, channel_axis = forms[dtype.name]
    if len(shape) != 4 or shape[channel_axis] not in (1, 3) or 0 in shape[1:]:
        raise DataError(
            f"{name} has {dtype.name} images of shape {shape_text(shape)}: store them as {layout} with C = 1 or 3"
        )
    sides = shape[1:4]
    return (sides[2], sides[0], sides[1]) if channel_axis == 3 else (sides[0], sides[1], sides[2])


def to_float(stored: Pixels) -> Tensor:
    """Turn uint8 n x H x W x C or float32 n x C x H x W into a float32 tensor n x C x H x W in [0, 1]."""
    if stored.dtype == np.float32:
        return torch.from_numpy(stored)
    # By numpy: in a thread of a reader's, torch would begin a team of threads of its own.
    return torch.from_numpy(np.divide(stored.transpose(0, 3, 1, 2), np.float32(255), order="C"))


class HDF5Dataset(ImageDataset):
    """Images in an HDF5 file.

    The file holds ``images`` (uint8 N x H x W x C, or float32 N x C x H x W in [0, 1]) and, where known, ``labels``
    (N whole numbers from 0, -1 for unknown), ``ids`` (N strings) and the attribute ``classes`` (the names). Without
    ids they are ``<file name>/00000`` and so on; without names the classes are called 0, 1, ... Only the labels
    are kept in memory. All of them must stand in the file itself: links, virtual data sets and external storage, which
    may lead to other files, are refused, and so are arrays far larger than the file.

    The path may be a URL.

    Raises:
        DataError: the file is missing, damaged or of another form; later, rows cannot be read or are out of range.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self._store = _Store(os.fspath(path))
        images = self._store.dataset("images")
        shape = image_shape(images.shape, images.dtype, str(path))
        count = int(images.shape[0])
        self._store.check_count(count)
        labels = self._store.labels(count)
        classes = self._store.classes()
        if classes is None:
            classes = numbered_classes(labels, str(path))
        elif count and labels.max() >= len(classes):
            raise DataError(f"{path} has label {labels.max()}, but names only {len(classes)} classes: {_REMEDY}")
        ids: Ids = NumberedIds(Path(self._store.path).stem, count)
        if self._store.has_ids(count):
            ids = _StoredIds(self._store, count)
        super().__init__(name=name or f"hdf5:{path}", classes=classes, shape=shape, ids=ids, labels=labels)

    @property
    def class_names_given(self) -> bool:
        """Whether the file names its classes."""
        return self._store.classes() is not None

    def stored(self, rows: RowNumbers) -> Pixels:
        """Return the images at ``rows`` as they are in the file."""
        pixels = self._store.read("images", rows)
        # Torch takes no arrays in the byte order of another machine.
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)

    def _read(self, rows: RowNumbers) -> Tensor:
        pixels = self.stored(rows)
        images = to_float(pixels)
        if pixels.dtype != np.uint8:
            try:
                check_images(images, name=f"images of {self._store.path}")
            except InputError as error:
                raise BadImage(str(error), "out of range", f"it has pixels that are not in [0, 1] ({error})") from error
        return images

    def _digest(self) -> str:
        """Hash the form, the labels and up to 1,000 evenly spaced images: reading all could take hours."""
        digest = hashlib.sha256(f"hdf5 {self.shape} {len(self)}\n".encode())
        digest.update(self.labels.astype("<i8").tobytes())
        update_with_strings(digest, self.classes)
        picked = np.unique(np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_IMAGES)).astype(np.int64))
        for start in range(0, len(picked), 100):
            pixels = self.stored(picked[start : start + 100])
            digest.update(np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<")).data)
        return digest.hexdigest()


class _StoredIds(Ids):
    """The ids in an HDF5 file, read when asked for."""

    def __init__(self, store: _Store, count: int) -> None:
        self._store, self._count = store, count

    def take(self, rows: RowNumbers) -> list[str]:
        return [_text(item) for item in self._store.read("ids", rows).tolist()]


class _Store:
    """An HDF5 file opened for reading, opened anew in each process."""

    def __init__(self, path: str) -> None:
        self._files, self._place = open_store(path)
        self.path = path
        self._file: h5py.File | None = None
        self._process = 0
        if not self._files.is_file(self._place):
            raise DataError(f"there is no file {path}: check the path")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None, "_process": 0}

    def file(self) -> h5py.File:
        # A forked process must not share the open file with its parent.
        if self._file is None or self._process != os.getpid():
            if self._file is not None:
                self._file.close()
            with self._reading():
                # HDF5 reads files of this machine by itself, which is faster than through an open one.
                local = isinstance(self._files, LocalStore)
                self._file = open_hdf5(self._place if local else self._files.open(self._place), foreign=local)
            self._process = os.getpid()
        return self._file

    def __contains__(self, key: str) -> bool:
        with self._reading():
            return self.file().get(key, getlink=True) is not None

    def dataset(self, key: str) -> h5py.Dataset:
        if key not in self:
            raise DataError(f"{self.path} has no data set {key!r}: store the images as {key}, uint8 N x H x W x C")
        with self._reading():
            return held_array(self.file(), key, self.path, dense=_DENSE)

    def check_count(self, count: int) -> None:
        with self._reading():
            size = self.file().id.get_filesize()
        if count > max(_FEW, _SHARE * size):
            raise DataError(
                f"{self.path} declares {count:,} images in {size:,} bytes, far more than it can hold: {_REMEDY}"
            )

    def labels(self, count: int) -> NDArray[np.int64]:
        if "labels" not in self:
            return np.full(count, -1, dtype=np.int64)
        stored = self.dataset("labels")
        self._check_length("labels", stored.shape, count)
        if stored.dtype.kind not in "iuf":
            raise DataError(f"{self.path} has labels of type {stored.dtype}: store whole numbers from 0")
        with self._reading():
            distinct, places = np.unique(np.asarray(stored[...]), return_inverse=True)
        numbers = [class_number(value, str(self.path)) for value in distinct.tolist()]
        return np.array(numbers, dtype=np.int64)[places.reshape(-1)]

    def classes(self) -> list[str] | None:
        import h5py

        with self._reading():
            attributes = self.file().attrs
            if "classes" not in attributes:
                return None
            # By its declared length, before anything is read.
            check_class_count(math.prod(h5py.h5a.open(self.file().id, b"classes").shape), self.path)
            stored = attributes["classes"]
        names = np.asarray(stored)
        if names.ndim != 1 or names.dtype.kind not in "SUO":
            raise DataError(f"{self.path} has a classes attribute that is no list of names: {_REMEDY}")
        return [_text(item) for item in names.tolist()]

    def has_ids(self, count: int) -> bool:
        import h5py

        if "ids" not in self:
            return False
        stored = self.dataset("ids")
        self._check_length("ids", stored.shape, count)
        if h5py.check_string_dtype(stored.dtype) is None:
            raise DataError(f"{self.path} has ids of type {stored.dtype}: store them as strings")
        return True

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Say in one line what h5py raises in many ways: the file is gone, damaged or of another kind."""
        try:
            yield
        except HDF5_ERRORS as error:
            reason = one_line(error)
            if not self._files.is_file(self._place):
                raise SourceError(
                    f"cannot read {self.path} ({reason}): it is gone; bring it back, then go on"
                ) from error
            told = not_read(self.path, error)
            if told:
                raise SourceError(told) from error
            raise DataError(
                f"cannot read {self.path} as an HDF5 file ({reason}): it is damaged or of another kind; {_REMEDY}"
            ) from error

    def _check_length(self, key: str, shape: tuple[int, ...], count: int) -> None:
        if shape != (count,):
            raise DataError(
                f"{self.path} has {count} images, but {key} of shape {shape_text(shape)}: store one for each image"
            )

    def read(self, key: str, rows: RowNumbers) -> NDArray[np.generic]:
        """Return the given rows of a data set, in that order."""
        stored = self.dataset(key)
        with self._reading():
            if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
                return np.asarray(stored[int(rows[0]) : int(rows[-1]) + 1])
            # HDF5 reads slices well, but long lists of rows slowly and only in ascending order.
            wanted, places = np.unique(rows, return_inverse=True)
            found = np.empty((len(wanted), *stored.shape[1:]), dtype=stored.dtype)
            compressed = stored.chunks is not None and stored.compression is not None
            for run in _runs(wanted, stored.chunks[0] if compressed else None):
                first = int(wanted[run.start])
                found[run] = stored[first : int(wanted[run.stop - 1]) + 1][wanted[run] - first]
        return found[places]


def _runs(rows: RowNumbers, chunk: int | None) -> Iterator[slice]:
    """Cut ascending rows into runs to be read in one go each: neighbours, or those within a compressed chunk."""
    breaks = np.diff(rows) > _NEAR if chunk is None else np.diff(rows // chunk) > 0
    for start, stop in itertools.pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(rows)]):
        if stop > start:
            yield slice(start, stop)


def _text(item: object) -> str:
    return item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item)


def write_hdf5(
    path: str | os.PathLike[str],
    images: Tensor | NDArray[np.float32],
    labels: ArrayLike | Tensor | None = None,
    ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a data set that :class:`HDF5Dataset` opens, e.g. attacked images. The file appears only when complete.

    Args:
        path: the file; an existing one is replaced.
        images: float32 N x C x H x W in [0, 1], stored without loss.
        labels: N class numbers, -1 where unknown.
        ids: N ids, e.g. those of the original images.
        classes: the names of the classes.

    Raises:
        InputError: images are out of range, or the numbers of images, labels and ids differ.
        DataError: the file cannot be written.
    """
    import h5py

    tensor = images.detach().cpu() if isinstance(images, Tensor) else torch.from_numpy(np.asarray(images))
    check_images(tensor)
    pixels = tensor.to(torch.float32).numpy()
    numbers = None
    if labels is not None:
        numbers = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        if numbers.shape != (len(pixels),) or numbers.dtype.kind not in "iu":
            raise InputError(f"give one whole-number label for each of the {len(pixels)} images")
    if ids is not None and len(ids) != len(pixels):
        raise InputError(f"give one id for each of the {len(pixels)} images, not {len(ids)}")

    target = Path(path)

    def write(part: Path) -> None:
        # Version 1.10 of the format, because older ones hold at most 64 KiB of class names. Nobody else knows the part.
        with h5py.File(part, "w", libver=("v110", "v110"), locking=False) as file:
            file["images"] = pixels
            if numbers is not None:
                file["labels"] = numbers.astype(np.int64)
            if ids is not None:
                encoded = [item.encode("utf-8", "surrogateescape") for item in ids]
                file["ids"] = np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")
            if classes is not None:
                file.attrs["classes"] = np.array(list(classes), dtype=h5py.string_dtype())

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, write)
    except OSError as error:
        raise DataError(f"cannot write {target} ({error}): check the folder and the space that is left") from error
