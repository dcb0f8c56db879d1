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
from nndefense.database.reranking import MOST_RERANKED, RERANK, RerankedIndex
from nndefense.database.rows import StoredRows, pieces_of, sample_of
from nndefense.database.writer import writing
from nndefense.errors import DatabaseError, InputError

Array = NDArray[Any]
Rows = Callable[[NDArray[np.int64]], Array]
_MOST_CANDIDATES = 1 << 12
QUERIES = 1000
_PIECE = 1 << 14
_PAIRS = 1 << 12
# Recall that nobody notices, and for which it is not worth while to search more.
_AS_GOOD = 0.001
# The speed of a search in fewer rows is of no interest, and many small databases are built to compare settings.
_TIMED_ROWS = 100_000


@dataclass(frozen=True)
class Tuned:
    """How to search an index, and what that gives.

    Attributes:
        parameter: ``nprobe``, ``efSearch``, or None where the kind has none.
        value: what it was set to.
        rerank: how many candidates are read for each row that is wanted; 1 where the index itself decides.
        recall: the share of the K rows found that are among the true K nearest, or as near as the last of these, on the
            queries that it was measured with.
        queries_per_second: all those queries at once, with ``threads`` threads.
        k: K.
        reached: whether the wanted recall was reached.
        threads: with which the speed was measured.
    """

    parameter: str | None
    value: int | None
    rerank: int
    recall: float
    queries_per_second: float
    k: int
    reached: bool
    threads: int

    @property
    def search(self) -> dict[str, int]:
        """What to give to :meth:`FaissIndex.set_search`."""
        setting = {} if self.parameter is None or self.value is None else {self.parameter: self.value}
        return setting if self.rerank == 1 else {**setting, RERANK: self.rerank}


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


def recall_at(found: Array, truth: Array, queries: Array | None = None, rows: Rows | None = None) -> float:
    """The share of the K nearest rows that was found, where a row as near as the K-th is as good as that one.

    Args:
        found: row numbers N x K, in any order, -1 for none; no row twice for a query.
        truth: row numbers N x K of the nearest rows, nearest first; see :func:`exact_neighbours`.
        queries: N x d, to tell which other rows are as near.
        rows: gives the vectors M x d of M ascending row numbers. Without it and queries only the very rows in ``truth``
            are counted, so that of repeated rows the ones that were not listed are missed.

    Raises:
        InputError: no queries, or results of another shape.
    """
    if found.shape != truth.shape or not truth.size:
        raise InputError(f"recall compares results of the same shape, not {found.shape} with {truth.shape}")
    hits = np.stack([np.isin(some, true) for some, true in zip(found, truth, strict=True)])
    if queries is not None and rows is not None:
        query, place = np.nonzero(~hits & (found >= 0))
        asked = np.unique(query)
        farthest = np.zeros(len(queries))
        farthest[asked] = _squared(queries, asked, truth[asked, -1], rows)
        # As near as float32 can tell: the usual error of |q|^2 - 2 q r + |r|^2, of d terms in any order.
        error = 2.0**-24 * np.sqrt(queries.shape[1])
        length = np.sqrt(np.square(queries, dtype=np.float64).sum(1))
        farthest += error * np.square(2 * length + np.sqrt(farthest))
        hits[query, place] = _squared(queries, query, found[query, place], rows) <= farthest[query]
    return float(hits.mean())


def _squared(queries: Array, query: Array, row: Array, rows: Rows) -> NDArray[np.float64]:
    """The squared distances of M pairs: queries[query] and the rows of the numbers ``row``."""
    squared = np.empty(len(row))
    order = np.argsort(row, kind="stable")
    for first in range(0, len(row), _PAIRS):
        pairs = order[first : first + _PAIRS]
        numbers, places = np.unique(row[pairs], return_inverse=True)
        apart = rows(numbers)[places].astype(np.float64) - queries[query[pairs]]
        squared[pairs] = np.square(apart).sum(1)
    return squared


def tune(
    index: FaissIndex,
    queries: Array,
    truth: Array,
    *,
    rows: Rows | None = None,
    own: NDArray[np.int64] | None = None,
    recall: float = 0.95,
    threads_used: int | None = None,
    seconds: float = 1.0,
) -> Tuned:
    """Find the smallest ``nprobe`` or ``efSearch`` that reaches a recall, and leave the index set to it.

    The value is doubled until the recall is reached, then halved in between. Where none reaches it, the smallest is
    taken whose recall is within 0.001 of the best: more effort would be spent on nothing. A search that finds fewer
    than K rows for a query counts as one that does not reach it, whatever the recall. An index that can read its rows
    (:class:`RerankedIndex`) is given as many candidates as may be for all that, and then as few as keep what was
    reached.

    Args:
        index: with its rows.
        queries: N x d, none of them a row of the index, or recall will look better than it is.
        truth: N x K, the true nearest rows, nearest first; see :func:`exact_neighbours`.
        rows: gives the vectors of rows, so that rows as near as the K-th count as found; see :func:`recall_at`.
        own: the queries' own row numbers N, where they are rows of the index. One more is asked for, and the row itself
            is left out; ``truth`` is without it, too.
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
    asked = k if own is None else k + 1
    parameter = next((name for name in known if name != RERANK), None)
    seen: dict[int, tuple[bool, float]] = {}

    def set_to(value: int, rerank: int) -> None:
        index.set_search({name: one for name, one in ((parameter, value), (RERANK, rerank)) if name in known})

    def search(value: int, rerank: int) -> tuple[bool, float]:
        set_to(value, rerank)
        found = index.search(queries, asked)[1]
        found = found if own is None else _without(found, own, k)
        return not bool((found < 0).any()), recall_at(found, truth, queries, rows)

    def measured(value: int) -> tuple[bool, float]:
        if value not in seen:
            seen[value] = search(value, rerank)
        return seen[value]

    def enough(value: int, complete: bool = True, share: float = recall) -> bool:
        return measured(value)[0] >= complete and measured(value)[1] >= share

    with threads(threads_used):
        value, rerank = 1, MOST_RERANKED if RERANK in known else 1
        if parameter is not None:
            most = int(index.inner.nlist) if parameter == "nprobe" else _MOST_CANDIDATES
            # A graph looks at k candidates or more in any case.
            least = 1 if parameter == "nprobe" else min(k, most)
            value = _smallest(enough, least, most)
            if not enough(value):
                complete = max(whole for whole, _ in seen.values())
                best = max(share for whole, share in seen.values() if whole == complete) - _AS_GOOD
                _smallest(lambda number: enough(number, complete, best), least, most)
                value = min(number for number in seen if enough(number, complete, best))
        found, reached = measured(value), enough(value)
        complete, least_share = found[0], recall if reached else found[1] - _AS_GOOD
        while rerank > 1:
            fewer = search(value, rerank // 2)
            if fewer[0] < complete or fewer[1] < least_share:
                break
            rerank, found = rerank // 2, fewer
        set_to(value, rerank)
        speed = len(queries) / fastest(lambda: index.search(queries, asked), seconds)
        count = int(import_faiss().omp_get_max_threads())
    return Tuned(parameter, None if parameter is None else value, rerank, found[1], speed, k, reached, count)


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

    Recall@K is the share of the K rows that the index finds which are among the exactly nearest, or as near as the
    K-th of these: of repeated pictures each is as good as another. Queries are feature vectors
    of images that stand in no row, where such are given; else 1,000 rows of the database, each looked for among the
    others: one neighbour more is asked for, and the row itself left out of both results. For inverted lists that is
    what a new image of the same kind would find; a graph (HNSW) holds the row itself, which may flatter it.

    Args:
        folder: a database with its manifest.
        recall: the share wanted, above 0 and at most 1; the cheapest setting that reaches it is chosen, or, where
            none does, the cheapest within 0.001 of the best.
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
    sizes = [manifest.files[name].rows for name in manifest.shards]
    if index.coded:
        stored = StoredRows(shards, sizes)
        index = RerankedIndex(index.index, lambda numbers: stored.take("features", numbers))
    own: NDArray[np.int64] | None = None
    if queries is None:
        own = sample_rows(rows, QUERIES, seed)
        queries = np.ascontiguousarray(sample_of(shards, sizes, "features", own), dtype=np.float32)
        queries_from = f"{len(own):,} rows, each without itself"
    elif queries.ndim != 2 or queries.shape[1] != manifest.dimension or not len(queries):
        raise InputError(f"queries have shape {queries.shape}, but must be n x {manifest.dimension} with n at least 1")
    k = min(k, rows - 1)
    truth = exact_neighbours(queries, pieces_of(shards, "features", _PIECE), k if own is None else k + 1)
    tuned = tune(
        index,
        queries,
        truth if own is None else _without(truth, own, k),
        rows=lambda numbers: sample_of(shards, sizes, "features", numbers),
        own=own,
        recall=recall,
        seconds=1.0 if rows >= _TIMED_ROWS else 0.0,
    )
    search = {
        **asdict(tuned),
        "setting": tuned.search,
        "recall": round(tuned.recall, 6),
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
