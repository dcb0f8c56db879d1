"""Files that are either whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nndefense.errors import DataError, InputError

PART = ".part"
_UNUSUAL = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents, before the work that fills it.

    Raises:
        InputError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} cannot be a folder, because a file is in its place: choose another one") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be created ({error.strerror}): choose another one") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written: choose another one, or change its permissions")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path in the same folder, then put that file in ``path``'s place."""
    # The process number keeps two writers of one file apart.
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        # Some writers make files for their owner alone; a finished one is as readable as its folder.
        part.chmod(path.parent.stat().st_mode & 0o666)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":
        # The rename itself must reach the disk, or a power cut could bring the old name back.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def json_text(value: Any) -> str:
    """Write plain values as indented JSON with a final newline; a NaN is an error, since JSON has none."""
    return escaped_json(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def escaped_json(text: str) -> str:
    """JSON with its unusual characters escaped, as which they can be read back.

    These are the bytes of file names that are no UTF-8 (which Python holds as halves of characters, PEP 383, and which
    have no UTF-8 either), and what a terminal would obey.
    """
    return _UNUSUAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""

    write_bytes(path, json_text(value).encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""

    def write(part: Path) -> None:
        part.write_bytes(content)

    write_atomically(path, write)


def write_part(path: Path, content: bytes | memoryview) -> None:
    """Write, as :func:`write_bytes`, one of the files after which a job that was stopped can go on.

    Raises:
        DataError: the disk is full, or the place cannot be written.
    """
    try:
        write_bytes(path, content)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}): free some space and run the same again, which goes on "
            "from here"
        ) from error


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: restore it or write it again") from error


def text_lines(text: str) -> list[str]:
    """Return the lines of a text, which end in LF, CR LF or CR and in nothing else.

    ``str.splitlines`` also cuts at characters that a file's name may hold: U+2028, U+0085, form feeds and others.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]
