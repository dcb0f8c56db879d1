"""WebDataset pools: images in tar shards, read at random through an index of where each one lies.

The ``webdataset`` library reads shards as a stream, from the first file to the last. A pool is picked from: subsets,
the most confident of a class, a batch of shuffled rows. So the headers are scanned once with :mod:`tarfile`, and then
an image is one seek and one read. Of what a shard holds, only pictures, whole numbers and JSON are ever decoded; the
library's own decoders would also unpack pickles.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from nndefense.datasets.base import update_with_strings
from nndefense.datasets.encoded import EncodedDataset
from nndefense.datasets.ids import PackedIds
from nndefense.datasets.image_files import SUFFIXES
from nndefense.datasets.labels import class_numbers, read_class_names
from nndefense.datasets.rejected import BadImage, SourceError
from nndefense.datasets.shards import REMEDY, ShardIndex, find_shards, scan
from nndefense.datasets.store import check_bytes
from nndefense.datasets.transform import Size, check_form
from nndefense.errors import DataError

CLASSES_FILE = "classes.txt"
_FINGERPRINT_IMAGES = 100


class WebDataset(EncodedDataset):
    """The images of tar shards in the WebDataset layout, decoded when asked for.

    Files of one sample share a key, their path in the tar up to the first dot of its last part: ``dog/0007.jpg`` and
    ``dog/0007.cls`` are the sample ``dog/0007``. The image is the file with the suffix of one (the first, if there are
    several). The label, where there is one, is a whole number in ``.cls``, or in ``.json`` the entry ``label``,
    ``cls`` or ``class``: a whole number or the name of a class. The names of classes come from ``classes.txt`` beside
    the first shard (a line each), else from the JSON, else they are 0, 1, ... Without any label there are no classes.

    Ids are the keys; where two shards have a key in common, ``<shard>/<key>`` throughout. Besides ids and labels,
    30 bytes an image are kept in memory. Other files in the shards are passed over. Compressed shards are refused,
    since nothing can be read from their middle.

    A shard that is damaged or cut short is an error of the source; an image in it that does not decode is a bad image.

    Args:
        source: a folder (all its ``*.tar``, sorted), one tar file, or a pattern: ``pool-{000..099}.tar``,
            ``{a,b}.tar``, ``pool-*.tar``; or the URL of one of these.
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
        form = check_form(size, channels)
        self._store, self.shards = find_shards(os.fspath(source), split)
        index = ShardIndex()
        for number, shard in enumerate(self.shards):
            scan(self._store, shard, number, index)
        title = name or f"webdataset:{os.fspath(source)}" + (f":{split}" if split else "")
        if not index.keys:
            seen = ", ".join(sorted(index.suffixes)[:8]) or "nothing"
            raise DataError(f"{title} holds no images, but {seen}: they must end in {', '.join(SUFFIXES)}")
        self._shard = np.array(index.shard, dtype=np.int32)
        self._offset = np.array(index.offset, dtype=np.int64)
        self._bytes = np.array(index.size, dtype=np.int64)
        self._suffix = tuple(index.suffix_names)
        self._suffix_of = np.array(index.suffix, dtype=np.int16)
        names_file = self._store.sibling(self.shards[0], CLASSES_FILE)
        names = read_class_names(self._store, names_file)
        classes, labels = class_numbers(index.labels, names, title, self._store.url(names_file))
        ids = index.keys
        if len(set(ids)) < len(ids):
            stems = [shard.rpartition("/")[2].removesuffix(".tar") for shard in self.shards]
            ids = [f"{stems[s]}/{key}" for s, key in zip(index.shard, ids, strict=True)]
            if len(set(ids)) < len(ids):
                raise DataError(f"two shards of {title} have the same name and keys: give them other names")
        super().__init__(name=title, classes=classes, ids=PackedIds(ids), labels=labels, size=form, channels=channels)

    def _fetch(self, row: int, item: str) -> tuple[str, bytes]:
        shard, size = self.shards[self._shard[row]], int(self._bytes[row])
        place = f"{item}.{self._suffix[self._suffix_of[row]]} in {self._store.url(shard)}"
        check_bytes(place, size)
        if not size:
            raise BadImage(f"the image {place} is empty: {REMEDY}", "empty", "the file is empty")
        try:
            data = self._store.read(shard, int(self._offset[row]), size)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise SourceError(f"cannot read {self._store.url(shard)} ({reason}): {REMEDY}") from error
        if len(data) != size:
            # Shards are whole when they are opened, so this one was changed since.
            raise SourceError(f"the image {place} is cut short: {REMEDY}")
        return place, data

    def _digest(self) -> str:
        """Hash the form, labels, ids, byte counts and up to 100 evenly spaced files: all of them could take hours."""
        digest = hashlib.sha256(f"webdataset {self.shape} {self._size}\n".encode())
        update_with_strings(digest, self.classes)
        update_with_strings(digest, self.ids)
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self._bytes.astype("<i8").tobytes())
        for row in np.unique(np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_IMAGES)).astype(np.int64)):
            shard, size = self.shards[self._shard[row]], int(self._bytes[row])
            try:
                digest.update(self._store.read(shard, int(self._offset[row]), size))
            except OSError as error:
                raise SourceError(f"cannot read {self._store.url(shard)} ({error}): {REMEDY}") from error
        return digest.hexdigest()
