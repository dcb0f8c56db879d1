"""Files while they are written: parts, which stand beside their place until they are whole.

A part is locked by its writer, so that what a killed process has left can be told from what a living one writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover  # not a Unix: there is no such lock there
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
_PART = ".part"
_WRITES = itertools.count()


def part_of(path: Path) -> Path:
    """A name for the file at ``path`` until it is whole; no other writer has it."""
    return path.with_name(f"{path.name}.{os.getpid()}.{next(_WRITES)}{_PART}")


def lock(descriptor: int) -> None:
    """Lock an open file until it is closed or the process ends.

    Raises:
        BlockingIOError: somebody else holds it; another OSError: its place has no locks.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def alive(part: Path) -> Iterator[None]:
    """Hold a lock on a part while it is written."""
    if not HAS_LOCKS:
        yield
        return
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: str | None = None, *, deep: bool = False) -> None:
    """Remove the parts that killed processes have left; living ones lose nothing.

    Args:
        folder: where; it may be missing.
        name: of the file; None for all.
        deep: look into the folders in it, too.
    """
    pattern = f"{'**/' if deep else ''}{'*' if name is None else escape(name)}.*{_PART}"
    for path in folder.glob(pattern):
        if path.name.removesuffix(_PART).rpartition(".")[2].isdecimal() and _is_dead(path):
            path.unlink(missing_ok=True)


def _is_dead(part: Path) -> bool:
    """Whether nobody writes a part any more; also where that cannot be told, since locks are missing."""
    if part.is_symlink() or not part.is_file():
        return False
    if not HAS_LOCKS:
        return True
    try:
        descriptor = os.open(part, os.O_RDWR)
    except OSError:
        return False
    try:
        lock(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return True
