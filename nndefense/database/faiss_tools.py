"""FAISS itself: whether it is there, on which GPUs, and what its Python interface leaves to its users."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.errors import DatabaseError, InputError

DEVICES = ("cpu", "cuda", "cuda:N", "all-gpus")


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


def check_device(device: str) -> list[int]:
    """The numbers of the GPUs that a device means; none for ``cpu``.

    Args:
        device: ``cpu``, ``cuda`` (the first GPU), ``cuda:N``, or ``all-gpus``.

    Raises:
        InputError: another word, or a GPU that is not there or that this FAISS cannot use.
    """
    if device == "cpu":
        return []
    if device != "all-gpus" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise InputError(f"there is no device {device!r} for an index: use {', '.join(DEVICES)}")
    faiss = import_faiss()
    count = int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
    if not count:
        raise InputError(
            "FAISS can use no GPU here: choose the device cpu, or install faiss-gpu on a computer with one"
        )
    if device == "all-gpus":
        return list(range(count))
    number = int(device.partition(":")[2] or 0)
    if number >= count:
        raise InputError(f"there is no device {device}: FAISS sees cuda:0 to cuda:{count - 1}")
    return [number]


def on_device(index: Any, device: str, *, float16: bool = False) -> Any:
    """A copy of a FAISS index on a GPU, or its rows shared out over all of them; on the CPU, the index itself.

    Args:
        index: FAISS's index.
        device: see :func:`check_device`.
        float16: keep float32 vectors in half the memory; distances are then right to about three digits.

    Raises:
        InputError: a GPU that is not there, or a kind of index that runs on the CPU alone, such as HNSW.
    """
    gpus = check_device(device)
    if not gpus:
        return index
    faiss = import_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, float16
    # A graph that chooses the lists works on the CPU; the lists themselves are searched on the GPU.
    options.allowCpuCoarseQuantizer = True
    try:
        return faiss.index_cpu_to_gpus_list(index, co=options, gpus=gpus)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"an index of the kind {type(index).__name__} cannot be put on a GPU ({reason}): search it on the CPU"
        ) from error


def list_finder(inner: Any, device: str) -> Callable[[NDArray[np.float32]], NDArray[np.int64]]:
    """A function rows M x d -> M inverted lists, the nearest of each row, worked out on a GPU.

    Only this is work for a GPU when rows are added; the lists themselves stay in the CPU's memory, so that what is
    written opens anywhere.
    """
    faiss = import_faiss()
    centres = faiss.IndexFlatL2(inner.d)
    centres.add(inner.quantizer.reconstruct_n(0, inner.nlist))
    search = on_device(centres, device)

    def find(rows: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(search.search(np.ascontiguousarray(rows), 1)[1][:, 0], dtype=np.int64)

    return find
