"""Changing a finished database: rows come, go, or are laid out anew beside the others, until a new manifest names them.

Every file of a change has a name that no file had before it, so that whoever has the database open keeps what was
opened, and a change that is killed leaves the old database or the new one. What else it leaves, the next one removes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nndefense.database.filling import grown_index, made_index
from nndefense.database.index import FaissIndex
from nndefense.database.index_training import choose_index, training_rows
from nndefense.database.manifest import CALIBRATION, GUARD, REBUILD, FileEntry, Manifest, in_row_order
from nndefense.database.merging import merge_parts
from nndefense.database.repeats import check_new_ids
from nndefense.database.rows import StoredRows, read_columns, write_shard
from nndefense.database.writer import GROWING, JOB, ShardWriter, drop_unnamed, shard_name, store, writing
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.files import read_json
from nndefense.locks import locked
from nndefense.versions import library_versions

Rownumbers = NDArray[np.int64]
SHARD_BYTES = 64 << 20
OUTGROWN = 4
"""With so many times the rows that an index was trained on, twice as many lists would be right."""


@contextmanager
def changing(folder: Path, opened: Manifest | None = None) -> Iterator[Manifest]:
    """Hold the lock of a database that is to be changed, once what the changes before have left is removed.

    Args:
        folder: of the database.
        opened: the manifest that it was opened with, where that must still be the one that is there.

    Raises:
        DatabaseError: there is no finished database, a file of it is missing, somebody else writes there, or it was
            changed since it was opened.
    """
    # Asked before the lock, which would make the folder.
    Manifest.read(folder)
    with locked(folder, error=DatabaseError):
        if (folder / JOB).exists():
            raise DatabaseError(
                f"the build of {folder} is not finished: finish it with 'nndefense index verify {folder}'"
            )
        manifest = Manifest.of_whole(folder, checksums=False)
        if opened is not None and opened.fingerprint != manifest.fingerprint:
            raise DatabaseError(f"{folder} was changed since it was opened: open it again, then change it")
        drop_unnamed(folder, manifest)
        _drop_guard(folder, manifest)
        yield manifest


def add_rows(
    folder: Path,
    manifest: Manifest,
    features: Tensor,
    posteriors: Tensor,
    ids: Sequence[str],
    labels: Sequence[int] | Tensor | NDArray[Any],
) -> Manifest:
    """Add rows to a database that stand in memory; see :meth:`nndefense.database.ImageDatabase.add`."""
    shards = ShardWriter(
        folder, first=next_number(manifest), classes=len(manifest.classes), half=manifest.half, top=manifest.top
    )
    shards.dimension = manifest.dimension
    shards.add(features, posteriors, ids, labels)
    if len(ids):
        check_new_ids([folder / name for name in manifest.shards], ids)
        manifest = add_shards(folder, manifest, shards.close())
    return manifest


def add_shards(folder: Path, manifest: Manifest, added: Mapping[str, FileEntry], **changed: Any) -> Manifest:
    """Let shards that stand in the folder be rows of its database, after those that are there.

    The index takes them up as it is trained: its lists are copied with theirs to a new file, in bounded memory; kinds
    that cannot be put together from parts (HNSW) are held whole.

    Args:
        folder: of the database; the caller holds its lock.
        manifest: its manifest.
        added: the new shards by name, in row order; at least one.
        changed: further entries of the manifest.

    Raises:
        DatabaseError: the disk is full or cannot be written.
    """
    index, shards = _new_index_name(manifest), {folder / name: entry.rows for name, entry in added.items()}
    with writing(folder):
        grown_index(_old_index(folder, manifest), shards, manifest.rows, folder / index)
    rows = sum(shards.values())
    kept = {name: entry for name, entry in manifest.files.items() if entry.rows}
    changed.setdefault("data", with_change(manifest, added=rows))
    changed["files"] = {**_others(manifest), **kept, **changed.get("files", {}), **added}
    order = (*manifest.order, *added) if manifest.order else ()
    return _commit(folder, manifest, index, rows=manifest.rows + rows, order=order, **changed)


def remove_rows(folder: Path, manifest: Manifest, rows: Rownumbers) -> Manifest:
    """Take rows out of a database; those after them move up, and all others keep their order.

    Shards that hold such rows are written anew; memory holds one of them. The index loses the rows as it is trained, or
    is made anew where its kind cannot (HNSW).

    Args:
        folder: of the database; the caller holds its lock.
        manifest: its manifest.
        rows: which, ascending; at least one.

    Raises:
        InputError: no row would be left, or fewer than the K of its rule.
        DatabaseError: the disk is full or cannot be written.
    """
    left = manifest.rows - len(rows)
    needed = _wanted_k(folder, manifest)
    if left < max(needed, 1):
        what = f"its rule asks for the {needed:,} nearest" if needed > 1 else "a database has at least one"
        raise InputError(
            f"{folder} would be left with {left:,} rows, but {what}: remove fewer, or build another database"
        )
    number, first, order = next_number(manifest), 0, []
    files: dict[str, FileEntry] = {}
    for name in manifest.shards:
        entry = manifest.files[name]
        within = rows[(rows >= first) & (rows < first + entry.rows)] - first
        first += entry.rows
        if len(within):
            if len(within) == entry.rows:
                continue
            columns, attributes = _columns(folder, manifest, name)
            held = {column: np.delete(values, within, axis=0) for column, values in columns.items()}
            name, number = shard_name(number), number + 1
            entry = _stored(folder / name, held, attributes)
        files[name] = entry
        order.append(name)
    index, shards = _new_index_name(manifest), {folder / name: files[name].rows for name in order}
    old, seed = _old_index(folder, manifest), int(manifest.build.get("seed", 0))
    with writing(folder):
        if FaissIndex.read(old, mapped=True, rows=manifest.rows).merges:
            merge_parts([old], folder / index, without=rows)
        else:
            made_index(manifest.index["factory"], manifest.dimension, shards, folder / index, seed=seed)
            manifest = replace(manifest, index={**manifest.index, "trained_rows": left})
    data = with_change(manifest, removed=len(rows))
    files |= _others(manifest)
    return _commit(folder, manifest, index, rows=left, order=tuple(order), files=files, data=data)


def next_number(manifest: Manifest) -> int:
    """The number of the next shard: no shard that the manifest names has it."""
    return 1 + max(int(re.sub(r"\D", "", name.partition(".")[0])) for name in manifest.shards)


def compact(
    folder: Path, manifest: Manifest, *, index: str | None = None, memory: int | None = None, device: str = "cpu"
) -> Manifest:
    """Join small shards to full ones of at most 64 MiB, and make the index anew where that is asked for.

    Rows, their order and what a search finds stay as they are; files that nobody names any more are removed.

    Args:
        folder: of the database; the caller holds its lock.
        manifest: its manifest.
        index: FAISS's factory string, or ``auto``, of the index that is trained on the rows as they are now; None: the
            one that is there stays.
        memory: bytes that ``auto`` may take.
        device: where the index is trained.

    Raises:
        InputError: an index that FAISS cannot build.
        DatabaseError: the disk is full or cannot be written.
    """
    why = ""
    if index == "auto":
        choice = choose_index(manifest.rows, manifest.dimension, memory=memory, gpu=device != "cpu")
        index, why = choice.factory, choice.why
    number, order = next_number(manifest), []
    files: dict[str, FileEntry] = {}
    for group in _groups(folder, manifest):
        name, entry = group[0], manifest.files[group[0]]
        if len(group) > 1:
            parts = [_columns(folder, manifest, part) for part in group]
            held = {column: np.concatenate([columns[column] for columns, _ in parts]) for column in parts[0][0]}
            name, number = shard_name(number), number + 1
            entry = _stored(folder / name, held, parts[0][1])
        files[name] = entry
        order.append(name)
    shards = {folder / name: files[name].rows for name in order}
    files |= _others(manifest)
    if index is None:
        if order == manifest.shards:
            return manifest
        old = manifest.index["file"]
        made = _commit(folder, manifest, None, files={**files, old: manifest.files[old]}, order=tuple(order))
    else:
        new = _new_index_name(manifest)
        with writing(folder):
            seed = int(manifest.build.get("seed", 0))
            made_index(index, manifest.dimension, shards, folder / new, seed=seed, device=device)
        entries = {"factory": index, "metric": "l2", "trained_rows": manifest.rows, **({"why": why} if why else {})}
        made = _commit(folder, replace(manifest, index=entries), new, files=files, order=tuple(order))
    drop_unnamed(folder, made)
    return made


def drop_grown(folder: Path, manifest: Manifest) -> None:
    """Remove the folder of rows that were extracted and are added by now, where a killed process has left it."""
    with suppress(DataError, KeyError, IndexError, TypeError):
        if read_json(folder / GROWING / JOB)["reopen"]["token"] == manifest.data["changes"][-1]["job"]:
            shutil.rmtree(folder / GROWING)


def outgrown(manifest: Manifest) -> str:
    """What to say of an index that was trained on far fewer rows than it holds now; nothing of any other."""
    trained, factory = manifest.index.get("trained_rows"), manifest.index["factory"]
    if not isinstance(trained, int) or manifest.rows < OUTGROWN * trained:
        return ""
    if not training_rows(factory, manifest.dimension, manifest.rows):
        return ""
    return (
        f"the index {factory} was trained on {trained:,} rows and holds {manifest.rows:,}: one that is made for "
        "so many answers faster; 'nndefense index compact --index auto' trains one"
    )


def with_change(manifest: Manifest, **change: Any) -> dict[str, Any]:
    """The manifest's ``data`` with one more change noted, and another fingerprint, since the images are others.

    Args:
        manifest: as it was before.
        change: what was done, as plain values; ``specs`` are those of images that came.
    """
    data, changes = manifest.data, [*manifest.data.get("changes", []), {"before": manifest.rows, **change}]
    text = f"{data['fingerprint']} {change} {manifest.fingerprint}"
    specs = [*data.get("specs", []), *(spec for spec in change.get("specs", []) if spec not in data.get("specs", []))]
    return {**data, "fingerprint": hashlib.sha256(text.encode()).hexdigest(), "specs": specs, "changes": changes}


def take_over(source: Path, target: Path) -> None:
    """Let a file stand in another place, too: as a link to the same bytes, or as a copy where there are no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        store(target, lambda part: copied(source, part))


def copied(source: Path, target: Path) -> None:
    """Copy the bytes of a file to another place."""
    shutil.copyfile(source, target)


def _commit(folder: Path, old: Manifest, index: str | None, **changed: Any) -> Manifest:
    """Write the manifest of a changed database, and remove what only the one before needed.

    Shards that were replaced stay until the next change: of many, those that have it open map some only when they are
    asked for.
    """
    entries, files = dict(old.index), dict(changed.pop("files"))
    if index is not None:
        entries["file"], files[index] = index, FileEntry.of(folder / index)
        entries.setdefault("trained_rows", old.rows)
        if "search" in entries:
            # Measured on the rows that there were.
            entries["search"] = {"rows": old.rows, **entries["search"]}
    if changed.get("order") == tuple(in_row_order(changed["order"])):
        changed["order"] = ()
    beside = dict(old.beside)
    if GUARD in beside:
        # Its distances are of other rows. It may be there or not until it is removed.
        beside[GUARD] = sorted({"", *beside[GUARD]})
    made = replace(old, index=entries, files=files, beside=beside, versions=library_versions(), **changed)
    with writing(folder):
        made.write(folder)
        _drop_guard(folder, made)
        for name, entry in old.files.items():
            if not entry.rows and name not in files:
                (folder / name).unlink(missing_ok=True)
    return made


def _drop_guard(folder: Path, manifest: Manifest) -> None:
    """Remove the guard's distances where they were measured before a change."""
    if "" in manifest.beside.get(GUARD, ()) and (folder / GUARD).is_file():
        with suppress(DataError, KeyError, TypeError):
            if read_json(folder / GUARD)["manifest"] == manifest.identity:
                return
        (folder / GUARD).unlink(missing_ok=True)


def _others(manifest: Manifest) -> dict[str, FileEntry]:
    """Files that a change leaves as they are: all but shards, their table in one file, and the index."""
    kept = re.compile(r"pca\.safetensors|rejected.*\.jsonl")
    return {name: entry for name, entry in manifest.files.items() if not entry.rows and kept.fullmatch(name)}


def _wanted_k(folder: Path, manifest: Manifest) -> int:
    chosen = manifest.read_beside(folder, CALIBRATION)
    found = chosen.get("chosen", {}) if isinstance(chosen, dict) else {}
    k = {**manifest.rule, **found}.get("k", 0)
    return k if isinstance(k, int) else 0


def _new_index_name(manifest: Manifest) -> str:
    number = re.sub(r"\D", "", manifest.index["file"].partition(".")[0])
    return f"index-{int(number or 0) + 1:05d}.faiss"


def _old_index(folder: Path, manifest: Manifest) -> Path:
    """The index's file, once every byte of it is compared with the manifest: its copy gets a checksum of its own."""
    path = folder / str(manifest.index["file"])
    manifest.files[path.name].check(path, REBUILD)
    return path


def _columns(folder: Path, manifest: Manifest, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A shard that is to be written anew, compared with the manifest likewise."""
    manifest.files[name].check(folder / name, REBUILD)
    return read_columns(folder / name)


def _stored(path: Path, columns: Mapping[str, Any], attributes: Mapping[str, int]) -> FileEntry:
    store(path, lambda part: write_shard(part, columns, attributes))
    return FileEntry.of(path, rows=len(columns["labels"]))


def _groups(folder: Path, manifest: Manifest) -> Iterator[list[str]]:
    """Shards in row order, those together that make one full shard and have the same columns."""
    group: list[str] = []
    size, columns = 0, frozenset[str]()
    for name in manifest.shards:
        more = manifest.files[name].bytes
        # All but the digest is in every shard.
        here = frozenset(["digest"] if StoredRows([folder / name]).digests else [])
        if group and (size + more > SHARD_BYTES or here != columns):
            yield group
            group, size = [], 0
        group, size, columns = [*group, name], size + more, here
    yield group
