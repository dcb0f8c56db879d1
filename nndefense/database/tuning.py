"""Tuning a search: how much of the index it must look at for a recall, measured against exact search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.database.exact_search import running_top_k
from nndefense.database.faiss_tools import import_faiss, threads
from nndefense.database.index import FaissIndex
from nndefense.database.index_training import sample_rows
from nndefense.database.manifest import Manifest
from nndefense.database.rows import pieces_of, sample_of
from nndefense.database.writer import writing
from nndefense.errors import DatabaseError, InputError

Array = NDArray[Any]
_MOST_CANDIDATES = 1 << 12
QUERIES = 1000
_PIECE = 1 << 14
# The speed of a search in fewer rows is of no interest, and many small databases are built to compare settings.
_TIMED_ROWS = 100_000


@dataclass(frozen=True)
class Tuned:
    """How to search an index, and what that gives.

    Attributes:
        parameter: ``nprobe``, ``efSearch``, or None where the kind has none.
        value: what it was set to.
        recall: the share of the true K nearest rows among the K found, on the queries that it was measured with.
        queries_per_second: all those queries at once, with ``threads`` threads.
        k: K.
        reached: whether the wanted recall was reached.
        threads: with which the speed was measured.
    """

    parameter: str | None
    value: int | None
    recall: float
    queries_per_second: float
    k: int
    reached: bool
    threads: int

    @property
    def search(self) -> dict[str, int]:
        """What to give to :meth:`FaissIndex.set_search`."""
        return {} if self.parameter is None or self.value is None else {self.parameter: self.value}


def exact_neighbours(queries: Array, pieces: Iterable[Array], k: int) -> NDArray[np.int64]:
    """The k nearest rows of each query, by comparing it with all of them.

    Args:
        queries: N x d.
        pieces: the rows in order, M x d at a time, so that memory holds one piece.
        k: 1 to the number of rows.

    Returns:
        Row numbers N x k, nearest first.

    Raises:
        InputError: fewer rows than k.
    """
    wanted = torch.from_numpy(np.array(queries, dtype=np.float32))
    first = 0

    def numbered() -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
        nonlocal first
        for piece in pieces:
            rows = torch.from_numpy(np.array(piece, dtype=np.float32))
            yield first, rows, (rows * rows).sum(1)
            first += len(rows)

    with torch.no_grad():
        found = running_top_k(wanted, numbered(), k)[1]
    if not 1 <= k <= first:
        raise InputError(f"k is {k}, but must be from 1 to the {first:,} rows: lower k")
    return found.numpy()


def recall_at(found: Array, truth: Array) -> float:
    """The share of the true nearest rows that were found: row numbers N x K and N x K, in any order, -1 for none.

    Raises:
        InputError: no queries, or results of another shape.
    """
    if found.shape != truth.shape or not truth.size:
        raise InputError(f"recall compares results of the same shape, not {found.shape} with {truth.shape}")
    hits = sum(len(np.intersect1d(some, true)) for some, true in zip(found, truth, strict=True))
    return hits / truth.size


def tune(
    index: FaissIndex,
    queries: Array,
    truth: Array,
    *,
    recall: float = 0.95,
    threads_used: int | None = None,
    seconds: float = 1.0,
) -> Tuned:
    """Find the smallest ``nprobe`` or ``efSearch`` that reaches a recall, and leave the index set to it.

    The value is doubled until the recall is reached, then halved in between. A search that finds fewer than K rows for
    a query counts as one that does not reach it, whatever the recall.

    Args:
        index: with its rows.
        queries: N x d, none of them a row of the index, or recall will look better than it is.
        truth: N x K, the true nearest rows; see :func:`exact_neighbours`.
        recall: wanted, above 0 and at most 1.
        threads_used: threads of the search; None: as many as FAISS uses.
        seconds: how long the speed is measured at the end, at least two searches.

    Raises:
        InputError: queries and truth that do not belong together, or a recall out of range.
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall is {recall}, but must be above 0 and at most 1")
    if queries.ndim != 2 or truth.ndim != 2 or len(queries) != len(truth) or not truth.size:
        raise InputError(f"tuning needs queries N x d and truth N x K, but was given {queries.shape} and {truth.shape}")
    k, known = truth.shape[1], index.parameters
    parameter = next(iter(known), None)
    seen: dict[int, tuple[float, bool]] = {}

    def measured(value: int) -> tuple[float, bool]:
        if value not in seen:
            if parameter is not None:
                index.set_search({parameter: value})
            found = index.search(queries, k)[1]
            share = recall_at(found, truth)
            seen[value] = share, share >= recall and not bool((found < 0).any())
        return seen[value]

    with threads(threads_used):
        value = 1
        if parameter is not None:
            most = int(index.inner.nlist) if parameter == "nprobe" else _MOST_CANDIDATES
            # A graph looks at k candidates or more in any case.
            value = _smallest(lambda number: measured(number)[1], 1 if parameter == "nprobe" else min(k, most), most)
            index.set_search({parameter: value})
        share, reached = measured(value)
        speed = len(queries) / fastest(lambda: index.search(queries, k), seconds)
        count = int(import_faiss().omp_get_max_threads())
    return Tuned(parameter, None if parameter is None else value, share, speed, k, reached, count)


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The seconds of the fastest of at least two calls, which are repeated for so many seconds."""
    best, begun, done = float("inf"), time.perf_counter(), 0
    while done < 2 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        best, done = min(best, time.perf_counter() - start), done + 1
    return best


def _smallest(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from ``low`` to ``high`` that is enough, where more is never less; else ``high``."""
    value = low
    while not enough(value):
        if value >= high:
            return high
        low, value = value + 1, min(2 * value, high)
    while low < value:
        middle = (low + value) // 2
        low, value = (low, middle) if enough(middle) else (middle + 1, value)
    return value


def measure(
    folder: Path,
    *,
    recall: float = 0.95,
    k: int = 50,
    queries: NDArray[np.float32] | None = None,
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
        own = sample_rows(rows, QUERIES, seed)
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
        **asdict(tuned),
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
