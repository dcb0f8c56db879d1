"""A database's index in parts, held by Ray actors: for more rows than one machine has memory for.

Each actor holds the features of a contiguous share of the rows and searches it exactly. What the actors find is put
together by FAISS's own merge of results, which takes the lower part first among equal distances; so rows of the same
distance come in row order, as they do on one machine.

That the distances have the same bits as on one machine is due to where shares begin: FAISS and the torch search work
through the rows in blocks, one matrix product each, and a product of another shape may round differently. So a share
is a whole number of blocks, and a database of few blocks is held in fewer parts than were asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.database import shard
from nndefense.database.cluster import NAMESPACE, import_ray, join
from nndefense.database.faiss_tools import faiss_available, import_faiss
from nndefense.database.manifest import Manifest
from nndefense.database.shard import Found, Shard, Share
from nndefense.errors import DatabaseError, InputError

Array = NDArray[Any]
ENGINES = ("local", "ray")

_START_SECONDS = 900.0
_SEARCH_SECONDS = 300.0
# What a share takes beside its rows: Python and FAISS.
_PROCESS_BYTES = 300 * 2**20


class LateError(DatabaseError):
    """A part of an index that has not answered in time; it may be starting again."""


class ShardedIndex:
    """An exact search over parts in Ray actors; the same ``search`` as an index on one machine.

    An actor that dies is started again by Ray, reads its rows again and is asked again; a search waits for it.

    Attributes:
        shares: first and last row (exclusive) of each part.
    """

    def __init__(self, actors: Sequence[Any], shares: Sequence[tuple[int, int]], backend: str) -> None:
        """Use :meth:`start`."""
        self._ray = import_ray()
        self._actors, self.shares, self.backend = list(actors), list(shares), backend

    @classmethod
    def start(
        cls,
        folder: Path,
        manifest: Manifest,
        *,
        shards: int = 2,
        address: str | None = None,
        backend: str = "faiss",
        device: str = "cpu",
        threads: int = 1,
        name: str | None = None,
    ) -> ShardedIndex:
        """Start the actors, or find them where others have started them under this name.

        Args:
            folder: the database's folder, under this path on every machine of the cluster.
            manifest: its manifest. Every file that a part reads is compared with it, also when the part is started
                again later.
            shards: the parts, at least 1; fewer where the database has fewer blocks (1,024 rows with FAISS).
            address: the cluster to join, unless this process is in one; see :func:`~nndefense.database.cluster.join`.
            backend: ``faiss`` or ``torch``.
            device: where the torch backend searches.
            threads: threads of a search in one part.
            name: share the parts with other processes of the cluster; they then last until :meth:`close`. None: they
                belong to this object and end with it.

        Raises:
            InputError: less than 1 part, or Ray is not installed.
            DatabaseError: files that differ from the manifest, or a cluster that cannot be joined or has no room.
        """
        if shards < 1:
            raise InputError(f"the number of shards is {shards}, but must be at least 1")
        join(address)
        ray = import_ray()
        parts = shares(manifest.rows, shards, block_of(backend))
        actors = []
        for number, (first, last) in enumerate(parts):
            size = 4 * manifest.dimension * (last - first) + _PROCESS_BYTES
            options: dict[str, Any] = {
                "num_cpus": 0,
                # Ray starts it where so much memory is not promised to others.
                "memory": size,
                "num_gpus": 1 if device.startswith("cuda") else 0,
                "max_restarts": -1,
                "max_task_retries": -1,
                # Of several machines, take another one for each part.
                "scheduling_strategy": "SPREAD",
            }
            if name is not None:
                options |= {
                    "name": f"{name}-{manifest.fingerprint[:16]}-{number + 1}-of-{len(parts)}",
                    "namespace": NAMESPACE,
                    "lifetime": "detached",
                    "get_if_exists": True,
                }
            remote = ray.remote(max_concurrency=4)(Shard)
            share = share_of(folder.resolve(), manifest, first, last)
            actors.append(remote.options(**options).remote(share, backend=backend, device=device, threads=threads))
        index = cls(actors, parts, backend)
        try:
            index.check(_START_SECONDS)
        except DatabaseError:
            index.close()
            raise
        return index

    def search(self, queries: Array, k: int) -> Found:
        """The k nearest rows of each query: N x d -> Euclidean distances N x k, row numbers N x k, nearest first.

        Raises:
            DatabaseError: a part cannot be loaded again, or does not answer within five minutes.
        """
        wanted = np.ascontiguousarray(queries, dtype=np.float32)
        # Large batches travel once to each machine, not once to each actor.
        sent = self._ray.put(wanted) if wanted.nbytes > 100_000 else wanted
        found = self._all([actor.search.remote(sent, k) for actor in self._actors], _SEARCH_SECONDS)
        keys, rows = merge([keys for keys, _ in found], [rows for _, rows in found], k)
        # As FAISS's squares are made distances on one machine.
        return np.sqrt(np.maximum(keys, 0)) if self.backend == "faiss" else _completed(keys, wanted), rows

    def check(self, seconds: float = 60.0) -> int:
        """Ask every part how many rows it holds; returns their sum.

        Raises:
            DatabaseError: as for :meth:`search`.
        """
        return sum(self._all([actor.count.remote() for actor in self._actors], seconds))

    def processes(self) -> list[int]:
        """The process numbers of the parts, each on its own machine."""
        return self._all([actor.process.remote() for actor in self._actors], 60.0)

    def close(self) -> None:
        """End the actors, for everybody who uses them."""
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)

    def _all(self, asked: list[Any], seconds: float) -> list[Any]:
        try:
            answers = self._ray.get(asked, timeout=seconds)
        except self._ray.exceptions.GetTimeoutError as error:
            raise LateError(
                f"a part of the index did not answer within {seconds:g} seconds: check that the cluster has memory for "
                f"{len(asked)} parts and that its machines can be reached"
            ) from error
        except self._ray.exceptions.RayError as error:
            raise DatabaseError(
                f"a part of the index was lost ({type(error).__name__}): open the database again"
            ) from error
        for failed, _ in answers:
            if failed is not None:
                raise DatabaseError(f"a part of the index cannot be loaded: {failed}")
        return [value for _, value in answers]


def block_of(backend: str) -> int:
    """How many rows a search compares at once, by which shares are cut."""
    return int(import_faiss().cvar.distance_compute_blas_database_bs) if backend == "faiss" else shard.TORCH_BLOCK


def shares(rows: int, shards: int, block: int) -> list[tuple[int, int]]:
    """Cut rows into at most ``shards`` contiguous shares of whole blocks, which differ by one block at most."""
    blocks = -(-rows // block)
    parts = min(shards, blocks)
    ends = [min(block * (blocks * number // parts), rows) for number in range(parts + 1)]
    return list(itertools.pairwise(ends))


def share_of(folder: Path, manifest: Manifest, first: int, last: int) -> Share:
    """The files that hold rows ``first`` up to ``last`` (exclusive)."""
    files, start, skipped = [], 0, 0
    for name in manifest.shards:
        entry = manifest.files[name]
        end = start + entry.rows
        if end <= first:
            skipped = end
        elif start < last:
            files.append((folder / name, entry.sha256, entry.bytes))
        start = end
    return Share(tuple(files), skipped, first, last, manifest.dimension)


def merge(keys: Sequence[NDArray[np.float32]], rows: Sequence[NDArray[np.int64]], k: int) -> Found:
    """The k best of several sorted results, lowest key first; of equal keys the one of the earlier result.

    Args:
        keys: N x k_i each, ascending, with k_i up to k.
        rows: N x k_i each, at least 0.
        k: at most all k_i together.

    Returns:
        Keys N x k and rows N x k.
    """
    if len(keys) == 1:
        # Copies: what comes from an actor is read-only.
        return np.array(keys[0][:, :k]), np.array(rows[0][:, :k])
    if not faiss_available():
        return _merge_in_torch(keys, rows, k)
    # FAISS wants results of the same length, and takes a row of -1 for the end of one.
    held = np.full((len(keys), len(keys[0]), k), np.finfo(np.float32).max, dtype=np.float32)
    numbers = np.full(held.shape, -1, dtype=np.int64)
    for part, (some, of) in enumerate(zip(keys, rows, strict=True)):
        held[part, :, : some.shape[1]], numbers[part, :, : of.shape[1]] = some, of
    best, found = import_faiss().merge_knn_results(held, numbers)
    return best, found


def _merge_in_torch(keys: Sequence[NDArray[np.float32]], rows: Sequence[NDArray[np.int64]], k: int) -> Found:
    together = torch.from_numpy(np.concatenate(keys, axis=1))
    best, order = together.sort(dim=1, stable=True)
    found = torch.from_numpy(np.concatenate(rows, axis=1)).gather(1, order)
    return best[:, :k].numpy(), found[:, :k].numpy()


def _completed(keys: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """As the torch search completes its keys on one machine."""
    wanted = torch.from_numpy(np.array(queries))
    squared = torch.from_numpy(np.array(keys)) + (wanted * wanted).sum(1, keepdim=True)
    return squared.clamp_min(0).sqrt().numpy()
