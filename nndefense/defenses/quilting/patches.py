"""The patch database: small pieces of many images, the index that finds those nearest to a piece, and its manifest."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.attacks.checks import at_least
from nndefense.database.exact_search import ExactSearch, squared_distances
from nndefense.database.faiss_tools import faiss_available, import_faiss
from nndefense.database.index import BACKENDS, FaissIndex
from nndefense.database.manifest import NAME, FileEntry, read_manifest
from nndefense.errors import DatabaseError, DataError, InputError, check_choice
from nndefense.files import HDF5_ERRORS, held_array, not_read, open_hdf5, sealed, tell_unsealed, write_json
from nndefense.images import shape_text

FORMAT, VERSION = "nndefense-patches", 1
PIXELS, INDEX = "patches.h5", "index.faiss"
STORAGES = ("uint8", "float32")
REBUILD = "build it again with 'nndefense index patches'"


@dataclass(frozen=True)
class PatchManifest:
    """The contents of ``manifest.json``; a patch database without one is not finished and does not open.

    Attributes:
        count: number of patches.
        channels: of each patch.
        side: of each patch, in pixels.
        storage: ``uint8`` (levels of 1/255) or ``float32``.
        data: ``name``, ``fingerprint`` and number of ``images`` of the data set, and the ``specs`` that open it again.
        seed: of the positions.
        index: ``factory`` (FAISS's description; None: no index file, exact search), ``metric`` and ``probes``.
        files: every file of the database by name.
        versions: the libraries that built it.
        created: time of the build, ISO 8601 in UTC.
        sealed: whether the manifest was read with a digest of its values; not an entry of the file.
    """

    count: int
    channels: int
    side: int
    storage: str
    data: dict[str, Any]
    seed: int | None
    index: dict[str, Any]
    files: dict[str, FileEntry]
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    sealed: bool = True

    @property
    def fingerprint(self) -> str:
        """The sha256 of the file of patches, which says what they are; the index only finds them."""
        return self.files[PIXELS].sha256

    def write(self, folder: Path) -> None:
        """Write the manifest with its digest, which is what makes the folder a patch database."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del values["sealed"]
        write_json(folder / NAME, sealed(values))

    @classmethod
    def read(cls, folder: Path) -> PatchManifest:
        """Read the manifest of a folder.

        Raises:
            DatabaseError: no such folder, no manifest in it (an unfinished build), or one that cannot be used.
        """

        def made(value: dict[str, Any]) -> PatchManifest:
            manifest = cls(**value)
            manifest._check_entries()
            return manifest

        return read_manifest(folder, made, FORMAT, VERSION, "patch database", "a patch database", REBUILD, REBUILD)

    def _check_entries(self) -> None:
        """Raise one of Python's errors for entries that cannot be used."""
        counts = (self.count, self.channels, self.side, *(entry.bytes for entry in self.files.values()))
        if not all(type(number) is int and number > 0 for number in counts):
            raise TypeError("counts must be whole numbers from 1")
        if self.storage not in STORAGES:
            raise ValueError(self.storage)
        # Only files of these two names are ever opened.
        if set(self.files) != ({PIXELS} if self.index["factory"] is None else {PIXELS, INDEX}):
            raise ValueError("the files must be the patches and their index")
        for entries, names in ((self.data, ("name", "fingerprint", "images")), (self.index, ("probes",))):
            for name in names:
                entries[name]

    def check_files(self, folder: Path) -> None:
        """Compare every byte of the files in ``folder`` with the manifest.

        Raises:
            DatabaseError: naming the first file that is missing or differs.
        """
        for name, entry in self.files.items():
            entry.check(folder / name, REBUILD)


# Vectors are searched about the middle of [0, 1]: where products of lengths stand in for differences, their rounding
# grows with the lengths.
CENTRE = 0.5
# Nearest patches by the index beyond those asked for; the right order is found among them by plain differences.
_SPARE = 3
_QUERIES, _EXACT_QUERIES = 1 << 15, 1 << 12


class PatchDatabase:
    """A finished patch database, held in memory. Open one with :meth:`open`.

    Attributes:
        path: its folder.
        manifest: what it is.
        channels: C.
        side: p, of the patches.
    """

    def __init__(self, path: Path, manifest: PatchManifest, stored: Tensor, index: FaissIndex | None) -> None:
        self.path, self.manifest = path, manifest
        self.channels, self.side = manifest.channels, manifest.side
        self._stored, self._index = {torch.device("cpu"): stored}, index
        self._exact: dict[torch.device, ExactSearch] = {}
        self._opening = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, *, backend: str = "auto", probes: int | None = None) -> PatchDatabase:
        """Open a folder. Every file's sha256 is compared with the manifest before it is read.

        Args:
            path: the folder.
            backend: ``faiss``, ``torch`` (exact search in torch, on the device of the images), or ``auto``: FAISS for
                images on a CPU where it is installed and the database has an index, torch for all others.
            probes: how many of an inverted index's lists are looked into; by default as many as when it was built.

        Raises:
            DatabaseError: a missing or unfinished database, or a file that is missing, changed or of another content
                than the manifest says.
            InputError: an unknown backend, or probes without an inverted index.
        """
        check_choice("backend", backend, BACKENDS)
        folder = Path(path).expanduser()
        manifest = PatchManifest.read(folder)
        manifest.check_files(folder)
        if not manifest.sealed:
            tell_unsealed(folder, folder)
        stored = _read_pixels(folder, manifest)
        if backend == "faiss" and manifest.index["factory"] is None:
            raise DatabaseError(f"{folder} was built without FAISS and has no index: {REBUILD}, or use backend torch")
        index = None
        if backend == "faiss" or (backend == "auto" and manifest.index["factory"] is not None and faiss_available()):
            index = _read_index(folder, manifest, probes)
        elif probes is not None:
            raise InputError("probes belong to an inverted index, but the search here is exact: leave them out")
        return cls(folder, manifest, stored, index)

    def __len__(self) -> int:
        return self.manifest.count

    def __repr__(self) -> str:
        shape = shape_text((self.channels, self.side, self.side))
        return f"<{self.path}: {len(self):,} patches {shape} of {self.manifest.data['name']}>"

    @property
    def fingerprint(self) -> str:
        """The sha256 of the patches."""
        return self.manifest.fingerprint

    def origins(self) -> NDArray[np.int64]:
        """Where each patch comes from: count x 3, the number of the image in its data set, first row, first column."""
        with open_hdf5(self.path / PIXELS) as file:
            return np.asarray(held_array(file, "origins", self.path / PIXELS), dtype=np.int64)

    def pixels(self, rows: Tensor) -> Tensor:
        """The patches of these numbers, of any shape: ``rows.shape`` x C x p x p, float32 in [0, 1]."""
        stored = self._stored.get(rows.device)
        if stored is None:
            stored = self._stored[rows.device] = self._stored[torch.device("cpu")].to(rows.device)
        taken = stored[rows]
        return taken.float().div_(255) if taken.dtype == torch.uint8 else taken

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest patches of each query by Euclidean distance.

        Distances are worked out by differences, so that a query that is a patch finds it at distance 0; with an
        inverted index too, since equal vectors lie in the same list. Whether the others are the nearest of all depends
        on the index: an exact one (``Flat``) or torch finds these.

        Args:
            queries: N x (C p p), pixels in [0, 1].
            k: 1 to all of the patches.

        Returns:
            Distances N x k, nearest first, and patch numbers N x k (int64), on the queries' device.

        Raises:
            InputError: k, or the shape of the queries, does not fit.
        """
        k = at_least("k", k)
        if k > len(self):
            raise InputError(f"k is {k}, but must be from 1 to the {len(self):,} patches: lower k")
        dimension = self.channels * self.side**2
        if queries.dim() != 2 or queries.shape[1] != dimension:
            raise InputError(f"queries have shape {tuple(queries.shape)}, but must be N x {dimension}")
        if not len(queries):
            return queries.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64, device=queries.device)
        by_faiss = self._index is not None and queries.device.type == "cpu"
        pieces = torch.split(queries.detach().float(), _QUERIES if by_faiss else _EXACT_QUERIES)
        found = [self._search(piece, k, by_faiss) for piece in pieces]
        return torch.cat([distances for distances, _ in found]), torch.cat([rows for _, rows in found])

    def _search(self, queries: Tensor, k: int, by_faiss: bool) -> tuple[Tensor, Tensor]:
        wanted = min(k + _SPARE, len(self))
        if by_faiss:
            assert self._index is not None
            rows = torch.from_numpy(self._index.search((queries - CENTRE).numpy(), wanted)[1])
            # The lists that were looked into may hold fewer than k patches.
            short = (rows[:, k - 1] < 0).nonzero()[:, 0]
            for piece in torch.split(short, _EXACT_QUERIES) if len(short) else ():
                rows[piece] = self._exactly(queries[piece], wanted)
        else:
            rows = self._exactly(queries, wanted)
        candidates = self.pixels(rows.clamp_min(0)).flatten(2)
        squared = squared_distances(queries, candidates).masked_fill_(rows < 0, torch.inf)
        nearest, order = squared.sort(dim=1, stable=True)
        return nearest[:, :k].sqrt(), rows.gather(1, order[:, :k])

    def _exactly(self, queries: Tensor, k: int) -> Tensor:
        """The k nearest rows by exact search in torch, on the queries' device."""
        with self._opening:
            search = self._exact.get(queries.device)
            if search is None:
                every = torch.arange(len(self), device=queries.device)
                search = ExactSearch(self.pixels(every).flatten(1) - CENTRE)
                self._exact[queries.device] = search
        return search.search(queries - CENTRE, k)[1]


def _read_pixels(folder: Path, manifest: PatchManifest) -> Tensor:
    path = folder / PIXELS
    try:
        with open_hdf5(path) as file:
            found: NDArray[Any] = np.asarray(held_array(file, "patches", path))
            origins = held_array(file, "origins", path).shape
    except DataError as error:
        raise DatabaseError(str(error)) from error
    except HDF5_ERRORS as error:
        told = not_read(path, error) or f"{path} is damaged or not a file of patches: restore it or {REBUILD}"
        raise DatabaseError(told) from error
    shape = (manifest.count, manifest.channels, manifest.side, manifest.side)
    if found.shape != shape or found.dtype != np.dtype(manifest.storage) or origins != (manifest.count, 3):
        raise DatabaseError(
            f"{path} holds patches {shape_text(found.shape)} of {found.dtype}, but its manifest says "
            f"{shape_text(shape)} of {manifest.storage}: {REBUILD}"
        )
    # Written so that a NaN fails too.
    if found.dtype != np.uint8 and not bool(((found >= 0) & (found <= 1)).all()):
        raise DatabaseError(f"{path} holds pixels outside [0, 1]: {REBUILD}")
    return torch.from_numpy(found)


def _read_index(folder: Path, manifest: PatchManifest, probes: int | None) -> FaissIndex:
    index = FaissIndex.read(folder / INDEX)
    dimension = manifest.channels * manifest.side**2
    if (index.index.ntotal, index.index.d) != (manifest.count, dimension):
        raise DatabaseError(
            f"{folder / INDEX} holds {index.index.ntotal:,} vectors of {index.index.d} numbers, but the database "
            f"{manifest.count:,} of {dimension}: {REBUILD}"
        )
    if probes is not None:
        set_probes(index, probes)
    return index


def set_probes(index: FaissIndex, probes: int) -> None:
    """Look into so many of an inverted index's lists, at most all.

    Raises:
        InputError: fewer than 1, or an index without lists.
    """
    probes = at_least("probes", probes)
    lists = import_faiss().try_extract_index_ivf(index.index)
    if lists is None:
        raise InputError("probes belong to an inverted index (IVF...), but this one has no lists: leave them out")
    lists.nprobe = min(lists.nlist, probes)


def probes_of(index: FaissIndex) -> int | None:
    """How many lists an index looks into; None where it has none."""
    lists = import_faiss().try_extract_index_ivf(index.index)
    return None if lists is None else int(lists.nprobe)
