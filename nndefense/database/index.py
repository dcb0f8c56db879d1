"""The search index: FAISS, or exact search in torch where FAISS is not installed. Distances are Euclidean."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nndefense.database.exact_search import TorchIndex
from nndefense.database.faiss_tools import (
    import_faiss,
    is_graph,
    list_finder,
    list_ids,
    on_device,
    threads,
    transforms,
    unusable,
)
from nndefense.errors import DatabaseError, InputError
from nndefense.files import not_read, open_regular

Array = NDArray[Any]
Search = tuple[NDArray[np.float32], NDArray[np.int64]]
BACKENDS = ("auto", "faiss", "torch")
_PIECE = 1 << 16
__all__ = ["BACKENDS", "FaissIndex", "Index", "TorchIndex"]


class Index(Protocol):
    """What the database asks of an index."""

    def search(self, queries: Array, k: int) -> Search:
        """The k nearest rows of each query: N x d -> Euclidean distances N x k, row numbers N x k, nearest first."""


_limits = threading.Lock()


@contextmanager
def _limited(size: int) -> Iterator[None]:
    """Within it FAISS reserves no more memory for a part of an index than a file of so many bytes can hold."""
    faiss = import_faiss()
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # older versions
        yield
        return
    with _limits:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(size + (1 << 20))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


class FaissIndex:
    """A FAISS index over the rows, whose ids are the rows' numbers (Johnson et al. 2019)."""

    def __init__(self, index: Any) -> None:
        self.index = index

    # -- making and opening -------------------------------------------------------------------------------------

    @classmethod
    def empty(cls, factory: str, dimension: int) -> FaissIndex:
        """An index without rows, neither trained, of FAISS's ``factory`` string for vectors of ``dimension`` numbers;
        see :func:`~nndefense.database.index_training.build_index`.
        """
        faiss = import_faiss()
        try:
            made = cls(faiss.index_factory(dimension, factory, faiss.METRIC_L2))
        except RuntimeError as error:
            raise unusable(factory, error) from error
        if getattr(made.inner, "nlist", 1) < 1:
            raise unusable(factory, RuntimeError("it has no inverted lists"))
        return made

    @classmethod
    def read(
        cls, path: Path, *, mapped: bool = False, dimension: int | None = None, rows: int | None = None
    ) -> FaissIndex:
        """Open an index file; call it only for files whose checksum was found right.

        FAISS hardly expects an index file from a stranger: one that was made to do harm may end the process. The
        checksum says that the file is the one that was built; the checks here find a file that stands in another one's
        place, one that declares more than it holds, and one whose lists are in another file.

        Args:
            path: the file.
            mapped: leave the vectors in the file and map it, so that a search reads what it needs and several
                processes share it; otherwise the whole file is read into memory.
            dimension: d, where it is known.
            rows: the number of rows, where it is known.

        Raises:
            DatabaseError: not an index, or one of another dimension, number of rows or metric.
        """
        faiss = import_faiss()
        # Older versions map inverted lists alone.
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP) if mapped else 0
        # Lists may be in a file of any name, which FAISS would open to write.
        flags |= faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
        try:
            with open_regular(path) as file, _limited(os.fstat(file.fileno()).st_size):
                index = faiss.read_index(str(path), flags)
        except (OSError, RuntimeError, MemoryError, ValueError) as error:
            told = not_read(path, error) or f"{path} is not an index that this FAISS can read: build the database again"
            raise DatabaseError(told) from error
        for what, found, wanted in (
            ("dimensions", index.d, dimension),
            ("rows", index.ntotal, rows),
            ("(metric)", index.metric_type, faiss.METRIC_L2),
        ):
            if wanted is not None and found != wanted:
                raise DatabaseError(
                    f"{path} is an index of {found:,} {what}, but {wanted:,} are expected: build the database again"
                )
        found = cls(index)
        lists = faiss.downcast_InvertedLists(found.inner.invlists) if hasattr(found.inner, "invlists") else None
        if isinstance(lists, faiss.OnDiskInvertedLists) and Path(lists.filename).name != path.name:
            raise DatabaseError(f"{path} has its lists in another file, which is not read: build the database again")
        return found

    def write(self, path: Path) -> None:
        """Save the index to the file ``path``; one on a GPU is saved as an index for the CPU."""
        import_faiss().write_index(self.to_cpu().index, str(path))

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """The number of rows in it."""
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        """d, the length of a vector."""
        return int(self.index.d)

    @property
    def inner(self) -> Any:
        """FAISS's index behind transformations of the vectors (OPQ and the like); of several GPUs, the first one's."""
        faiss = import_faiss()
        index = faiss.downcast_index(self.index)
        while isinstance(index, (faiss.IndexPreTransform, faiss.IndexShards)):
            index = faiss.downcast_index(index.at(0) if isinstance(index, faiss.IndexShards) else index.index)
        return index

    @property
    def coded(self) -> bool:
        """Whether rows are kept as codes or shortened, so that distances are not quite those of the rows."""
        faiss, inner = import_faiss(), self.inner
        kept = faiss.downcast_index(inner.storage) if is_graph(inner) else inner
        shortened = any(transform.d_out < transform.d_in for transform in transforms(self.index))
        return shortened or not isinstance(kept, (faiss.IndexFlat, faiss.IndexIVFFlat))

    @property
    def merges(self) -> str:
        """How parts become one: ``lists`` (inverted lists), ``codes`` (rows in order), or nothing: they
        cannot be filled apart from each other."""
        faiss, inner = import_faiss(), self.inner
        if isinstance(inner, faiss.IndexIVF):
            plain = isinstance(faiss.downcast_InvertedLists(inner.invlists), faiss.ArrayInvertedLists)
            return "lists" if plain else ""
        return "codes" if isinstance(inner, faiss.IndexFlatCodes) else ""

    def held_rows(self) -> NDArray[np.int64]:
        """The row numbers in the index, in ascending order, as often as they are there."""
        if self.merges != "lists":
            return np.arange(self.rows, dtype=np.int64)
        lists = import_faiss().downcast_InvertedLists(self.inner.invlists)
        return np.sort(np.concatenate([list_ids(lists, number) for number in range(lists.nlist)]))

    # -- filling ------------------------------------------------------------------------------------------------

    def add(self, rows: Array, *, first: int | None = None, device: str = "cpu") -> None:
        """Append rows M x d; their ids are their numbers.

        Args:
            rows: M x d.
            first: the number of the first of them; None: they follow what is there. Inverted lists can begin
                anywhere, which makes them a part of a larger index; other kinds count from 0 in each part.
            device: where inverted lists are chosen; see :func:`~nndefense.database.faiss_tools.check_device`.

        Raises:
            InputError: rows of another length, an index that cannot be filled so, or a GPU that is not there.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dimension:
            raise InputError(f"the index takes rows M x {self.dimension}, but was given {rows.shape}")
        in_lists = self.merges == "lists"
        start = self.rows if first is None else first
        if start != self.rows and not self.merges:
            raise InputError("an index of this kind cannot be made in parts: add its rows from the first to the last")
        assign = None
        if in_lists and device != "cpu":
            assign = list_finder(self.inner, device)
        try:
            # Several threads at once would build another graph every time.
            with threads(1 if is_graph(self.inner) else None):
                for begin in range(0, len(rows), _PIECE):
                    piece = np.ascontiguousarray(rows[begin : begin + _PIECE], dtype=np.float32)
                    ids = np.arange(start + begin, start + begin + len(piece), dtype=np.int64)
                    if assign is not None:
                        self._add_assigned(piece, ids, assign)
                    elif in_lists:
                        self.index.add_with_ids(piece, ids)
                    else:
                        self.index.add(piece)
        except RuntimeError as error:
            raise unusable(type(self.inner).__name__, error) from error

    def _add_assigned(self, piece: NDArray[np.float32], ids: NDArray[np.int64], assign: Any) -> None:
        """Add rows to the inverted lists that ``assign`` names for them."""
        faiss, inner = import_faiss(), self.inner
        for transform in transforms(self.index):
            piece = transform.apply(piece)
        chosen = np.ascontiguousarray(assign(piece), dtype=np.int64)
        pointers = (faiss.swig_ptr(array) for array in (np.ascontiguousarray(piece), ids, chosen))
        inner.add_core(len(piece), *pointers)
        self.index.ntotal = inner.ntotal

    # -- searching ----------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, int]:
        """What :meth:`set_search` can set for this kind, as it is now: ``nprobe`` or ``efSearch``, or nothing."""
        faiss, inner = import_faiss(), self.inner
        if isinstance(inner, faiss.IndexIVF) or hasattr(inner, "nprobe"):
            return {"nprobe": int(inner.nprobe)}
        return {"efSearch": int(inner.hnsw.efSearch)} if hasattr(inner, "hnsw") else {}

    def set_search(self, parameters: Mapping[str, int]) -> None:
        """Say how much of the index a search looks at.

        Args:
            parameters: ``nprobe``: the inverted lists, from 1 to all of them; ``efSearch``: the candidates in a graph
                (HNSW), at least 1. Nothing changes nothing.

        Raises:
            InputError: a parameter that this kind of index does not have, or a value out of range.
        """
        inner, known = self.inner, self.parameters
        for name, value in parameters.items():
            if name not in known:
                raise InputError(f"an index of this kind has no {name!r}: it has {', '.join(known) or 'none to set'}")
            most = int(inner.nlist) if name == "nprobe" else 1 << 20
            if not (isinstance(value, int) and 1 <= value <= most):
                raise InputError(f"{name} is {value!r}, but must be a whole number from 1 to {most:,}")
            if self.on_gpu:
                # On all of them.
                import_faiss().GpuParameterSpace().set_index_parameter(self.index, name, value)
                continue
            if name == "efSearch":
                inner.hnsw.efSearch = value
                continue
            inner.nprobe = value
            coarse: Any = import_faiss().downcast_index(inner.quantizer) if hasattr(inner, "quantizer") else None
            if hasattr(coarse, "hnsw"):
                # A graph that chooses the lists must look at more of them than it gives.
                coarse.hnsw.efSearch = max(16, 2 * value)

    def search(self, queries: Array, k: int) -> Search:
        """The k nearest rows of each of the ``queries``, N x d; see :class:`Index`. Where fewer were found, the rest
        are row -1.

        Raises:
            DatabaseError: the index gives rows that it cannot hold.
            InputError: on a GPU, k above 2,048.
        """
        if k > 2048 and self.on_gpu:
            raise InputError(f"k is {k}, but a search on a GPU gives at most 2,048 rows: lower k or search on the CPU")
        squared, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        # FAISS gives squared distances, and rounding can carry the smallest of them below 0.
        return np.sqrt(np.maximum(squared, 0)).astype(np.float32), rows.astype(np.int64)

    @property
    def on_gpu(self) -> bool:
        """Whether it is on one GPU or more."""
        return type(self.inner).__name__.startswith("Gpu")

    def to_device(self, device: str, *, float16: bool = False) -> FaissIndex:
        """A copy for searching on ``device``, with ``float16`` at half precision there; see
        :func:`nndefense.database.faiss_tools.on_device`.
        """
        return FaissIndex(on_device(self.index, device, float16=float16))

    def to_cpu(self) -> FaissIndex:
        """The same index for the CPU: itself, or a copy of one that is on GPUs."""
        return FaissIndex(import_faiss().index_gpu_to_cpu(self.index)) if self.on_gpu else self
