"""The patch database: the job that cuts it, the search, and what a damaged or unfinished one says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digits, nearest_by_loop, rewrite, table, write
from typer.testing import CliRunner

from index_build.patches import build_patches, draw_places
from nndefense.cli import app
from nndefense.datasets import ImageDataset
from nndefense.datasets.arrays import ArrayDataset
from nndefense.defenses.quilting import PatchDatabase, PatchManifest, quilt, write_patches, writer
from nndefense.defenses.quilting import patches as module
from nndefense.defenses.quilting.patches import FileEntry
from nndefense.errors import DatabaseError, DataError, InputError

# What SplitMix64 gives for seed 0, modulo 1000 x 24 x 24 places.
EXPECTED_DRAW = [[774, 16, 23], [810, 20, 15], [837, 22, 14], [865, 8, 6]]


def made_up(images: np.ndarray) -> ImageDataset:
    return ArrayDataset(images, np.zeros(len(images), np.int64), name="made-up", classes=["a"])


def colour(count: int = 30, height: int = 12, width: int = 10) -> ImageDataset:
    return made_up(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def build(dataset: ImageDataset, out: Path, **options) -> PatchDatabase:
    return build_patches(dataset, out, progress=False, **options)


@pytest.fixture
def small(tmp_path: Path) -> PatchDatabase:
    return build(colour(), tmp_path / "patches", patches=400, batch_size=7)


# -- cutting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "patches"), [(30, 400), (30, 900), (5, 10_000)])
def test_every_patch_is_where_it_is_said_to_come_from(tmp_path, images, patches):
    dataset = colour(images)
    database = build(dataset, tmp_path, patches=patches, batch_size=7)
    origins = database.origins()
    assert len(database) == min(patches, images * 8 * 6)
    assert len(np.unique(origins, axis=0)) == len(database)
    found = database.pixels(torch.arange(len(database)))
    for patch, (image, y, x) in zip(found, origins.tolist(), strict=True):
        assert torch.equal(patch, dataset[image][0][:, y : y + 5, x : x + 5])
    assert database.manifest.storage == "uint8"


@pytest.mark.parametrize("count", [3000, 30_000])
def test_places_are_drawn_evenly(count):
    places = draw_places(100, 20, 30, count, seed=3)
    assert places.shape == (count, 3)
    assert len(np.unique(places, axis=0)) == count
    for column, size in enumerate((100, 20, 30)):
        counts = np.bincount(places[:, column], minlength=size)
        assert len(counts) == size
        # Five standard deviations of a draw with replacement, which varies more.
        assert abs(counts - count / size).max() < 5 * np.sqrt(count / size)


def test_the_draw_is_the_same_on_every_machine():
    assert draw_places(1000, 24, 24, 4, seed=0).tolist() == EXPECTED_DRAW
    assert draw_places(1000, 24, 24, 4, seed=1).tolist() != EXPECTED_DRAW
    assert draw_places(2, 1, 2, 9, seed=0).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_two_builds_are_equal_and_another_seed_is_not(tmp_path):
    first, again = (
        build(colour(), tmp_path / name, patches=300, batch_size=size) for name, size in (("a", 4), ("b", 64))
    )
    other = build(colour(), tmp_path / "c", patches=300, seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_images_of_more_than_8_bits_are_kept_whole(tmp_path):
    pixels = np.random.default_rng(0).random((20, 1, 8, 8)).astype(np.float32)
    pixels[:10] = np.round(pixels[:10] * 255) / np.float32(255)
    dataset = made_up(pixels)
    database = build(dataset, tmp_path / "a", patches=200, batch_size=4)
    assert database.manifest.storage == "float32"
    for patch, (image, y, x) in zip(database.pixels(torch.arange(200)), database.origins().tolist(), strict=True):
        assert torch.equal(patch, dataset[image][0][:, y : y + 5, x : x + 5])
    rounded = build(dataset, tmp_path / "b", patches=200, storage="uint8")
    assert rounded.manifest.storage == "uint8"
    difference = rounded.pixels(torch.arange(200)) - database.pixels(torch.arange(200))
    assert difference.abs().max() <= 0.5 / 255 + 1e-6
    assert build(colour(), tmp_path / "c", patches=9, storage="float32").manifest.storage == "float32"
    assert build(digits("train"), tmp_path / "d", patches=50, side=3).manifest.storage == "float32"


# -- searching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_search_is_exact(small, backend):
    database = PatchDatabase.open(small.path, backend=backend)
    queries = torch.rand(60, 75, generator=torch.Generator().manual_seed(0))
    distances, rows = database.search(queries, 7)
    vectors = database.pixels(torch.arange(400)).flatten(1)
    expected, order = nearest_by_loop(queries.numpy(), vectors.numpy(), 7)
    assert np.array_equal(rows.numpy(), order)
    assert np.allclose(distances.numpy(), expected, atol=1e-5)
    distances, rows = database.search(vectors, 1)
    assert torch.equal(rows[:, 0], torch.arange(400))
    assert (distances == 0).all()
    assert database.search(vectors[:0], 3)[1].shape == (0, 3)
    assert sorted(database.search(queries[:1], 400)[1][0].tolist()) == list(range(400))


def test_pieces_of_a_search_make_no_difference(small, monkeypatch):
    queries = torch.rand(50, 75, generator=torch.Generator().manual_seed(0))
    for backend in ("faiss", "torch"):
        database = PatchDatabase.open(small.path, backend=backend)
        whole = database.search(queries, 4)[1]
        monkeypatch.setattr(module, "_QUERIES", 7)
        monkeypatch.setattr(module, "_EXACT_QUERIES", 7)
        assert torch.equal(database.search(queries, 4)[1], whole)
        monkeypatch.undo()


def test_lists_with_too_few_patches_are_made_up_for(tmp_path):
    build(colour(), tmp_path / "a", patches=400, index="IVF50,Flat", probes=1)
    database = PatchDatabase.open(tmp_path / "a")
    assert database.manifest.index == {"factory": "IVF50,Flat", "metric": "l2", "probes": 1}
    queries = torch.rand(40, 75, generator=torch.Generator().manual_seed(0))
    rows = database.search(queries, 100)[1]
    assert torch.equal(rows, PatchDatabase.open(tmp_path / "a", backend="torch").search(queries, 100)[1])
    few = database.search(queries, 1)[1]
    all_lists = PatchDatabase.open(tmp_path / "a", probes=50).search(queries, 1)[1]
    assert torch.equal(all_lists[:, 0], rows[:, 0])
    assert (few != all_lists).any()


def test_the_index_suits_the_number_of_patches(tmp_path):
    assert writer.index_for(32_768, 75) == "Flat"
    assert writer.index_for(100_000, 25) == "IVF1024,Flat"
    assert writer.index_for(1_000_000, 75) == "PCA32,IVF4096,Flat"


def test_without_faiss_the_search_is_exact(tmp_path, monkeypatch):
    for place in (module, writer):
        monkeypatch.setattr(place, "faiss_available", lambda: False)
    database = build(colour(), tmp_path, patches=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "patches.h5"]
    assert database.manifest.index["factory"] is None
    vectors = database.pixels(torch.arange(300)).flatten(1)
    assert torch.equal(database.search(vectors, 1)[1][:, 0], torch.arange(300))
    picture = torch.rand(1, 3, 11, 11)
    assert quilt.Quilt(database)(picture).shape == picture.shape
    monkeypatch.undo()
    assert PatchDatabase.open(tmp_path)._index is None
    with pytest.raises(DatabaseError, match="without FAISS"):
        PatchDatabase.open(tmp_path, backend="faiss")


def test_questions_that_cannot_be_answered(small):
    with pytest.raises(InputError, match="400 patches"):
        small.search(torch.rand(2, 75), 401)
    with pytest.raises(InputError, match="N x 75"):
        small.search(torch.rand(2, 74), 1)
    with pytest.raises(InputError, match="backend"):
        PatchDatabase.open(small.path, backend="annoy")
    with pytest.raises(InputError, match="no lists"):
        PatchDatabase.open(small.path, probes=4)
    with pytest.raises(InputError, match="exact"):
        PatchDatabase.open(small.path, probes=4, backend="torch")


# -- files ------------------------------------------------------------------------------------------------------


def change_manifest(folder: Path, **entries) -> None:
    rewrite(folder / "manifest.json", lambda manifest: manifest.update(entries))


@pytest.mark.parametrize("name", ["patches.h5", "index.faiss"])
def test_a_changed_file_is_not_read(small, name):
    path = small.path / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DatabaseError, match="wrong sha256"):
        PatchDatabase.open(small.path)
    path.write_bytes(whole[:-1])
    with pytest.raises(DatabaseError, match="truncated"):
        PatchDatabase.open(small.path)
    path.unlink()
    with pytest.raises(DatabaseError, match="is missing"):
        PatchDatabase.open(small.path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "nndefense-database"}, "not the manifest of a patch database"),
        ({"version": 2}, "another version"),
        ({"count": "400"}, "lacks entries"),
        ({"count": 0}, "lacks entries"),
        ({"storage": "int64"}, "lacks entries"),
        ({"extra": 1}, "lacks entries"),
        ({"files": {"../patches.h5": {"sha256": "", "bytes": 1}}}, "lacks entries"),
        ({"data": {}}, "lacks entries"),
        ({"count": 401}, "its manifest says 401 x 3 x 5 x 5"),
        ({"storage": "float32"}, "but its manifest says"),
    ],
)
def test_a_manifest_that_does_not_fit(small, entries, message):
    change_manifest(small.path, **entries)
    with pytest.raises(DatabaseError, match=message):
        PatchDatabase.open(small.path)


def test_files_with_right_checksums_and_wrong_content(tmp_path):
    one, two = (build(colour(), tmp_path / str(count), patches=count) for count in (100, 200))
    (one.path / "index.faiss").write_bytes((two.path / "index.faiss").read_bytes())
    files = dict(one.manifest.files) | {"index.faiss": FileEntry.of(one.path / "index.faiss")}
    change_manifest(one.path, files={name: vars(entry) for name, entry in files.items()})
    with pytest.raises(DatabaseError, match="200 vectors"):
        PatchDatabase.open(one.path)
    (two.path / "patches.h5").write_bytes(b"not HDF5")
    files = dict(two.manifest.files) | {"patches.h5": FileEntry.of(two.path / "patches.h5")}
    change_manifest(two.path, files={name: vars(entry) for name, entry in files.items()})
    with pytest.raises(DatabaseError, match="not a file of patches"):
        PatchDatabase.open(two.path)


def test_folders_that_hold_none(tmp_path):
    with pytest.raises(DatabaseError, match="no patch database"):
        PatchDatabase.open(tmp_path / "nowhere")
    with pytest.raises(DatabaseError, match="no finished patch database"):
        PatchDatabase.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DatabaseError, match="damaged"):
        PatchDatabase.open(tmp_path)


def test_nothing_is_overwritten_unasked(small, tmp_path):
    before = small.fingerprint
    with pytest.raises(DatabaseError, match="already holds a patch database"):
        build(colour(), small.path, patches=100)
    assert PatchDatabase.open(small.path).fingerprint == before
    assert len(build(colour(), small.path, patches=100, overwrite=True)) == 100
    database = write(tmp_path / "images", table(30))
    with pytest.raises(DatabaseError, match="something else"):
        build(colour(), tmp_path / "images", patches=100, overwrite=True)
    database.verify()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is in its place"):
        build(colour(), tmp_path / "file", patches=100)


@pytest.mark.parametrize("step", ["_write_hdf5", "index", "manifest"])
def test_an_interrupted_build_does_not_open(small, monkeypatch, step):
    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    if step == "_write_hdf5":
        monkeypatch.setattr(writer, step, killed)
    elif step == "index":
        monkeypatch.setattr(writer.FaissIndex, "write", killed)
    else:
        monkeypatch.setattr(PatchManifest, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        build(colour(), small.path, patches=100, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(DatabaseError, match="no finished patch database"):
        PatchDatabase.open(small.path)
    assert len(build(colour(), small.path, patches=100)) == 100
    assert len(list(small.path.iterdir())) == 3


def test_a_full_disk_is_told_in_a_line(small, monkeypatch):
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_hdf5", full)
    with pytest.raises(DatabaseError, match="No space left on device"):
        build(colour(), small.path, patches=100, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 11}, "from 1 to 10"),
        ({"side": 0}, "from 1 to 10"),
        ({"patches": 0}, "at least 1 patch"),
        ({"storage": "int8"}, "storage"),
        ({"index": "Flatt"}, "FAISS cannot build"),
        ({"index": "IVF4000,Flat"}, "FAISS cannot build"),
        ({"probes": 3}, "no lists"),
        ({"probes": 0, "index": "IVF4,Flat"}, "probes"),
    ],
)
def test_builds_that_cannot_be(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build(colour(), tmp_path, **({"patches": 200} | options))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_data_set(tmp_path):
    with pytest.raises(DataError, match="empty"):
        build(colour().subset([]), tmp_path)


def test_patches_that_are_none(tmp_path):
    data = {"name": "", "fingerprint": "", "images": 1}
    for patches, origins in ((torch.rand(0, 1, 5, 5), 0), (torch.rand(2, 1, 5, 4), 2), (torch.rand(2, 1, 5, 5) + 1, 2)):
        with pytest.raises(InputError):
            write_patches(tmp_path, patches, np.zeros((origins, 3), np.int64), data=data, seed=None)
    with pytest.raises(InputError, match="origins"):
        write_patches(tmp_path, torch.rand(2, 1, 5, 5), np.zeros((3, 3), np.int64), data=data, seed=None)


# -- command ----------------------------------------------------------------------------------------------------


def test_the_command_builds_and_describes(tmp_path):
    command = app.build()

    def run(*words: object) -> object:
        return CliRunner().invoke(command, ["index", *map(str, words)], catch_exceptions=True)

    asked = ("patches", "--dataset", "digits:train", "--patches", 300, "--side", 3, "--limit", 40, "--quiet")
    done = run(*asked, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["count"], said["shape"], said["data"]["images"]) == (300, [1, 3, 3], 40)
    assert said["data"]["specs"] == ["digits:train"]
    info = run("patches-info", tmp_path / "a")
    assert "300 patches 1 x 3 x 3, float32" in info.stdout
    assert isinstance(run(*asked, "--out", tmp_path / "a").exception, DatabaseError)
    shaped = run(*asked, "--out", tmp_path / "b", "--input-shape", "3,16,16", "--json")
    assert json.loads(shaped.stdout)["shape"] == [3, 3, 3]
