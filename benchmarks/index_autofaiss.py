"""autofaiss on the vectors of the index benchmark; run by index.py in an environment that has autofaiss (numpy < 2).

Usage: python benchmarks/index_autofaiss.py FOLDER THREADS RECALL

FOLDER holds rows/0.npy, queries.npy and truth.npy. Prints one line of JSON: how long build_index took (it trains, adds
and tunes for its own target, a time per query), which index it chose, the smallest nprobe or efSearch that reaches
RECALL, and the queries per second then.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from autofaiss import build_index


def main(folder: Path, threads: int, recall: float) -> None:
    """Build, tune for the recall, and print."""
    faiss.omp_set_num_threads(threads)
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    index, _ = build_index(
        str(folder / "rows"), save_on_disk=False, metric_type="l2", nb_cores=threads, verbose=logging.ERROR,
        max_index_memory_usage="8GB", current_memory_available="12GB",
    )  # fmt: skip
    built = clock() - start
    faiss.omp_set_num_threads(threads)
    own = measured(index, queries, truth, clock)
    space, name = faiss.ParameterSpace(), "nprobe" if faiss.try_extract_index_ivf(index) else "efSearch"
    at: dict[str, Any] = {}
    for value in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024]:
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:
            break
        at = {"parameter": name, "value": value, **measured(index, queries, truth, clock)}
        if at["recall"] >= recall:
            break
    kind = type(faiss.downcast_index(index)).__name__
    lists = faiss.try_extract_index_ivf(index)
    print(json.dumps({
        "built_s": built, "kind": kind, "lists": lists.nlist if lists else None, "as_built": own, "at_recall": at,
    }))  # fmt: skip


def measured(index: Any, queries: Any, truth: Any, clock: Any) -> dict[str, float]:
    """Recall at the truth's K, and queries per second."""
    found, best = None, float("inf")
    for _ in range(3):
        start = clock()
        found = index.search(queries, truth.shape[1])[1]
        best = min(best, clock() - start)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True))
    return {"recall": hits / truth.size, "queries_per_second": len(queries) / best}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
