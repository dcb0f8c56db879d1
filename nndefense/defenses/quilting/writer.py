"""Writing a patch database: patches, then their index, then the manifest that makes the folder one."""

from __future__ import annotations

import datetime
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.database.faiss_tools import faiss_available, import_faiss
from nndefense.database.index import FaissIndex
from nndefense.database.index_training import build_index
from nndefense.database.manifest import NAME, FileEntry
from nndefense.database.writer import writing
from nndefense.defenses.quilting.patches import (
    CENTRE,
    FORMAT,
    INDEX,
    PIXELS,
    PatchManifest,
    probes_of,
    set_probes,
)
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.files import make_folder, read_json, write_atomically
from nndefense.images import check_images
from nndefense.locks import writes
from nndefense.versions import library_versions

# Up to so many patches an exact search takes no longer than the rest of a quilt.
FLAT_UP_TO = 1 << 15
PROBES = 16
# Vectors for each list that the lists' centres are found from; FAISS asks for 39.
_TRAINING = 64
# As many training vectors as for so many lists, where an index learns but has no lists.
_LISTS = 1024
_PIECE = 1 << 16


def check_patch_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Raise unless a patch database can be written to a folder: it is there or can be made, and holds none yet.

    Raises:
        DatabaseError: a finished patch database and ``overwrite`` is off, or a finished database of another kind,
            which is never overwritten.
        InputError: a folder that cannot be made or written.
    """
    make_folder(folder)
    if not (folder / NAME).exists():
        return
    try:
        found = read_json(folder / NAME)
    except DataError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DatabaseError(f"{folder} holds something else than patches ({NAME} says so): choose another folder")
    if not overwrite:
        raise DatabaseError(f"{folder} already holds a patch database: choose another folder, or overwrite it")


def index_for(count: int, dimension: int) -> str:
    """The index of so many patches of so many numbers.

    Exact up to 32,768 patches; then about 4 sqrt(count) inverted lists (a power of 2), in which the patches lie with
    their first 32 principal components where they have more than 48 numbers. What is found so is put into order by all
    numbers.
    """
    if count <= FLAT_UP_TO:
        return "Flat"
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    return f"IVF{lists},Flat" if dimension <= 48 else f"PCA32,IVF{lists},Flat"


@writes("folder")
def write_patches(
    folder: str | Path,
    patches: Tensor,
    origins: NDArray[np.int64],
    *,
    data: Mapping[str, Any],
    seed: int | None,
    index: str = "auto",
    probes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a patch database. Interrupted at any moment, the folder does not open.

    Args:
        folder: where it will be; made if missing.
        patches: n x C x p x p with n >= 1: uint8, or floats in [0, 1], which are kept as float32.
        origins: n x 3, where each patch comes from: image, row and column.
        data: ``name``, ``fingerprint`` and number of ``images`` of the data set, and perhaps ``specs``.
        seed: of the positions.
        index: FAISS's factory string, or ``auto``: see :func:`index_for`; where FAISS is missing ``auto`` writes no
            index, and the search is exact.
        probes: how many lists of an inverted index are looked into; by default 16, or all if there are fewer.
        overwrite: replace a finished patch database in that folder.

    Raises:
        InputError: patches or origins of the wrong form, or an index that FAISS cannot build.
        DatabaseError: see :func:`check_patch_folder`; a disk that is full; an index by name where FAISS is missing.
    """
    folder = Path(folder).expanduser()
    _check(patches, origins)
    check_patch_folder(folder, overwrite=overwrite)
    stored = patches.detach().cpu().contiguous()
    stored = stored if stored.dtype == torch.uint8 else stored.float()
    factory: str | None = index
    if index == "auto":
        factory = index_for(len(stored), stored[0].numel()) if faiss_available() else None
    # A misspelt index is refused before anything is written.
    built = None if factory is None else _build_index(factory, stored, probes)
    with writing(folder):
        _clear(folder)
        write_atomically(folder / PIXELS, lambda part: _write_hdf5(part, stored.numpy(), origins))
        files = {PIXELS: FileEntry.of(folder / PIXELS)}
        if built is not None:
            write_atomically(folder / INDEX, built.write)
            files[INDEX] = FileEntry.of(folder / INDEX)
        PatchManifest(
            count=len(stored),
            channels=stored.shape[1],
            side=stored.shape[2],
            storage=str(stored.dtype).removeprefix("torch."),
            data=dict(data),
            seed=seed,
            index={"factory": factory, "metric": "l2", "probes": None if built is None else probes_of(built)},
            files=files,
            versions=library_versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        ).write(folder)


def _check(patches: Tensor, origins: NDArray[np.int64]) -> None:
    if patches.dim() != 4 or not patches.numel() or patches.shape[2] != patches.shape[3]:
        raise InputError(f"patches have shape {tuple(patches.shape)}, but must be n x C x p x p with n >= 1")
    if origins.shape != (len(patches), 3):
        raise InputError(f"{len(patches)} patches need origins {len(patches)} x 3, not {origins.shape}")
    if patches.dtype != torch.uint8:
        check_images(patches, name="patches")


def _build_index(factory: str, stored: Tensor, probes: int | None) -> FaissIndex:
    dimension = stored[0].numel()

    def vectors(rows: Tensor) -> NDArray[np.float32]:
        found = rows.flatten(1).float()
        centred: NDArray[np.float32] = ((found / 255 if rows.dtype == torch.uint8 else found) - CENTRE).numpy()
        return centred

    empty = FaissIndex.empty(factory, dimension).index
    lists = import_faiss().try_extract_index_ivf(empty)
    wanted = 0 if empty.is_trained else _TRAINING * (_LISTS if lists is None else lists.nlist)
    chosen = np.sort(np.random.default_rng(0).permutation(len(stored))[:wanted])
    index = build_index(
        factory, dimension, vectors(stored[torch.from_numpy(chosen)]), map(vectors, torch.split(stored, _PIECE))
    )
    if probes is not None or probes_of(index) is not None:
        set_probes(index, PROBES if probes is None else probes)
    return index


def _write_hdf5(path: Path, patches: NDArray[Any], origins: NDArray[np.int64]) -> None:
    # By way of memory: where the disk is full, HDF5 itself can crash the whole process when it closes the file.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("patches", data=patches)
        file.create_dataset("origins", data=origins.astype(np.int32))
    path.write_bytes(buffer.getbuffer())


def _clear(folder: Path) -> None:
    """Remove a patch database, or what an interrupted build left of one; the manifest goes first."""
    for name in (NAME, PIXELS, INDEX):
        (folder / name).unlink(missing_ok=True)
