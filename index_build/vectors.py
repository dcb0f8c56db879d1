"""Vectors that exist already: embeddings in files of other programs become a database, and its rows such files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.database import DatabaseWriter, ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.datasets.labels import LABEL_NAMES, read_labels
from nndefense.datasets.vectors import matrix_pieces, numbered_files, read_table
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.features import FeatureExtractor, FeatureSpec
from nndefense.files import make_folder, sha256_of, write_atomically
from nndefense.locks import locked
from nndefense.models import Classifier

Vectors = NDArray[np.float32]
ID_NAMES = ("id", "key", "image_path", "url")
"""What a column of ids is called in metadata; the first that is there is taken."""
_PROBES = 64
_FILE_ROWS, _FILE_BYTES = 1 << 20, 256 << 20


def import_vectors(
    vectors: Path,
    out: Path,
    *,
    metadata: Path | None = None,
    posteriors: Path | None = None,
    column: str = "embedding",
    id_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] = (),
    classifier: Classifier | None = None,
    feature: FeatureSpec | None = None,
    images: ImageDataset | None = None,
    index: str = "Flat",
    overwrite: bool = False,
) -> ImageDatabase:
    """Make a database of vectors that somebody else has computed.

    Without a classifier it can be described, verified, searched by vectors, changed and exported, and nothing else: to
    search by an image, a net must be known that makes the same vectors. With one, images of some of the rows are looked
    at, and the vectors must be those that its layer gives.

    Args:
        vectors: N x d: a ``.npy``, HDF5 or Parquet file, or a folder of them, in the order of their numbers.
        out: the database's folder.
        metadata: Parquet files, likewise, with a row for each vector: its id and label. None: of Parquet vectors they
            themselves; else ids are numbers, and no label is known.
        posteriors: N x C in files of the same kinds. None: from the labels, certain of the class; of a row without
            a label, all classes are as likely.
        column: the vectors' in HDF5 and Parquet, also of the posteriors.
        id_column, label_column: of the metadata; None: the first of the usual names.
        classes: the names of the C classes; None: of the classifier, else as the labels say.
        classifier: that makes such vectors.
        feature: the layer and pooling that does; without a PCA.
        images: of some of the rows, by their ids.
        index: FAISS's factory string.
        overwrite: replace a finished database.

    Raises:
        DataError: files that cannot be read or do not belong together, or images whose vectors are others.
        InputError: a classifier without a layer or images, or vectors that are no rows.
        DatabaseError: a folder that holds a database, or cannot be written.
    """
    if (classifier is None) != (feature is None) or (classifier is None) != (images is None):
        raise InputError(
            "a classifier is taken together with its layer and images to compare: give all, or none of them"
        )
    found, others = numbered_files(vectors), numbered_files(posteriors) if posteriors else []
    tables = (
        numbered_files(metadata, (".parquet",)) if metadata else [path for path in found if path.suffix == ".parquet"]
    )
    ids, labels = _described(tables, id_column, label_column)
    names = tuple(classes) or (tuple(classifier.classes) if classifier else ())
    numbers, names = _numbered(labels, names)
    if classifier is not None and names != classifier.classes:
        raise InputError(
            f"the classifier has {len(classifier.classes):,} classes, but {len(names):,} were given: give its"
        )
    if not names and not others:
        raise InputError("nothing says which classes there are: give labels (--metadata) or posteriors (--posteriors)")
    if classifier is not None and feature is not None and images is not None:
        _compare(found, column, ids, classifier, feature, images)
    print_of = hashlib.sha256("".join(map(sha256_of, [*found, *others, *tables])).encode()).hexdigest()
    with locked(out, error=DatabaseError):
        writer: DatabaseWriter | None = None
        taken = 0
        for features, given in _together(
            matrix_pieces(found, column), matrix_pieces(others, column) if others else None
        ):
            last = taken + len(features)
            if tables and last > len(ids):
                raise DataError(
                    f"{tables[0]} and the like describe {len(ids):,} rows, but there are more vectors: {_PAIR}"
                )
            if given is None:
                some = _from_labels(numbers[taken:last], len(names))
            else:
                some = given
                names = names or tuple(map(str, range(given.shape[1])))
            if writer is None:
                writer = DatabaseWriter(
                    out, classifier=classifier, classes=names, feature=feature or FeatureSpec("imported", pca=0),
                    data={"name": str(vectors), "fingerprint": print_of, "specs": []}, index=index, overwrite=overwrite,
                )  # fmt: skip
            called = ids[taken:last] if tables else [str(row) for row in range(taken, last)]
            known = numbers[taken:last] if tables else np.full(len(features), -1)
            writer.add(torch.from_numpy(features), torch.from_numpy(some), called, known)
            taken = last
        if writer is None or (tables and taken != len(ids)):
            raise DataError(f"there are {taken:,} vectors, but metadata of {len(ids):,} rows: {_PAIR}")
        writer.finish()
    return ImageDatabase.open(out, verify=False)


_PAIR = "give files that were written together"


def _described(tables: Sequence[Path], id_column: str | None, label_column: str | None) -> tuple[list[str], list[Any]]:
    ids, labels = [id_column] if id_column else ID_NAMES, [label_column] if label_column else LABEL_NAMES
    found = read_table(tables, [*ids, *labels]) if tables else {}
    for asked in filter(None, (id_column, label_column)):
        if asked not in found:
            raise DataError(f"the metadata has no column {asked!r}: name one that it has")
    called = next((found[name] for name in ids if name in found), None)
    marked = next((found[name] for name in labels if name in found), None)
    rows = len(called or marked or [])
    if tables and not rows:
        raise DataError(f"{tables[0]} has no column of ids or labels: name them by --id-column and --label-column")
    if called is None:
        called = [str(row) for row in range(rows)]
    if None in called or len(set(called)) < len(called):
        raise DataError("the ids of the metadata are not there for each row, or not all different: name another column")
    return [str(name) for name in called], marked if marked is not None else [None] * rows


def _numbered(labels: Sequence[Any], names: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    meanings = read_labels(labels, names or None, "the metadata")
    texts = sorted({value for value in meanings.values() if isinstance(value, str)})
    if not names:
        most = max((value for value in meanings.values() if isinstance(value, int)), default=-1)
        names = tuple(texts) or tuple(map(str, range(most + 1)))
    places = {name: number for number, name in enumerate(names)}
    numbers = {label: places.get(value, -1) if isinstance(value, str) else value for label, value in meanings.items()}
    found = np.array([-1 if numbers[label] is None else numbers[label] for label in labels], dtype=np.int64)
    if len(found) and found.max() >= len(names):
        raise DataError(
            f"the metadata has the label {found.max():,}, but there are {len(names):,} classes: give --classes"
        )
    return found, names


def _from_labels(numbers: NDArray[np.int64], classes: int) -> Vectors:
    made = np.full((len(numbers), classes), 1 / classes, dtype=np.float32)
    made[numbers >= 0] = 0
    made[np.flatnonzero(numbers >= 0), numbers[numbers >= 0]] = 1
    return made


def _together(vectors: Iterator[Vectors], others: Iterator[Vectors] | None) -> Iterator[tuple[Vectors, Vectors | None]]:
    """Vectors with as many rows of the others, whatever pieces both come in."""
    held: Vectors | None = None
    for piece in vectors:
        if others is None:
            yield piece, None
            continue
        parts, wanted = [], len(piece)
        while wanted:
            held = held if held is not None and len(held) else next(others, None)
            if held is None:
                raise DataError(f"there are fewer posteriors than vectors: {_PAIR}")
            parts.append(held[:wanted])
            held, wanted = held[wanted:], wanted - len(parts[-1])
        yield piece, np.concatenate(parts)
    if others is not None and ((held is not None and len(held)) or next(others, None) is not None):
        raise DataError(f"there are more posteriors than vectors: {_PAIR}")


def _compare(
    paths: Sequence[Path],
    column: str,
    ids: Sequence[str],
    classifier: Classifier,
    feature: FeatureSpec,
    images: ImageDataset,
) -> None:
    """Compare the vectors of some images with those of their rows.

    Raises:
        DataError: none of the images is a row, or one has another vector.
    """
    rows = {name: row for row, name in enumerate(ids)}
    shared = [place for place, name in enumerate(images.ids) if name in rows][:_PROBES]
    if not shared:
        raise DataError(f"no image of {images.name} has the id of a row: give images that the vectors were made from")
    wanted = np.array([rows[images.ids[place]] for place in shared])
    pictures = images.batch(shared)[0].to(classifier.device)
    with torch.no_grad():
        made = FeatureExtractor(classifier.eval(), feature, None, pictures[:2])(pictures).cpu().numpy()
    first = 0
    for piece in matrix_pieces(paths, column):
        here = (wanted >= first) & (wanted < first + len(piece))
        stored = piece[wanted[here] - first]
        apart = made[here] - stored if made.shape[1] == piece.shape[1] else np.full((1, 1), np.inf)
        if (np.linalg.norm(apart, axis=1) > 0.02 * np.linalg.norm(stored, axis=1).max(initial=0) + 1e-4).any():
            raise DataError(
                f"the classifier's {feature} gives other vectors for the images of {images.name} than are imported: "
                "name the layer and pooling that made them, or leave --classifier out"
            )
        first += len(piece)


def export_vectors(database: ImageDatabase, out: Path, *, form: str = "npy") -> list[Path]:
    """Write the rows of a database for other programs, at most a million and 256 MiB to a file.

    Args:
        database: opened.
        out: the folder; made if missing.
        form: ``npy``: ``img_emb/img_emb_0.npy``, ``posteriors/posteriors_0.npy`` and, with ids and labels,
            ``metadata/metadata_0.parquet``, ... as clip-retrieval and autofaiss take them; ``parquet``:
            ``rows_0.parquet``, ... with all of that as columns.

    Returns:
        The files.

    Raises:
        InputError: files are there already, or pyarrow is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError("ids and labels are written as Parquet by pyarrow: pip install pyarrow") from error
    make_folder(out)
    written: list[Path] = []
    each = max(1, min(_FILE_ROWS, _FILE_BYTES // (4 * (database.dimension + len(database.classes)))))
    for number, first in enumerate(range(0, len(database), each)):
        rows = np.arange(first, min(first + each, len(database)))
        columns: dict[str, Any] = {"id": database.ids(rows), "label": database.labels(rows).numpy()}
        names = [f"rows_{number}.parquet"]
        if form == "npy":
            kinds = {"img_emb": "npy", "posteriors": "npy", "metadata": "parquet"}
            names = [f"{kind}/{kind}_{number}.{ending}" for kind, ending in kinds.items()]
        for name in names:
            make_folder((out / name).parent)
            if (out / name).exists():
                raise InputError(f"{out / name} is there already: choose another folder")
        if form == "npy":
            for name, values in zip(names, (database.features(rows), database.posteriors(rows)), strict=False):
                write_atomically(out / name, partial(_saved, values.numpy()))
        else:
            for name, values in (("embedding", database.features(rows)), ("posterior", database.posteriors(rows))):
                flat = arrow.array(values.numpy().ravel())
                columns[name] = arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        table = arrow.table(columns)
        write_atomically(out / names[-1], partial(parquet.write_table, table))
        written += [out / name for name in names]
    return written


def _saved(values: Vectors, part: Path) -> None:
    with part.open("wb") as file:
        np.save(file, values, allow_pickle=False)
