"""Where files lie: on this machine, or anywhere that fsspec reads. One small interface for both."""

from __future__ import annotations

import errno
import glob
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nndefense.datasets.litter import Place, holders, is_folder, is_passed_over, leads_up, place_of, stands_in
from nndefense.datasets.rejected import BadImage, SourceError
from nndefense.errors import DataError
from nndefense.files import open_regular

MOST_BYTES = 1 << 30
"""A file of a single picture that has more bytes is refused before it is read."""

# These say that the machine or the way to the files is at fault; which images are good must not depend on it.
_OURS = {
    getattr(errno, name)
    for name in ("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "ENODEV")
    if hasattr(errno, name)
}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


def is_url(text: str) -> bool:
    """Whether a place is written as fsspec does: ``s3://...``, ``zip://...::...``; a path that exists is none."""
    return _URL.match(text) is not None and not os.path.exists(text)


class Store(ABC):
    """A file system: the files of this machine, or those behind a URL. Paths are text, with forward slashes."""

    lists_sizes = False
    """Whether :meth:`below` tells the bytes of the files, as far as they are known."""

    @abstractmethod
    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the sorted names of the folders and of the files in a folder.

        Left out is what :func:`~nndefense.datasets.litter.is_passed_over` names, and links to this folder or one above.

        Raises:
            DataError: it is no folder, or cannot be listed.
        """

    @abstractmethod
    def below(self, folder: str, root: str) -> Iterator[tuple[str, int]]:
        """Yield every file in and below a folder: its path relative to it, and its bytes (-1 where unknown).

        Left out is what :func:`~nndefense.datasets.litter.is_passed_over` names, and links back up, or to other
        folders of ``root``, the whole that ``folder`` is a part of: what is there is found there.

        Raises:
            DataError: a folder cannot be listed.
        """

    def true_path(self, path: str) -> str:
        """The path without links."""
        return path

    def is_link(self, path: str) -> bool:
        """Whether it is a link, be it to nowhere."""
        return False

    @abstractmethod
    def reachable(self, folder: str) -> bool:
        """Whether a folder can be listed and has anything in it, asked of the store anew.

        Raises:
            OSError, DataError: it cannot be listed.
        """

    @abstractmethod
    def glob(self, pattern: str) -> list[str]:
        """Return the paths that fit a pattern with ``*``, ``?`` and ``[...]``, sorted."""

    @abstractmethod
    def is_file(self, path: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def is_folder(self, path: str) -> bool:
        """Whether there is such a folder."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """Open a file for reading at any place.

        Raises:
            OSError: it cannot be opened.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """The bytes of a file, -1 where it is missing or does not say."""

    @abstractmethod
    def read(self, path: str, start: int = 0, count: int | None = None) -> bytes:
        """Read a file, or ``count`` bytes of it from ``start``.

        Raises:
            OSError: FileNotFoundError and PermissionError speak of this file, others of the way to it.
        """

    def join(self, folder: str, name: str) -> str:
        """The path of ``name`` in a folder."""
        return f"{folder.rstrip('/')}/{name}"

    def sibling(self, path: str, name: str) -> str:
        """The path of ``name`` in the folder that ``path`` lies in."""
        head, slash, _ = path.rpartition("/")
        return head + slash + name

    def url(self, path: str) -> str:
        """What messages call a file."""
        return path

    def read_text(self, path: str) -> str:
        """Read a whole text in UTF-8, with or without a mark at its beginning.

        Raises:
            DataError: it is absurdly large.
            OSError, UnicodeDecodeError: it cannot be read.
        """
        size = self.size(path)
        if size > MOST_BYTES:
            raise DataError(
                f"{self.url(path)} has {size:,} bytes, more than the {MOST_BYTES:,} that are read of a text: split it"
            )
        return (self.read(path) if size < 0 else self.read(path, 0, size)).decode("utf-8-sig")

    def image_bytes(self, path: str, alive: Callable[[], bool]) -> bytes:
        """Read the file of one picture.

        Args:
            path: the file.
            alive: whether the source is still there, asked where the file is not: a disk that was taken away is no
                reason to reject images.

        Raises:
            BadImage: it is missing, empty, unreadable or absurdly large.
            SourceError: the source is gone, or nothing can be read at the moment.
        """
        place = self.url(path)
        try:
            data = self.read(path)
        except BadImage:
            raise
        except FileNotFoundError as error:
            self._check_alive(alive, place, error)
            raise BadImage(
                f"there is no image file {place}: check the path", "missing", "there is no such file"
            ) from None
        except OSError as error:
            words = error.strerror or " ".join(str(error).split()) or type(error).__name__
            if error.errno in _OURS or not isinstance(error, self.speaks_of_one_file):
                raise SourceError(
                    f"cannot read {place} ({words}): see that its place can be reached, then go on"
                ) from error
            self._check_alive(alive, place, error)
            reason = (
                "there is no permission to read it"
                if isinstance(error, PermissionError)
                else f"it cannot be read ({words})"
            )
            raise BadImage(
                f"cannot read the image {place} ({words}): repair, replace or remove it", "unreadable", reason
            ) from error
        except MemoryError as error:
            raise SourceError(f"there is not enough memory left to read {place}: use fewer workers") from error
        if not data:
            raise empty_image(place)
        return data

    speaks_of_one_file: tuple[type[OSError], ...] = (OSError,)
    """The errors of :meth:`read` that can be the fault of the file alone."""

    def _check_alive(self, alive: Callable[[], bool], place: str, error: OSError) -> None:
        try:
            there = alive()
        except (OSError, DataError):
            there = False
        if not there:
            raise SourceError(
                f"cannot read {place} ({error.strerror or type(error).__name__}): the whole source is out of reach; "
                "bring it back, then go on"
            ) from error


def empty_image(place: str) -> BadImage:
    """The error for a picture without a byte."""
    return BadImage(
        f"cannot read the image {place} (empty): repair, replace or remove it", "empty", "the file is empty"
    )


def check_bytes(place: str, size: int) -> None:
    """Raise :class:`BadImage` where a picture's file is absurdly large."""
    if size > MOST_BYTES:
        what = f"{size:,} bytes, more than the {MOST_BYTES:,} allowed for one picture"
        raise BadImage(f"the image {place} has {what}: scale it down or remove it", "too large", f"it has {what}")


class LocalStore(Store):
    """The files of this machine."""

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_passed_over(entry.name):
                        continue
                    if not is_folder(entry):
                        files.append(entry.name)
                    elif not leads_up(entry):
                        folders.append(entry.name)
        except OSError as error:
            raise _unlisted(folder, error) from error
        return sorted(folders), sorted(files)

    def below(self, folder: str, root: str) -> Iterator[tuple[str, int]]:
        try:
            above = holders(os.path.realpath(folder))
        except OSError as error:
            raise _unlisted(folder, error) from error
        return _walk(folder, "", above, os.path.realpath(root))

    def true_path(self, path: str) -> str:
        return os.path.realpath(path)

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def reachable(self, folder: str) -> bool:
        with os.scandir(folder) as entries:
            # The place of a disk that was taken away is often an empty folder.
            return next(entries, None) is not None

    def glob(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern))

    def is_file(self, path: str) -> bool:
        return os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def open(self, path: str) -> BinaryIO:
        return open_regular(path)

    def size(self, path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    def read(self, path: str, start: int = 0, count: int | None = None) -> bytes:
        with open_regular(path) as file:
            if count is None:
                check_bytes(path, os.fstat(file.fileno()).st_size - start)
            file.seek(start)
            return file.read(-1 if count is None else count)


def _walk(folder: str, prefix: str, above: frozenset[Place], root: str) -> Iterator[tuple[str, int]]:
    """As :meth:`Store.below`; ``above`` are the folders that this one is in, ``root`` is without links."""
    try:
        here = place_of(folder)
        if here in above:  # a link back to a folder that we are in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_passed_over(entry.name):
                    continue
                if not is_folder(entry):
                    # Byte counts would cost a system call each; who wants them asks for them.
                    yield f"{prefix}{entry.name}", -1
                    continue
                inside = above | {here}
                if entry.is_symlink():
                    real = os.path.realpath(entry.path)
                    if stands_in(real, root):
                        continue
                    inside |= holders(real)
                yield from _walk(entry.path, f"{prefix}{entry.name}/", inside, root)
    except OSError as error:
        raise _unlisted(folder, error) from error


def _unlisted(folder: str, error: OSError) -> DataError:
    return DataError(f"cannot list the folder {folder} ({error.strerror or error}): check its permissions")
