"""WebDataset pools: images in tar shards, read at random through an index of where each one lies.

The ``webdataset`` library reads shards as a stream, from the first file to the last. A pool is picked from: subsets,
the most confident of a class, a batch of shuffled rows. So the headers are scanned once with :mod:`tarfile`, and then
an image is one seek and one read. Of what a shard holds, only pictures, whole numbers and JSON are ever decoded; the
library's own decoders would also unpack pickles.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.folder import decoder_threads
from nndefense.datasets.ids import PackedIds
from nndefense.datasets.image_files import SUFFIXES, decode, to_tensor
from nndefense.datasets.shards import REMEDY, ShardIndex, find_shards, scan
from nndefense.datasets.transform import Size, check_form
from nndefense.errors import DataError
from nndefense.images import shape_text

CLASSES_FILE = "classes.txt"
_FINGERPRINT_IMAGES = 100


class WebDataset(ImageDataset):
    """The images of tar shards in the WebDataset layout, decoded when asked for.

    Files of one sample share a key, their path in the tar up to the first dot of its last part: ``dog/0007.jpg`` and
    ``dog/0007.cls`` are the sample ``dog/0007``. The image is the file with the suffix of one (the first, if there are
    several). The label, where there is one, is a whole number in ``.cls``, or in ``.json`` the entry ``label``,
    ``cls`` or ``class``: a whole number or the name of a class. The names of classes come from ``classes.txt`` beside
    the first shard (a line each), else from the JSON, else they are 0, 1, ... Without any label there are no classes.

    Ids are the keys; where two shards have a key in common, ``<shard>/<key>`` throughout. Besides ids and labels,
    30 bytes an image are kept in memory. Other files in the shards are passed over. Compressed shards are refused,
    since nothing can be read from their middle.

    Args:
        source: a folder (all its ``*.tar``, sorted), one tar file, or a pattern: ``pool-{000..099}.tar``,
            ``{a,b}.tar``, ``pool-*.tar``.
        split: a folder in ``source``, or the beginning of its shards' names: ``train`` for ``train-000.tar``.
        size, channels: as for :class:`~nndefense.datasets.ImageFolderDataset`.

    Raises:
        DataError: no shards, a shard that is damaged, cut short or compressed, no images, or labels of another form;
            later, an image cannot be read.
        InputError: ``size`` or ``channels`` is out of range.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        split: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
        name: str | None = None,
    ) -> None:
        self._size = check_form(size, channels)
        self.shards = find_shards(os.fspath(source), split)
        index = ShardIndex()
        for number, shard in enumerate(self.shards):
            scan(shard, number, index)
        title = name or f"webdataset:{os.fspath(source)}" + (f":{split}" if split else "")
        if not index.keys:
            seen = ", ".join(sorted(index.suffixes)[:8]) or "nothing"
            raise DataError(f"{title} holds no images, but {seen}: they must end in {', '.join(SUFFIXES)}")
        self._shard = np.array(index.shard, dtype=np.int32)
        self._offset = np.array(index.offset, dtype=np.int64)
        self._bytes = np.array(index.size, dtype=np.int64)
        self._suffix = tuple(index.suffix_names)
        self._suffix_of = np.array(index.suffix, dtype=np.int16)
        classes, labels = _classes(index.labels, self.shards[0].parent / CLASSES_FILE, title)
        ids = index.keys
        if len(set(ids)) < len(ids):
            ids = [f"{self.shards[s].stem}/{key}" for s, key in zip(index.shard, ids, strict=True)]
            if len(set(ids)) < len(ids):
                raise DataError(f"two shards of {title} have the same name and keys: give them other names")
        # The first image tells the shape; self.ids does not exist yet, so it is read by its place alone.
        first = self._decode(0, channels or 3, ids[0])
        super().__init__(
            name=title,
            classes=classes,
            shape=(channels or 3, first.shape[0], first.shape[1]),
            ids=PackedIds(ids),
            labels=labels,
        )

    def _decode(self, row: int, channels: int, item: str) -> NDArray[np.uint8] | NDArray[np.float32]:
        shard, size = self.shards[self._shard[row]], int(self._bytes[row])
        place = f"{item}.{self._suffix[self._suffix_of[row]]} in {shard}"
        try:
            with shard.open("rb") as file:
                file.seek(int(self._offset[row]))
                data = file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {shard} ({error.strerror}): {REMEDY}") from error
        if not data or len(data) != size:
            what = "is empty" if not size else "is cut short"
            raise DataError(f"the image {place} {what}: {REMEDY}")
        return decode(place, channels, self._size, data)

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        images = torch.empty((len(rows), *self.shape))
        items = self.ids.take(rows)

        def read(place: int, row: int) -> None:
            image = to_tensor(self._decode(row, self.shape[0], items[place]))
            if image.shape[1:] != self.shape[1:]:
                raise DataError(
                    f"the image {items[place]} is {shape_text(image.shape[1:])}, but the first one of {self.name} is "
                    f"{shape_text(self.shape[1:])}: give a size that all images are brought to"
                )
            images[place] = image

        if len(rows) == 1 or get_worker_info() is not None:
            for place, row in enumerate(rows.tolist()):
                read(place, row)
        else:
            list(decoder_threads(os.getpid()).map(read, range(len(rows)), rows.tolist()))
        return images

    def _digest(self) -> str:
        """Hash the form, labels, ids, byte counts and up to 100 evenly spaced files: all of them could take hours."""
        digest = hashlib.sha256(f"webdataset {self.shape} {self._size}\n".encode())
        update_with_strings(digest, self.classes)
        update_with_strings(digest, self.ids)
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self._bytes.astype("<i8").tobytes())
        for row in np.unique(np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_IMAGES)).astype(np.int64)):
            with self.shards[self._shard[row]].open("rb") as file:
                file.seek(int(self._offset[row]))
                digest.update(file.read(int(self._bytes[row])))
        return digest.hexdigest()


def _classes(labels: list[int | str | None], names_file: Path, title: str) -> tuple[list[str], NDArray[np.int64]]:
    """Class names, and the label of each image as a number into them; -1 where there is none."""
    words = sorted({label for label in labels if isinstance(label, str)})
    numbered = any(isinstance(label, int) for label in labels)
    if words and numbered:
        raise DataError(f"{title} has labels that are numbers and labels that are names: use one kind")
    classes = words
    if names_file.is_file():
        try:
            classes = [line.strip() for line in names_file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise DataError(
                f"{names_file} cannot be read: it must be a UTF-8 text with one class name a line"
            ) from None
        if not classes or "" in classes or len(set(classes)) < len(classes):
            raise DataError(f"{names_file} is empty, or has an empty or a repeated line: write one class name a line")
        unknown = [word for word in words if word not in set(classes)]
        if unknown:
            raise DataError(f"{title} has the class {unknown[0]!r}, which {names_file} does not list: add it")
    place = {word: number for number, word in enumerate(classes)}
    found = np.fromiter(
        (-1 if label is None else place[label] if isinstance(label, str) else label for label in labels),
        dtype=np.int64,
        count=len(labels),
    )
    if not classes:
        classes = [str(number) for number in range(int(found.max(initial=-1)) + 1)]
    elif found.max(initial=-1) >= len(classes):
        raise DataError(f"{title} has label {found.max()}, but {names_file} names {len(classes)} classes: add the rest")
    return classes, found
