"""Places without locks, and systems that give no more files or maps: neither is damage."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import table, write

from nndefense import locks, parts
from nndefense.database import ImageDatabase, Manifest, rows
from nndefense.datasets import open_dataset
from nndefense.datasets.arrays import write_hdf5
from nndefense.datasets.rejected import SourceError
from nndefense.errors import DatabaseError, DataError
from nndefense.files import not_read, open_hdf5, read_json
from nndefense.training.pseudo_file import read_file

REPOSITORY = Path(__file__).resolve().parent.parent
NO_LOCKS = ("ENOLCK", "EOPNOTSUPP", "EROFS", "EACCES")
_PROGRAM = """
import sys
from pathlib import Path
import h5py, numpy as np
from helpers import table, write
from nndefense.database import ImageDatabase
from nndefense.datasets import open_dataset
from nndefense.datasets.arrays import write_hdf5
place = Path(sys.argv[1])
try:
    h5py.File(place / "probe.h5", "w")
except OSError:
    pass
else:
    raise AssertionError("there are locks here")
write(place / "db", table(20))
assert ImageDatabase.open(place / "db").verify()["rows"] == 20
write_hdf5(place / "x.h5", np.zeros((3, 1, 8, 8), np.float32))
images, _ = open_dataset(f"hdf5:{place}/x.h5").batch([0, 2])
assert images.shape == (2, 1, 8, 8)
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler on Linux")
def test_databases_and_data_sets_are_written_and_read_where_nothing_can_be_locked(tmp_path: Path) -> None:
    source, library, place = tmp_path / "nolock.c", tmp_path / "nolock.so", tmp_path / "share"
    source.write_text("#include <errno.h>\nint flock(int fd, int op) { errno = ENOLCK; return -1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    place.mkdir()
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, place],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_one_function_opens_hdf5_files_for_reading() -> None:
    sources = [*(REPOSITORY / "nndefense").rglob("*.py"), *(REPOSITORY / "index_build").rglob("*.py")]
    opened = [
        (path.name, mode)
        for path in sources
        for mode in re.findall(r"h5py\.File\([^,]+, \"(.)\"", path.read_text(encoding="utf-8"))
    ]
    assert ("files.py", "r") in opened
    assert ("rows.py", "w") in opened
    assert {mode for name, mode in opened if name != "files.py"} == {"w"}


@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_builder_without_locks_says_so_and_goes_on(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, what: int) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(parts.fcntl, "flock", refuse)
    told = pytest.warns(UserWarning, match=r"x cannot be locked \(.+\).*nobody else writes there")
    with told, locks.locked(tmp_path / "x"):
        assert (tmp_path / "x" / locks.LOCK).exists()
    assert not (tmp_path / "x").exists()


def test_a_file_that_is_being_written_is_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_hdf5(path, np.zeros((3, 1, 8, 8), np.float32))
    # Another process, since HDF5 knows what its own has open.
    program = f"import h5py, sys; f = h5py.File({str(path)!r}, 'a'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(SourceError, match="another program has locked it: wait") as error:
            open_dataset(f"hdf5:{path}")
        assert "damaged" not in str(error.value)
        writer.communicate()
    assert len(open_dataset(f"hdf5:{path}")) == 3


@contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    held = []
    try:
        # Numbers that were let go of below it.
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE  # noqa: PT017
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in (used, *held):
            os.close(descriptor)


def test_too_many_open_files_are_told_as_such(tmp_path: Path) -> None:
    write(tmp_path / "db", table(20))
    write_hdf5(tmp_path / "x.h5", np.zeros((3, 1, 8, 8), np.float32))
    with h5py.File(tmp_path / "labels.h5", "w") as file:
        file["x"] = 1
    manifest = Manifest.read(tmp_path / "db")
    index = tmp_path / "db" / manifest.index["file"]
    ImageDatabase.open(tmp_path / "db")  # loads what is loaded late
    from nndefense.database.index import FaissIndex

    told = []
    with no_more_files():
        for use in (
            lambda: ImageDatabase.open(tmp_path / "db"),
            lambda: manifest.check_files(tmp_path / "db", checksums=True),
            lambda: rows.StoredRows([tmp_path / "db" / manifest.shards[0]]),
            lambda: FaissIndex.read(index),
            lambda: open_dataset(f"hdf5:{tmp_path}/x.h5"),
            lambda: read_file(tmp_path / "labels.h5"),
            lambda: read_json(tmp_path / "db" / "manifest.json"),
        ):
            try:
                use()
            except (DatabaseError, DataError) as error:  # noqa: PERF203
                told.append(str(error))
    assert len(told) == 7
    assert all("too many files are open: raise the limit" in text for text in told), told


def test_no_more_memory_maps_are_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "db", table(20))

    def refuse(*about: object, **more: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(rows.np, "memmap", refuse)
    with pytest.raises(DatabaseError, match=r"no more memory or memory maps: .*vm.max_map_count"):
        ImageDatabase.open(tmp_path / "db")


def test_what_the_file_is_to_blame_for_is_not_the_systems(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"no HDF5")
    for foreign in (False, True):
        with pytest.raises(OSError, match="signature") as error:
            open_hdf5(tmp_path / "x.h5", foreign=foreign)
        assert not not_read("x", error.value)
        with pytest.raises(FileNotFoundError) as missing:
            open_hdf5(tmp_path / "y.h5", foreign=foreign)
        assert not not_read("x", missing.value)
    assert not not_read("x", ValueError("Permission denied"))
    for code in (errno.EACCES, errno.EIO, errno.ENOLCK, errno.ESTALE):
        text = not_read("x", OSError(code, os.strerror(code)))
        assert os.strerror(code) in text
        assert "damaged" not in text


def test_locks_of_this_machine_still_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with locks.locked(tmp_path / "x"):
            assert (tmp_path / "x" / locks.LOCK).exists()
