"""Databases of more shards than a process may map: opened, read and searched, and never mixed with another one's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import table, write
from hypothesis import given, settings
from hypothesis import strategies as st
from served import environment

from nndefense.database import ImageDatabase, mapped_shards, writer
from nndefense.database.rows import StoredRows, write_shard
from nndefense.errors import DatabaseError


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of 30 rows in ten shards."""
    monkeypatch.setattr(writer, "_SHARD_BYTES", 3 * 4 * (16 + 10 + 8))
    write(tmp_path, table(30))
    return tmp_path


def few(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(mapped_shards, "room_for_shards", lambda: room)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_few_maps_read_what_many_do(tmp_path_factory, sizes, room, random) -> None:
    folder, rows = tmp_path_factory.mktemp("shards"), sum(sizes)
    draws = np.random.default_rng(random.randrange(1 << 30))
    features = draws.normal(size=(rows, 3)).astype(np.float16 if random.random() < 0.5 else np.float32)
    # Ids of other lengths, so that columns begin elsewhere.
    ids = np.array([b"x" * random.randrange(1, 40) + str(i).encode() for i in range(rows)])
    paths, start = [], 0
    for number, size in enumerate(sizes):
        here = np.arange(start, start + size)
        columns = {
            "features": features[here], "posteriors": draws.random((size, 2)).astype(np.float32),
            "cbw_e": here.astype(np.float32), "cbw_d": here.astype(np.float32),
            "ids": np.array(ids[here].tolist()), "labels": here,
        }  # fmt: skip
        write_shard(folder / f"{number}.h5", columns)
        paths.append(folder / f"{number}.h5")
        start += size
    whole = StoredRows(paths)
    with pytest.MonkeyPatch.context() as patch:
        few(patch, room)
        known = StoredRows(paths, sizes)
        for part in (known, StoredRows(paths)):
            assert len(part) == rows
            asked = draws.integers(0, rows, (4, 3))
            for name in mapped_shards.COLUMNS:
                np.testing.assert_array_equal(part.take(name, asked), whole.take(name, asked))
                nothing = part.take(name, asked[:0])
                assert nothing.shape == (0, 3, *whole.take(name, asked).shape[2:])
                first = int(draws.integers(0, rows))
                last = int(draws.integers(first, rows + 1))
                np.testing.assert_array_equal(part.slice(name, first, last), whole.slice(name, first, last))
                np.testing.assert_array_equal(np.concatenate(list(part.pieces(name, 4))), whole.slice(name, 0, rows))
            assert len(part._shards._mapped) <= room
        known.hold()
        for path in paths:
            path.unlink()
        np.testing.assert_array_equal(known.take("features", asked), whole.take("features", asked))


def test_a_shard_of_another_database_in_its_place_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, 2)
    database = ImageDatabase.open(shards)
    names = database.manifest.shards
    assert len(names) > 3
    expected = database.features(np.arange(len(database)))
    # The same bytes, so that nothing but the file's identity can tell.
    target = shards / names[1]
    copy = target.with_suffix(".copy")
    copy.write_bytes(target.read_bytes())
    copy.replace(target)
    with pytest.raises(DatabaseError, match="is another file than the one that was opened: open the database again"):
        database.features(np.arange(len(database)))
    again = ImageDatabase.open(shards)
    np.testing.assert_array_equal(again.features(np.arange(len(again))), expected)
    # Where there is room for all, an open database depends on no file.
    few(monkeypatch, 100)
    database = ImageDatabase.open(shards)
    for name in names:
        (shards / name).unlink()
    np.testing.assert_array_equal(database.features(np.arange(len(database))), expected)


def test_sizes_that_the_manifest_does_not_say_are_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ImageDatabase.open(shards).manifest.shards
    for room in (2, 100):
        few(monkeypatch, room)
        with pytest.raises(DatabaseError, match="rows, but its manifest says 2"):
            StoredRows([shards / name for name in names], [2] * len(names)).slice("labels", 0, 5)


PROGRAM = """
import json, resource, sys, time
from pathlib import Path
folder, shards, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
import faiss, h5py, numpy as np, torch
torch.set_num_threads(1)
from helpers import untrained
from index_build import build_database
from nndefense.database import ImageDatabase
from nndefense.datasets import open_dataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.features import FeatureSpec
began = time.monotonic()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
times, images = {}, np.random.default_rng(0).random((2 * shards, 1, 8, 8)).astype(np.float32)
with h5py.File(folder / "images.h5", "w") as file:
    file["images"], file["labels"] = images, np.arange(2 * shards) % 10
classifier, source = untrained(), open_dataset(f"hdf5:{folder / 'images.h5'}")
before = peak()
build_database(source, classifier, FeatureSpec("block2", pca=8), folder / "db", shard_rows=2, batch_size=64,
               pca_sample=100, progress=False)
times["build"] = time.monotonic() - began
began = time.monotonic()
database = ImageDatabase.open(folder / "db", verify=True)
times["open and verify files"] = time.monotonic() - began
began = time.monotonic()
assert database.verify()["rows"] == 2 * shards
times["verify"] = time.monotonic() - began
defense = NearestNeighborDefense(classifier, database, 10)
defense(torch.from_numpy(images[:64]))
began = time.monotonic()
found = defense.explain(torch.from_numpy(images[:64]))
times["64 answers"] = time.monotonic() - began
assert [row[0] for row in np.asarray(found.rows).tolist()] == list(range(64)), found.rows[:5]
seconds = {name: round(value, 2) for name, value in times.items()}
print(json.dumps({"shards": len(database.manifest.shards), "MB": peak() - before, **seconds}))
"""


def in_a_child(folder: Path, shards: int, limit: int, seconds: int) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(shards), str(limit)],
        env={**environment(), "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"},
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, float] = json.loads(run.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "limit", "megabytes"), [(150, 64, 300), (10_000, 256, 800)])
def test_more_shards_than_files_may_be_open(tmp_path: Path, shards: int, limit: int, megabytes: int) -> None:
    found = in_a_child(tmp_path, shards, limit, 1800)
    print(found)
    assert found["shards"] == shards
    # Of the whole build: some 35 KB a shard, most of it for the virtual data sets that show them as one table.
    assert found["MB"] < megabytes
