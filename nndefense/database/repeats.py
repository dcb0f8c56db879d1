"""Which rows repeat an earlier one, or have given ids; in bounded memory, since large tables are sorted on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.database.rows import StoredRows, pieces_of
from nndefense.errors import InputError

Array = NDArray[Any]
Rownumbers = NDArray[np.int64]
SPILL = "build-spill-"
_BUCKETS = 256
_HELD = 1 << 19
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


def repeats(keys: Iterable[Array], folder: Path | None = None, *, held: int = _HELD) -> tuple[Rownumbers, Rownumbers]:
    """Find the rows whose key an earlier row has.

    Args:
        keys: pieces M x 16 uint8 of the rows' keys, in row order.
        folder: where buckets are kept meanwhile, 24 bytes a row; by default where the system keeps such files.
        held: rows up to which no bucket is written.

    Returns:
        The repeating rows, ascending, and for each the first row with its key.

    Raises:
        OSError: the buckets cannot be written.
    """
    waiting: list[Array] = []
    first = number = 0
    with ExitStack() as stack:
        files: list[Any] = []
        for piece in keys:
            records = _records(piece, first)
            first += len(records)
            number += len(records)
            waiting.append(records)
            if number > held:
                if not files:
                    where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=SPILL, dir=folder)))
                    files = [stack.enter_context((where / str(i)).open("w+b")) for i in range(_BUCKETS)]
                _spill(files, np.concatenate(waiting))
                waiting, number = [], 0
        if files and waiting:
            _spill(files, np.concatenate(waiting))
        for file in files:
            file.seek(0)
        held_in = (np.frombuffer(file.read(), dtype=_RECORD) for file in files)
        found = [_found(part) for part in (held_in if files else [np.concatenate(waiting or [_EMPTY])])]
    rows, firsts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(rows)
    return rows[order], firsts[order]


def repeated_ids(shards: Sequence[Path], folder: Path | None = None) -> Rownumbers:
    """The rows of shards whose id an earlier row has, ascending; compared as text, whatever the keys say.

    Raises:
        OSError: the buckets cannot be written.
    """
    rows, firsts = repeats((id_keys(piece) for piece in pieces_of(shards, "ids")), folder)
    if not len(rows):
        return rows
    table = StoredRows(shards)
    same: Rownumbers = rows[table.take("ids", rows) == table.take("ids", firsts)]
    return same


def known_rows(old: Sequence[Path], new: Sequence[Path], column: str, folder: Path) -> tuple[Rownumbers, Rownumbers]:
    """The rows of new shards whose id or digest a row of the old ones has.

    Args:
        old, new: shards in row order.
        column: ``ids`` or ``digest``.
        folder: where large tables are sorted meanwhile.

    Returns:
        Row numbers in the new shards, ascending, and for each the row in the old ones.

    Raises:
        OSError: the buckets cannot be written.
    """
    pieces = chain(pieces_of(old, column), pieces_of(new, column))
    rows, firsts = repeats((id_keys(piece) if column == "ids" else piece for piece in pieces), folder)
    held = len(StoredRows(old))
    chosen = (rows >= held) & (firsts < held)
    rows, firsts = rows[chosen] - held, firsts[chosen]
    # Keys of ids are equal for equal ids, but not only for these.
    same = StoredRows(new).take(column, rows) == StoredRows(old).take(column, firsts)
    same = same if same.ndim == 1 else same.all(1)
    return rows[same], firsts[same]


def rows_of(shards: Sequence[Path], ids: Sequence[str]) -> Rownumbers:
    """The numbers of the rows of shards that have these ids, ascending.

    Raises:
        InputError: no id is given, or no row has one of them.
    """
    wanted = np.unique(np.array([name.encode("utf-8", "surrogateescape") for name in ids], dtype="S"))
    if not len(wanted):
        raise InputError("no id was given: name the images whose rows are to be removed")
    found, missing, first = [], np.ones(len(wanted), dtype=np.bool_), 0
    for piece in pieces_of(shards, "ids"):
        here = np.flatnonzero(np.isin(piece, wanted))
        missing[np.searchsorted(wanted, piece[here])] = False
        found.append(here + first)
        first += len(piece)
    if missing.any():
        raise InputError(
            f"{int(missing.sum()):,} of the ids are of no row of {shards[0].parent}, such as "
            f"{id_text(wanted[missing][0])!r}: nothing was removed; give ids that it has"
        )
    return np.concatenate(found).astype(np.int64)


def check_new_ids(shards: Sequence[Path], ids: Sequence[str]) -> None:
    """Make sure that no row of shards has one of these ids, and that none comes twice.

    Raises:
        InputError: one that is not so.
    """
    wanted = np.sort(np.array([name.encode("utf-8", "surrogateescape") for name in ids], dtype="S"))
    twice = wanted[1:][wanted[1:] == wanted[:-1]]
    if len(twice):
        raise InputError(f"two rows would have the id {id_text(twice[0])!r}: give each image one of its own")
    for piece in pieces_of(shards, "ids"):
        there = piece[np.isin(piece, wanted)]
        if len(there):
            raise InputError(
                f"{shards[0].parent} has a row with the id {id_text(there[0])!r} already: give the images "
                "other ids, or remove that row first"
            )


def id_text(name: Any) -> str:
    """An id as text, whose bytes may be no UTF-8."""
    return bytes(name).decode("utf-8", "surrogateescape")


def id_keys(ids: Array) -> NDArray[np.uint8]:
    """Keys n x 16 of n byte strings: equal strings have equal keys, padded to whatever length."""
    letters = ids.view(np.uint8).reshape(len(ids), ids.dtype.itemsize)
    # Sums of products with fixed random numbers; the padding's zeros add nothing.
    factors = np.random.default_rng(0).integers(1, 1 << 63, (ids.dtype.itemsize, 2), dtype=np.uint64) * 2 + 1
    keys = np.zeros((len(ids), 2), dtype=np.uint64)
    for place, factor in enumerate(factors):
        keys += letters[:, place, None].astype(np.uint64) * factor
    return np.ascontiguousarray(keys).view(np.uint8)


_EMPTY = np.empty(0, dtype=_RECORD)


def _records(keys: Array, first: int) -> Array:
    records = np.empty(len(keys), dtype=_RECORD)
    halves = np.ascontiguousarray(keys, dtype=np.uint8).view("<u8").reshape(len(keys), 2)
    records["high"], records["low"] = halves[:, 0], halves[:, 1]
    records["row"] = np.arange(first, first + len(keys))
    return records


def _spill(files: list[Any], records: Array) -> None:
    # The product's upper bits depend on all bits of the key.
    bucket = (records["high"] * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(_BUCKETS), side="right")
    for file, part in zip(files, np.split(records[order], ends[:-1]), strict=True):
        file.write(part.tobytes())


def _found(records: Array) -> tuple[Rownumbers, Rownumbers]:
    order = np.lexsort((records["row"], records["low"], records["high"]))
    records = records[order]
    same = np.zeros(len(records), dtype=np.bool_)
    same[1:] = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    # Where a run of equal keys begins, for every record of it.
    begins = np.maximum.accumulate(np.where(same, 0, np.arange(len(records))))
    return records["row"][same].astype(np.int64), records["row"][begins[same]].astype(np.int64)
