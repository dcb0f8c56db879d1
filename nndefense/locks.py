"""One job at a time in a folder: its lock, and what jobs that were killed there have left, which is swept."""

from __future__ import annotations

import functools
import inspect
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from operator import attrgetter
from pathlib import Path
from typing import ParamSpec, TypeVar

from nndefense.errors import InputError, NNDefenseError, warn
from nndefense.files import make_folder
from nndefense.parts import HAS_LOCKS, lock, sweep

LOCK = "nndefense.lock"
_P = ParamSpec("_P")
_R = TypeVar("_R")
# Folders whose jobs have begun other jobs, which write there too.
_LENT: ContextVar[frozenset[Path]] = ContextVar("_LENT", default=frozenset())


@contextmanager
def locked(
    folder: Path, *, error: type[NNDefenseError] = InputError, holds: Sequence[str] = (), lend: bool = False
) -> Iterator[bool]:
    """Hold the folder's lock; it is made if it is missing, with those above it, and removed again if left empty.

    The system lets go of the lock when the process ends, so none is ever stale. Where the system has no such lock
    (Windows), nothing is locked; where the folder's file system has none (some network shares), a warning says so.

    Gives whether a job that was killed has left its lock here. What such jobs were just writing is removed.

    Args:
        folder: that a job writes into.
        error: the kind of the errors.
        holds: names of folders in it, which hold nothing but what such jobs write: they are swept at every depth.
        lend: whether jobs that this one begins may write into the folder, too; others are kept out.

    Raises:
        NNDefenseError: of the kind ``error``: another job writes there, or the folder cannot be made or written.
    """
    if folder.resolve() in _LENT.get():
        yield False
        return
    with _held(folder, folder / LOCK, f"{folder} is being written", "folder", error) as left:
        sweep(folder)
        for name in holds:
            sweep(folder / name, deep=True)
        lent = _LENT.set(_LENT.get() | {folder.resolve()}) if lend else None
        try:
            yield left
        finally:
            if lent is not None:
                _LENT.reset(lent)


@contextmanager
def locked_file(path: Path, *, error: type[NNDefenseError] = InputError) -> Iterator[None]:
    """Hold the lock of a file that a job will write, ``NAME.lock`` beside it; all else as for :func:`locked`.

    Other files in the folder may be written at the same time.
    """
    with _held(path.parent, path.with_name(f"{path.name}.lock"), f"{path} is being written", "file", error):
        sweep(path.parent, path.name)
        yield


def writes(
    place: str,
    *,
    file: bool = False,
    error: type[NNDefenseError] = InputError,
    holds: Sequence[str] = (),
    lend: bool = False,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function hold the lock of the folder that one of its arguments names; None: there is no folder.

    Args:
        place: name of the argument, or of an attribute of it, such as ``settings.out``.
        file: whether it is that of a file.
        error, holds, lend: as for :func:`locked`.
    """
    argument, _, attribute = place.partition(".")

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*given: _P.args, **named: _P.kwargs) -> _R:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            value = bound.arguments[argument]
            value = attrgetter(attribute)(value) if attribute else value
            if value is None:
                return function(*given, **named)
            path = Path(value).expanduser()
            with locked_file(path, error=error) if file else locked(path, error=error, holds=holds, lend=lend):
                return function(*given, **named)

        return wrapped

    return decorate


@contextmanager
def _held(folder: Path, place: Path, busy: str, what: str, error: type[NNDefenseError]) -> Iterator[bool]:
    """Hold a lock in a folder; gives whether it was there already, though nobody held it."""
    made = [missing for missing in (folder, *folder.parents) if not missing.exists()]
    if error is InputError:
        make_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, left = _hold(place)
    except BlockingIOError as held:
        raise error(f"{busy} by {held.strerror}: wait for it to end, or choose another {what}") from None
    except OSError as reason:
        raise error(f"{folder} cannot be written ({reason.strerror}): choose another folder") from reason
    try:
        yield left
    finally:
        if descriptor >= 0:
            place.unlink(missing_ok=True)
            os.close(descriptor)
        # Mostly they hold something by now, as they should.
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


def _hold(path: Path) -> tuple[int, bool]:
    """An open file that is locked (-1 where there are no locks), and whether it was there before.

    Raises:
        BlockingIOError: somebody else holds it, whom it names.
    """
    if not HAS_LOCKS:
        return -1, False
    while True:
        # A link could lead to a file of the user's, which is emptied below.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(descriptor, path)
            # The holder before removes the file when it is done: then this lock is on a file that nobody finds.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                left = os.fstat(descriptor).st_size > 0
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor, left
        except BlockingIOError as held:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise BlockingIOError(held.errno, holder) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock the open file, or warn where its place has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        lock(descriptor)
    except BlockingIOError:
        raise
    except OSError as error:
        warn(
            f"{path.parent} cannot be locked ({os.strerror(error.errno or 0)}), as on some network shares: see to it "
            "that nobody else writes there at the same time"
        )
