"""Shards: which files a source stands for; and of tar files, where in them each image lies."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from nndefense.datasets.image_files import SUFFIXES
from nndefense.datasets.remote import has_suffix, open_store
from nndefense.datasets.store import Store, is_url
from nndefense.errors import DataError

REMEDY = "write or fetch the shard again"
_LABELS = ("cls", "json")
_JSON_NAMES = ("label", "cls", "class")
# A label takes a few bytes; what is longer is something else, and is not read into memory.
_LONGEST_LABEL = 1 << 20
_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(source: str, split: str | None = None) -> tuple[Store, tuple[str, ...]]:
    """The tar files that a source stands for; see :func:`find_files`."""
    return find_files(source, split, (".tar",), "shard")


def find_files(source: str, split: str | None, suffixes: tuple[str, ...], kind: str) -> tuple[Store, tuple[str, ...]]:
    """The files that a folder, a file or a pattern stands for, in sorted order (braces: as written), and their store.

    Args:
        source: a path or URL; ``{000..099}``, ``{a,b}``, ``*``, ``?`` and ``[...]`` make a pattern.
        split: a folder in ``source``, or the beginning of its files' names.
        suffixes: how the files of a folder end.
        kind: what messages call one of them.

    Raises:
        DataError: there are none, or one that braces name is missing.
    """
    suffix = suffixes[0]
    store, path = open_store(source)
    # A server of web pages cannot tell files from folders; a name that ends like a file is one.
    remote = is_url(source)
    if split is not None:
        inner = store.join(path, split)
        if store.is_folder(inner) and not has_suffix(inner, suffixes):
            return store, _of_folder(store, inner, suffixes, kind)
        names = [name for name in store.listing(path)[1] if name.startswith(split) and has_suffix(name, suffixes)]
        if not names:
            raise DataError(f"{source} has neither a folder {split} nor {kind}s {split}*{suffix}: check the split")
        return store, tuple(store.join(path, name) for name in names)
    if not (remote and has_suffix(path, suffixes)) and store.is_folder(path):
        return store, _of_folder(store, path, suffixes, kind)
    if store.is_file(path):
        return store, (path,)
    found: list[str] = []
    letters = "*[" if remote else "*?["
    for text in itertools.islice(expand_braces(path), _MOST_SHARDS):
        if store.is_file(text):
            found.append(text)
        elif any(letter in text for letter in letters):
            found.extend(store.glob(text))
        else:
            raise DataError(
                f"there is no {kind} {store.url(text)}: check the path or the numbers in braces of {source}"
            )
    if not found:
        raise DataError(f"no {kind} fits {source}: check the pattern")
    return store, tuple(found)


def _of_folder(store: Store, folder: str, suffixes: tuple[str, ...], kind: str) -> tuple[str, ...]:
    found = [store.join(folder, name) for name in store.listing(folder)[1] if has_suffix(name, suffixes)]
    if not found:
        raise DataError(
            f"the folder {store.url(folder)} has no {kind}s *{suffixes[0]}: give the folder or the pattern of the files"
        )
    return tuple(found)


def expand_braces(pattern: str) -> Iterator[str]:
    """Write out ``a-{000..002}`` as a-000, a-001, a-002 and ``{x,y}`` as x, y; from left to right, not nested."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inside = match[1]
    bounds = _RANGE.fullmatch(inside)
    words: Iterator[str]
    if bounds:
        # The numbers are as wide as the first one is written.
        words = (f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1))
    else:
        words = iter(inside.split(","))
    for word in words:
        for rest in expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + word + rest


def _numbers() -> array[int]:
    return array("q")


@dataclass
class ShardIndex:
    """What is known of the images of all shards so far; one entry an image in each list."""

    keys: list[str] = field(default_factory=list)
    shard: array[int] = field(default_factory=_numbers)
    offset: array[int] = field(default_factory=_numbers)
    size: array[int] = field(default_factory=_numbers)
    suffix: array[int] = field(default_factory=_numbers)
    labels: list[int | str | None] = field(default_factory=list)
    suffix_names: dict[str, int] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)


def scan(store: Store, path: str, number: int, index: ShardIndex) -> None:
    """Add the images of one shard: their places and labels, without reading their pixels."""
    place = store.url(path)
    places: dict[str, int] = {}
    labels: dict[str, int | str] = {}
    try:
        # "r:" is a plain tar: a compressed one must not be unpacked in secret for every image.
        with store.open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or a kilobyte would stay in memory for every file
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if member.issparse():
                    raise DataError(f"{place} stores {member.name} as a sparse file: {REMEDY}, without --sparse")
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                index.suffixes.add(suffix)
                if f".{suffix}" in SUFFIXES and key not in places:
                    places[key] = len(index.keys)
                    index.keys.append(key)
                    index.shard.append(number)
                    index.offset.append(member.offset_data)
                    index.size.append(member.size)
                    index.suffix.append(index.suffix_names.setdefault(suffix, len(index.suffix_names)))
                    index.labels.append(None)
                elif f".{suffix}" in SUFFIXES and index.suffix_names.get(suffix) == index.suffix[places[key]]:
                    raise DataError(f"{place} holds {key}.{suffix} twice: keys must be unique in a shard; {REMEDY}")
                elif suffix in _LABELS:
                    found = _label(file, member, place)
                    # .cls says nothing but the label, so it goes before .json.
                    if found is not None and (suffix == "cls" or key not in labels):
                        labels[key] = found
            _check_end(file, tar.offset, place)
    except tarfile.TarError as error:
        raise _damaged(store, path, error) from error
    except (OSError, ValueError) as error:
        # fsspec raises ValueError where a server gives no part of a file.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot read {place} ({reason}): {REMEDY}") from error
    for key, found in labels.items():
        if key in places:
            index.labels[places[key]] = found


def _check_end(file: BinaryIO, offset: int, path: str) -> None:
    """Raise DataError where the scan ended at something else than the mark of the end; tarfile does not ask for it."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut short: it lacks the empty block that ends a tar file; {REMEDY}")
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged at byte {offset:,}, where a file should begin: {REMEDY}")


def _damaged(store: Store, path: str, error: tarfile.TarError) -> DataError:
    with store.open(path) as file:
        head = file.read(6)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    place = store.url(path)
    kind = next((name for magic, name in packed.items() if head.startswith(magic)), None)
    if kind:
        return DataError(f"{place} is compressed ({kind}), so no image in its middle can be reached: unpack it to .tar")
    return DataError(f"{place} is no tar file or is cut short ({error}): {REMEDY}")


def _label(file: BinaryIO, member: tarfile.TarInfo, path: str) -> int | str | None:
    """The label in a ``.cls`` or ``.json`` file; None where a JSON has no such entry."""
    place = f"{member.name} in {path}"
    if member.size > _LONGEST_LABEL:
        raise DataError(f"{place} has {member.size:,} bytes, too many for a label: leave it out of the shard")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise DataError(f"{path} is cut short within {member.name}: {REMEDY}")
    try:
        if not member.name.lower().endswith("json"):
            return _whole(int(data.decode("ascii").strip()))
        value = json.loads(data)
        entry = next((value[name] for name in _JSON_NAMES if name in value), None) if isinstance(value, dict) else None
        if isinstance(entry, int) and not isinstance(entry, bool):
            return _whole(entry)
        if entry is not None and (not isinstance(entry, str) or not entry):
            raise ValueError
        return entry
    except (ValueError, RecursionError):
        raise DataError(
            f"{place} is no label: write a whole number from 0, or in JSON an entry label that is one or a class's name"
        ) from None


def _whole(number: int) -> int:
    if number < -1 or number >= 1 << 31:
        raise ValueError
    return number
