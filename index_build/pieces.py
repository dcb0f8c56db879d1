"""Finished pieces of an unfinished build: a file that is whole, and beside it a small one that says so.

The file is put in place first and its description second, so a description vouches for a whole file, wherever the
build was killed. A piece without rows has a description alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.database.manifest import FileEntry
from nndefense.database.mapped_shards import DIGEST
from nndefense.database.repeats import id_text, repeats
from nndefense.database.rows import StoredRows, pieces_of, read_columns
from nndefense.database.writer import PIECE, store, writing
from nndefense.errors import DataError
from nndefense.files import read_json, sealed, sha256_of, unsealed

Array = NDArray[Any]
WriteShard = Callable[[Path, dict[str, Array], Sequence[dict[str, str]]], None]


@dataclass(frozen=True)
class Piece:
    """What is known of a finished piece.

    Attributes:
        entry: its checksum, length and rows; a length of 0 where there is no file.
        notes: whatever else its maker wrote down, as plain values.
    """

    entry: FileEntry
    notes: dict[str, Any] = field(default_factory=dict)


def finish(path: Path, write: Callable[[Path], None] | None, *, rows: int = 0, **notes: Any) -> Piece:
    """Write a file atomically, then its description.

    Args:
        path: where the file will be.
        write: writes it to the path that it is given; None for a piece without a file.
        rows: of the database, that it holds.
        notes: what to write down with it, as plain values.

    Raises:
        DatabaseError: the disk is full or cannot be written.
    """
    if write is not None:
        store(path, write)
    else:
        path.unlink(missing_ok=True)
    return _describe(path, Piece(FileEntry.of(path, rows=rows) if write is not None else FileEntry("", 0), notes))


def finished(path: Path, *, checksum: bool = False) -> Piece | None:
    """The piece at ``path`` if it is whole, else None; ``checksum`` reads every byte of it."""
    try:
        value, _ = unsealed(read_json(_beside(path)))
        piece = Piece(FileEntry(**value["entry"]), dict(value["notes"]))
    except (DataError, KeyError, TypeError, ValueError):
        return None
    if not piece.entry.bytes:
        return None if path.exists() else piece
    whole = path.is_file() and path.stat().st_size == piece.entry.bytes
    if whole and checksum:
        whole = sha256_of(path) == piece.entry.sha256
    return piece if whole else None


def discard(path: Path) -> None:
    """Remove a piece, its description first."""
    _beside(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def forget(path: Path) -> None:
    """Remove the description alone: the file belongs to a finished database from now on."""
    _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + PIECE)


def _describe(path: Path, piece: Piece) -> Piece:
    # All but ASCII is escaped: among the notes can be file names that are not UTF-8.
    text = json.dumps(sealed(asdict(piece))) + "\n"

    def write(part: Path) -> None:
        part.write_text(text, encoding="ascii")

    store(_beside(path), write)
    return piece


def drop_repeats(paths: Sequence[Path], write: WriteShard) -> int:
    """Write the shards that hold exact duplicates (the same pixels) again, without them; the first in order stays.

    Killed in the middle, what is left to drop is found again: the first of several equals is never dropped, and what a
    shard has dropped stands in its description. A shard whose description was not reached is made anew by extract.

    Args:
        paths: the shards, in source order; all of them finished.
        write: writes a shard: its path, its columns and all that was rejected from its positions.

    Returns:
        How many rows were dropped.

    Raises:
        DatabaseError: the disk is full or cannot be written.
    """
    held = with_rows(paths)
    if not held:
        return 0
    table = StoredRows(held)
    with writing(held[0].parent):
        rows, firsts = repeats(pieces_of(held, DIGEST), held[0].parent)
    names = table.take("ids", firsts)
    drop(held, rows, [f"duplicate of {id_text(name)}" for name in names], write)
    return len(rows)


def with_rows(paths: Sequence[Path]) -> list[Path]:
    """Those of the finished shards that hold rows."""
    return [path for path in paths if (piece := finished(path)) and piece.entry.rows]


def drop(held: Sequence[Path], rows: NDArray[np.int64], reasons: Sequence[str], write: WriteShard) -> None:
    """Write those shards again that hold some rows, without these.

    Args:
        held: finished shards with rows, in order.
        rows: numbers of rows of all these shards, ascending.
        reasons: for each, why it is dropped as a duplicate.
        write: as for :func:`drop_repeats`.

    Raises:
        DatabaseError: the disk is full or cannot be written.
    """
    starts = StoredRows(held).starts if len(rows) else np.zeros(1, dtype=np.int64)
    shard = np.searchsorted(starts, rows, side="right") - 1
    for number in np.unique(shard).tolist():
        path, here = held[number], np.flatnonzero(shard == number)
        within = rows[here] - starts[number]
        piece, (stored, _) = finished(path), read_columns(path)
        assert piece is not None
        dropped = [
            {"id": id_text(name), "kind": "duplicate", "reason": reasons[place]}
            for name, place in zip(stored["ids"][within], here.tolist(), strict=True)
        ]
        keep = np.ones(piece.entry.rows, dtype=np.bool_)
        keep[within] = False
        left = {name: column[keep] for name, column in stored.items()} if keep.any() else {}
        write(path, left, [*piece.notes["rejected"], *dropped])
