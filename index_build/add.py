"""Add and merge: rows -> parts of the index -> one index, then the manifest, which makes the folder a database.

A part covers fixed shards, so parts can be made by anybody.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_build import pieces
from index_build.extract import Extracted, bar, read_extracted
from index_build.fit import TRAINED, Fitted, fitted, rows_key
from index_build.job import NAME, BuildJob, key_of
from nndefense.database.faiss_tools import import_faiss
from nndefense.database.filling import fill
from nndefense.database.index import FaissIndex
from nndefense.database.manifest import CALIBRATION, FileEntry, Manifest
from nndefense.database.manifest import NAME as MANIFEST
from nndefense.database.merging import merge_parts
from nndefense.database.writer import PCA_FILE, store, writing
from nndefense.errors import DatabaseError, InputError
from nndefense.files import write_bytes
from nndefense.versions import library_versions

INDEX = "index.faiss"
PART_ROWS = 1 << 18
"""A part takes shards until it has so many rows: 256 MiB of 256 dimensions in float32."""


@dataclass(frozen=True)
class PartReport:
    """A part that was made."""

    number: int
    rows: int


Make = Callable[[Sequence[int]], Iterable[PartReport]]


def part_name(number: int) -> str:
    """The file of a part."""
    return f"index-part-{number:05d}.faiss"


def parts_of(found: Extracted, part_rows: int | None = None) -> list[list[str]]:
    """Which shards go into which part; they depend on the rows alone.

    Args:
        found: the build's rows.
        part_rows: a part takes shards until it has so many rows; ``PART_ROWS`` by default.
    """
    parts: list[list[str]] = [[]]
    held = 0
    for name, entry in found.files.items():
        if entry.rows:
            if held >= (PART_ROWS if part_rows is None else part_rows):
                parts.append([])
                held = 0
            parts[-1].append(name)
            held += entry.rows
    return parts


def make_part(
    folder: Path, number: int, *, device: str = "cpu", threads: int | None = None, part_rows: int | None = None
) -> PartReport:
    """Make one part from the trained index. Any process can call it, in any order, and again.

    Raises:
        DatabaseError: rows or trained index are missing, or the disk is full or cannot be written.
    """
    found = read_extracted(folder)
    parts, trained = parts_of(found, part_rows), standing(folder, found)
    before = sum(found.files[name].rows for part in parts[:number] for name in part)
    if threads is not None:
        # FAISS keeps the number for each thread that calls it.
        import_faiss().omp_set_num_threads(threads)
    index = FaissIndex.read(folder / TRAINED)
    rows = fill(index, [folder / name for name in parts[number]], before, device=device)
    pieces.finish(folder / part_name(number), index.write, inputs=trained.inputs)
    return PartReport(number, rows)


def standing(folder: Path, found: Extracted) -> Fitted:
    """The trained index that fits the rows that were found.

    Raises:
        DatabaseError: there is none.
    """
    inputs, trained = rows_key(BuildJob.read(folder), found), fitted(folder)
    if trained is None or trained.inputs != inputs:
        raise DatabaseError(f"the index of {folder} is not fitted on its rows: run 'nndefense index fit' first")
    return trained


def add(folder: Path, *, workers: int = 1, device: str = "cpu", make: Make | None = None, progress: bool = True) -> int:
    """Make the parts that are missing from an unfinished build.

    An index whose parts cannot be merged (HNSW) has none: ``merge`` adds all rows to it in one go.

    Args:
        folder: the build's folder.
        workers: parts made at once; each holds one in memory, and they share the processors.
        device: where to add.
        make: makes the parts of the given numbers and reports each, in any order; by default threads do.
        progress: show a bar.

    Returns:
        The number of parts.

    Raises:
        InputError: less than 1 worker.
        DatabaseError: no unfinished build, no complete rows, no fitted index, or a disk that cannot be written.
    """
    if workers < 1:
        raise InputError(f"parts of the index need at least 1 worker, not {workers}")
    found = read_extracted(folder)
    trained = standing(folder, found)
    if not trained.mergeable:
        return 0
    parts = parts_of(found)
    missing = []
    for number in range(len(parts)):
        piece = pieces.finished(folder / part_name(number), checksum=True)
        if piece is None or piece.notes.get("inputs") != trained.inputs:
            pieces.discard(folder / part_name(number))
            missing.append(number)
    done = found.rows - sum(found.files[name].rows for number in missing for name in parts[number])
    with bar(found.rows, "adding to the index", progress, done, " rows") as shown:
        for report in make(missing) if make else _in_threads(folder, missing, workers, device):
            if shown is not None:
                shown.update(report.rows)
    return len(parts)


def _in_threads(folder: Path, numbers: Sequence[int], workers: int, device: str) -> Iterator[PartReport]:
    threads = max((os.cpu_count() or 1) // workers, 1) if workers > 1 else None
    with ThreadPoolExecutor(max_workers=workers) as pool:
        yield from pool.map(lambda number: make_part(folder, number, device=device, threads=threads), numbers)


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
    settings = job.settings(job.targets[0])
    done = sealed(folder, settings)
    if done is not None:
        return done
    found = read_extracted(folder)
    trained = standing(folder, found)
    files = dict(found.files)
    if job.targets[0].pca:
        pca = pieces.finished(folder / PCA_FILE, checksum=True)
        if pca is None:
            raise DatabaseError(
                f"{folder / PCA_FILE} is missing or damaged: begin again with 'nndefense index build --overwrite'"
            )
        files[PCA_FILE] = pca.entry
    for path in _index_files(folder, job, found, trained):
        files[path.name] = FileEntry.of(path)
    index: dict[str, Any] = {"factory": trained.factory, "metric": "l2", "file": INDEX}
    if trained.why:
        index["why"] = trained.why
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
        storage={"features": job.options.storage, "posteriors": f"top-{job.top}" if job.top else "dense"},
        rejected=found.rejected,
        build={
            **{name: value for name, value in job.options.to_json().items() if name != "rule"},
            "job": key_of(settings),
            "images": job.images,
            "shard_rows": job.shard_rows,
            "precision": job.precision,
            "excluded": job.excluded,
        },
        rule=dict(job.options.rule or {}),
        beside={CALIBRATION: [settings["calibration"]]} if settings["calibration"] else {},
    )
    with writing(folder):
        if job.targets[0].calibration:
            write_bytes(folder / CALIBRATION, job.targets[0].calibration.encode())
        manifest.write(folder)
    return manifest


def sealed(folder: Path, settings: Mapping[str, Any]) -> Manifest | None:
    """The manifest that a build with these settings has written, if it has.

    Raises:
        DatabaseError: there is one that cannot be read.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(folder)
    return manifest if manifest.build.get("job") == key_of(settings) else None


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


def _index_files(folder: Path, job: BuildJob, found: Extracted, trained: Fitted) -> list[Path]:
    if trained.mergeable:
        names = [part_name(number) for number in range(len(parts_of(found)))]
        for name in names:
            piece = pieces.finished(folder / name, checksum=True)
            if piece is None or piece.notes.get("inputs") != trained.inputs:
                raise DatabaseError(f"{folder / name} is missing or not of these rows: run 'nndefense index add' first")
        with writing(folder):
            return merge_parts([folder / name for name in names], folder / INDEX, memory=job.options.memory)
    index = FaissIndex.read(folder / TRAINED)
    fill(index, [folder / name for name, entry in found.files.items() if entry.rows], 0)
    store(folder / INDEX, index.write)
    return [folder / INDEX]
