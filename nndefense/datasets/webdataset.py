"""WebDataset pools: images in tar shards, read at random through an index of where each one lies.

The ``webdataset`` library reads shards as a stream, from the first file to the last. A pool is picked from: subsets,
the most confident of a class, a batch of shuffled rows. So the headers are scanned once with :mod:`tarfile`, and then
an image is one seek and one read. Of what a shard holds, only pictures, whole numbers and JSON are ever decoded; the
library's own decoders would also unpack pickles.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np

from nndefense.datasets.derived import Size, check_form
from nndefense.datasets.encoded import EncodedDataset
from nndefense.datasets.ids import PackedIds
from nndefense.datasets.labels import LABEL_NAMES, Label, class_number, class_numbers, read_class_names
from nndefense.datasets.litter import passes_through
from nndefense.datasets.picture_names import SUFFIXES, UNREAD, Unread
from nndefense.datasets.rejected import BadImage, SourceError
from nndefense.datasets.remote import find_files
from nndefense.datasets.store import Store, check_bytes
from nndefense.errors import DataError

CLASSES_FILE = "classes.txt"
REMEDY = "write or fetch the shard again"
_FINGERPRINT_IMAGES = 100
_LABELS = ("cls", "json")
# Of a sample's pictures with names of two parts (0.image.png), the one that is the image.
_IMAGE_PARTS = ("image", "img", "input", "picture", "photo", "rgb")
# A label takes a few bytes; what is longer is something else, and is not read into memory.
_LONGEST_LABEL = _LONGEST_HEADER = 1 << 20


class WebDataset(EncodedDataset):
    """The images of tar shards in the WebDataset layout, decoded when asked for.

    Files of one sample share a key, their path in the tar up to the first dot of its last part: ``dog/0007.jpg`` and
    ``dog/0007.cls`` are the sample ``dog/0007``. The image is the file with the suffix of one (the first, if there are
    several); in a sample without, the only one whose suffix ends so, or ``.image.png``. The label, where there is one,
    is a whole number in ``.cls`` (or ``.label.cls``), or in ``.json`` (or ``.label.json``) an entry of
    :data:`~nndefense.datasets.labels.LABEL_NAMES`: a whole number or the name of a class. The names of classes come
    from ``classes.txt`` beside the first shard (a line each), else from the JSON, else they are 0, 1, ... Without any
    label there are no classes.

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
        self._store, self.shards = find_files(os.fspath(source), split, (".tar",), "shard")
        index = ShardIndex()
        for number, shard in enumerate(self.shards):
            scan(self._store, shard, number, index)
        title = name or f"webdataset:{os.fspath(source)}" + (f":{split}" if split else "")
        index.unread.tell(title)
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
        data = self._stored(row)
        if len(data) != size:
            # Shards are whole when they are opened, so this one was changed since.
            raise SourceError(f"the image {place} is cut short: {REMEDY}")
        return place, data

    def _stored(self, row: int) -> bytes:
        shard = self.shards[self._shard[row]]
        try:
            return self._store.read(shard, int(self._offset[row]), int(self._bytes[row]))
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise SourceError(f"cannot read {self._store.url(shard)} ({reason}): {REMEDY}") from error

    def _digest(self) -> str:
        """Hash the form, labels, ids, byte counts and up to 100 evenly spaced files: all of them could take hours."""
        digest = self._begun_digest("webdataset")
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self._bytes.astype("<i8").tobytes())
        for row in np.unique(np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_IMAGES)).astype(np.int64)):
            digest.update(self._stored(row))
        return digest.hexdigest()


@dataclass
class ShardIndex:
    """What is known of the images of all shards so far; one entry an image in each list."""

    keys: list[str] = field(default_factory=list)
    shard: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    suffix: array[int] = field(default_factory=lambda: array("q"))
    labels: list[Label] = field(default_factory=list)
    suffix_names: dict[str, int] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)
    unread: Unread = field(default_factory=Unread)

    def add(self, key: str, suffix: str, shard: int, offset: int, size: int) -> int:
        """Add an image without a label; returns its row."""
        self.keys.append(key)
        self.shard.append(shard)
        self.offset.append(offset)
        self.size.append(size)
        self.suffix.append(self.suffix_names.setdefault(suffix, len(self.suffix_names)))
        self.labels.append(None)
        return len(self.keys) - 1


def scan(store: Store, path: str, number: int, index: ShardIndex) -> None:
    """Add the images of one shard: their places and labels, without reading their pixels."""
    place = store.url(path)
    places: dict[str, int] = {}
    further: dict[str, dict[str, tuple[int, int, int]]] = {}
    labels: dict[str, tuple[tuple[bool, bool], int | str]] = {}
    try:
        # "r:" is a plain tar: a compressed one must not be unpacked in secret for every image.
        with store.open(path) as file, tarfile.open(fileobj=cast(BinaryIO, _Headers(file, place)), mode="r:") as tar:
            before = -1
            while (member := tar.next()) is not None:
                # A size below nothing would lead back to a header that was read.
                if not before < tar.offset:
                    raise DataError(f"{place} is damaged at byte {member.offset:,}: {REMEDY}")
                before = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # or a kilobyte would stay in memory for every file
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not member.isfile() or not dot or not stem or passes_through(folder):
                    continue
                if member.issparse():
                    raise DataError(f"{place} stores {member.name} as a sparse file: {REMEDY}, without --sparse")
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                index.suffixes.add(suffix)
                if base.lower().endswith(UNREAD):
                    index.unread.add(member.name)
                part, _, kind = suffix.rpartition(".")
                entry = (number, member.offset_data, member.size)
                if f".{kind}" in SUFFIXES and part:
                    if suffix in further.setdefault(key, {}):
                        raise _twice(place, key, suffix)
                    further[key][suffix] = entry
                elif f".{kind}" in SUFFIXES and key not in places:
                    places[key] = index.add(key, suffix, *entry)
                elif f".{kind}" in SUFFIXES and index.suffix_names.get(suffix) == index.suffix[places[key]]:
                    raise _twice(place, key, suffix)
                elif kind in _LABELS and (not part or part in LABEL_NAMES):
                    # .cls says nothing but the label, so it goes before .json, and .cls before .label.cls.
                    rank = (kind != "cls", bool(part))
                    found = _label(file, member, place)
                    if found is not None and (key not in labels or rank <= labels[key][0]):
                        labels[key] = rank, found
            _check_end(file, tar.offset, place)
    except tarfile.TarError as error:
        raise _damaged(store, path, error) from error
    # Python's tarfile raises most kinds of errors for headers of a wrong form.
    except (OSError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # fsspec raises ValueError where a server gives no part of a file.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot read {place} ({reason}): {REMEDY}") from error
    for key, pictures in further.items():
        if key not in places:
            named = [s for part in _IMAGE_PARTS for s in pictures if s.rpartition(".")[0] == part] or list(pictures)
            if len(named) > 1:
                raise DataError(
                    f"{place} holds {key}.{named[0]} and {key}.{named[1]} for one key: call the image .image.png, or "
                    "write keys without dots"
                )
            places[key] = index.add(key, named[0], *pictures[named[0]])
    for key, (_, found) in labels.items():
        if key in places:
            index.labels[places[key]] = found


class _Headers:
    """A shard as :mod:`tarfile` reads it for headers, each of which says itself how long it is."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._file, self._place = file, place
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise DataError(f"{self._place} has a header of {size:,} bytes: {REMEDY}, with shorter names")
        return self._file.read(size)


def _check_end(file: BinaryIO, offset: int, path: str) -> None:
    """Raise DataError where the scan ended at something else than the mark of the end; tarfile does not ask for it."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut short: it lacks the empty block that ends a tar file; {REMEDY}")
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged at byte {offset:,}, where a file should begin: {REMEDY}")


def _damaged(store: Store, path: str, error: tarfile.TarError) -> DataError:
    with store.open(path) as file:
        head = file.read(6)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    place = store.url(path)
    kind = next((name for magic, name in packed.items() if head.startswith(magic)), None)
    if kind:
        return DataError(f"{place} is compressed ({kind}), so no image in its middle can be reached: unpack it to .tar")
    return DataError(f"{place} is no tar file or is cut short ({error}): {REMEDY}")


def _twice(place: str, key: str, suffix: str) -> DataError:
    return DataError(f"{place} holds {key}.{suffix} twice: keys must be unique in a shard; {REMEDY}")


def _label(file: BinaryIO, member: tarfile.TarInfo, path: str) -> int | str | None:
    """The label in a ``.cls`` or ``.json`` file; None where a JSON has no such entry."""
    place = f"{member.name} in {path}"
    if member.size > _LONGEST_LABEL:
        raise DataError(f"{place} has {member.size:,} bytes, too many for a label: leave it out of the shard")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise DataError(f"{path} is cut short within {member.name}: {REMEDY}")
    try:
        if not member.name.lower().endswith("json"):
            return class_number(float(data.decode("ascii").strip()), place)
        value = json.loads(data)
        entry = next((value[name] for name in LABEL_NAMES if name in value), None) if isinstance(value, dict) else None
        if isinstance(entry, int | float) and not isinstance(entry, bool):
            return class_number(entry, place)
        if entry is not None and not isinstance(entry, str):
            raise ValueError
        return entry
    except (ValueError, RecursionError, DataError):
        raise DataError(
            f"{place} is no label: write a whole number from 0, or in JSON an entry label that is one or a class's name"
        ) from None
