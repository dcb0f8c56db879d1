"""Verify: is everything there, and how well does the index find what an exact search finds?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_build.fit import sample_positions
from nndefense.database import ImageDatabase
from nndefense.database.index import FaissIndex
from nndefense.database.manifest import Manifest
from nndefense.database.rows import pieces_of, sample_of
from nndefense.database.tuning import exact_neighbours, recall_at, tune
from nndefense.database.writer import writing
from nndefense.errors import DatabaseError, InputError

QUERIES = 1000
_PIECE = 1 << 14
# The speed of a search in fewer rows is of no interest, and many small databases are built to compare settings.
_TIMED_ROWS = 100_000
Vectors = NDArray[np.float32]


def check(folder: Path) -> dict[str, Any]:
    """Compare everything with the manifest: checksums, row counts, every id once, an index of every row.

    Returns:
        ``rows``, ``files`` and ``index_rows`` as found.

    Raises:
        DatabaseError: naming what is wrong and what to do.
    """
    return ImageDatabase.open(folder, verify=False).verify()


def measure(
    folder: Path,
    *,
    recall: float = 0.95,
    k: int = 50,
    queries: Vectors | None = None,
    queries_from: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure recall@K and speed of a database's index, choose its setting, and write both into the manifest.

    Recall@K is the share of the K exactly nearest rows among the K that the index finds. Queries are feature vectors
    of images that stand in no row, where such are given; else 1,000 rows of the database, each looked for among the
    others: one neighbour more is asked for, and the row itself left out of both results. For inverted lists that is
    what a new image of the same kind would find; a graph (HNSW) holds the row itself, which may flatter it.

    Args:
        folder: a database with its manifest.
        recall: the share wanted, above 0 and at most 1; the cheapest setting that reaches it is chosen, or the best
            there is.
        k: K; lowered where there are fewer rows.
        queries: n x d float32 of images that stand in no row, or None.
        queries_from: where they came from, for the record.
        seed: draws the rows, where no queries are given.

    Returns:
        What stands in the manifest's ``index["search"]`` from now on.

    Raises:
        InputError: a recall or K out of range, or queries of another length.
        DatabaseError: a database that cannot be opened or written.
    """
    if not 0 < recall <= 1 or k < 1:
        raise InputError(f"recall {recall} at {k}: recall must be above 0 and at most 1, K at least 1")
    manifest = Manifest.read(folder)
    shards = [folder / name for name in manifest.shards]
    index = FaissIndex.read(folder / manifest.index["file"], mapped=True)
    rows = manifest.rows
    if rows < 2:
        raise DatabaseError(f"{folder} holds {rows} row: an index over it has no recall to measure")
    own: NDArray[np.int64] | None = None
    if queries is None:
        own = sample_positions(rows, QUERIES, seed)
        sizes = [manifest.files[name].rows for name in manifest.shards]
        queries = np.ascontiguousarray(sample_of(shards, sizes, "features", own), dtype=np.float32)
        queries_from = f"{len(own):,} rows, each without itself"
    elif queries.ndim != 2 or queries.shape[1] != manifest.dimension or not len(queries):
        raise InputError(f"queries have shape {queries.shape}, but must be n x {manifest.dimension} with n at least 1")
    k = min(k, rows - 1)
    asked = k if own is None else k + 1
    truth = exact_neighbours(queries, pieces_of(shards, "features", _PIECE), asked)
    # Each row finds itself, so of K + 1 neighbours that many have to be found for the share that was asked for.
    wanted = recall if own is None else (recall * k + 1) / (k + 1)
    tuned = tune(index, queries, truth, recall=wanted, seconds=1.0 if rows >= _TIMED_ROWS else 0.0)
    _, found = index.search(queries, asked)
    reached = tuned.recall
    if own is not None:
        reached = recall_at(_without(found, own, k), _without(truth, own, k))
    search = {
        **tuned.to_json(),
        "setting": tuned.search,
        "recall": round(float(reached), 6),
        "k": k,
        "wanted": recall,
        "queries": len(queries),
        "queries_from": queries_from,
    }
    updated = replace(manifest, index={**manifest.index, "search": search})
    with writing(folder):
        updated.write(folder)
    return search


def _without(found: NDArray[np.int64], own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Each row of numbers without its own row, or without the farthest where it is not among them."""
    mine = found == own[:, None]
    mine[~mine.any(1), -1] = True
    others: NDArray[np.int64] = found[~mine].reshape(len(found), k)
    return others
