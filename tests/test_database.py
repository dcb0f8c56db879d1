"""The image database: exact search, whole files or none, and one-line errors for whatever is missing or damaged."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import BLOCK2, Table, assert_holds, nearest_by_loop, rewrite, table, untrained, write
from hypothesis import given, settings
from hypothesis import strategies as st

from nndefense import files
from nndefense.database import ImageDatabase, mapped_shards, rows, writer
from nndefense.database.index import TorchIndex
from nndefense.database.index_training import build_index
from nndefense.errors import DatabaseError, InputError
from nndefense.features import PCA

BACKENDS = ("faiss", "torch")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 7 rows (16 features and 10 classes)."""
    monkeypatch.setattr(writer, "_SHARD_BYTES", 7 * 4 * (16 + 10 + 8))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) > 20
    return text


# -- search ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 50, 1000])
def test_exact_search_is_brute_force_on_1000_vectors(tmp_path, backend, k):
    data = table(1000, 16)
    write(tmp_path, data)
    queries = table(40, 16, seed=1).features
    distances, found = ImageDatabase.open(tmp_path, backend=backend).search(queries, k)
    wanted, order = nearest_by_loop(queries.numpy(), data.features.numpy(), k)
    assert distances.dtype == torch.float32
    assert found.dtype == torch.int64
    assert [set(row) for row in found.tolist()] == [set(row) for row in order.tolist()]
    np.testing.assert_allclose(distances.numpy(), wanted, rtol=1e-4)
    assert bool((distances.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_duplicates(tmp_path, backend):
    features = torch.tensor([[0.0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [3, 4]])
    data = Table(features, torch.full((7, 10), 0.1), [str(i) for i in range(7)], torch.arange(7))
    write(tmp_path, data)
    database = ImageDatabase.open(tmp_path, backend=backend)
    distances, found = database.search(torch.zeros(3, 2), 7)
    assert torch.allclose(distances, torch.tensor([0.0, 0, 1, 1, 1, 1, 5]).expand(3, 7))
    assert [set(row[:2]) for row in found.tolist()] == [{0, 5}] * 3
    assert [set(row[2:6]) for row in found.tolist()] == [{1, 2, 3, 4}] * 3
    # A cut through a tie takes some of the equals, and no row twice.
    _, found = database.search(torch.zeros(1, 2), 4)
    assert len(set(found[0].tolist())) == 4
    assert set(found[0].tolist()) < {0, 1, 2, 3, 4, 5}
    assert [list(part.shape) for part in database.search(torch.zeros(0, 2), 3)] == [[0, 3], [0, 3]]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 60), d=st.integers(1, 12), q=st.integers(1, 6), piece=st.integers(1, 70), seed=st.integers(0, 999),
    k=st.integers(1, 60), whole=st.booleans(),
)  # fmt: skip
def test_torch_search_is_brute_force_for_any_shape(n, d, q, piece, seed, k, whole):
    generator = np.random.default_rng(seed)
    draw = (lambda *shape: generator.integers(-2, 3, shape)) if whole else (lambda *shape: generator.normal(size=shape))
    data, queries, k = draw(n, d).astype(np.float32), draw(q, d).astype(np.float32), min(k, n)
    distances, found = TorchIndex(lambda first, last: data[first:last], n, piece=piece).search(queries, k)
    wanted, _ = nearest_by_loop(queries, data, k)
    # Small whole numbers make many ties and no rounding: then distances alone are determined.
    np.testing.assert_allclose(distances, wanted, atol=1e-6 if whole else 2e-3)
    own = np.linalg.norm(queries[:, None] - data[found], axis=2)
    np.testing.assert_allclose(own, wanted, atol=1e-6 if whole else 2e-3)
    assert all(len(set(row)) == k for row in found.tolist())


def test_bad_queries(tmp_path):
    database = write(tmp_path, table(20))
    for k in (0, 21, -1):
        with pytest.raises(InputError, match=f"k is {k}, but must be from 1 to the database's 20 rows"):
            database.search(torch.zeros(1, 16), k)
    for shape in ((2, 15), (16,)):
        with pytest.raises(InputError, match="needs N x 16"):
            database.search(torch.zeros(shape), 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="NaN or infinite"):
            database.search(torch.full((1, 16), value), 1)
    with pytest.raises(InputError, match="must be one of auto, faiss, torch"):
        ImageDatabase.open(tmp_path, backend="numpy")


def test_overwriting_removes_no_file_of_others(tmp_path):
    write(tmp_path, table(5))
    for name in ("rows-mine.h5", "film.part", "notes.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "rows-00007.h5.123.part").write_text("left by a writer that was killed")
    write(tmp_path, table(6), overwrite=True)
    assert len(ImageDatabase.open(tmp_path)) == 6
    assert {"rows-mine.h5", "film.part", "notes.txt"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "rows-00007.h5.123.part").exists()


def test_an_inverted_index_finds_the_same_where_it_looks(tmp_path):
    data = table(400)
    database = write(tmp_path, data, index="IVF16,Flat")
    assert database.manifest.index["factory"] == "IVF16,Flat"
    distances, found = database.search(data.features[:50], 1)
    assert torch.equal(found[:, 0], torch.arange(50))
    assert float(distances.max()) < 1e-2
    assert database.search(data.features[:50], 50)[0].shape == (50, 50)
    # Half of the sixteen lists are looked at, so the whole database cannot be asked for.
    with pytest.raises(DatabaseError, match=r"found fewer than 400 rows.*lower k or use an exact index"):
        database.search(data.features[:1], 400)
    # The torch backend searches exactly, whatever the index.
    exact = ImageDatabase.open(tmp_path, backend="torch").search(data.features[:3], 400)[1]
    assert [len(set(row)) for row in exact.tolist()] == [400] * 3


@pytest.mark.parametrize("factory", ["nonsense", "", "IVF8", "PQ7", "IVF500,Flat", "IDMap,Flat"])
def test_an_index_that_cannot_be_built(tmp_path, factory):
    with pytest.raises(InputError, match="FAISS cannot build an index") as error:
        write(tmp_path, table(30), index=factory)
    assert ".cpp" not in one_line(error)
    with pytest.raises(DatabaseError):
        ImageDatabase.open(tmp_path)


def test_a_misspelt_index_is_refused_with_the_first_rows(tmp_path):
    begun = ImageDatabase.create(tmp_path, classifier=untrained(), feature=BLOCK2, index="Flatt")
    with pytest.raises(InputError, match="Flatt"):
        begun.add(*table(3).columns())


# -- writing and reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20, 21])
def test_round_trip_over_shards(tmp_path, small_shards, count):
    data = table(count)
    begun = ImageDatabase.create(
        tmp_path, classifier=untrained(), feature=BLOCK2, data={"name": "n", "fingerprint": "f"}
    )
    # Batches of 1, 2, 3, ... rows do not end where shards do; one of them is empty.
    starts = [0, 0, 1, 3, 6, 10, 15, count]
    for first, last in itertools.pairwise(starts):
        begun.add(*data.cut(first, min(last, count)).columns())
    begun.finish()
    for backend in BACKENDS:
        database = ImageDatabase.open(tmp_path, classifier=untrained(), backend=backend)
        assert_holds(database, data)
    assert [part.name for part in sorted(tmp_path.glob("rows-*"))] == [
        f"rows-{i:05d}.h5" for i in range(-(-count // 7))
    ]
    assert not list(tmp_path.glob("*.part"))
    assert database.feature == BLOCK2
    assert database.classes == untrained().classes
    assert database.manifest.data["name"] == "n"
    # Any shape of row numbers is answered in that shape, also across shards.
    picked = np.array([[count - 1, 0], [0, count // 2]])
    assert torch.equal(database.posteriors(picked), data.posteriors[picked])
    assert torch.equal(database.labels(torch.from_numpy(picked)), data.labels[picked])
    assert database.ids(picked) == [data.ids[i] for i in picked.ravel()]
    assert database.labels(np.asarray(0)).shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_to_a_finished_database(tmp_path, small_shards, backend):
    data = table(40)
    write(tmp_path, data.cut(0, 10))
    database = ImageDatabase.open(tmp_path, backend=backend)
    before = database.fingerprint
    database.add(*data.cut(10, 25).columns())
    assert_holds(database, data.cut(0, 25))
    database.add(*data.cut(25, 40).columns())
    assert_holds(database, data)
    assert_holds(ImageDatabase.open(tmp_path, classifier=untrained()), data)
    assert database.fingerprint != before
    assert len(list(tmp_path.glob("index*"))) == 1


def test_adding_nothing_changes_nothing(tmp_path):
    data = table(10)
    database = write(tmp_path, data)
    for _ in range(3):
        database.add(*data.cut(0, 0).columns())
    database.add(*table(3, seed=1).columns())
    held = database.fingerprint
    for _ in range(3):
        database.add(*data.cut(0, 0).columns())
    assert ImageDatabase.open(tmp_path).fingerprint == held
    assert len(ImageDatabase.open(tmp_path)) == 13


def test_add_checks_its_rows_and_leaves_the_database_alone(tmp_path):
    database = write(tmp_path, table(10))
    with pytest.raises(InputError, match="have 5 dimensions, but the rows before had 16"):
        database.add(*table(3, 5).columns())
    assert_holds(ImageDatabase.open(tmp_path), table(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"posteriors": torch.randn(4, 10)}, "at least 0: give softmax outputs"),
        ({"posteriors": torch.rand(4, 10) + 1}, "sum to 1 in each row: give softmax outputs, not logits"),
        ({"posteriors": torch.full((4, 10), float("nan"))}, "finite"),
        ({"posteriors": torch.full((4, 9), 1 / 9)}, "9 classes, but the classifier has 10"),
        ({"features": torch.full((4, 16), float("inf"))}, "features hold NaN or infinite"),
        ({"features": torch.rand(4, 16).masked_fill(torch.eye(4, 16) > 0, float("nan"))}, "NaN"),
        ({"features": torch.rand(3, 16)}, "M ids and M labels"),
        ({"features": torch.rand(4, 4, 4)}, "features M x d"),
        ({"ids": ["a"]}, "M ids and M labels"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "M ids and M labels"),
    ],
)
def test_rows_that_cannot_be_stored(tmp_path, change, message):
    begun = ImageDatabase.create(tmp_path, classifier=untrained(), feature=BLOCK2)
    good = table(4)
    columns = {"features": good.features, "posteriors": good.posteriors, "ids": good.ids, "labels": good.labels}
    with pytest.raises(InputError, match=message) as error:
        begun.add(**(columns | change))
    one_line(error)


def test_ids_of_any_characters(tmp_path, small_shards):
    names = ["ä/ß.png", "画像/猫.png", "", "🙂", "a b'\"\\", "x" * 300, "caf\udce9.png", "plain", "zwei\tdrei"]
    data = table(9)
    database = write(tmp_path, Table(data.features, data.posteriors, names, data.labels))
    assert database.ids(np.arange(9)) == names
    assert database.labels(np.arange(9)).tolist() == data.labels.tolist()
    assert -1 in data.labels.tolist()


def test_subset_keeps_row_numbers(tmp_path, small_shards):
    data, chosen = table(30), [29, 3, 4, 11, 3]
    write(tmp_path, data)
    for backend in BACKENDS:
        part = ImageDatabase.open(tmp_path, backend=backend).subset(np.array(chosen))
        assert len(part) == 4
        distances, found = part.search(data.features[[3, 29, 0]], 4)
        assert found[:2, 0].tolist() == [3, 29]
        assert [set(row) for row in found.tolist()] == [{3, 4, 11, 29}] * 3
        own = (data.features[found] - data.features[[3, 29, 0]][:, None]).norm(dim=2)
        assert torch.allclose(distances, own, atol=1e-3)
        assert part.ids(found[0]) == [data.ids[int(i)] for i in found[0]]
        with pytest.raises(InputError, match="4 rows"):
            part.search(data.features[:1], 5)
        for refused, arguments in ((part.subset, [np.array([3])]), (part.verify, []), (part.add, data.columns())):
            with pytest.raises(InputError, match="subset of a database cannot be"):
                refused(*arguments)
        for bad in ([], [-1], [30]):
            with pytest.raises(InputError, match="from 0 to 29"):
                ImageDatabase.open(tmp_path, backend=backend).subset(np.array(bad))


def test_opening_reads_no_rows(tmp_path, small_shards, monkeypatch):
    write(tmp_path, table(30))
    monkeypatch.setattr(rows.StoredRows, "slice", lambda *_: pytest.fail("rows were read"))
    monkeypatch.setattr(rows.StoredRows, "take", lambda *_: pytest.fail("rows were read"))
    database = ImageDatabase.open(tmp_path, backend="torch")
    shards = database._table._shards
    assert len(shards._mapped) == len(shards) > 1
    for name in mapped_shards.COLUMNS:
        for number in range(len(shards)):
            assert isinstance(shards[number][name], np.memmap), name
            assert shards[number][name].mode == "r"


def test_a_repacked_shard_that_cannot_be_mapped_is_read(tmp_path):
    data = table(12)
    columns = {
        "features": data.features.numpy(),
        "posteriors": data.posteriors.numpy(),
        "cbw_e": np.zeros(12),
        "cbw_d": np.zeros(12),
        "ids": np.array([name.encode() for name in data.ids]),
        "labels": data.labels.numpy(),
    }
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, chunks=True, compression="gzip")
    packed = rows.StoredRows([tmp_path / "packed.h5"])
    assert np.array_equal(packed.slice("features", 2, 9), columns["features"][2:9])
    assert np.array_equal(packed.take("ids", np.array([[11, 0]])), columns["ids"][[[11, 0]]])


def test_pca_comes_back_and_extractors_do_not_share_it(tmp_path):
    pca = PCA.fit(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), 16, whiten=True)
    classifier = untrained()
    database = write(tmp_path, table(8), pca=pca)
    batch = torch.rand(3, 1, 8, 8)
    first, second = database.extractor(classifier), database.extractor(classifier)
    for name, tensor in pca.state_dict().items():
        assert torch.equal(first.pca.state_dict()[name], tensor)
    before = second(batch)
    first.pca.to(torch.float64).mean.zero_()
    assert torch.equal(second(batch), before)


# -- what is missing, damaged or of somebody else ----------------------------------------------------------------------


def test_another_classifier(tmp_path):
    database = write(tmp_path, table(5), classifier=untrained(0))
    other = untrained(1)
    with pytest.raises(DatabaseError, match="made with another classifier") as error:
        ImageDatabase.open(tmp_path, classifier=other)
    assert other.fingerprint[:12] in one_line(error)
    for use in (database.check_classifier, database.extractor):
        with pytest.raises(DatabaseError, match="another classifier"):
            use(other)


def test_a_finished_database_is_not_overwritten_unasked(tmp_path):
    write(tmp_path, table(5))
    with pytest.raises(DatabaseError, match="already holds a database"):
        write(tmp_path, table(6))
    assert_holds(ImageDatabase.open(tmp_path), table(5))
    (tmp_path / "calibration.json").write_text("{}")
    assert_holds(write(tmp_path, table(6, seed=2), overwrite=True), table(6, seed=2))
    # What was calibrated for the old rows does not hold for the new ones.
    assert not (tmp_path / "calibration.json").exists()
    # From the first moment of a replacement on, the old manifest cannot vouch for new files of the same length.
    ImageDatabase.create(tmp_path, classifier=untrained(), feature=BLOCK2, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_nothing_to_open(tmp_path):
    with pytest.raises(DatabaseError, match="there is no database at"):
        ImageDatabase.open(tmp_path / "none")
    with pytest.raises(DatabaseError, match="holds no finished database"):
        ImageDatabase.open(tmp_path)
    begun = ImageDatabase.create(tmp_path / "x", classifier=untrained(), feature=BLOCK2)
    with pytest.raises(DatabaseError, match="no image was added"):
        begun.finish()
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="cannot be written"):
        ImageDatabase.create(tmp_path / "file", classifier=untrained(), feature=BLOCK2)


@pytest.mark.parametrize("name", ["rows-00000.h5", "index.faiss", "pca.safetensors"])
def test_every_kind_of_damage_to_every_kind_of_file(tmp_path, name):
    pca = PCA.fit(torch.randn(40, 20), 16)
    write(tmp_path, table(9), pca=pca)
    path = tmp_path / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for content, message in (
        (whole[: len(whole) // 2], "is truncated"),
        (b"", "is truncated"),
        (whole + b"x", "is longer than it was"),
        (bytes(changed), r"has changed since it was built \(wrong sha256\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(DatabaseError, match=f"{name} {message}") as error:
            ImageDatabase.open(tmp_path)
        assert "build the database again" in one_line(error)
    path.unlink()
    with pytest.raises(DatabaseError, match=f"{name} is missing"):
        ImageDatabase.open(tmp_path, verify=False)
    path.write_bytes(whole)
    assert_holds(ImageDatabase.open(tmp_path), table(9))


@pytest.mark.parametrize("name", ["rows-00000.h5", "index.faiss"])
def test_damage_of_the_same_length_without_checksums(tmp_path, name):
    write(tmp_path, table(9))
    path = tmp_path / name
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DatabaseError) as error:
        ImageDatabase.open(tmp_path, verify=False, backend="faiss")
    assert name in one_line(error)


def _edit(**changes):
    def edit(manifest):
        for name, value in changes.items():
            if value is None:
                del manifest[name]
            else:
                manifest[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(version=2), "another version"),
        (_edit(version=None), "another version"),
        (_edit(format="something"), "not the manifest of an image database"),
        (_edit(rows=None), "lacks entries"),
        (_edit(files=None), "lacks entries"),
        (_edit(extra=1), "unknown ones"),
        (_edit(rows="many"), "lacks entries or has unknown ones"),
        (_edit(index={"factory": "Flat"}), "lacks entries"),
        (_edit(index={"factory": "Flat", "file": "../other.faiss"}), "lacks entries"),
        (_edit(feature={"layer": "block2", "pooling": "grid0"}), "lacks entries or has unknown ones"),
        (_edit(classifier={}), "lacks entries"),
        (_edit(rows=8), "holds 9 rows but its manifest says 8"),
        (lambda manifest: manifest["files"].update({"../x": manifest["files"]["index.faiss"]}), "lacks entries"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, edit, message):
    write(tmp_path, table(9))
    rewrite(tmp_path / "manifest.json", edit)
    with pytest.raises(DatabaseError, match=message) as error:
        ImageDatabase.open(tmp_path)
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3"])
def test_a_manifest_that_is_none(tmp_path, content):
    write(tmp_path, table(9))
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DatabaseError, match=r"damaged|not the manifest") as error:
        ImageDatabase.open(tmp_path)
    one_line(error)


def test_verify_finds_what_checksums_cannot(tmp_path):
    data = table(9)
    twice = write(tmp_path / "a", Table(data.features, data.posteriors, ["same", "same", *data.ids[2:]], data.labels))
    with pytest.raises(DatabaseError, match="holds 1 ids twice"):
        twice.verify()
    database = write(tmp_path / "b", data)
    assert database.verify() == {"rows": 9, "files": 2, "index_rows": 9}
    database._index = build_index("Flat", 16, data.features.numpy()[:0], [data.features.numpy()[:8]])
    with pytest.raises(DatabaseError, match="holds 8 of 9 rows"):
        database.verify()


# -- interruptions -----------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it."""


def interrupted_at(number: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the ``number``-th file that is put in place (before or after that) be the last thing that happens."""
    placed: list[str] = []
    replace = os.replace

    def cut(source, target):
        placed.append(Path(target).name)
        if len(placed) > number and not after:
            raise PowerCut
        replace(source, target)
        if len(placed) > number:
            raise PowerCut

    monkeypatch.setattr(files.os, "replace", cut)
    return placed


def content(folder: Path) -> str | None:
    """The fingerprint of what opens in a folder, with every checksum right; None where nothing opens."""
    try:
        database = ImageDatabase.open(folder)
    except DatabaseError:
        return None
    database.verify()
    return database.fingerprint


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("job", ["create", pytest.param("overwrite", marks=pytest.mark.slow), "add"])
def test_interrupted_between_any_two_files(tmp_path, small_shards, job, after):
    old, new, pca = table(10, seed=1), table(16, seed=2), PCA.fit(torch.randn(40, 20), 16)

    def work(folder):
        if job == "add":
            ImageDatabase.open(folder).add(*new.columns())
        else:
            write(folder, new, pca=pca, overwrite=job == "overwrite")

    def prepare(folder):
        return None if job == "create" else write(folder, old, pca=pca).fingerprint

    prepare(tmp_path / "done")
    work(tmp_path / "done")
    finished = content(tmp_path / "done")
    for number in itertools.count():
        folder = tmp_path / str(number)
        begun = prepare(folder)
        with pytest.MonkeyPatch.context() as patch:
            placed = interrupted_at(number, after, patch)
            try:
                work(folder)
            except PowerCut:
                pass
            else:
                break
        last = placed[-1]
        unfinished = begun if job == "add" else None
        expected = finished if after and last == "manifest.json" else unfinished
        assert content(folder) == expected, (number, placed)
        # Whatever is left does not stand in the way of the next attempt.
        if (job == "add" and expected == begun) or (job == "create" and expected is None):
            work(folder)
            assert content(folder) == finished
    # Shards (3 of 7 rows), PCA, index and manifest; a database that is added to keeps its PCA.
    assert number == {"create": 6, "overwrite": 6, "add": 5}[job]


@pytest.mark.parametrize("job", ["create", "add"])
def test_a_full_disk_is_one_clean_error(tmp_path, small_shards, monkeypatch, job):
    if job == "add":
        write(tmp_path, table(10))
    before = content(tmp_path)
    fsync = os.fsync

    def work():
        if job == "add":
            ImageDatabase.open(tmp_path).add(*table(10, seed=1).columns())
        else:
            write(tmp_path, table(10))

    for number in range(4):
        calls = itertools.count()

        def full(descriptor, calls=calls, number=number):
            if next(calls) == 2 * number:  # each file is flushed, and then its folder
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(DatabaseError, match=r"cannot be written \(No space left on device\)") as error:
            work()
        one_line(error)
        monkeypatch.setattr(files.os, "fsync", fsync)
        assert content(tmp_path) == before
        assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
@pytest.mark.parametrize("dimension", [16, 400])
def test_the_systems_own_refusal_to_write(tmp_path, dimension):
    import resource

    # 16 dimensions: the shard is refused by HDF5; the second limit lets the shard pass, and FAISS is refused.
    data = table(200, dimension)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    begun = ImageDatabase.create(tmp_path, classifier=untrained(), feature=BLOCK2)
    begun.add(*data.columns())
    limit = 4096
    if dimension == 400:
        write(tmp_path / "size", data)
        limit = (tmp_path / "size" / "index.faiss").stat().st_size - 1000
        begun._shards.close()
        begun._shards.close = lambda: begun._shards._files
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(DatabaseError, match="cannot be written") as error:
            begun.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    one_line(error)
    assert content(tmp_path) is None


KILLED = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from helpers import table, untrained, BLOCK2
from nndefense.database import ImageDatabase, writer
writer._SHARD_BYTES = 7 * 4 * (16 + 10 + 8)
root, trials = Path(sys.argv[1]), int(sys.argv[2])
new, classifier = table(100, seed=2), untrained()

def work(job, folder):
    if job == "add":
        ImageDatabase.open(folder).add(*new.columns())
        return
    begun = ImageDatabase.create(folder, classifier=classifier, feature=BLOCK2, overwrite=job == "overwrite")
    for first in range(0, 100, 9):
        begun.add(*new.cut(first, min(first + 9, 100)).columns())
    begun.finish()

def start(job, name):
    child = os.fork()
    if child == 0:
        work(job, root / job / name)
        os._exit(0)
    return child

for job in ("create", "overwrite", "add"):
    started = time.monotonic()
    os.waitpid(start(job, "done"), 0)
    whole = time.monotonic() - started
    for number, delay in enumerate(np.random.default_rng(0).uniform(0, whole, trials)):
        child = start(job, str(number))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, small_shards):
    trials, jobs, begun = 8, ("create", "overwrite", "add"), None
    for job, name in itertools.product(jobs[1:], ["done", *map(str, range(trials))]):
        begun = write(tmp_path / job / name, table(10, seed=1)).fingerprint
    here = Path(__file__).resolve().parent
    # One process imports everything and forks those that are killed.
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(trials)],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    codes = [int(line) for line in run.stdout.split()]
    assert len(codes) == len(jobs) * trials
    for job in jobs:
        killed, codes = codes[:trials], codes[trials:]
        assert -signal.SIGKILL in killed
        finished = content(tmp_path / job / "done")
        found = [content(tmp_path / job / str(number)) for number in range(trials)]
        # The old rows, the new ones, or nothing: never a mixture; and an added-to database never stops opening.
        allowed = {"create": {None, finished}, "overwrite": {None, begun, finished}, "add": {begun, finished}}[job]
        assert finished not in (None, begun)
        assert set(found) <= allowed
        assert all(fingerprint == finished for fingerprint, code in zip(found, killed, strict=True) if code == 0)
