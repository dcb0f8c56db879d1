"""Extract: images -> shards of rows. A shard covers fixed positions of the source, so each can be made by anybody."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index_build import pieces
from index_build.job import BuildJob, BuildTarget
from index_build.mapper import Mapped, ShardTools
from index_build.reader import ReadBatch, read
from nndefense.bars import progress_bar
from nndefense.database.manifest import FileEntry
from nndefense.database.mapped_shards import DIGEST
from nndefense.database.repeats import repeated_ids
from nndefense.database.rows import StoredRows, write_shard, write_virtual
from nndefense.database.writer import REJECTED, VIRTUAL, check_rows, columns, store, writing
from nndefense.datasets.rejected import NOT_FINITE
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.features import reduced
from nndefense.files import escaped_json, not_read, read_json, sealed, unsealed, write_json
from nndefense.memory import reused_memory

Array = NDArray[Any]
Rejection = dict[str, str]
EXTRACTED = "extracted.json"
"""The file that closes this stage: the counts, and every file that belongs to the rows."""
_TOGETHER = 1 << 20
"""Numbers in features and posteriors that are checked and made into columns in one go."""
EXCLUDED, DUPLICATE = "excluded", "duplicate"


@dataclass(frozen=True)
class ShardReport:
    """What became of the source's positions of one shard: how many rows, and what was rejected."""

    number: int
    images: int
    rows: int
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True)
class Extracted:
    """The finished stage: rows, rejected images by kind, and the files of the rows."""

    rows: int
    rejected: dict[str, int]
    files: dict[str, FileEntry]


Make = Callable[[Sequence[int]], Iterable[ShardReport]]


@reused_memory()
def make_shard(job: BuildJob, number: int, tools: ShardTools, ready: Callable[[], None] | None = None) -> ShardReport:
    """Make one shard for every target that lacks it, from one forward pass.

    It depends on nothing but its arguments and writes nothing but the shard's files, each atomically: any process can
    call it, in any order, and again.

    Args:
        job: a job that has begun.
        number: of the shard.
        tools: for the job.
        ready: called before anything is written; its errors end the making.

    Raises:
        DataError: the source is gone.
        InputError: rows that cannot be stored, as from a classifier that gives NaN.
        DatabaseError: the disk is full or cannot be written.
    """
    first, last = job.bounds(number)
    lacking = [place for place, target in enumerate(job.targets) if pieces.finished(job.path(target, number)) is None]
    sheaves = {place: _Sheaf(job, job.targets[place]) for place in lacking}
    rejected: list[Rejection] = []
    rows = 0
    batches = read(
        tools.dataset,
        np.arange(first, last, dtype=np.int64),
        job.options.batch_size,
        workers=tools.workers,
        pin=tools.mapper.device.type == "cuda",
    )
    admitted = (_admitted(batch, tools, rejected) for batch in batches)
    noise = (job.options.row_noise, job.options.seed, job.before)
    for batch, mapped in tools.mapper.over((batch, batch.under_noise(*noise)) for batch in admitted if batch.ids):
        batch, mapped = _finite(batch, mapped, rejected)
        labels, digests = tools.labels(batch.labels).numpy(), batch.digests
        rows += len(batch.ids)
        for place, sheaf in sheaves.items():
            with torch.no_grad():
                vectors = reduced(mapped.vectors[place], sheaf.target.feature, tools.pcas[place])
            sheaf.add(vectors, mapped.posteriors, batch.ids, labels, digests)
    # Whatever is wrong with the rows of any target shows before one is written.
    held = {place: sheaves.pop(place).columns() for place in lacking}
    if ready is not None:
        ready()
    for place in lacking:
        write_rows(job.path(job.targets[place], number), held.pop(place), job, rejected)
    return ShardReport(number, last - first, rows, tuple(rejected))


class _Sheaf:
    """The rows of one shard, made into columns when some have come together: with every batch of a small net it would
    take as long as a tenth of the forward pass.
    """

    def __init__(self, job: BuildJob, target: BuildTarget) -> None:
        self.job, self.target = job, target
        self._most = max(1, _TOGETHER // (target.dimension + len(job.classes)))
        self._loose: list[tuple[Tensor, Tensor, list[str], Array, Array]] = []
        self._count = 0
        self._bound: list[dict[str, Array]] = []

    def add(self, vectors: Tensor, posteriors: Tensor, ids: list[str], labels: Array, digests: Array) -> None:
        self._loose.append((vectors, posteriors, ids, labels, digests))
        self._count += len(ids)
        if self._count >= self._most:
            self._bind()

    def columns(self) -> dict[str, Array]:
        """All rows, by column; none at all where there was no row. Afterwards the sheaf is empty."""
        if self._loose:
            self._bind()
        parts, self._bound = self._bound, []
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _bind(self) -> None:
        loose, self._loose, self._count = self._loose, [], 0
        features, outputs, names, numbers, marks = zip(*loose, strict=True)
        vectors, posteriors = torch.cat(features), torch.cat(outputs)
        labels, digests = np.concatenate(numbers), np.concatenate(marks)
        ids = [name for some in names for name in some]
        check_rows(vectors, posteriors, ids, labels, len(self.job.classes), self.target.dimension)
        half = self.job.options.storage == "float16"
        made = columns(vectors, posteriors, ids, labels, half=half, top=self.job.top)
        self._bound.append(made | {DIGEST: digests})


def write_rows(path: Path, held: dict[str, Array], job: BuildJob, rejected: Sequence[Rejection]) -> None:
    """Write a shard and what was rejected from its positions."""

    def write(part: Path) -> None:
        write_shard(part, held, {"classes": len(job.classes)} if job.top else None)

    rows = len(held["labels"]) if held else 0
    pieces.finish(path, write if rows else None, rows=rows, rejected=list(rejected))


def _admitted(batch: ReadBatch, tools: ShardTools, rejected: list[Rejection]) -> ReadBatch:
    """Note what the reader rejected, and leave out what is to be kept out of the database."""
    rejected.extend({"id": item.id, "kind": item.kind, "reason": item.reason} for item in batch.rejected)
    if tools.near is None or not len(batch.ids):
        return batch
    found = tools.near(batch.images)
    names = tools.near.references.ids
    for place in torch.nonzero(found.rows >= 0).flatten().tolist():
        other, distance = names[int(found.rows[place])], float(found.distances[place])
        reason = f"equal to {other}" if distance == 0 else f"near {other} (L2 distance {distance:.4g})"
        rejected.append({"id": batch.ids[place], "kind": EXCLUDED, "reason": reason})
    return batch.take(found.rows < 0)


def _finite(batch: ReadBatch, mapped: Mapped, rejected: list[Rejection]) -> tuple[ReadBatch, Mapped]:
    """Note and leave out the images for which the net gives NaN or infinite values, whichever target they are of."""
    fine = mapped.finite()
    if bool(fine.all()):
        return batch, mapped
    reason = "the classifier gives NaN or infinite values for it"
    named = (batch.ids[place] for place in torch.nonzero(~fine).flatten().tolist())
    rejected.extend({"id": name, "kind": NOT_FINITE, "reason": reason} for name in named)
    return batch.take(fine), Mapped(mapped.posteriors[fine], tuple(vectors[fine] for vectors in mapped.vectors))


def extract(
    job: BuildJob,
    tools: ShardTools,
    *,
    max_rejected: int | str | None = None,
    make: Make | None = None,
    close: Callable[[BuildJob, BuildTarget], Extracted] | None = None,
    progress: bool = True,
) -> list[Extracted]:
    """Make the shards that are missing, then close the stage.

    Args:
        job: a job that has begun.
        tools: for it.
        max_rejected: more unreadable images than that (a number, or a share such as ``5%``) end the build; None: any.
        make: makes the shards of the given numbers and reports each, in any order; by default one after another here.
        close: what is done of each target when all its shards are there; by default what a build does.
        progress: show a bar.

    Returns:
        For each target what is there now.

    Raises:
        DataError: the source is gone, too many images are unreadable, or none is left.
        InputError: rows that cannot be stored.
        DatabaseError: the disk is full or cannot be written, or two images have the same id.
    """
    bad = _Unusable(job, rejection_limit(max_rejected, job.images))
    whole = _standing(job, bad)
    missing = [number for number in range(job.shards) if number not in whole]
    done = sum(last - first for first, last in map(job.bounds, whole))
    with bar(job.images, "extracting features", progress, done) as shown:
        for report in make(missing) if make else (make_shard(job, number, tools) for number in missing):
            bad.add(report.rejected)
            if shown is not None:
                shown.update(report.images)
    return [(close or _close)(job, target) for target in job.targets]


class _Unusable:
    """Counts the images that cannot be used, and ends the build when they are too many."""

    def __init__(self, job: BuildJob, limit: int | None) -> None:
        self._job, self._limit, self._count = job, limit, 0
        self._first: Rejection | None = None

    def add(self, rejected: Iterable[Rejection]) -> None:
        for entry in rejected:
            if entry["kind"] not in (EXCLUDED, DUPLICATE):
                self._count += 1
                self._first = self._first or entry
        if self._limit is not None and self._first is not None and self._count > self._limit:
            raise DataError(
                f"{self._count:,} of the {self._job.images:,} images of {self._job.data['name']} cannot be used, more "
                f"than the {self._limit:,} that --max-rejected allows; the first is {self._first['id']}: "
                f"{self._first['reason']}"
            )


def _standing(job: BuildJob, bad: _Unusable) -> set[int]:
    """The shards that every target holds whole, by their checksums; what they rejected is counted."""
    whole = set(range(job.shards))
    with ThreadPoolExecutor(max_workers=4) as pool:
        for place, target in enumerate(job.targets):
            paths = job.paths(target)
            found = pool.map(lambda path: pieces.finished(path, checksum=True), paths)
            for number, (path, piece) in enumerate(zip(paths, found, strict=True)):
                if piece is None:
                    whole.discard(number)
                    pieces.forget(path)
                elif place == 0:
                    bad.add(piece.notes["rejected"])
    return whole


def _close(job: BuildJob, target: BuildTarget) -> Extracted:
    """Drop duplicates where that was asked for, join what was rejected, and show all shards as one table."""
    paths = job.paths(target)
    drop_duplicates(job, paths)
    found = tally(paths)
    if not found.rows:
        first = next(_rejections(paths))
        if set(found.rejected) == {NOT_FINITE}:
            raise InputError(f"the classifier gives NaN or infinite values for every image of {job.data['name']}")
        raise DataError(
            f"none of the {job.images:,} images of {job.data['name']} can be used: {first['id']}: {first['reason']}"
        )
    shards = [target.folder / name for name in found.files]
    check_ids(shards)
    store(target.folder / VIRTUAL, lambda part: write_virtual(part, shards))
    files = {**found.files, VIRTUAL: FileEntry.of(target.folder / VIRTUAL)}
    files |= write_rejections(target.folder / REJECTED, paths)
    with writing(target.folder):
        described = {name: vars(entry) for name, entry in files.items()}
        value = {"rows": found.rows, "rejected": found.rejected, "files": described}
        write_json(target.folder / EXTRACTED, sealed(value))
    return Extracted(found.rows, found.rejected, files)


def drop_duplicates(job: BuildJob, paths: Sequence[Path]) -> None:
    """Drop rows with the pixels of earlier ones from finished shards, where that was asked for."""
    if job.options.dedupe:
        pieces.drop_repeats(paths, lambda path, held, rejected: write_rows(path, held, job, rejected))


def tally(paths: Sequence[Path]) -> Extracted:
    """The rows and rejected images of all shards, and those of their files that hold rows.

    Raises:
        DatabaseError: a shard that is not finished.
    """
    counts: Counter[str] = Counter()
    files: dict[str, FileEntry] = {}
    for path in paths:
        piece = pieces.finished(path)
        if piece is None:
            raise DatabaseError(f"{path} is missing: somebody else has removed it; run the same command again")
        counts.update(entry["kind"] for entry in piece.notes["rejected"])
        if piece.entry.rows:
            files[path.name] = piece.entry
    return Extracted(sum(entry.rows for entry in files.values()), dict(sorted(counts.items())), files)


def check_ids(shards: Sequence[Path]) -> None:
    """Make sure that no id is there twice.

    Raises:
        DataError: one is.
    """
    with writing(shards[0].parent):
        twice = repeated_ids(shards, shards[0].parent)
    if len(twice):
        name = bytes(StoredRows(shards).take("ids", twice[:1])[0]).decode("utf-8", "replace")
        raise DataError(
            f"{len(twice):,} images have an id that another one has, such as {name!r}, so a row could not be told from "
            "another: open folders that are laid out alike as splits of one folder (imagefolder:PATH:SPLIT)"
        )


def write_rejections(out: Path, paths: Sequence[Path]) -> dict[str, FileEntry]:
    """Join what all shards have rejected to one file, which is described; none where nothing was."""
    out.unlink(missing_ok=True)
    if next(_rejections(paths), None) is None:
        return {}
    store(out, lambda part: _write_lines(part, _rejections(paths)))
    return {out.name: FileEntry.of(out)}


def _rejections(paths: Iterable[Path]) -> Iterator[Rejection]:
    for path in paths:
        piece = pieces.finished(path)
        yield from piece.notes["rejected"] if piece else ()


def read_extracted(folder: Path) -> Extracted:
    """The rows of a folder's unfinished build.

    Raises:
        DatabaseError: they are not complete, or a file of them is missing or of another length.
    """
    try:
        value, _ = unsealed(read_json(folder / EXTRACTED))
        found = Extracted(
            value["rows"], value["rejected"], {name: FileEntry(**entry) for name, entry in value["files"].items()}
        )
    except (DataError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DatabaseError(
            not_read(folder / EXTRACTED, error)
            or f"the rows of {folder} are not complete: run 'nndefense index extract' (or build) first"
        ) from None
    for name, entry in found.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise DatabaseError(f"{path} is missing or damaged: run 'nndefense index extract' (or build) again")
    return found


def rejection_limit(text: int | str | None, images: int) -> int | None:
    """How many images may be rejected: a number, a share such as ``5%`` of all, or None for any number.

    Raises:
        InputError: text that is neither, or a number below 0.
    """
    if text is None:
        return None
    share = isinstance(text, str) and text.strip().endswith("%")
    try:
        value = float(str(text).strip().removesuffix("%")) if share else float(int(text))
    except ValueError:
        value = -1.0
    if not (0 <= value <= 100 if share else 0 <= value < float("inf")):
        raise InputError(f"the rejected images are limited to {text!r}, but that must be a number or a share like 5%")
    return int(images * value / 100) if share else int(value)


def _write_lines(path: Path, entries: Iterable[Rejection]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(escaped_json(json.dumps(entry, ensure_ascii=False)) + "\n")


def bar(total: int, what: str, progress: bool, done: int = 0, unit: str = " images") -> Any:
    """A progress bar, or a context that holds None."""
    return progress_bar(total=total, initial=done, desc=what, unit=unit) if progress else nullcontext()
