"""Files behind a URL, read by fsspec: object stores, HTTP, memory, archives and whatever else it knows.

And which files, here or there, a folder or a pattern stands for.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from nndefense.datasets.litter import is_passed_over
from nndefense.datasets.rejected import BadImage
from nndefense.datasets.store import LocalStore, Store, check_bytes, is_url
from nndefense.errors import DataError

_TRIES = 3
_PAUSE = 0.5
_MOST_FILES = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_T = TypeVar("_T")


def open_store(place: str | os.PathLike[str]) -> tuple[Store, str]:
    """Return the store of a path or URL, and what the place is called in it.

    Raises:
        DataError: a URL that fsspec, or a package that it needs, is missing for; an unknown kind of URL.
    """
    text = os.fspath(place)
    if not is_url(text):
        return LocalStore(), os.path.expanduser(text)
    store = RemoteStore(text)
    return store, store.root


class RemoteStore(Store):
    """The files behind a URL.

    fsspec's file systems hold connections and locks that do not survive a fork, so each process makes its own.
    """

    # Asking a server for each file's size would take as long as reading small files.
    lists_sizes = True
    # HTTP servers' answers are ClientErrors, which are no OSErrors and are told apart in _tried.
    speaks_of_one_file = (FileNotFoundError, PermissionError, IsADirectoryError)

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = -1
        self._file_system: Any = None
        root = self._connect()
        # The top of an archive is called nothing, and what lies in it has no slash before it.
        self.root: str = root.rstrip("/") or root[:1]

    def __getstate__(self) -> dict[str, object]:
        return {"_url": self._url, "root": self.root, "_process": -1, "_file_system": None}

    @property
    def file_system(self) -> Any:
        """fsspec's file system, this process's own."""
        if self._process != os.getpid():
            self._connect()
        return self._file_system

    def _connect(self) -> str:
        try:
            import fsspec
        except ImportError:
            raise DataError(
                f"{self._url} is read by fsspec, which is not installed: pip install 'fsspec[http]', or copy the "
                "data to this machine"
            ) from None
        try:
            self._file_system, root = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            raise DataError(f"{self._url} needs another package: {_words(error)}") from error
        except Exception as error:
            raise DataError(f"{self._url} cannot be opened ({_words(error)}): check the URL") from error
        self._process = os.getpid()
        return str(root)

    def url(self, path: str) -> str:
        return str(self.file_system.unstrip_protocol(path))

    def join(self, folder: str, name: str) -> str:
        return super().join(folder, name) if folder else name

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        folders: list[str] = []
        files: list[str] = []
        for name, entry in self._entries(folder):
            if not is_passed_over(name) and "/" not in name:
                (folders if entry["type"] == "directory" else files).append(name)
        return sorted(folders), sorted(files)

    def below(self, folder: str, root: str) -> Iterator[tuple[str, int]]:
        for name, entry in self._entries(folder):
            if is_passed_over(name):
                continue
            if entry["type"] == "directory":
                for inner, size in self.below(str(entry["name"]).rstrip("/"), root):
                    yield f"{name}/{inner}", size
            elif "/" not in name:
                known = entry.get("size")
                yield name, -1 if known is None else int(known)

    def _entries(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            entries = self._tried(lambda: self.file_system.ls(folder, detail=True))
        except FileNotFoundError as error:
            raise DataError(f"there is no folder {self.url(folder)}: check the URL") from error
        except OSError as error:
            raise DataError(f"cannot list the folder {self.url(folder)} ({_words(error)}): check the URL") from error
        base = folder.strip("/") + "/"
        for entry in entries:
            path = str(entry["name"]).strip("/")
            # Some stores list the folder itself, and web pages link to places outside it.
            if path.startswith(base) and len(path) > len(base):
                yield path[len(base) :], entry
            elif base == "/":
                yield path, entry

    def reachable(self, folder: str) -> bool:
        self.file_system.invalidate_cache()
        return next(self._entries(folder), None) is not None

    def glob(self, pattern: str) -> list[str]:
        try:
            return sorted(str(path) for path in self._tried(lambda: self.file_system.glob(pattern)))
        except OSError as error:
            raise DataError(f"cannot look for {self.url(pattern)} ({_words(error)}): check the URL") from error

    def is_file(self, path: str) -> bool:
        try:
            return bool(self._tried(lambda: self.file_system.isfile(path)))
        except OSError:
            return False

    def is_folder(self, path: str) -> bool:
        try:
            return bool(self._tried(lambda: self.file_system.isdir(path)))
        except OSError:
            return False

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, self._tried(lambda: self.file_system.open(path, "rb")))

    def size(self, path: str) -> int:
        try:
            size = self._tried(lambda: self.file_system.size(path))
        except OSError:
            return -1
        return -1 if size is None else int(size)

    def read(self, path: str, start: int = 0, count: int | None = None) -> bytes:
        if count is not None:
            data = bytes(self._tried(lambda: self.file_system.cat_file(path, start=start, end=start + count)))
            if len(data) > count:
                raise OSError(f"the server of {self.url(path)} sends whole files only, not parts of them")
            return data
        data = bytes(self._tried(lambda: self.file_system.cat_file(path, start=start or None)))
        check_bytes(self.url(path), len(data))
        return data

    def _tried(self, attempt: Callable[[], _T]) -> _T:
        """Try a few times, and turn whatever the libraries behind fsspec raise into an OSError."""
        for number in range(1, _TRIES + 1):
            try:
                return attempt()
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, MemoryError):
                raise
            except (zipfile.BadZipFile, zlib.error) as error:
                reason = f"it is damaged in its archive ({_words(error)})"
                raise BadImage(
                    f"cannot read from {self._url} ({_words(error)}): fetch it again", "damaged", reason
                ) from error
            except Exception as error:
                status = getattr(error, "status", None)
                if status in (404, 410):
                    raise FileNotFoundError(_words(error)) from error
                if status in (401, 403):
                    raise PermissionError(_words(error)) from error
                if number == _TRIES or isinstance(error, (ValueError, NotImplementedError)):
                    if isinstance(error, OSError):
                        raise
                    raise OSError(_words(error)) from error
            time.sleep(_PAUSE * number)
        raise AssertionError("the loop returns or raises")


def has_suffix(place: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a path or URL (without its query) ends in one of these suffixes."""
    text = urlsplit(place).path if place.lower().startswith(("http://", "https://")) else place
    return text.lower().endswith(suffixes)


def _words(error: BaseException) -> str:
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)) and not str(error):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__


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
    for text in itertools.islice(expand_braces(path), _MOST_FILES):
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
