"""One builder at a time: a lock on the folder that ends with its process, however that ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nndefense.errors import DatabaseError

try:
    import fcntl
except ImportError:  # pragma: no cover  # not a Unix: there is no such lock there
    fcntl = None  # type: ignore[assignment]

NAME = "build.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the folder is made if it is missing, and removed again if it is then left empty.

    The system lets go of the lock when the process ends, so none is ever stale. Where the system has no such lock
    (Windows), nothing is locked.

    Raises:
        DatabaseError: another process builds there, or the folder cannot be made or written.
    """
    made = not folder.exists()
    descriptor = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _hold(folder)
    except OSError as error:
        raise DatabaseError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield
    finally:
        if descriptor >= 0:
            (folder / NAME).unlink(missing_ok=True)
            os.close(descriptor)
        if made:
            # Mostly it holds something by now, as it should.
            with suppress(OSError):
                folder.rmdir()


def _hold(folder: Path) -> int:
    if fcntl is None:
        return -1
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before removes the file when it is done: then this lock is on a file that nobody finds.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise DatabaseError(
                f"{folder} is being built by {holder}: wait for it to end, or choose another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
