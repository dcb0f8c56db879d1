"""The manifest: what a database is, which files belong to it, and how to tell that they are whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nndefense.errors import DatabaseError
from nndefense.features import FeatureSpec
from nndefense.files import not_read, read_whole, sha256_of, write_json

FORMAT, VERSION = "nndefense-database", 1
NAME = "manifest.json"
M = TypeVar("M")
_REBUILD = "build the database again with 'nndefense index build'"


@dataclass(frozen=True)
class FileEntry:
    """One file of a database: its length in bytes, its sha256, and the rows that it holds (0 but for shards)."""

    sha256: str
    bytes: int
    rows: int = 0

    @classmethod
    def of(cls, path: Path, rows: int = 0) -> FileEntry:
        """Describe a file that was just written."""
        return cls(sha256_of(path), path.stat().st_size, rows)

    def check(self, path: Path, remedy: str, *, checksum: bool = True) -> None:
        """Compare a file with this: its presence and length, and with ``checksum`` every byte.

        Raises:
            DatabaseError: what is wrong, and the remedy, or that the system does not read it.
        """
        try:
            size = path.stat().st_size if path.is_file() else -1
            found = sha256_of(path) if checksum and size == self.bytes else self.sha256
        except OSError as error:
            raise DatabaseError(not_read(path, error) or f"{path} is missing: restore it or {remedy}") from error
        if size < 0:
            raise DatabaseError(f"{path} is missing: restore it or {remedy}")
        if size != self.bytes:
            what = "truncated" if size < self.bytes else "longer than it was"
            raise DatabaseError(f"{path} is {what} ({size:,} of {self.bytes:,} bytes): restore it or {remedy}")
        if found != self.sha256:
            raise DatabaseError(f"{path} has changed since it was built (wrong sha256): restore it or {remedy}")


def read_manifest(
    folder: Path, made: Callable[[dict[str, Any]], M], form: str, version: int, kind: str, a_kind: str, rebuild: str,
    again: str,
) -> M:  # fmt: skip
    """Read the manifest of a folder: what ``made`` makes of its entries, whose ``files`` are :class:`FileEntry`.

    Args:
        folder: of the database.
        made: raises one of Python's lookup, type or value errors for entries that cannot be used.
        form, version: of the format.
        kind, a_kind: what it is, in words.
        rebuild, again: what to do where it is damaged, or not finished; the former ends ``again with COMMAND``.

    Raises:
        DatabaseError: no such folder, no manifest in it (an unfinished build), or one that cannot be read or used.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise DatabaseError(f"there is no {kind} at {folder}: build one {rebuild.partition(' again ')[2]}")
    try:
        value = json.loads(read_whole(path))
    except FileNotFoundError as error:
        what = f"({NAME} is missing; was its build interrupted?): {again}"
        raise DatabaseError(f"{folder} holds no finished {kind} {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        told = not_read(path, error) or f"{path} is damaged: restore it or {rebuild}"
        raise DatabaseError(told) from error
    if not isinstance(value, dict) or value.pop("format", None) != form:
        raise DatabaseError(f"{path} is not the manifest of {a_kind}: give the folder of one")
    if value.pop("version", None) != version:
        raise DatabaseError(f"{path} is of another version of the format than {version}: {rebuild}")
    try:
        return made({**value, "files": {name: FileEntry(**entry) for name, entry in value["files"].items()}})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatabaseError(f"{path} lacks entries or has unknown ones: restore it or {rebuild}") from error


def in_row_order(names: Iterable[str]) -> list[str]:
    """Shards by their numbers, which have five digits or more."""
    return sorted(names, key=lambda name: (len(name), name))


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``; a database without one is not finished and does not open.

    Attributes:
        rows: number of images.
        dimension: d, the length of a feature vector.
        classes: the classifier's class names, in the order of the posteriors.
        feature: the :class:`~nndefense.features.FeatureSpec` as plain values.
        classifier: ``fingerprint``, ``arch``, ``source`` and ``input_shape`` of the classifier.
        data: ``name`` and ``fingerprint`` of the images, and the ``specs`` that open them again.
        index: ``factory`` (FAISS's description), ``metric`` and ``file``; where it was measured ``search`` (the setting
            for the recall that was asked for, what it reached and how fast), and ``why`` where it was chosen for a job.
        files: every file of the database by name.
        versions: the libraries that built it.
        created: time of the build, ISO 8601 in UTC.
        storage: how the rows are stored: ``features`` (float32 or float16) and ``posteriors`` (``dense`` or ``top-M``).
            Empty, as in older databases: float32 and dense.
        rejected: how many images of the source are not in the database: ``unreadable``, ``excluded``, ``duplicate``.
        build: the settings of the job that made it, and ``job``, their sha256; empty where rows came from elsewhere.
    """

    rows: int
    dimension: int
    classes: tuple[str, ...]
    feature: dict[str, Any]
    classifier: dict[str, Any]
    data: dict[str, Any]
    index: dict[str, Any]
    files: dict[str, FileEntry]
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    storage: dict[str, Any] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the files' checksums: two databases with the same one hold the same bytes."""
        text = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def shards(self) -> list[str]:
        """The names of the files that hold rows, in row order."""
        return in_row_order(name for name, entry in self.files.items() if entry.rows)

    @property
    def top(self) -> int:
        """How many of the largest posteriors a row holds; 0 where it holds all."""
        return int(str(self.storage.get("posteriors", "dense")).partition("-")[2] or 0)

    @property
    def half(self) -> bool:
        """Whether features are stored as float16."""
        return bool(self.storage.get("features", "float32") == "float16")

    def write(self, folder: Path) -> None:
        """Write the manifest, which is what makes the folder a database."""
        write_json(folder / NAME, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a database folder.

        Raises:
            DatabaseError: no such folder, no manifest in it (an unfinished build), or one that cannot be read.
        """

        def made(value: dict[str, Any]) -> Manifest:
            manifest = cls(**value | {"classes": tuple(value["classes"])})
            manifest._check_entries()
            return manifest

        again = "build it again, or continue, with 'nndefense index build'"
        return read_manifest(folder, made, FORMAT, VERSION, "database", "an image database", _REBUILD, again)

    def _check_entries(self) -> None:
        """Raise one of Python's lookup or type errors, or :class:`InputError`, for entries that cannot be used."""
        FeatureSpec(**self.feature)
        if self.top < 0 or not all(isinstance(part, dict) for part in (self.storage, self.rejected, self.build)):
            raise TypeError("storage, rejected and build must be objects")
        if not isinstance(self.index.get("search", {}).get("setting", {}), dict):
            raise TypeError("a search's setting must be an object")
        for entries, names in (
            (self.classifier, ("fingerprint", "source", "input_shape")),
            (self.data, ("name", "fingerprint")),
            (self.index, ("factory", "file")),
        ):
            for name in names:
                entries[name]
        if self.index["file"] not in self.files:
            raise KeyError(self.index["file"])
        numbers = (self.rows, self.dimension, *(n for entry in self.files.values() for n in (entry.bytes, entry.rows)))
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("counts must be whole numbers")
        if any(Path(name).name != name for name in self.files):
            raise KeyError("files must stand in the folder itself")

    def check_files(self, folder: Path, *, checksums: bool) -> None:
        """Compare the files with the manifest: their presence and length, and with ``checksums`` every byte.

        Raises:
            DatabaseError: naming the first file that differs.
        """
        for name, entry in self.files.items():
            entry.check(folder / name, _REBUILD, checksum=checksums)
