"""Merge: parts -> one index, then the manifest, which makes the folder a database."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

from index_build import pieces
from index_build.add import fill, part_name, parts_of, standing
from index_build.extract import read_extracted
from index_build.fit import TRAINED
from index_build.job import NAME, BuildJob, key_of
from nndefense.database.index import FaissIndex
from nndefense.database.manifest import NAME as MANIFEST
from nndefense.database.manifest import FileEntry, Manifest
from nndefense.database.merging import merge_parts
from nndefense.database.writer import PCA_FILE, store, writing
from nndefense.errors import DatabaseError
from nndefense.versions import library_versions

INDEX = "index.faiss"


def merge(folder: Path) -> Manifest:
    """Put the parts together, and write the manifest of the finished database.

    Args:
        folder: the build's folder.

    Returns:
        The manifest; where there is one already, nothing is done.

    Raises:
        InputError: an index that cannot be put together within the memory that was given.
        DatabaseError: no unfinished build, missing rows, index or parts, or a disk that cannot be written.
    """
    job = BuildJob.read(folder)
    done = sealed(folder, job)
    if done is not None:
        return done
    found, trained = read_extracted(folder), standing(folder)
    files = dict(found.files)
    if job.targets[0].pca:
        files[PCA_FILE] = FileEntry.of(folder / PCA_FILE)
    for path in _index_files(folder, job, trained.mergeable):
        files[path.name] = FileEntry.of(path)
    index: dict[str, Any] = {"factory": trained.factory, "metric": "l2", "file": INDEX}
    if trained.why:
        index["why"] = trained.why
    settings = job.settings(job.targets[0])
    manifest = Manifest(
        rows=found.rows,
        dimension=job.targets[0].dimension,
        classes=job.classes,
        feature=job.targets[0].feature.to_json(),
        classifier=job.classifier,
        data=job.data,
        index=index,
        files=files,
        versions=library_versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        storage=job.storage(),
        rejected=found.rejected,
        build={
            **asdict(job.options),
            "job": key_of(settings),
            "images": job.images,
            "shard_rows": job.shard_rows,
            "precision": job.precision,
            "excluded": job.excluded,
        },
    )
    with writing(folder):
        manifest.write(folder)
    return manifest


def sealed(folder: Path, job: BuildJob) -> Manifest | None:
    """The manifest that this job has written, if it has.

    Raises:
        DatabaseError: there is one that cannot be read.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(folder)
    return manifest if manifest.build.get("job") == key_of(job.settings(job.targets[0])) else None


def tidy(folder: Path) -> None:
    """Remove what only the unfinished build needed; the job goes last, and with it the build is finished."""
    for path in [*folder.glob("index-part-*.faiss"), folder / TRAINED]:
        pieces.discard(path)
    for path in folder.glob("index-part-*.faiss.json"):
        path.unlink(missing_ok=True)
    for path in [*folder.glob("rows-*.h5.json"), *folder.glob(f"{PCA_FILE}.json")]:
        pieces.forget(path.with_name(path.name.removesuffix(".json")))
    (folder / "extracted.json").unlink(missing_ok=True)
    (folder / NAME).unlink(missing_ok=True)


def _index_files(folder: Path, job: BuildJob, mergeable: bool) -> list[Path]:
    if mergeable:
        names = [part_name(number) for number in range(len(parts_of(folder)))]
        trained = standing(folder)
        for name in names:
            piece = pieces.finished(folder / name)
            if piece is None or piece.notes.get("inputs") != trained.inputs:
                raise DatabaseError(f"{folder / name} is missing or not of these rows: run 'nndefense index add' first")
        with writing(folder):
            return merge_parts([folder / name for name in names], folder / INDEX, memory=job.options.memory)
    index = FaissIndex.read(folder / TRAINED)
    fill(index, [folder / name for name, entry in read_extracted(folder).files.items() if entry.rows], 0)
    store(folder / INDEX, index.write)
    return [folder / INDEX]
