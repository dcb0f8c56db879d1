"""Finished cells of an evaluation, kept in a folder and found again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nndefense.errors import DataError
from nndefense.files import make_folder, read_json, write_json

FORMAT, VERSION = "nndefense-cell", 1


class CellStore:
    """A folder with one file for each finished cell.

    A cell is found again only under exactly the same key: the same images, models, database, attack, budget and seed.
    So a folder may hold cells of several recipes, and a changed recipe repeats only what it changes.
    """

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which is made when the first cell is put into it."""
        self.folder = folder

    def get(self, name: str, key: Any) -> Any | None:
        """The value that was put under this name and key, or None.

        A file that is damaged counts as absent: its cell is measured again.
        """
        path = self._path(name, key)
        if not path.exists():
            return None
        try:
            stored = read_json(path)
        except DataError:
            return None
        same = isinstance(stored, dict) and stored.get("format") == FORMAT and stored.get("version") == VERSION
        return stored.get("value") if same and stored.get("key") == json.loads(json.dumps(key)) else None

    def put(self, name: str, key: Any, value: Any) -> None:
        """Keep a finished cell, whole or not at all."""
        make_folder(self.folder)
        write_json(self._path(name, key), {"format": FORMAT, "version": VERSION, "key": key, "value": value})

    def _path(self, name: str, key: Any) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:80]
        return self.folder / f"{readable}-{digest[:16]}.json"
