"""Filling an index: rows in shards -> parts of a trained index -> one file, in memory that holds a part at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nndefense.database.index import FaissIndex
from nndefense.database.index_training import sample_rows, train_index, training_rows
from nndefense.database.merging import emptied, merge_parts
from nndefense.database.rows import StoredRows, sample_of
from nndefense.database.writer import store
from nndefense.locks import passing_folder

PART_ROWS = 1 << 18
"""Rows of a part."""


def fill(index: FaissIndex, shards: Sequence[Path], first: int, *, device: str = "cpu") -> int:
    """Add shards to an index, whose rows there get numbers from ``first`` on; returns how many they are.

    One call a shard, so that the same rows make the same index whatever was done before.
    """
    added = 0
    for path in shards:
        table = StoredRows([path])
        index.add(table.slice("features", 0, len(table)), first=first + added, device=device)
        added += len(table)
    return added


def grown_index(old: Path, shards: Mapping[Path, int], rows: int, out: Path) -> None:
    """Write an index with more rows than the ``rows`` of another one, as that is trained.

    Lists are copied to the new file with what comes to them; kinds that are not put together from parts are held whole.
    """
    if FaissIndex.read(old, mapped=True, rows=rows).merges:
        with passing_folder(out.parent) as place:
            merge_parts([old, *_parts(lambda: emptied(old), shards, rows, place)], out)
        return
    whole = FaissIndex.read(old)
    fill(whole, list(shards), rows)
    store(out, whole.write)


def made_index(
    factory: str, dimension: int, shards: Mapping[Path, int], out: Path, *, seed: int = 0, device: str = "cpu"
) -> None:
    """Train an index on a sample of the rows in shards, and write it with all of them."""
    rows = sum(shards.values())
    sample = np.empty((0, dimension), np.float32)
    wanted = training_rows(factory, dimension, rows)
    if wanted:
        sample = sample_of(list(shards), list(shards.values()), "features", sample_rows(rows, wanted, seed))
    trained = train_index(factory, dimension, sample, device=device, seed=seed)
    if not trained.merges:
        fill(trained, list(shards), 0)
        store(out, trained.write)
        return
    with passing_folder(out.parent) as place:
        trained.write(place / "trained.faiss")
        merge_parts(_parts(lambda: FaissIndex.read(place / "trained.faiss"), shards, 0, place), out)


def _parts(make: Callable[[], FaissIndex], shards: Mapping[Path, int], first: int, place: Path) -> list[Path]:
    """Parts of an index over these shards, each of about :data:`PART_ROWS` rows, in a folder."""
    groups: list[list[Path]] = [[]]
    held, parts = 0, []
    for path, rows in shards.items():
        if held >= PART_ROWS:
            groups.append([])
            held = 0
        groups[-1].append(path)
        held += rows
    for number, group in enumerate(groups):
        part = make()
        first += fill(part, group, first)
        parts.append(place / f"{number:05d}.faiss")
        part.write(parts[-1])
    return parts
