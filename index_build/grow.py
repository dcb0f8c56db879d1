"""Growing: more images become rows of a finished database, without building it again.

They are extracted in a folder within the database's as any build extracts them, so that a run that was killed goes on;
then their shards are linked beside the others, and the index takes them up.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_build import pieces
from index_build.begin import excluded_by
from index_build.extract import (
    DUPLICATE,
    Extracted,
    check_ids,
    drop_duplicates,
    extract,
    rejection_limit,
    tally,
    write_rejections,
    write_rows,
)
from index_build.job import (
    NAME,
    BuildJob,
    BuildTarget,
    Options,
    check_same,
    identity_of,
    key_of,
    settings_of,
    shard_size,
)
from index_build.mapper import ShardTools, tell_unplaced
from index_build.runner import building
from nndefense.database.database import check_classifier
from nndefense.database.faiss_tools import check_device
from nndefense.database.growing import (
    add_shards,
    changing,
    compact,
    copied,
    drop_grown,
    next_number,
    remove_rows,
    take_over,
    with_change,
)
from nndefense.database.manifest import REBUILD, FileEntry, Manifest
from nndefense.database.mapped_shards import DIGEST
from nndefense.database.repeats import id_text, known_rows, rows_of
from nndefense.database.rows import StoredRows
from nndefense.database.tuning import measure
from nndefense.database.writer import GROWING, PCA_FILE, clear, made_by, shard_name, writing
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.features import FeatureSpec
from nndefense.memory import reused_memory
from nndefense.models import Classifier
from nndefense.unwrapping import unwrapped

Rows = NDArray[np.int64]
_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Grown:
    """What became of a database to which images were added.

    Attributes:
        rows: how many it has now.
        added: how many of them are new.
        rejected: how many of the images that were given are in no new row, by kind.
        manifest: its manifest.
    """

    rows: int
    added: int
    rejected: dict[str, int]
    manifest: Manifest


@reused_memory()
def grow_database(
    dataset: ImageDataset,
    classifier: Classifier,
    folder: str | Path,
    *,
    specs: Sequence[str] = (),
    exclude: ImageDataset | None = None,
    exclude_eps: float | None = None,
    max_rejected: int | str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Grown:
    """Add images to a finished database: the rows that a build of all of them would have, after those that are there.

    Layer, pooling, PCA, storage, precision, noise and rule are those of the database, and its index takes the rows up
    as it is trained. Killed at any moment, the folder opens as it was, or with all new rows, and the same call goes on.
    Images that are in already (the same id and pixels; with ``dedupe``, as the database was built, the same pixels)
    are left out as duplicates.

    Args:
        dataset: the images.
        classifier: the one that the database was made with.
        folder: the database's.
        batch_size: None: as the database was built, else 128.
        overwrite: begin anew where other images were being added and that is not finished.
        specs, exclude, exclude_eps, max_rejected, workers, progress: as for
            :func:`~index_build.runner.build_databases`.

    Raises:
        DataError: an empty data set, a source that vanished, too many images that cannot be read, or an image with the
            id of a row of other pixels.
        InputError: a setting or image that does not fit.
        DatabaseError: no finished database, one of another classifier, other images that are being added to it, or a
            disk that cannot be written.
    """
    folder, classifier = Path(folder).expanduser(), unwrapped(classifier)
    if not len(dataset):
        raise DataError(f"the data set {dataset.name} is empty: there is nothing to add")
    rejection_limit(max_rejected, len(dataset))
    check_classifier(folder, Manifest.read(folder), classifier)
    place = folder / GROWING
    with changing(folder) as manifest:
        check_classifier(folder, manifest, classifier)
        excluded = excluded_by(exclude, exclude_eps)
        job = _job(folder, manifest, dataset, classifier, specs, excluded, batch_size)
        with building([place]):
            job = _begun(job, folder, manifest, overwrite)
            last = manifest.data.get("changes", [{}])[-1]
            if last.get("job") == job.reopen["token"]:
                # Killed when all was done but to remove the folder.
                found = Extracted(last["added"], last["rejected"], {})
            else:
                tell_unplaced(dataset, classifier)
                tools = ShardTools.of(job, dataset, classifier, exclude, workers=workers)
                close = partial(_without_known, folder=folder, manifest=manifest)
                (found,) = extract(job, tools, max_rejected=max_rejected, close=close, progress=progress)
                if found.rows:
                    manifest = _join(folder, manifest, job, found)
        shutil.rmtree(place, ignore_errors=True)
    return Grown(manifest.rows, found.rows, found.rejected, manifest)


def _job(
    folder: Path,
    manifest: Manifest,
    dataset: ImageDataset,
    classifier: Classifier,
    specs: Sequence[str],
    excluded: dict[str, Any] | None,
    batch_size: int | None,
) -> BuildJob:
    """The job that extracts images as those of a database were extracted."""
    built, names = manifest.build, {field.name for field in fields(Options)}
    as_stored = {"storage": "float16" if manifest.half else "float32"}
    as_stored["posteriors"] = f"top-{manifest.top}" if manifest.top else "dense"
    choice = built.get("precision") or {"precision": "float32", "channels_last": False}
    options = Options(
        **{name: value for name, value in built.items() if name in names}
        | as_stored
        | {"precision": choice["precision"]}
        | ({} if batch_size is None else {"batch_size": batch_size})
    )
    if options.dedupe and not StoredRows([folder / name for name in manifest.shards]).digests:
        raise InputError(
            f"{folder} was built without duplicates, but rows that came without images cannot be compared with new "
            "ones: remove those first, or build the database again"
        )
    feature, dimension = FeatureSpec(**manifest.feature), manifest.dimension
    data, made = identity_of(dataset, specs), made_by(classifier)
    settings = settings_of(data, made, feature, options, excluded, None)
    token = hashlib.sha256(f"{key_of(settings)} {manifest.fingerprint}".encode()).hexdigest()
    return BuildJob(
        targets=(BuildTarget(folder / GROWING, feature, dimension, PCA_FILE in manifest.files),),
        options=options,
        images=len(dataset),
        data=data,
        classes=tuple(classifier.classes),
        classifier=made,
        excluded=excluded,
        shard_rows=built.get("shard_rows") or shard_size(options, [dimension], len(classifier.classes)),
        top=manifest.top,
        precision=choice,
        reopen={"token": token},
        before=built.get("images", manifest.rows),
    )


def _begun(job: BuildJob, folder: Path, manifest: Manifest, overwrite: bool) -> BuildJob:
    """The job as it was begun before, or else as it is written down now."""
    (target,) = job.targets
    if (target.folder / NAME).exists():
        try:
            check_same(target.folder, job.settings(target))
            return BuildJob.read(target.folder)
        except DatabaseError:
            drop_grown(folder, manifest)
            if (target.folder / NAME).exists() and not overwrite:
                raise
    with writing(target.folder):
        target.folder.mkdir(exist_ok=True)
        clear(target.folder)
    if target.pca:
        manifest.files[PCA_FILE].check(folder / PCA_FILE, REBUILD)
        pieces.finish(target.folder / PCA_FILE, partial(copied, folder / PCA_FILE))
    job.write()
    return job


def _without_known(job: BuildJob, target: BuildTarget, *, folder: Path, manifest: Manifest) -> Extracted:
    """Close the extraction: what is in the database already is dropped, as duplicates are."""
    paths, old = job.paths(target), [folder / name for name in manifest.shards]
    drop_duplicates(job, paths)
    for column in ("ids", DIGEST) if job.options.dedupe else ("ids",):
        new = pieces.with_rows(paths)
        with writing(target.folder):
            rows, firsts = known_rows(old, new, column, target.folder) if new else (_NONE, _NONE)
        if len(rows):
            names = StoredRows(old).take("ids", firsts)
            if column == "ids":
                _check_pixels(folder, old, new, rows, firsts)
            reasons = [f"{id_text(name)} is in the database already" for name in names]
            pieces.drop(new, rows, reasons, lambda path, held, rejected: write_rows(path, held, job, rejected))
    found = tally(paths)
    if not found.rows and DUPLICATE not in found.rejected:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.rejected.items())
        raise DataError(f"none of the {job.images:,} images of {job.data['name']} can be used: {kinds}")
    if found.rows:
        check_ids([target.folder / name for name in found.files])
    return found


def _check_pixels(folder: Path, old: Sequence[Path], new: Sequence[Path], rows: Rows, firsts: Rows) -> None:
    """Make sure that images with the ids of rows have their pixels, too.

    Raises:
        DataError: one has not, or that cannot be told.
    """
    before, now = StoredRows(old), StoredRows(new)
    if before.digests:
        other = (now.take(DIGEST, rows) != before.take(DIGEST, firsts)).any(1)
    else:
        other = np.ones(len(rows), dtype=np.bool_)
    if other.any():
        name = id_text(now.take("ids", rows[other][:1])[0])
        what = "with other pixels" if before.digests else "whose pixels are not known"
        raise DataError(
            f"{int(other.sum()):,} images have the id of a row of {folder} {what}, such as {name!r}: remove those rows "
            "first ('nndefense index remove'), or give images with other ids"
        )


def _join(folder: Path, manifest: Manifest, job: BuildJob, found: Extracted) -> Manifest:
    """Let the extracted shards stand beside those of the database, and be its rows."""
    (target,), number = job.targets, next_number(manifest)
    added: dict[str, FileEntry] = {}
    for place, (name, entry) in enumerate(found.files.items(), number):
        take_over(target.folder / name, folder / shard_name(place))
        added[shard_name(place)] = entry
    change = {name: job.data[name] for name in ("name", "fingerprint", "specs")}
    data = with_change(
        manifest, added=found.rows, **change, images=job.images, rejected=found.rejected, job=job.reopen["token"]
    )
    kinds = {*manifest.rejected, *found.rejected}
    counts = {kind: manifest.rejected.get(kind, 0) + found.rejected.get(kind, 0) for kind in sorted(kinds)}
    built = {**manifest.build, "images": job.before + job.images} if manifest.build else {}
    files = write_rejections(folder / f"rejected-{number:05d}.jsonl", job.paths(target))
    return add_shards(folder, manifest, added, data=data, rejected=counts, build=built, files=files)


def remove_images(folder: str | Path, ids: Sequence[str]) -> Manifest:
    """Take the rows of images out of the database in ``folder``, by their ids; see
    :meth:`nndefense.database.ImageDatabase.remove`.
    """
    folder = Path(folder).expanduser()
    with changing(folder) as manifest:
        drop_grown(folder, manifest)
        return remove_rows(folder, manifest, rows_of([folder / name for name in manifest.shards], ids))


def compact_database(
    folder: str | Path, *, index: str | None = None, memory: int | None = None, device: str = "cpu"
) -> Manifest:
    """Join small shards, remove files that changes have replaced, and train another index where that is asked for.

    ``folder``, ``memory`` and ``device`` as for :func:`~nndefense.database.growing.compact`. A new index is measured
    for the recall that the database was built for.

    Raises:
        InputError, DatabaseError: as that does.
    """
    folder = Path(folder).expanduser()
    check_device(device)
    with changing(folder) as manifest:
        drop_grown(folder, manifest)
        made = compact(folder, manifest, index=index, memory=memory, device=device)
        if index is not None and made.rows > 1:
            search, built = manifest.index.get("search", {}), manifest.build
            recall = search.get("wanted", built.get("recall", Options.recall))
            k = search.get("k", built.get("k", Options.k))
            measure(folder, recall=recall, k=k, seed=built.get("seed", 0))
        return Manifest.read(folder)
