"""The manifest: what a database is, which files belong to it, and how to tell that they are whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nndefense.errors import DatabaseError
from nndefense.features import FeatureSpec
from nndefense.files import (
    digest_of,
    json_text,
    not_read,
    read_whole,
    sealed,
    sha256_of,
    unsealed,
    write_bytes,
    write_json,
)

FORMAT, VERSION = "nndefense-database", 1
NAME = "manifest.json"
CALIBRATION, GUARD = "calibration.json", "guard.json"
BESIDE = (CALIBRATION, GUARD)
"""Files that may be made for a finished database, each of which decides answers."""
M = TypeVar("M")
REBUILD = "build the database again with 'nndefense index build'"


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
    """Read the manifest of a folder: what ``made`` makes of its entries, whose ``files`` are :class:`FileEntry`, and
    of ``sealed``: whether the manifest has a digest, which those of older versions lack.

    Args:
        folder: of the database.
        made: raises one of Python's lookup, type or value errors for entries that cannot be used.
        form, version: of the format.
        kind, a_kind: what it is, in words.
        rebuild, again: what to do where it is damaged, or not finished; the former ends ``again with COMMAND``.

    Raises:
        DatabaseError: no such folder, no manifest in it (an unfinished build), or one that cannot be read or used, or
            that has changed since it was written.
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
    if not isinstance(value, dict) or value.get("format") != form:
        raise DatabaseError(f"{path} is not the manifest of {a_kind}: give the folder of one")
    if value.get("version") != version:
        raise DatabaseError(f"{path} is of another version of the format than {version}: {rebuild}")
    try:
        value, had_digest = unsealed(value)
    except ValueError as error:
        raise DatabaseError(f"{path} has changed since it was written: restore it or {rebuild}") from error
    del value["format"], value["version"]
    if "sealed" in value:
        raise DatabaseError(f"{path} lacks entries or has unknown ones: restore it or {rebuild}")
    value["sealed"] = had_digest
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
        rule: how its rows are to decide, as values of :class:`~nndefense.database.Rule`; empty where nobody said.
        build: the settings of the job that made it, and ``job``, their sha256; empty where rows came from elsewhere.
        beside: for each file of :data:`BESIDE` the sha256 that it may have. There are two of them while it is being
            replaced, and the empty one says that the file may be missing.
        order: the files that hold rows, in row order, where their numbers do not tell it, since rows were removed.
        sealed: whether the manifest was read with a digest of its values; not an entry of the file.
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
    rule: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, list[str]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    sealed: bool = True

    @property
    def identity(self) -> str:
        """A sha256 of all entries but ``rule`` and ``beside``: of everything that the guard's distances depend on."""
        return digest_of({name: value for name, value in self._record().items() if name not in ("rule", "beside")})

    @property
    def fingerprint(self) -> str:
        """A sha256 of the files' checksums: two databases with the same one hold the same bytes."""
        text = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def shards(self) -> list[str]:
        """The names of the files that hold rows, in row order."""
        return list(self.order) or in_row_order(name for name, entry in self.files.items() if entry.rows)

    @property
    def first_rows(self) -> int | None:
        """How many rows there were before any were added or removed; None where none were."""
        changes = self.data.get("changes")
        return int(changes[0]["before"]) if changes else None

    @property
    def top(self) -> int:
        """How many of the largest posteriors a row holds; 0 where it holds all."""
        return int(str(self.storage.get("posteriors", "dense")).partition("-")[2] or 0)

    @property
    def half(self) -> bool:
        """Whether features are stored as float16."""
        return bool(self.storage.get("features", "float32") == "float16")

    def write(self, folder: Path) -> None:
        """Write the manifest with its digest, which is what makes the folder a database."""
        write_json(folder / NAME, sealed(self._record()))

    def _record(self) -> dict[str, Any]:
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del values["sealed"]
        for name in ("rule", "order"):
            if not values[name]:
                # Older versions of the library read it, too.
                del values[name]
        return values

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a database folder.

        One of an older version, without a digest, is read with the files of :data:`BESIDE` that stand there.

        Raises:
            DatabaseError: no such folder, no manifest in it (an unfinished build), or one that cannot be read, or that
                has changed since it was written.
        """

        def made(value: dict[str, Any]) -> Manifest:
            manifest = cls(**value | {"classes": tuple(value["classes"]), "order": tuple(value.get("order", ()))})
            manifest._check_entries()
            return manifest if manifest.sealed else replace(manifest, beside=standing_beside(folder))

        again = "build it again, or continue, with 'nndefense index build'"
        return read_manifest(folder, made, FORMAT, VERSION, "database", "an image database", REBUILD, again)

    @classmethod
    def of_whole(cls, folder: Path, *, checksums: bool) -> Manifest:
        """Read the manifest in ``folder``, and compare the files with it, with ``checksums`` every byte; once more
        where it is changed meanwhile, and they with it.

        Raises:
            DatabaseError: as :meth:`read` and :meth:`check_files` do.
        """
        manifest = cls.read(folder)
        try:
            manifest.check_files(folder, checksums=checksums)
        except DatabaseError:
            now = cls.read(folder)
            if now == manifest:
                raise
            now.check_files(folder, checksums=checksums)
            return now
        return manifest

    def _check_entries(self) -> None:
        """Raise one of Python's lookup or type errors, or :class:`InputError`, for entries that cannot be used."""
        FeatureSpec(**self.feature)
        objects = (self.storage, self.rejected, self.build, self.rule)
        if self.top < 0 or not all(isinstance(part, dict) for part in objects):
            raise TypeError("storage, rejected, build and rule must be objects")
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
        if self.order and sorted(self.order) != sorted(name for name, entry in self.files.items() if entry.rows):
            raise KeyError("order must name each file that holds rows once")
        if not all(isinstance(change["before"], int) for change in self.data.get("changes", ())):
            raise TypeError("changes must tell the rows before")
        if any(Path(name).name != name for name in self.files):
            raise KeyError("files must stand in the folder itself")
        if set(self.beside) - set(BESIDE) or not all(isinstance(allowed, list) for allowed in self.beside.values()):
            raise TypeError("beside must hold lists of checksums")

    def check_files(self, folder: Path, *, checksums: bool) -> None:
        """Compare the files in ``folder`` with the manifest: presence and length, and with ``checksums`` every byte.

        The few bytes of those in :data:`BESIDE` are always compared.

        Raises:
            DatabaseError: naming the first file that differs.
        """
        for name, entry in self.files.items():
            entry.check(folder / name, REBUILD, checksum=checksums)
        for name in BESIDE:
            self.read_beside(folder, name)

    def read_beside(self, folder: Path, name: str) -> Any:
        """The values of the file ``name`` of :data:`BESIDE` in ``folder``, or None where there need be none.

        Raises:
            DatabaseError: it is missing, has changed, was never made for this database, or is no JSON.
        """
        path, allowed = folder / name, self.beside.get(name, [""])
        accept = f"or take the database as it is now with 'nndefense index verify --seal {folder}'"
        if "" in allowed and not path.exists():
            return None
        if not path.is_file():
            raise DatabaseError(f"{path} is missing, though the database was made with it: restore it, {accept}")
        try:
            content = read_whole(path)
        except OSError as error:
            raise DatabaseError(not_read(path, error) or f"{path} cannot be read: restore it, {accept}") from error
        if hashlib.sha256(content).hexdigest() not in allowed:
            what = "has changed since it was made" if name in self.beside else "was not made for this database"
            raise DatabaseError(f"{path} {what} (wrong sha256): restore what was there, {accept}")
        try:
            return json.loads(content)
        except ValueError as error:
            raise DatabaseError(
                f"{path} cannot be read as JSON: restore it, or remove it and calibrate again"
            ) from error


def standing_beside(folder: Path) -> dict[str, list[str]]:
    """The files of :data:`BESIDE` that stand in a folder, as :attr:`Manifest.beside` has them."""
    return {name: [sha256_of(folder / name)] for name in BESIDE if (folder / name).is_file()}


def keep_beside(folder: Path, name: str, value: Any) -> None:
    """Put a file of :data:`BESIDE` into the folder of a finished database, and its sha256 into the manifest.

    Interrupted at any moment, the folder opens with the file that was there before, or with the new one.

    Raises:
        DatabaseError: there is no such database.
        OSError: the folder cannot be written.
    """
    manifest, content = Manifest.read(folder), json_text(value).encode()
    new = hashlib.sha256(content).hexdigest()
    both = replace(manifest, beside={**manifest.beside, name: [*manifest.beside.get(name, [""]), new]})
    both.write(folder)
    write_bytes(folder / name, content)
    replace(both, beside={**both.beside, name: [new]}).write(folder)
