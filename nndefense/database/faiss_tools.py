"""FAISS itself: whether it is there, and what its Python interface leaves to its users."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.errors import DatabaseError, InputError


def import_faiss() -> Any:
    """The faiss module, or an error that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise DatabaseError(
            "FAISS is not installed: pip install faiss-gpu (Linux x86-64) or faiss-cpu, or use the torch backend"
        ) from error
    return faiss


def faiss_available() -> bool:
    """Whether FAISS can be imported."""
    try:
        import_faiss()
    except DatabaseError:
        return False
    return True


def transforms(index: Any) -> Iterator[Any]:
    """What FAISS does to vectors before it indexes them, first things first."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(number))


def is_graph(inner: Any) -> bool:
    """Whether a FAISS index is a graph, whose shape depends on the order in which rows come."""
    return hasattr(inner, "hnsw") or hasattr(inner, "nsg") or hasattr(inner, "nndescent")


def list_ids(lists: Any, number: int) -> NDArray[np.int64]:
    """The row numbers in one inverted list."""
    size = lists.list_size(number)
    if not size:
        return np.empty(0, dtype=np.int64)
    return np.array(import_faiss().rev_swig_ptr(lists.get_ids(number), size), dtype=np.int64)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let FAISS use this many threads for a while; None: as many as it does."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    if count is not None:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def unusable(factory: str, error: RuntimeError) -> InputError:
    """What FAISS says of an index that it cannot make, for people."""
    # It ends with the reason; before it stand a C++ signature and a line number.
    reason = re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])
    return InputError(f"FAISS cannot build an index {factory!r} here ({reason.strip()}): name another, such as Flat")
