"""The image database: features, posteriors, ids and labels of many images, and the index that searches them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.database.classifier_source import imported
from nndefense.database.faiss_tools import faiss_available
from nndefense.database.growing import add_rows, changing, remove_rows
from nndefense.database.index import BACKENDS, FaissIndex, Index, TorchIndex
from nndefense.database.index_training import build_index
from nndefense.database.manifest import Manifest
from nndefense.database.repeats import repeated_ids, rows_of
from nndefense.database.reranking import set_as_stored
from nndefense.database.rows import StoredRows
from nndefense.database.sharded import ENGINES, ShardedIndex
from nndefense.database.weighting import CBW_D_POWER, CBW_D_TERMS, neighbor_weights
from nndefense.database.writer import PCA_FILE, DatabaseWriter, load_pca
from nndefense.errors import DatabaseError, InputError, check_choice
from nndefense.features import PCA, FeatureExtractor, FeatureSpec
from nndefense.files import tell_unsealed
from nndefense.models import Classifier
from nndefense.modes import outside_inference_mode
from nndefense.unwrapping import unwrapped

Array = NDArray[Any]
# Larger indexes are mapped into memory. Smaller ones are read: a mapped file that is cut short ends the process.
_MAPPED_BYTES = 1 << 30


class ImageDatabase:
    """A finished database, opened for searching.

    Only the rows that a query needs are read; with millions of rows the memory in use is that of the index.
    Use :meth:`create` to write one, :meth:`open` to open one.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        table: StoredRows,
        index: Index,
        pca: PCA | None,
        backend: str,
        device: str,
    ) -> None:
        self.path, self.manifest, self.pca = path, manifest, pca
        self._table, self._index, self._backend, self._device = table, index, backend, device
        self._selection: Array | None = None
        # How the index is held, to open it again in the same way.
        self._held: dict[str, Any] = {}

    @staticmethod
    def create(
        path: str | Path,
        *,
        classifier: Classifier,
        feature: FeatureSpec,
        pca: PCA | None = None,
        data: Mapping[str, Any] | None = None,
        index: str = "Flat",
        overwrite: bool = False,
    ) -> DatabaseWriter:
        """Begin a new database in the folder ``path``; ``classifier``, ``feature``, ``pca``, ``data``, ``index``,
        ``overwrite`` and errors are those of :class:`~nndefense.database.writer.DatabaseWriter`.
        """
        return DatabaseWriter(
            Path(path).expanduser(), classifier=classifier, feature=feature, pca=pca, data=data, index=index,
            overwrite=overwrite,
        )  # fmt: skip

    @classmethod
    @outside_inference_mode
    def open(
        cls,
        path: str | Path,
        *,
        classifier: Classifier | None = None,
        verify: bool = True,
        backend: str = "auto",
        device: str = "cpu",
        engine: str = "local",
        shards: int = 2,
        ray_address: str | None = None,
        ray_name: str | None = None,
    ) -> ImageDatabase:
        """Open a database folder.

        Args:
            path: the folder.
            classifier: when given, the database must have been made with it.
            verify: compare every file's sha256 with the manifest (about a second per GB); without it only lengths.
            backend: ``faiss``, ``torch`` (exact search in torch, whatever the index), or ``auto``: FAISS where it is
                installed.
            device: where the torch backend searches.
            engine: ``local``: the index is in this process. ``ray``: parts of the rows are in Ray actors, which search
                them exactly, whatever the index; for databases larger than one machine's memory.
            shards: with Ray, the number of parts.
            ray_address: with Ray, the cluster to join. None: the one that this process is in, else one is started.
            ray_name: with Ray, a name under which processes share the parts; see
                :meth:`~nndefense.database.sharded.ShardedIndex.start`.

        Raises:
            DatabaseError: a missing or unfinished database, a file that is missing, truncated or changed, a database
                made with another classifier, or a Ray cluster that cannot be used.
            InputError: an unknown backend or engine; Ray is not installed.
        """
        check_choice("backend", backend, BACKENDS)
        check_choice("engine", engine, ENGINES)
        folder = Path(path).expanduser()
        manifest = Manifest.of_whole(folder, checksums=verify)
        if not manifest.sealed:
            tell_unsealed(folder, folder)
        if classifier is not None:
            check_classifier(folder, manifest, classifier)
        held_rows = {folder / name: manifest.files[name].rows for name in manifest.shards}
        table = StoredRows(list(held_rows), list(held_rows.values()))
        if not len(table) or len(table) != manifest.rows:
            raise DatabaseError(
                f"{folder} holds {len(table):,} rows but its manifest says {manifest.rows:,}: build it again"
            )
        if (table.classes, table.dimension) != (len(manifest.classes), manifest.dimension):
            raise DatabaseError(
                f"{folder} holds rows of {table.classes:,} classes and {table.dimension:,} dimensions, but its "
                f"manifest says {len(manifest.classes):,} and {manifest.dimension:,}: build it again"
            )
        if backend == "auto":
            backend = "faiss" if faiss_available() else "torch"
        held: dict[str, Any] = {}
        index: Index
        if engine == "ray":
            held = {"engine": engine, "shards": shards, "ray_address": ray_address, "ray_name": ray_name}
            index = ShardedIndex.start(
                folder, manifest, shards=shards, address=ray_address, backend=backend, device=device, name=ray_name
            )
        elif backend == "faiss":
            name = manifest.index["file"]
            mapped = manifest.files[name].bytes > _MAPPED_BYTES
            read = FaissIndex.read(folder / name, mapped=mapped, dimension=manifest.dimension, rows=manifest.rows)
            index = set_as_stored(read, manifest.index, lambda rows: table.take("features", rows))
        else:
            index = TorchIndex(lambda first, last: table.slice("features", first, last), len(table), device=device)
        pca = load_pca(folder / PCA_FILE) if PCA_FILE in manifest.files else None
        database = cls(folder, manifest, table, index, pca, backend, device)
        database._held = held
        return database

    def add(
        self, features: Tensor, posteriors: Tensor, ids: Sequence[str], labels: Sequence[int] | Tensor | Array
    ) -> None:
        """Append M rows to the finished database: new shards, an index that has taken them up, then a new manifest.

        Interrupted at any moment, the folder opens as it was before, or with all of the rows; others that have it open
        keep what they opened. The index is not trained again, and the guard's distances go. ``features`` M x d,
        ``posteriors`` M x C, M ``ids`` and M ``labels`` are those of :meth:`DatabaseWriter.add`; none change nothing.

        Raises:
            InputError: also an id that a row has already, or that comes twice.
            DatabaseError: also where the folder was changed since this database was opened.
        """
        self._whole("added to")
        with changing(self.path, self.manifest) as manifest:
            add_rows(self.path, manifest, features, posteriors, ids, labels)
        self._reopen()

    def remove(self, ids: Sequence[str]) -> int:
        """Take the rows of images out of the finished database, by their ids.

        The rows after them move up, so that row numbers change, while the ids of all others stay. Others that have the
        database open keep what they opened. Interrupted at any moment, the folder opens as it was, or without the rows.

        Returns:
            How many rows were removed.

        Raises:
            InputError: an id that no row has, or fewer rows left than the rule needs; nothing is removed then.
            DatabaseError: the folder cannot be written, or was changed since this database was opened.
        """
        self._whole("cut down")
        with changing(self.path, self.manifest) as manifest:
            left = remove_rows(self.path, manifest, rows_of([self.path / name for name in manifest.shards], ids)).rows
        self._reopen()
        return manifest.rows - left

    def _reopen(self) -> None:
        now = ImageDatabase.open(self.path, verify=False, backend=self._backend, device=self._device, **self._held)
        self.manifest, self._table, self._index = now.manifest, now._table, now._index

    def hold_rows(self, max_bytes: int) -> bool:
        """Copy the rows into memory, where they have ``max_bytes`` at most; whether they had.

        Rows are otherwise mapped: a program that overwrites a file in place, rather than replacing it, would change
        what is read here, and one that truncates it would end this process.
        """
        fits = self._table.nbytes <= max_bytes
        if fits:
            self._table.hold()
        return fits

    def __len__(self) -> int:
        return self.manifest.rows if self._selection is None else len(self._selection)

    @property
    def dimension(self) -> int:
        """d, the length of a feature vector."""
        return self.manifest.dimension

    @property
    def classes(self) -> tuple[str, ...]:
        """The classifier's class names."""
        return self.manifest.classes

    @property
    def feature(self) -> FeatureSpec:
        """How the feature vectors are made."""
        return FeatureSpec(**self.manifest.feature)

    @property
    def sharded(self) -> ShardedIndex | None:
        """The parts of the index in Ray actors, or None where the index is in this process."""
        return self._index if isinstance(self._index, ShardedIndex) else None

    @property
    def exact(self) -> bool:
        """Whether a search finds the nearest rows for certain, and not only most of them."""
        made_exact = self.manifest.index["factory"] == "Flat" or self._selection is not None
        return made_exact or not isinstance(self._index, FaissIndex)

    @property
    def fingerprint(self) -> str:
        """Identifies the contents: equal for databases of the same bytes (and for each part of them alike)."""
        return self.manifest.fingerprint

    def check_classifier(self, classifier: Classifier) -> None:
        """Raise :class:`DatabaseError` unless the database was made with this classifier and has its class names."""
        check_classifier(self.path, self.manifest, classifier)

    @outside_inference_mode
    def extractor(self, classifier: Classifier) -> FeatureExtractor:
        """The module that turns images into vectors that can be searched for here.

        Raises:
            DatabaseError: the database was made with another classifier.
        """
        classifier = unwrapped(classifier)
        self.check_classifier(classifier)
        example = torch.full((2, *classifier.input_shape), 0.5, device=classifier.device)
        # A copy: the extractor moves with its classifier, and other extractors stay where they are.
        return FeatureExtractor(classifier, self.feature, copy.deepcopy(self.pca), example).to(classifier.device)

    # -- searching and reading ----------------------------------------------------------------------------------

    def search(self, vectors: Tensor | Array, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows of each vector.

        Args:
            vectors: N x d.
            k: 1 to the number of rows.

        Returns:
            Euclidean distances N x k (float32), nearest first, and row numbers N x k (int64).

        Raises:
            InputError: k or the vectors' shape do not fit, or a vector is not finite.
            DatabaseError: an approximate index found fewer than k rows.
        """
        queries = np.asarray(vectors.detach().cpu() if isinstance(vectors, Tensor) else vectors, dtype=np.float32)
        if not 1 <= k <= len(self):
            raise InputError(f"k is {k}, but must be from 1 to the database's {len(self):,} rows: lower k")
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise InputError(f"vectors have shape {queries.shape}, but this database needs N x {self.dimension}")
        if not np.isfinite(queries).all():
            raise InputError("the feature vectors hold NaN or infinite values: check the images and the classifier")
        distances, rows = self._index.search(queries, k)
        if (rows < 0).any():
            raise DatabaseError(
                f"the index {self.manifest.index['factory']!r} found fewer than {k} rows for a query: "
                "lower k or use an exact index (Flat)"
            )
        if self._selection is not None:
            rows = self._selection[rows]
        return torch.from_numpy(distances), torch.from_numpy(rows)

    def posteriors(self, rows: Tensor | Array) -> Tensor:
        """The classifier's posteriors of rows, of any shape: ``rows.shape`` x C, float32."""
        return torch.from_numpy(self._table.take("posteriors", np.asarray(rows)))

    def features(self, rows: Tensor | Array) -> Tensor:
        """The feature vectors of rows, of any shape: ``rows.shape`` x d, float32."""
        return torch.from_numpy(self._table.take("features", np.asarray(rows)))

    @property
    def row_numbers(self) -> Array:
        """The numbers of the rows that a search can find, ascending: all of them, or those of a subset."""
        return np.arange(len(self), dtype=np.int64) if self._selection is None else self._selection

    def weights(
        self, rows: Tensor | Array, weighting: str, *, power: float = CBW_D_POWER, terms: int = CBW_D_TERMS
    ) -> Tensor:
        """The weights of rows, of any shape, by a ``weighting``, for other ``power`` or ``terms`` computed anew."""
        default = power == CBW_D_POWER and min(terms, len(self.classes) - 1) == min(CBW_D_TERMS, len(self.classes) - 1)
        if weighting == "cbw-e" or (weighting == "cbw-d" and default):
            return torch.from_numpy(self._table.take(weighting.replace("-", "_"), np.asarray(rows)))
        return neighbor_weights(self.posteriors(rows), weighting, power=power, terms=terms)

    def ids(self, rows: Tensor | Array) -> list[str]:
        """The ids of rows, as one flat list."""
        names = self._table.take("ids", np.asarray(rows)).ravel()
        return [bytes(name).decode("utf-8", "surrogateescape") for name in names]

    def labels(self, rows: Tensor | Array) -> Tensor:
        """The labels of rows, of any shape; -1 where unknown."""
        return torch.from_numpy(self._table.take("labels", np.asarray(rows)))

    def subset(self, rows: Array) -> ImageDatabase:
        """The same database with only these rows to be found, searched exactly; row numbers stay what they are.

        The chosen features are held in memory; nothing is written.

        Raises:
            InputError: there are no rows, or numbers that the database does not have.
        """
        self._whole("cut down")
        selection = np.unique(np.asarray(rows, dtype=np.int64))
        if not len(selection) or selection[0] < 0 or selection[-1] >= len(self):
            raise InputError(f"a subset needs row numbers from 0 to {len(self) - 1}")
        features = self._table.take("features", selection)
        index: Index = (
            build_index("Flat", self.dimension, features[:0], [features])
            if self._backend == "faiss"
            else TorchIndex(lambda first, last: features[first:last], len(features), device=self._device)
        )
        part = ImageDatabase(self.path, self.manifest, self._table, index, self.pca, self._backend, self._device)
        part._selection = selection
        return part

    def verify(self) -> dict[str, Any]:
        """Check everything that the manifest promises: checksums, row counts, unique ids, an index of every row.

        Returns:
            ``rows``, ``files`` and ``index_rows`` as found.

        Raises:
            DatabaseError: naming what is wrong and what to do.
        """
        self._whole("verified")
        self.manifest.check_files(self.path, checksums=True)
        twice = repeated_ids([self.path / name for name in self.manifest.shards])
        if len(twice):
            raise DatabaseError(
                f"{self.path} holds {len(twice):,} ids twice, such as {self.ids(twice[:1])[0]!r}: give the images "
                "different ids, and build it again"
            )
        held = len(self)
        if isinstance(self._index, FaissIndex):
            numbers = self._index.held_rows()
            held = len(numbers)
            if held == len(self) and not np.array_equal(numbers, np.arange(held)):
                raise DatabaseError(f"the index of {self.path} holds rows twice and lacks others: build it again")
        elif isinstance(self._index, ShardedIndex):
            held = self._index.check()
        if held != len(self):
            raise DatabaseError(f"the index of {self.path} holds {held:,} of {len(self):,} rows: build it again")
        return {"rows": len(self), "files": len(self.manifest.files), "index_rows": held}

    def _whole(self, verb: str) -> None:
        if self._selection is not None:
            raise InputError(f"a subset of a database cannot be {verb}: use the whole one")


def check_classifier(folder: Path, manifest: Manifest, classifier: Classifier) -> None:
    """Raise :class:`DatabaseError` unless the database of this folder and manifest was made with this classifier."""
    classifier = unwrapped(classifier)
    made, given = manifest.classifier["fingerprint"], classifier.fingerprint
    if not made:
        raise DatabaseError(imported(folder))
    if made != given:
        raise DatabaseError(
            f"{folder} was made with another classifier ({manifest.classifier['source']}, {made[:12]}) than this one "
            f"({classifier.source}, {given[:12]}): load that classifier, or build a database for this one"
        )
    if manifest.classes != classifier.classes:
        pairs = zip_longest(manifest.classes, classifier.classes)
        place, (kept, named) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
        raise DatabaseError(
            f"{folder} has other classes than the classifier ({len(manifest.classes):,} and "
            f"{len(classifier.classes):,}; number {place} is {kept!r} in the one and {named!r} in the other): "
            "give the names that it was built with by --classes, or build a database for this one"
        )
