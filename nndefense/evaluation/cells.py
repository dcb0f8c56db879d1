"""Finished cells of an evaluation, kept in a folder and found again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nndefense.errors import DataError, warn
from nndefense.files import make_folder, read_json, sealed, unsealed, write_json
from nndefense.versions import code_version

FORMAT, VERSION = "nndefense-cell", 2
# The code that decides what a cell holds: attacks, what they attack, and how it is judged.
_ROOMS = ("attacks", "database", "defenses", "evaluation", "features", "images", "models", "modes", "statistics")


class CellStore:
    """A folder with one file for each finished cell.

    A cell is found again only under exactly the same key: the same images, models, database, attack, budget and seed,
    and the same code of the library. So a folder may hold cells of several recipes, a changed recipe repeats only what
    it changes, and a changed attack, defence or evaluation never takes up what an older one has measured.
    """

    def __init__(self, folder: Path, *rooms: str) -> None:
        """Use ``folder``, which is made when the first cell is put into it.

        Args:
            folder: of the cells.
            rooms: of the library's code that decides what they hold, beside attacks, defences and evaluation.
        """
        self.folder, self.code = folder, code_version(*_ROOMS, *rooms)

    def get(self, name: str, key: Any) -> Any | None:
        """The value that was put under this name and key, or None.

        A file that has changed since counts as absent, with a warning: its cell is measured again.
        """
        path, whole = self._path(name, key), False
        if not path.exists():
            return None
        try:
            stored, whole = unsealed(read_json(path))
            # A file under another one's name has a digest that is right.
            whole &= stored.get("key") == json.loads(json.dumps(self._key(key)))
        except (DataError, ValueError):
            whole = False
        if not whole:
            warn(f"{path} has changed since it was written: its cell is measured again")
            return None
        return stored["value"]

    def put(self, name: str, key: Any, value: Any) -> None:
        """Keep the ``value`` of a finished cell ``name``, whole or not at all."""
        make_folder(self.folder)
        record = {"format": FORMAT, "version": VERSION, "key": self._key(key), "value": value}
        write_json(self._path(name, key), sealed(record))

    def _key(self, key: Any) -> dict[str, Any]:
        return {"cell": key, "code": self.code}

    def _path(self, name: str, key: Any) -> Path:
        digest = hashlib.sha256(json.dumps(self._key(key), sort_keys=True).encode()).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:80]
        return self.folder / f"{readable}-{digest[:16]}.json"
