"""The job that labels a pool: part by part, so that a run that was killed goes on where it stood."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.bars import progress_bar
from nndefense.database.near_images import NearSearch
from nndefense.datasets import ImageDataset
from nndefense.datasets.base import pool_identity
from nndefense.errors import DataError, InputError
from nndefense.files import make_folder, read_json, write_json, write_part
from nndefense.images import check_images, shape_text
from nndefense.locks import writes
from nndefense.parts import sweep
from nndefense.training.labellers import Guess, Labeller
from nndefense.training.pools import without_labels
from nndefense.training.pseudo_file import encode_ids, write_file
from nndefense.training.pseudo_labels import PseudoLabels

Array = NDArray[Any]
_PART_IMAGES = 4096
_JOB = "job.json"
_PARTS = "part-*.npz"


@writes("out", file=True)
def write_pseudo_labels(
    labeller: Labeller,
    pool: ImageDataset,
    out: str | Path,
    *,
    exclude: NearSearch | None = None,
    batch_size: int = 128,
    part_images: int = _PART_IMAGES,
    overwrite: bool = False,
    progress: bool = True,
) -> PseudoLabels:
    """Label every image of a pool, and mark those near to a test set; the pool's own labels are dropped first.

    Finished parts are kept in ``OUT.parts`` until ``OUT`` is there. A run that was killed goes on after the last of
    them, and gives the same file as one that was not; where the same job is finished already, its file is opened.
    Memory holds a batch, the results of one part and, where it fits, the test set.

    Args:
        labeller: :class:`~nndefense.training.labellers.Teacher`, ``Retrieval`` or ``Combined``.
        pool: n images of the shape that the labeller's classifier takes.
        out: the HDF5 file.
        exclude: the search for images near to a test set.
        batch_size: images at a time.
        part_images: images of a part, rounded up to whole batches.
        overwrite: replace another job's file and parts.
        progress: show a bar.

    Returns:
        The pseudo-labels of all n images, opened.

    Raises:
        DataError: the pool is empty, an image cannot be read, or the disk is full.
        InputError: the images do not fit the classifier, or ``out`` holds another job.
        ModelError: the teacher gives NaN.
    """
    out = Path(out).expanduser()
    if batch_size < 1 or part_images < 1:
        raise InputError("labelling needs a batch size and a part of at least 1 image")
    if not len(pool):
        raise DataError(f"{pool.name} has no images to label: name another pool")
    classifier = labeller.classifier
    try:
        classifier.check_shape((1, *pool.shape))
    except InputError as error:
        raise InputError(f"{pool.name} does not fit the teacher: {error}") from None
    if exclude is not None and exclude.references.shape != pool.shape:
        raise InputError(
            f"the pool's images are {shape_text(pool.shape)}, but those of {exclude.references.name} "
            f"{shape_text(exclude.references.shape)}: open both in one size and number of channels"
        )
    pool = without_labels(pool.usable)
    job = {
        "labeller": labeller.as_dict(),
        "pool": pool_identity(pool),
        "exclude": exclude.as_dict() if exclude is not None else None,
        "batch_size": batch_size,
    }
    parts = _Parts(out, -(-part_images // batch_size) * batch_size, len(pool))
    if not overwrite and out.exists():
        _check_same(PseudoLabels.open(out).job, job, out)
        parts.clear()
        return PseudoLabels.open(out)
    parts.begin(job, overwrite=overwrite)
    with progress_bar(total=len(pool), desc="labelling", unit=" images", shown=progress) as bar:
        for number in range(parts.count):
            rows = parts.rows(number)
            if not parts.holds(number):
                done = []
                for first in range(0, len(rows), batch_size):
                    done.append(_label(labeller, pool, rows[first : first + batch_size], exclude))
                    bar.update(len(done[-1]["rows"]))
                parts.save(number, {name: np.concatenate([batch[name] for batch in done]) for name in done[0]})
            else:
                bar.update(len(rows))
    class_ids = classifier.class_ids
    write_file(out, len(pool), parts.read, classifier.classes, class_ids, job)
    parts.clear()
    return PseudoLabels.open(out)


def _label(
    labeller: Labeller, pool: ImageDataset, rows: NDArray[np.int64], exclude: NearSearch | None
) -> dict[str, Array]:
    images, _ = pool.batch(rows)
    check_images(images, name=f"images of {pool.name}")
    ids = pool.ids.take(rows)
    guess: Guess = labeller(images, ids)
    near = exclude(images) if exclude is not None else None
    columns = {
        "rows": rows,
        "ids": encode_ids(ids),
        "label": guess.labels.numpy().astype(np.int64),
        "confidence": guess.confidence.numpy().astype(np.float32),
        "near_row": (near.rows if near else torch.full((len(rows),), -1)).numpy().astype(np.int64),
        "near_distance": (near.distances if near else torch.full((len(rows),), torch.inf)).numpy().astype(np.float64),
    }
    for name, (labels, confidence) in guess.parts.items():
        columns[f"{name}_label"] = labels.numpy().astype(np.int64)
        columns[f"{name}_confidence"] = confidence.numpy().astype(np.float32)
    return columns


class _Parts:
    """The finished parts of a job, in the folder ``OUT.parts``."""

    def __init__(self, out: Path, images: int, total: int) -> None:
        self.folder, self.images, self.total = out.with_name(f"{out.name}.parts"), images, total
        self.count = -(-total // images)

    def rows(self, number: int) -> NDArray[np.int64]:
        """The pool's rows of a part."""
        return np.arange(number * self.images, min((number + 1) * self.images, self.total), dtype=np.int64)

    def begin(self, job: dict[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or go on with it where it holds parts of this job."""
        job = {**job, "part_images": self.images}
        make_folder(self.folder)
        sweep(self.folder)
        begun = read_json(self.folder / _JOB) if (self.folder / _JOB).exists() else None
        # A job that was refused before its first part was finished keeps no other one out.
        if begun is not None and not overwrite and any(self.folder.glob(_PARTS)):
            _check_same(begun, job, self.folder)
        elif begun != job:
            self.clear()
            make_folder(self.folder)
            write_json(self.folder / _JOB, job)

    def holds(self, number: int) -> bool:
        """Whether a part is there and whole."""
        try:
            return bool(np.array_equal(self._load(number)["rows"], self.rows(number)))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def save(self, number: int, columns: dict[str, Array]) -> None:
        """Keep a part."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **columns)
        write_part(self._path(number), buffer.getbuffer())

    def read(self) -> Iterator[dict[str, Array]]:
        """All parts in order."""
        for number in range(self.count):
            yield self._load(number)

    def clear(self) -> None:
        """Remove the parts, the description last, and nothing else."""
        sweep(self.folder)
        for pattern in (_PARTS, _JOB):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / _PARTS.replace("*", f"{number:06d}")

    def _load(self, number: int) -> dict[str, Array]:
        with np.load(self._path(number), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}


def _check_same(old: Any, new: dict[str, Any], place: Path) -> None:
    """Raise :class:`InputError` that names in what a job differs from the one that was begun; names may differ."""
    what = {"labeller": "labeller", "pool": "pool", "exclude": "test set", "batch_size": "batch size"}
    what["part_images"] = "size of parts"
    changed = [text for key, text in what.items() if key in new and _plain(old.get(key)) != _plain(new[key])]
    if changed:
        raise InputError(
            f"{place} belongs to a job with another {' and another '.join(changed)}: finish that one, choose another "
            "file, or replace it with --overwrite of nndefense pseudo-label write"
        )


def _plain(value: Any) -> Any:
    """A description as JSON gives it back, without the paths that things were opened by."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key not in ("name", "source")}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return json.loads(json.dumps(value))
