"""Writing a database: rows arrive in batches, leave as whole shards, and count only once the manifest is there."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.database.index import FaissIndex
from nndefense.database.index_training import build_index
from nndefense.database.manifest import BESIDE, FileEntry, Manifest, in_row_order
from nndefense.database.manifest import NAME as MANIFEST
from nndefense.database.rows import StoredRows, top_posteriors, write_shard
from nndefense.database.weighting import neighbor_weights
from nndefense.errors import DatabaseError, InputError, one_line
from nndefense.features import PCA, FeatureSpec
from nndefense.files import not_read, write_atomically
from nndefense.models import Classifier
from nndefense.parts import sweep
from nndefense.versions import library_versions

Array = NDArray[Any]
_SHARD_BYTES = 64 << 20
_TRAINING_ROWS = 200_000
PCA_FILE = "pca.safetensors"
VIRTUAL = "rows.h5"
REJECTED = "rejected.jsonl"
JOB = "job.json"
"""The file of an unfinished build."""
GROWING = "growing"
"""Folder within a database's, for rows that are extracted to be added to it."""
PIECE = ".json"
"""Ending of the small file beside a finished piece of an unfinished build, which describes it."""
_SHARD = "rows-" + "[0-9]" * 5
_DATA = ("index*.faiss", PCA_FILE, f"{_SHARD}.h5", f"{_SHARD}[0-9].h5", VIRTUAL, "rejected*.jsonl")
# What a database, finished or not, may consist of, the manifest first: no more is ever removed.
_OWN_FILES = (
    *(MANIFEST, JOB, "extracted.json", *BESIDE, *_DATA),
    *(f"{name}{PIECE}" for name in _DATA),
)


class DatabaseWriter:
    """Collects rows and seals them into a database.

    Memory holds one shard of at most 64 MiB, three times while it is written. Every file appears whole or not at all,
    and the manifest comes last: a folder whose writing was interrupted does not open.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classifier: Classifier | None,
        feature: FeatureSpec,
        pca: PCA | None = None,
        data: Mapping[str, Any] | None = None,
        index: str = "Flat",
        overwrite: bool = False,
        classes: Sequence[str] = (),
    ) -> None:
        """Begin a database.

        Args:
            folder: where it will be; made if missing.
            classifier: the classifier whose features and posteriors the rows hold; None where nobody knows one: such a
                database is searched by vectors alone.
            classes: without a classifier, the names of the posteriors' classes.
            feature: how the features are made.
            pca: the fitted PCA that belongs to ``feature``, or None.
            data: ``name``, ``fingerprint`` and ``specs`` of the images.
            index: FAISS's factory string.
            overwrite: replace a finished database in that folder.

        Raises:
            DatabaseError: the folder holds a finished database and ``overwrite`` is off, or cannot be written.
        """
        check_vacant(folder, overwrite=overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
        except OSError as error:
            raise DatabaseError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
        self.folder, self.pca, self.factory = folder, pca, index
        self._identity: dict[str, Any] = {
            "classes": tuple(classes if classifier is None else classifier.classes),
            "feature": feature.to_json(),
            "classifier": made_by(classifier),
            "data": dict(data or {"name": "unnamed", "fingerprint": "", "specs": []}),
        }
        self._shards = ShardWriter(folder, first=0, classes=len(self._identity["classes"]))

    def add(
        self, features: Tensor, posteriors: Tensor, ids: Sequence[str], labels: Sequence[int] | Tensor | Array
    ) -> None:
        """Append M rows: features M x d, posteriors M x C, ids M, labels M (-1 where unknown).

        Raises:
            InputError: columns of different lengths, a changed dimension, values that are not finite, or posteriors
                that are not probability distributions; an index that FAISS cannot build for vectors of this length.
            DatabaseError: the disk is full or cannot be written.
        """
        first = self._shards.dimension is None
        self._shards.add(features, posteriors, ids, labels)
        if first:
            # A misspelt index is refused now rather than after the last image.
            FaissIndex.empty(self.factory, features.shape[1])

    def finish(self) -> None:
        """Write the last shard, build the index and seal the database with its manifest.

        Raises:
            DatabaseError: no row was added, or the disk is full or cannot be written.
            InputError: FAISS cannot build the index that was asked for.
        """
        files = self._shards.close()
        if not files:
            raise DatabaseError(f"no image was added to the database {self.folder}: give a data set that is not empty")
        if self.pca is not None:
            store(self.folder / PCA_FILE, pca_writer(self.pca))
            files[PCA_FILE] = FileEntry.of(self.folder / PCA_FILE)
        seal(self.folder, files, self.factory, "index.faiss", self._identity)


class ShardWriter:
    """Cuts a stream of rows into shards ``rows-00000.h5``, ``rows-00001.h5``, ..., stored as columns() says."""

    def __init__(self, folder: Path, *, first: int, classes: int, half: bool = False, top: int = 0) -> None:
        self.folder, self.number, self.classes, self.half, self.top = folder, first, classes, half, top
        self.dimension: int | None = None
        self._columns: dict[str, list[Array]] = {}
        self._pending = 0
        self._files: dict[str, FileEntry] = {}

    def add(
        self, features: Tensor, posteriors: Tensor, ids: Sequence[str], labels: Sequence[int] | Tensor | Array
    ) -> None:
        """Append M rows; see :meth:`DatabaseWriter.add`."""
        features, posteriors = features.detach().float().cpu(), posteriors.detach().float().cpu()
        numbers = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels, dtype=np.int64)
        check_rows(features, posteriors, ids, numbers, self.classes, self.dimension)
        self.dimension = features.shape[1]
        batch = columns(features, posteriors, ids, numbers, half=self.half, top=self.top)
        first = 0
        while first < len(ids):
            last = min(first + self._rows_per_shard - self._pending, len(ids))
            for name, column in batch.items():
                # A copy, so that a small slice does not keep the caller's whole batch alive.
                self._columns.setdefault(name, []).append(column[first:last].copy())
            self._pending += last - first
            first = last
            if self._pending == self._rows_per_shard:
                self._write()

    def close(self) -> dict[str, FileEntry]:
        """Write what is left; describe all shards that were written."""
        if self._pending:
            self._write()
        return self._files

    @property
    def _rows_per_shard(self) -> int:
        return max(_SHARD_BYTES // (4 * ((self.dimension or 0) + self.classes + 8)), 1)

    def _write(self) -> None:
        held = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        path = self.folder / shard_name(self.number)
        store(path, lambda part: write_shard(part, held, {"classes": self.classes} if self.top else None))
        self._files[path.name] = FileEntry.of(path, rows=self._pending)
        self.number, self._pending, self._columns = self.number + 1, 0, {}


def made_by(classifier: Classifier | None) -> dict[str, Any]:
    """What a database records of its classifier; empty entries where there is none."""
    if classifier is None:
        return {"fingerprint": "", "arch": "", "source": "", "input_shape": []}
    return {
        "fingerprint": classifier.fingerprint,
        "arch": classifier.arch,
        "source": classifier.source,
        "input_shape": list(classifier.input_shape),
    }


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"rows-{number:05d}.h5"


def columns(
    features: Tensor, posteriors: Tensor, ids: Sequence[str], labels: Array, *, half: bool = False, top: int = 0
) -> dict[str, Array]:
    """A shard's columns for M rows that :func:`check_rows` has passed; both weights come from the whole posterior.

    Args:
        features: M x d float32.
        posteriors: M x C float32.
        ids: M.
        labels: M int64.
        half: store features as float16.
        top: store so many of the largest posteriors; 0 for all.

    Raises:
        InputError: a feature that float16 cannot hold.
    """
    kept = features.numpy()
    if half:
        kept = kept.astype(np.float16)
        if not np.isfinite(kept).all():
            raise InputError("the features hold values over 65,504, which float16 cannot store: store float32")
    return {
        "features": kept,
        **(top_posteriors(posteriors.numpy(), top) if top else {"posteriors": posteriors.numpy()}),
        "cbw_e": neighbor_weights(posteriors, "cbw-e").numpy(),
        "cbw_d": neighbor_weights(posteriors, "cbw-d").numpy(),
        # File names that are not UTF-8 come from the system with escapes, and go back to the same bytes.
        "ids": np.array([name.encode("utf-8", "surrogateescape") for name in ids], dtype="S"),
        "labels": labels,
    }


def check_vacant(folder: Path, *, overwrite: bool = False) -> None:
    """Raise :class:`DatabaseError` where ``folder`` holds a finished database, unless ``overwrite`` replaces it."""
    if (folder / MANIFEST).exists() and not overwrite:
        raise DatabaseError(f"{folder} already holds a database: choose another folder, or overwrite it")


def seal(folder: Path, files: dict[str, FileEntry], factory: str, index_name: str, identity: Mapping[str, Any]) -> None:
    """Build the index over all shards and write the manifest, which replaces an older one in one step."""
    rows = StoredRows([folder / name for name in in_row_order(name for name, entry in files.items() if entry.rows)])
    dimension = int(rows.slice("features", 0, 1).shape[1])
    chosen = np.random.default_rng(0).permutation(len(rows))[:_TRAINING_ROWS]
    needs_training = factory != "Flat"
    sample = rows.take("features", np.sort(chosen)) if needs_training else np.empty((0, dimension), np.float32)
    index = build_index(factory, dimension, sample, rows.pieces("features"))
    store(folder / index_name, index.write)
    files[index_name] = FileEntry.of(folder / index_name)
    manifest = Manifest(
        rows=len(rows),
        dimension=dimension,
        index={"factory": factory, "metric": "l2", "file": index_name},
        files=files,
        versions=library_versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **identity,
    )
    with writing(folder):
        manifest.write(folder)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say in one line that a disk is full or read-only; HDF5, FAISS and safetensors each have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error).strip().splitlines()[-1]
        raise DatabaseError(
            f"{folder} cannot be written ({reason}): free some space or choose another folder"
        ) from error


def store(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file of a database atomically; a full or read-only disk is a :class:`DatabaseError`."""
    with writing(path.parent):
        write_atomically(path, write)


def clear(folder: Path) -> None:
    """Remove a database, or what an interrupted build left of one; the manifest goes first."""
    for pattern in _OWN_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / GROWING, ignore_errors=True)
    sweep(folder)


def drop_unnamed(folder: Path, manifest: Manifest) -> None:
    """Remove files of a database that its manifest does not name: what a change has replaced, or left unfinished."""
    for path in (path for pattern in _DATA for path in folder.glob(pattern)):
        if path.name not in manifest.files:
            path.unlink(missing_ok=True)


def pca_writer(pca: PCA) -> Callable[[Path], None]:
    """What writes a fitted PCA to a path."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in pca.state_dict().items()}
    return lambda part: safetensors.torch.save_file(tensors, part)


def load_pca(path: Path) -> PCA:
    """Read a PCA that :func:`pca_writer` wrote.

    Raises:
        DatabaseError: the file is missing, damaged or holds something else.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        mean, axes, scale = tensors["mean"], tensors["axes"], tensors["scale"]
        if axes.dim() != 2 or mean.shape != axes.shape[:1] or scale.shape != axes.shape[1:]:
            raise ValueError("its tensors do not fit together")
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        told = not_read(path, error) or f"{path} holds no PCA ({one_line(error)}): build the database again"
        raise DatabaseError(told) from error
    return PCA(mean, axes, scale)


def check_rows(
    features: Tensor, posteriors: Tensor, ids: Sequence[str], labels: Array, classes: int, dimension: int | None
) -> None:
    """Raise :class:`InputError` for rows that cannot be stored; see :meth:`DatabaseWriter.add`."""
    count = len(ids)
    if not (features.dim() == posteriors.dim() == 2 and len(features) == len(posteriors) == len(labels) == count):
        raise InputError(
            f"a batch of rows needs features M x d, posteriors M x C, M ids and M labels, but has "
            f"{tuple(features.shape)}, {tuple(posteriors.shape)}, {count} and {len(labels)}"
        )
    if dimension is not None and features.shape[1] != dimension:
        raise InputError(f"features have {features.shape[1]} dimensions, but the rows before had {dimension}")
    if posteriors.shape[1] != classes:
        raise InputError(f"posteriors have {posteriors.shape[1]} classes, but the classifier has {classes}")
    if not bool(torch.isfinite(features).all()):
        raise InputError("features hold NaN or infinite values: check the images and the classifier")
    if not bool(torch.isfinite(posteriors).all()) or bool((posteriors < 0).any()):
        raise InputError("posteriors must be finite and at least 0: give softmax outputs")
    if count and not torch.allclose(posteriors.sum(1), torch.ones(count), atol=1e-3):
        raise InputError("posteriors must sum to 1 in each row: give softmax outputs, not logits")
