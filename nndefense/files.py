"""Files that are either whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nndefense.errors import DataError, InputError, NNDefenseError

PART = ".part"
DIGEST = "digest"
"""The entry of a record that holds the sha256 of all others."""
# Of a file itself; whatever else a system says is said of the system, and the file may be whole.
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG)
_OF_THE_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO, errno.ESTALE)
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
        told = not_read(path, error) or f"{path} cannot be read as JSON: restore it or write it again"
        raise DataError(told) from error


def digest_of(value: Any) -> str:
    """The sha256 of plain values: of what JSON can tell apart, whatever the order of keys and the spaces are."""
    # Once through JSON, so that a tuple and a list, or the keys 1 and "1", are one before and after they are stored.
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the digest of its values, which :func:`unsealed` compares when it is read again."""
    values = {name: value for name, value in record.items() if name != DIGEST}
    return {**values, DIGEST: digest_of(values)}


def unsealed(record: Any) -> tuple[dict[str, Any], bool]:
    """A record that was read, without its digest, and whether it had one: those of older versions have none.

    Raises:
        ValueError: the values are not those that the digest was made of, or it is no record at all.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not a record")
    values = {name: value for name, value in record.items() if name != DIGEST}
    if len(values) < len(record) and record[DIGEST] != digest_of(values):
        raise ValueError("its values have changed since it was written (wrong digest)")
    return values, len(values) < len(record)


def open_hdf5(source: str | Path | BinaryIO, *, foreign: bool = False) -> Any:
    """Open an HDF5 file for reading, also where nothing can be locked: on network shares or read-only media.

    Args:
        source: a path, or an open file.
        foreign: whether another program may be writing it. Files of our own are whole or absent, and need no lock.

    Raises:
        OSError: it cannot be opened; :class:`BlockingIOError`: another program has it open to write.
    """
    import h5py

    if foreign:
        try:
            return h5py.File(source, "r")
        except BlockingIOError:
            raise
        except OSError as error:
            # Without a number it is the content that HDF5 speaks of, and no lock.
            if error.errno is None:
                raise
    return h5py.File(source, "r", locking=False)


def not_read(path: str | Path, error: BaseException | None) -> str:
    """What to say of a file that the system did not read, though it may be whole; empty where the file is at fault.

    Args:
        path: of the file.
        error: of the system's, of FAISS's, or one of ours that came of one.
    """
    error = error.__cause__ if isinstance(error, NNDefenseError) else error
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, RuntimeError):
        # FAISS gives the system's words alone.
        number = next((code for code in _OF_THE_SYSTEM if os.strerror(code) in str(error)), None)
    if number is None or number in _OF_THE_FILE:
        return ""
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{path} cannot be opened, because too many files are open: raise the limit, as with 'ulimit -n 65536'"
    if number == errno.ENOMEM:
        return (
            f"{path} cannot be read, because the system gives no more memory or memory maps: free memory, or raise "
            "the limit vm.max_map_count"
        )
    if number in (errno.EACCES, errno.EPERM):
        return f"{path} cannot be read ({os.strerror(number)}): check its permissions"
    if isinstance(error, BlockingIOError):
        return (
            f"{path} cannot be read, because another program has locked it: wait until it is written, or set "
            "HDF5_USE_FILE_LOCKING=FALSE in the environment where nobody writes it"
        )
    return f"{path} cannot be read ({os.strerror(number)}): check the disk or the network share that it is on"


def text_lines(text: str) -> list[str]:
    """Return the lines of a text, which end in LF, CR LF or CR and in nothing else.

    ``str.splitlines`` also cuts at characters that a file's name may hold: U+2028, U+0085, form feeds and others.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]
