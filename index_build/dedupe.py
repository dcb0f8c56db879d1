"""Exact duplicates: images with the same pixels. The first in source order stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_build import pieces
from nndefense.database.repeats import repeats
from nndefense.database.rows import DIGEST, StoredRows, pieces_of, read_columns
from nndefense.database.writer import writing

Array = NDArray[Any]


def drop_repeats(
    paths: Sequence[Path], write: Callable[[Path, dict[str, Array], Sequence[dict[str, str]]], None]
) -> int:
    """Write the shards that hold duplicates again, without them.

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
    held = [(path, piece) for path in paths if (piece := pieces.finished(path)) and piece.entry.rows]
    if not held:
        return 0
    table = StoredRows([path for path, _ in held])
    with writing(held[0][0].parent):
        rows, firsts = repeats(pieces_of([path for path, _ in held], DIGEST), held[0][0].parent)
    shard = np.searchsorted(table.starts, rows, side="right") - 1
    for number in np.unique(shard).tolist():
        path, piece = held[number]
        here = shard == number
        within = rows[here] - table.starts[number]
        stored, _ = read_columns(path)
        dropped = [
            {"id": _text(name), "kind": "duplicate", "reason": f"duplicate of {_text(first)}"}
            for name, first in zip(stored["ids"][within], table.take("ids", firsts[here]), strict=True)
        ]
        keep = np.ones(piece.entry.rows, dtype=np.bool_)
        keep[within] = False
        left = {name: column[keep] for name, column in stored.items()} if keep.any() else {}
        write(path, left, [*piece.notes["rejected"], *dropped])
    return len(rows)


def _text(name: Any) -> str:
    return bytes(name).decode("utf-8", "surrogateescape")
