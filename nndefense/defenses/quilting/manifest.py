"""The manifest of a patch database: what it holds, which files belong to it, and how to tell that they are whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nndefense.database.manifest import FileEntry
from nndefense.errors import DatabaseError
from nndefense.files import write_json

FORMAT, VERSION = "nndefense-patches", 1
NAME = "manifest.json"
PIXELS, INDEX = "patches.h5", "index.faiss"
STORAGES = ("uint8", "float32")
REBUILD = "build it again with 'nndefense index patches'"


@dataclass(frozen=True)
class PatchManifest:
    """The contents of ``manifest.json``; a patch database without one is not finished and does not open.

    Attributes:
        count: number of patches.
        channels: of each patch.
        side: of each patch, in pixels.
        storage: ``uint8`` (levels of 1/255) or ``float32``.
        data: ``name``, ``fingerprint`` and number of ``images`` of the data set, and the ``specs`` that open it again.
        seed: of the positions.
        index: ``factory`` (FAISS's description; None: no index file, exact search), ``metric`` and ``probes``.
        files: every file of the database by name.
        versions: the libraries that built it.
        created: time of the build, ISO 8601 in UTC.
    """

    count: int
    channels: int
    side: int
    storage: str
    data: dict[str, Any]
    seed: int | None
    index: dict[str, Any]
    files: dict[str, FileEntry]
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def fingerprint(self) -> str:
        """The sha256 of the file of patches, which says what they are; the index only finds them."""
        return self.files[PIXELS].sha256

    def write(self, folder: Path) -> None:
        """Write the manifest, which is what makes the folder a patch database."""
        write_json(folder / NAME, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> PatchManifest:
        """Read the manifest of a folder.

        Raises:
            DatabaseError: no such folder, no manifest in it (an unfinished build), or one that cannot be used.
        """
        path = folder / NAME
        if not folder.is_dir():
            raise DatabaseError(f"there is no patch database at {folder}: build one with 'nndefense index patches'")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DatabaseError(
                f"{folder} holds no finished patch database ({NAME} is missing; was its build interrupted?): {REBUILD}"
            ) from error
        except (OSError, ValueError) as error:
            raise DatabaseError(f"{path} is damaged or cannot be read: restore it or {REBUILD}") from error
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise DatabaseError(f"{path} is not the manifest of a patch database: give the folder of one")
        if value.pop("version", None) != VERSION:
            raise DatabaseError(f"{path} is of another version of the format than {VERSION}: {REBUILD}")
        try:
            value["files"] = {name: FileEntry(**entry) for name, entry in value["files"].items()}
            manifest = cls(**value)
            manifest._check_entries()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatabaseError(f"{path} lacks entries or has unknown ones: restore it or {REBUILD}") from error
        return manifest

    def _check_entries(self) -> None:
        """Raise one of Python's errors for entries that cannot be used."""
        counts = (self.count, self.channels, self.side, *(entry.bytes for entry in self.files.values()))
        if not all(type(number) is int and number > 0 for number in counts):
            raise TypeError("counts must be whole numbers from 1")
        if self.storage not in STORAGES:
            raise ValueError(self.storage)
        # Only files of these two names are ever opened.
        if set(self.files) != ({PIXELS} if self.index["factory"] is None else {PIXELS, INDEX}):
            raise ValueError("the files must be the patches and their index")
        for entries, names in ((self.data, ("name", "fingerprint", "images")), (self.index, ("probes",))):
            for name in names:
                entries[name]

    def check_files(self, folder: Path) -> None:
        """Compare every byte of the files with the manifest.

        Raises:
            DatabaseError: naming the first file that is missing or differs.
        """
        for name, entry in self.files.items():
            entry.check(folder / name, REBUILD)
