"""Files that are either whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nndefense.errors import DataError, InputError, NNDefenseError, warn
from nndefense.parts import alive, part_of

DIGEST = "digest"
"""The entry of a record that holds the sha256 of all others."""
# Of a file itself; whatever else a system says is said of the system, and the file may be whole.
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG)
_OF_THE_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO, errno.ESTALE)
HDF5_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, SystemError, TypeError, ValueError)
"""What h5py raises of files that are damaged, of another kind or not there."""
MOST_CLASSES = 100_000
"""The most classes that a file may have: a few bytes can speak of a class two billion, and names are held in memory."""
# An array may be so large whatever stores it; a larger one must not be more than so many times its file.
_SMALL, _DENSE = 64 << 20, 100
_BLOCK = 256 << 20
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
    part = part_of(path)
    try:
        with alive(part):
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
        return json.loads(read_whole(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        told = not_read(path, error) or f"{path} cannot be read as JSON{reason}: restore it or write it again"
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


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; a pipe or a device could give bytes without end, or none until somebody writes.

    Raises:
        OSError: it is missing, cannot be opened, or is a folder, a pipe or a device.
    """
    # A pipe would wait for a writer when it is opened.
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(opened).st_mode
    if not stat.S_ISREG(mode):
        os.close(opened)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if code == errno.EISDIR else "not a regular file", str(path))
    return open(opened, "rb")


def read_whole(path: str | Path, most: int = 64 << 20) -> bytes:
    """Read a file whose content stands in memory several times when it is understood, such as a text or JSON.

    Raises:
        OSError: as from :func:`open_regular`, or it has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {most:,} allowed", str(path))
        return file.read(size)


def tell_unsealed(path: Path, seal: Path) -> None:
    """Warn that something was made before records had a digest.

    Args:
        path: of it.
        seal: what to seal.
    """
    warn(
        f"{path} was made before its records had checksums of their own, so that a change in them goes unnoticed: "
        f"'nndefense index verify --seal {seal}' adds them, without building anything again"
    )


def open_hdf5(source: str | Path | BinaryIO, *, foreign: bool = False) -> Any:
    """Open an HDF5 file for reading, also where nothing can be locked: on network shares or read-only media.

    What is in it is read by :func:`held_array`: a name may lead out of the file.

    Args:
        source: a path, or an open file.
        foreign: whether another program may be writing it. Files of our own are whole or absent, and need no lock.

    Raises:
        OSError: it cannot be opened; :class:`BlockingIOError`: another program has it open to write.
    """
    import h5py

    if isinstance(source, (str, Path)):
        open_regular(source).close()
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


def held_array(file: Any, name: str, path: str | Path, *, dense: int = _DENSE) -> Any:
    """An array of an open HDF5 file that stands in this very file, as an ``h5py.Dataset``.

    HDF5 would follow soft and external links, virtual data sets and external storage to any file of the machine, and
    a virtual data set that is made of itself ends the process; a few bytes can declare an array of any size.

    Args:
        file: as :func:`open_hdf5` gives it.
        name: of the array.
        path: what messages call the file.
        dense: how many times its file an array of more than 64 MiB may be.

    Raises:
        KeyError: there is nothing of that name.
        DataError: it is no array, stands elsewhere, or is far larger than the file.
    """
    import h5py

    place = f"the array {name} in {path}"
    link = file.get(name, getlink=True)
    if link is None:
        raise KeyError(f"there is no {name}")
    if not isinstance(link, h5py.HardLink):
        raise _elsewhere(place, "a link")
    opened = h5py.h5o.open(file.id, name.encode())
    if not isinstance(opened, h5py.h5d.DatasetID):
        raise DataError(f"{path} has no array in {name!r}: write or fetch the file again")
    # Before anything is asked of its shape: that of a virtual one may depend on other files, which are opened for it.
    layout = opened.get_create_plist()
    if layout.get_layout() == h5py.h5d.VIRTUAL:
        raise _elsewhere(place, "a virtual data set")
    if layout.get_layout() == h5py.h5d.CONTIGUOUS and layout.get_external_count():
        raise _elsewhere(place, "external storage")
    found = h5py.Dataset(opened)
    if found.shape is None:
        raise DataError(f"{path} has no array in {name!r}: write or fetch the file again")
    size = math.prod(found.shape) * found.dtype.itemsize
    if size > max(_SMALL, dense * file.id.get_filesize()):
        raise DataError(
            f"{place} declares {size:,} bytes, far more than the file holds: write it whole, and not compressed so much"
        )
    if found.chunks is not None and layout.get_nfilters():
        block = math.prod(found.chunks) * found.dtype.itemsize
        if block > _BLOCK:
            raise DataError(
                f"{place} is compressed in blocks of {block:,} bytes, more than the {_BLOCK:,} that are unpacked at "
                "once: write it in smaller chunks"
            )
    return found


def _elsewhere(place: str, kind: str) -> DataError:
    return DataError(
        f"{place} is {kind}, which may lead out of the file and is not read: write the values into the file itself"
    )


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
