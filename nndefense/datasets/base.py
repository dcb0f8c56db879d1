"""The map-style data set that everything else takes, and how data sets are cut, joined and split."""

from __future__ import annotations

import functools
import hashlib
import operator
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nndefense.datasets.ids import Ids, PackedIds, PickedIds, RowNumbers
from nndefense.datasets.labels import check_class_count
from nndefense.datasets.pixels import Digests, pixel_digests
from nndefense.datasets.rejected import OTHER_SIZE, BadImage, Reading, Rejected, SourceError, left_out
from nndefense.errors import DataError, InputError, warn
from nndefense.images import shape_text

_POOL_SAMPLE = 64
_BLOCK = 8192
_COMPARED, _TOGETHER = 200, 25

# Indices may come as any list of numbers, as an array, as a tensor, or as a boolean mask over the whole data set.
Indices = ArrayLike | Tensor


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images with labels and ids.

    Attributes:
        name: the text that the data set was opened with, e.g. ``mnist:test``.
        classes: the names of the classes; a label is an index into them.
        shape: channels, height and width of every image.
        ids: one id per item, e.g. ``mnist:test/00012``. An item keeps it in subsets and concatenations.
        labels: int64 array of length N; -1 where the class is unknown.

    A subclass implements :meth:`_read` and :meth:`_digest`. Safe to pickle and to use in forked loader processes.

    Raises:
        DataError: labels that are not one for each image, or no classes of it.
    """

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str],
        shape: tuple[int, int, int],
        ids: Sequence[str],
        labels: ArrayLike,
    ) -> None:
        self.name = name
        check_class_count(len(classes), name)
        self.classes = tuple(classes)
        self.shape = shape
        self.ids: Ids = ids if isinstance(ids, Ids) else PackedIds(ids)
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        if self.labels.shape != (len(self.ids),):
            raise DataError(f"{name} has {len(self.ids)} images, but labels of shape {shape_text(self.labels.shape)}")
        if len(self.labels) and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(
                f"{name} has labels from {self.labels.min()} to {self.labels.max()}, but {len(self.classes)} classes: "
                f"labels must be class numbers from 0, or -1 where unknown"
            )

    @abstractmethod
    def _read(self, rows: RowNumbers) -> Tensor:
        """Return the images at ``rows`` (each in 0..N-1) as a new float32 tensor n x C x H x W in [0, 1]."""

    def read_into(self, rows: RowNumbers, images: Tensor, digests: Digests | None = None) -> dict[int, BadImage]:
        """Read into memory that the caller has made, and say what is wrong with each image that cannot be read.

        This one halves a batch that fails until the bad images are alone; subclasses that know better do better.

        Args:
            rows: n row numbers in 0..N-1.
            images: float32 n x C x H x W, to be filled; bad images become black.
            digests: uint8 n x 16, to be filled with :func:`~nndefense.datasets.pixel_digests`, where they are wanted.

        Returns:
            The errors, by place in ``rows``.

        Raises:
            SourceError: the source itself cannot be read.
        """
        try:
            # By numpy: in a thread of a reader's, torch would begin a team of threads of its own.
            images.numpy()[:] = self._read(rows).numpy()
        except SourceError:
            raise
        except DataError as error:
            if len(rows) == 1:
                images.zero_()
                return {0: error if isinstance(error, BadImage) else BadImage(str(error), "unreadable", str(error))}
        else:
            if digests is not None:
                digests[:] = pixel_digests(images)
            return {}
        wrong: dict[int, BadImage] = {}
        middle = len(rows) // 2
        for half in (slice(0, middle), slice(middle, len(rows))):
            found = self.read_into(rows[half], images[half], None if digests is None else digests[half])
            wrong.update({half.start + place: error for place, error in found.items()})
        return wrong

    @abstractmethod
    def _digest(self) -> str:
        """Return the sha256 of what defines the content, as hexadecimal digits."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of what defines the content, as 64 hexadecimal digits; worked out once."""
        return self._digest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = operator.index(index)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            # Not an InputError: Python's own loops over a sequence end with an IndexError.
            raise IndexError(f"{self.name} has {len(self)} images, so no image {index}")
        return self._read(np.array([row], dtype=np.int64))[0], int(self.labels[row])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Read many items in one go; ``torch.utils.data.DataLoader`` calls this where it exists."""
        images, labels = self.batch(indices)
        return list(zip(images.unbind(), labels.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} images {shape_text(self.shape)}, {len(self.classes)} classes>"

    def rows(self, indices: Indices) -> NDArray[np.int64]:
        """Return ``indices`` as row numbers 0..N-1: negative ones count from the end, a boolean mask picks.

        Raises:
            InputError: an index is out of range, or is no whole number.
        """
        given = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
        if given.size == 0 and given.dtype != np.bool_:
            return np.zeros(0, dtype=np.int64)
        if given.ndim != 1 or given.dtype.kind not in "biu":
            raise InputError(f"indices into {self.name} must be a list of whole numbers")
        if given.dtype == np.bool_:
            if len(given) != len(self):
                raise InputError(f"a mask over {self.name} must have {len(self)} entries, not {len(given)}")
            return np.flatnonzero(given).astype(np.int64)
        low, high = int(given.min()), int(given.max())
        if low < -len(self) or high >= len(self):
            raise InputError(
                f"{self.name} has {len(self)} images, so no image {high if high >= len(self) else low}: "
                f"use indices from 0 to {len(self) - 1}"
            )
        rows = given.astype(np.int64)
        rows[rows < 0] += len(self)
        return rows

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return images (float32 n x C x H x W in [0, 1]) and labels (int64 n) at ``indices``, in that order.

        Raises:
            InputError: an index is out of range.
            DataError: the images cannot be read.
        """
        rows = self.rows(indices)
        if len(rows) == 0:
            return torch.zeros((0, *self.shape)), torch.zeros(0, dtype=torch.int64)
        return self._read(rows), torch.from_numpy(self.labels[rows])

    def has_one_size(self) -> bool:
        """Whether up to 200 evenly spaced images have the size of the first; what cannot be read says nothing."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), _COMPARED)).astype(np.int64))
        for start in range(0, len(rows), _TOGETHER):
            part = rows[start : start + _TOGETHER]
            wrong = self.read_into(part, torch.empty((len(part), *self.shape)))
            if any(error.kind == OTHER_SIZE for error in wrong.values()):
                return False
        return True

    def read_each(self, indices: Indices) -> Reading:
        """Read the images at ``indices`` that can be read, in that order, and say of the others what is wrong.

        Raises:
            InputError: an index is out of range.
            SourceError: the source itself cannot be read. A bad image raises nothing.
        """
        rows = self.rows(indices)
        if len(rows) == 0:
            return Reading(rows, torch.zeros((0, *self.shape)), torch.zeros(0, dtype=torch.int64), [], ())
        images = torch.empty((len(rows), *self.shape))
        wrong = self.read_into(rows, images)
        rejected = self.rejected(rows, wrong)
        if wrong:
            good = np.delete(np.arange(len(rows)), sorted(wrong))
            rows, images = rows[good], images[torch.from_numpy(good)]
        return Reading(rows, images, torch.from_numpy(self.labels[rows]), self.ids.take(rows), rejected)

    @functools.cached_property
    def usable(self) -> ImageDataset:
        """The images that can be read, for a job that needs all of them again and again: this set where none is bad.

        All are read once, when it is first asked for; a warning names those that are left out.

        Raises:
            DataError: not one of them can be read.
            SourceError: the source itself cannot be read.
        """
        bad: list[Rejected] = []
        images = torch.empty((min(len(self), _TOGETHER), *self.shape))
        for start in range(0, len(self), _TOGETHER):
            rows = np.arange(start, min(start + _TOGETHER, len(self)), dtype=np.int64)
            bad += self.rejected(rows, self.read_into(rows, images[: len(rows)]))
        if not bad:
            return self
        text = left_out(bad, len(self), self.name)
        warn(text)
        kept = self.subset(np.delete(np.arange(len(self), dtype=np.int64), [item.row for item in bad]))
        kept.__dict__["usable"] = kept
        return kept

    def rejected(self, rows: RowNumbers, wrong: dict[int, BadImage]) -> tuple[Rejected, ...]:
        """Describe what :meth:`read_into` returned as ``wrong`` for ``rows``, in order."""
        places = sorted(wrong)
        items = self.ids.take(rows[places]) if places else []
        return tuple(
            Rejected(int(rows[place]), item, wrong[place].kind, wrong[place].reason)
            for place, item in zip(places, items, strict=True)
        )

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """Yield all images, labels and row numbers in order, at most ``batch_size`` (below 1: InputError) at a time."""
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        # The check above must not wait for the first item, so the loop is a function of its own.
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        for start in range(0, len(self), batch_size):
            rows = np.arange(start, min(start + batch_size, len(self)), dtype=np.int64)
            images, labels = self.batch(rows)
            yield images, labels, rows

    def subset(self, indices: Indices, *, name: str | None = None) -> ImageDataset:
        """Return the items at ``indices`` as a data set; ids and classes stay. All of them in order: this one."""
        rows = self.rows(indices)
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        return SubsetDataset(self, rows, name=name)

    @functools.cached_property
    def _row_of_id(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, item in enumerate(self.ids):
            rows.setdefault(item, row)
        return rows

    def index_of(self, item: str) -> int:
        """Return the index of the item with id ``item`` (the first one, if several have it).

        Raises:
            DataError: no item has that id.
        """
        try:
            return self._row_of_id[item]
        except KeyError:
            raise DataError(f"{self.name} has no image with id {item!r}: its ids look like {self.ids[:1]}") from None


class SubsetDataset(ImageDataset):
    """Some items of another data set, in a given order; made by :meth:`ImageDataset.subset`."""

    def __init__(self, parent: ImageDataset, rows: RowNumbers, *, name: str | None = None) -> None:
        name = name or f"{parent.name} ({len(rows)} of {len(parent)})"
        # A subset of a subset points at the origin, so its fingerprint does not depend on how it was reached.
        if isinstance(parent, SubsetDataset):
            rows, parent = parent.origin_rows[rows], parent.origin
        self.origin: ImageDataset = parent
        self.origin_rows: NDArray[np.int64] = rows
        super().__init__(
            name=name,
            classes=parent.classes,
            shape=parent.shape,
            ids=PickedIds(parent.ids, rows),
            labels=parent.labels[rows],
        )

    def _read(self, rows: RowNumbers) -> Tensor:
        return self.origin._read(self.origin_rows[rows])

    def read_into(self, rows: RowNumbers, images: Tensor, digests: Digests | None = None) -> dict[int, BadImage]:
        """As for every data set: see :meth:`ImageDataset.read_into`."""
        return self.origin.read_into(self.origin_rows[rows], images, digests)

    def _digest(self) -> str:
        digest = hashlib.sha256(f"subset {self.origin.fingerprint}\n".encode())
        update_with_strings(digest, self.ids)
        return digest.hexdigest()


def holdout(dataset: ImageDataset, n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split ``dataset`` in two: return the rows that remain and the ``n`` rows held out, both ascending.

    Each class (unknown labels count as one) gives its share of ``n``, rounded by largest remainder. The same data
    set, ``n`` and ``seed`` give the same rows on every machine and with every version of the libraries.

    Raises:
        InputError: ``n`` is not between 1 and the number of images less 1.
    """
    if not 0 < n < len(dataset):
        raise InputError(
            f"cannot hold out {n} of the {len(dataset)} images of {dataset.name}: "
            f"choose a number from 1 to {len(dataset) - 1}"
        )
    held = stratified_rows(dataset.labels, n, seed)
    remains = np.ones(len(dataset), dtype=np.bool_)
    remains[held] = False
    return np.flatnonzero(remains).astype(np.int64), held


def stratified_rows(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Choose ``n`` of the rows so that each label keeps its share; ascending."""
    values, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quotas, remainders = np.divmod(counts.astype(np.int64) * n, len(labels))
    # A stable sort gives ties to the lower label.
    quotas[np.argsort(-remainders, kind="stable")[: n - int(quotas.sum())]] += 1
    keys = shuffle_keys(len(labels), seed)
    chosen = []
    for member in range(len(values)):
        rows = np.flatnonzero(members == member)
        chosen.append(rows[np.argsort(keys[rows], kind="stable")[: quotas[member]]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def shuffle_keys(n: int, seed: int) -> NDArray[np.uint64]:
    """Return n pseudo-random keys to sort by: the SplitMix64 output function (Steele, Lea and Flood, OOPSLA 2014).

    NumPy and PyTorch do not promise the same permutation for a seed in every version; integer arithmetic does.
    """

    def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values ^= values >> np.uint64(31)
        return values

    golden = np.uint64(0x9E3779B97F4A7C15)
    # Arrays, not scalars, because NumPy warns when a scalar wraps around; the seed is mixed first so that
    # neighbouring seeds do not give shifted copies of one sequence.
    start = mix(np.array([seed % 2**64], dtype=np.uint64) + golden)
    return mix(start + golden * np.arange(1, n + 1, dtype=np.uint64))


def update_with_strings(digest: hashlib._Hash, strings: Iterable[str]) -> None:
    """Feed strings to a hash, each with its length, so that no two lists look alike."""
    for string in strings:
        data = string.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data))
        digest.update(data)


def pool_identity(pool: ImageDataset) -> dict[str, Any]:
    """What tells one pool from another, whatever its labels: number, shape, all ids and 64 evenly spaced images.

    Pixels are rounded to 8 bits, and a hash of each image says which one has changed.
    """
    ids = hashlib.sha256()
    for start in range(0, len(pool), _BLOCK):
        update_with_strings(ids, pool.ids[start : start + _BLOCK])
    images = hashlib.sha256()
    picked = np.unique(np.linspace(0, len(pool) - 1, min(len(pool), _POOL_SAMPLE)).astype(np.int64))
    if len(picked):
        images.update((pool.batch(picked)[0] * 255).round().byte().numpy().tobytes())
    return {
        "name": pool.name,
        "n": len(pool),
        "shape": list(pool.shape),
        "ids_sha256": ids.hexdigest(),
        "images_sha256": images.hexdigest(),
    }


def check_pool(pool: ImageDataset, made: dict[str, Any]) -> None:
    """Raise :class:`DataError` unless ``pool`` is the one that ``made`` (a :func:`pool_identity`) describes."""
    given = pool_identity(pool)
    names = {"n": "number of images", "shape": "shape", "ids_sha256": "ids", "images_sha256": "pixels"}
    changed = [what for key, what in names.items() if given[key] != made.get(key)]
    if changed:
        raise DataError(
            f"{pool.name} is not the pool that was labelled ({made.get('name')}, {made.get('n')} images): other "
            f"{' and '.join(changed)}; open that pool as it was, or label this one"
        )
