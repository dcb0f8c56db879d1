"""Tuning a search: how much of the index it must look at for a recall, measured against exact search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.database.exact_search import running_top_k
from nndefense.database.faiss_tools import import_faiss, threads
from nndefense.database.index import FaissIndex, Index
from nndefense.errors import InputError

Array = NDArray[Any]
_MOST_CANDIDATES = 1 << 12


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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


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
        speed = queries_per_second(index, queries, k, seconds)
        count = int(import_faiss().omp_get_max_threads())
    return Tuned(parameter, None if parameter is None else value, share, speed, k, reached, count)


def queries_per_second(index: Index, queries: Array, k: int, seconds: float = 1.0) -> float:
    """The best of at least two searches for all queries, repeated for so many seconds."""
    best, begun = float("inf"), time.perf_counter()
    done = 0
    while done < 2 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        index.search(queries, k)
        best, done = min(best, time.perf_counter() - start), done + 1
    return len(queries) / best


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
