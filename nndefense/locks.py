"""One job at a time in a folder: its lock, and what jobs that were killed there have left, which is swept."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from operator import attrgetter
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from nndefense.errors import InputError, NNDefenseError, warn
from nndefense.files import make_folder
from nndefense.parts import HAS_LOCKS, lock, sweep

LOCK = "nndefense.lock"
_PASSING = "nndefense-passing-"
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
        _sweep_passing(folder)
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
def passing_folder(place: Path | None = None) -> Iterator[Path]:
    """A new folder for what is not kept, which is removed at the end, also where SIGTERM or SIGHUP ends the process.

    What a process that was killed outright has left in the same place is removed by the next one there that asks for
    such a folder or for the lock of the place; where the system has no locks, it stays.

    Args:
        place: the folder to make it in; None: the system's for temporary files.
    """
    place = (place or Path(tempfile.gettempdir())).expanduser()
    make_folder(place)
    _sweep_passing(place)
    with _ending_in_order():
        folder = Path(tempfile.mkdtemp(prefix=_PASSING, dir=place))
        try:
            with locked(folder):
                try:
                    yield folder
                finally:
                    # The lock goes last: by it the next job knows what a kill leaves of this.
                    for path in folder.iterdir():
                        if path.is_dir():
                            shutil.rmtree(path, ignore_errors=True)
                        elif path.name != LOCK:
                            path.unlink()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep_passing(place: Path) -> None:
    """Remove the passing folders of this user's whose processes are dead; strangers' and living ones lose nothing."""
    for folder in place.glob(f"{_PASSING}*") if HAS_LOCKS else ():
        with suppress(OSError):
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            if (folder / LOCK).exists():
                descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    lock(descriptor)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(descriptor)
            else:
                # Killed before it had its lock, or after; one that is just being made is made again by its lock.
                folder.rmdir()


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let signals that end the process unwind it, as Ctrl-C does, unless somebody handles them already."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    ours = [each for each in wanted if main and signal.getsignal(each) is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


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
