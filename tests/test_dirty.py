"""Dirty collections: of each file exactly the picture or exactly the rejection, from every kind of source."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dirty import HEIGHT, WIDTH, Dirt, catalogue, encoded, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from index_build.reader import read
from nndefense.datasets import (
    REJECTED_KINDS,
    ArrayDataset,
    BadImage,
    ImageDataset,
    SourceError,
    concatenate,
    open_dataset,
    pixel_digests,
)
from nndefense.datasets.store import LocalStore
from nndefense.errors import DataError, InputError

SIZE = (HEIGHT, WIDTH)
CATALOGUE = catalogue()
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:.*EXIF.*:UserWarning")


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue as an image folder: its folders are the classes."""
    root = tmp_path_factory.mktemp("dirty")
    for name, dirt in CATALOGUE.items():
        file = root / (name if "/" in name else f"clean/{name}")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(dirt.data)
    return root


def key_of(item: str) -> str:
    return item.removeprefix("clean/")


def check(dirt: Dirt, image: torch.Tensor) -> None:
    assert dirt.picture is not None
    found = image.permute(1, 2, 0).numpy().astype(np.float64) * 255
    assert found.shape == dirt.picture.shape
    assert np.abs(found - dirt.picture).max() <= dirt.tolerance + 1e-4


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_file_of_the_catalogue(name: str, dirty: Path) -> None:
    dataset = open_dataset(f"imagefolder:{dirty}", size=SIZE)
    dirt, row = CATALOGUE[name], dataset.index_of(name if "/" in name else f"clean/{name}")
    reading = dataset.read_each([row])
    if dirt.picture is not None:
        assert reading.rejected == ()
        assert reading.rows.tolist() == [row]
        check(dirt, reading.images[0])
        assert torch.equal(dataset.batch([row])[0], reading.images)
        return
    assert len(reading.images) == len(reading.ids) == len(reading.labels) == 0
    (rejected,) = reading.rejected
    assert (rejected.row, rejected.id, rejected.kind) == (row, dataset.ids[row], dirt.kind)
    assert dirt.kind in REJECTED_KINDS
    assert dirt.reason in rejected.reason
    # A sentence for people: one line, no path, no class of an exception.
    assert "\n" not in rejected.reason
    assert str(dirty) not in rejected.reason
    assert not any(word in rejected.reason for word in ("Error", "Exception", "Traceback", "<_io"))
    with pytest.raises(BadImage) as error:
        dataset.batch([row])
    assert (error.value.kind, error.value.reason) == (rejected.kind, rejected.reason)
    assert str(dirty / dataset.ids[row]) in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.kind, again.reason) == (str(error.value), error.value.kind, error.value.reason)


def test_the_catalogue_has_every_kind_of_rejection() -> None:
    # The rest needs more than bytes: see the tests of permissions, vanished files, sizes and bad items.
    assert {dirt.kind for dirt in CATALOGUE.values() if dirt.kind} | {
        "unreadable", "missing", "other size", "not finite"
    } == set(REJECTED_KINDS)  # fmt: skip


def as_tar(root: Path, names: list[str]) -> str:
    with tarfile.open(root / "dirty.tar", "w") as tar:
        for name in names:
            # Tar keys end at the first dot.
            info = tarfile.TarInfo(f"{name.replace('.', '_')}.{name.rpartition('.')[2]}")
            info.size = len(CATALOGUE[name].data)
            tar.addfile(info, io.BytesIO(CATALOGUE[name].data))
    return f"webdataset:{root / 'dirty.tar'}"


def as_parquet(root: Path, names: list[str]) -> str:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": CATALOGUE[name].data, "path": None} for name in names]
    parquet.write_table(arrow.table({"image": cells, "id": names}), root / "dirty.parquet", row_group_size=7)
    return f"parquet:{root / 'dirty.parquet'}"


def as_list(root: Path, names: list[str]) -> str:
    for number, name in enumerate(names):
        (root / f"{number:03d}.bin").write_bytes(CATALOGUE[name].data)
    lines = [f"{number:03d}.bin,{name}" for number, name in enumerate(names)]
    (root / "dirty.csv").write_text("\n".join(["path,id", *lines]))
    return f"files:{root / 'dirty.csv'}"


def as_zip(root: Path, names: list[str]) -> str:
    pytest.importorskip("fsspec")
    for name in names:
        file = root / "photos" / (name if "/" in name else f"clean/{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(CATALOGUE[name].data)
    shutil.make_archive(str(root / "photos"), "zip", root, "photos")
    return f"imagefolder:zip://photos::{root / 'photos.zip'}"


@pytest.mark.parametrize("form", [as_tar, as_parquet, as_list, as_zip], ids=lambda form: form.__name__)
def test_every_source_treats_dirt_alike(form, dirty: Path, tmp_path: Path) -> None:
    folder = open_dataset(f"imagefolder:{dirty}", size=SIZE)
    names = [key_of(item) for item in folder.ids]
    dataset = open_dataset(form(tmp_path, names), size=SIZE)
    expected, found = folder.read_each(range(len(names))), dataset.read_each(range(len(names)))
    assert found.rows.tolist() == expected.rows.tolist()
    assert torch.equal(found.images, expected.images)
    assert [(r.row, r.kind, r.reason) for r in found.rejected] == [(r.row, r.kind, r.reason) for r in expected.rejected]
    assert [r.id for r in found.rejected] == [dataset.ids[r.row] for r in found.rejected]
    assert {r.row for r in found.rejected} == {n for n, name in enumerate(names) if CATALOGUE[name].kind}


# --- dirt that does not lie in the bytes


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone can read; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "c").mkdir(mode=0o755)
        for number in range(4):
            (root / "c" / f"{number}.png").write_bytes(encoded(noise(number), "PNG"))
            (root / "c" / f"{number}.png").chmod(0o644)
        yield root


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_file_that_may_not_be_read(open_folder: Path) -> None:
    (open_folder / "c" / "2.png").chmod(0)
    with nobody():
        dataset = open_dataset(f"imagefolder:{open_folder}", size=SIZE)
        reading = dataset.read_each(range(4))
    assert reading.rows.tolist() == [0, 1, 3]
    (rejected,) = reading.rejected
    assert (rejected.id, rejected.kind, rejected.reason) == (
        "c/2.png",
        "unreadable",
        "there is no permission to read it",
    )


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_folder_that_may_not_be_listed_is_an_error(open_folder: Path) -> None:
    (open_folder / "c").chmod(0)
    with nobody(), pytest.raises(DataError, match=r"cannot list the folder .*check its permissions"):
        open_dataset(f"imagefolder:{open_folder}", size=SIZE)
    (open_folder / "c").chmod(0o755)


def test_a_file_that_vanishes_and_a_source_that_vanishes(open_folder: Path) -> None:
    dataset = open_dataset(f"imagefolder:{open_folder}", size=SIZE)
    (open_folder / "c" / "1.png").unlink()
    reading = dataset.read_each(range(4))
    assert reading.rows.tolist() == [0, 2, 3]
    assert [(r.id, r.kind, r.reason) for r in reading.rejected] == [("c/1.png", "missing", "there is no such file")]
    # An empty folder in its place is what a disk leaves that was taken away.
    shutil.rmtree(open_folder / "c")
    for _ in range(2):
        with pytest.raises(SourceError, match="whole source is out of reach; bring it back") as error:
            dataset.read_each(range(4))
        assert "\n" not in str(error.value)
        with pytest.raises(SourceError):
            list(read(dataset, np.arange(4), 2, workers=2))


def test_links_and_pipes_among_the_images(open_folder: Path) -> None:
    (open_folder / "c" / "4.png").symlink_to(open_folder / "nowhere.png")
    (open_folder / "c" / "5.png").symlink_to(open_folder / "c" / "0.png")
    os.mkfifo(open_folder / "c" / "6.png")
    (open_folder / "c" / "7.png").mkdir()
    dataset = open_dataset(f"imagefolder:{open_folder}", size=SIZE)
    assert len(dataset) == 7
    reading = dataset.read_each(range(7))
    assert reading.rows.tolist() == [0, 1, 2, 3, 5]
    assert torch.equal(reading.images[0], reading.images[4])
    assert [(r.kind, r.reason) for r in reading.rejected] == [
        ("missing", "there is no such file"),
        ("unreadable", "it cannot be read (not a regular file)"),
    ]
    # Nor do they keep a build from telling what it was made of.
    assert len(dataset.fingerprint) == 64
    late = open_dataset(f"imagefolder:{open_folder}", size=SIZE)
    assert late.fingerprint == dataset.fingerprint
    late = open_dataset(f"imagefolder:{open_folder}", size=SIZE)
    (open_folder / "c" / "4.png").unlink()
    with pytest.raises(DataError, match=r"cannot find .*4\.png any more"):
        _ = late.fingerprint


def test_the_machine_is_at_fault_not_the_image(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(f"imagefolder:{open_folder}", size=SIZE)

    def fails(error: BaseException) -> None:
        def read_file(self: LocalStore, path: str, start: int = 0, count: int | None = None) -> bytes:
            raise error

        monkeypatch.setattr(LocalStore, "read", read_file)

    fails(OSError(24, "Too many open files"))
    with pytest.raises(SourceError, match="Too many open files"):
        dataset.read_each([0])
    fails(MemoryError())
    with pytest.raises(SourceError, match="not enough memory"):
        dataset.read_each([0])
    fails(OSError(5, "Input/output error"))
    assert [r.reason for r in dataset.read_each([0]).rejected] == ["it cannot be read (Input/output error)"]
    monkeypatch.undo()
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(SourceError, match="not enough memory"):
        dataset.read_each([0])


def test_an_absurdly_large_file_is_not_read(open_folder: Path) -> None:
    with (open_folder / "c" / "9.png").open("wb") as file:
        file.truncate((1 << 30) + 1)  # no block of it is on the disk
    reading = open_dataset(f"imagefolder:{open_folder}", size=SIZE).read_each([4])
    assert [(r.kind, r.reason) for r in reading.rejected] == [
        ("too large", "it has 1,073,741,825 bytes, more than the 1,073,741,824 allowed for one picture")
    ]


def test_without_a_size_the_first_good_image_gives_it(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(b"")
    for number, height in enumerate((5, 5, 7), 1):
        (tmp_path / "c" / f"{number}.png").write_bytes(encoded(noise(0, height, 6), "PNG"))
    dataset = open_dataset(f"imagefolder:{tmp_path}")
    assert dataset.shape == (3, 5, 6)
    reading = dataset.read_each(range(4))
    assert reading.rows.tolist() == [1, 2]
    assert [(r.row, r.kind) for r in reading.rejected] == [(0, "empty"), (3, "other size")]
    assert reading.rejected[1].reason == (
        "it is 7 x 6 pixels, but the first image is 5 x 6: give a size that all images are brought to (--size)"
    )
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(b"")
    with pytest.raises(BadImage, match="empty"):
        open_dataset(f"imagefolder:{tmp_path}")
    sized = open_dataset(f"imagefolder:{tmp_path}", size=4)
    assert len(sized.read_each([0]).rejected) == 1


# --- read_each of every kind of data set


class Moody(ImageDataset):
    """A data set that knows nothing of read_each and fails for some rows."""

    def __init__(self, count: int, bad: set[int]) -> None:
        super().__init__(
            name="moody", classes=["a"], shape=(1, 2, 2), ids=[f"m/{n}" for n in range(count)], labels=[0] * count
        )
        self.bad = bad

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        for row in rows.tolist():
            if row in self.bad:
                raise DataError(f"row {row} is moody")
        return torch.from_numpy(rows).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 255

    def _digest(self) -> str:
        return "0" * 64


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda count: st.tuples(
            st.just(count),
            st.sets(st.integers(0, count - 1)),
            st.lists(st.integers(-count, count - 1), max_size=60),
        )
    ),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_reading_is_the_same_however_it_is_cut(
    case: tuple[int, set[int], list[int]], batch_size: int, workers: int, ahead: int
) -> None:
    count, bad, positions = case
    dataset = Moody(count, bad)
    asked = [position % count for position in positions]
    whole = dataset.read_each(positions)
    assert whole.rows.tolist() == [row for row in asked if row not in bad]
    assert [r.row for r in whole.rejected] == [row for row in asked if row in bad]
    assert all(r.reason == f"row {r.row} is moody" and r.id == f"m/{r.row}" for r in whole.rejected)
    assert (whole.images[:, 0, 0, 0] * 255).round().long().tolist() == whole.rows.tolist()
    batches = list(read(dataset, np.array(positions, dtype=np.int64), batch_size, workers=workers, ahead=ahead))
    assert len(batches) == -(-len(positions) // batch_size)
    for batch, start in zip(batches, range(0, len(positions), batch_size), strict=True):
        part = asked[start : start + batch_size]
        assert batch.positions.tolist() == [row for row in part if row not in bad]
        assert [r.row for r in batch.rejected] == [row for row in part if row in bad]
        assert batch.ids == [f"m/{row}" for row in batch.positions]
        assert len(batch.images) == len(batch.labels) == len(batch.digests) == len(batch.ids)
    if batches:
        assert torch.equal(torch.cat([batch.images for batch in batches]), whole.images)
        assert np.array_equal(np.concatenate([b.digests for b in batches]), pixel_digests(whole.images))


def test_subsets_joins_and_transformed_ones_pass_rejections_on(open_folder: Path) -> None:
    (open_folder / "c" / "1.png").write_bytes(b"")
    dataset = open_dataset(f"imagefolder:{open_folder}", size=(2, 2), channels=1)
    subset = dataset.subset([3, 1, 0])
    reading = subset.read_each([0, 1, 2])
    assert reading.ids == ["c/3.png", "c/0.png"]
    assert [(r.row, r.id) for r in reading.rejected] == [(1, "c/1.png")]
    joined = concatenate([Moody(3, {2}), subset])
    reading = joined.read_each([5, 4, 2, 0, 3])
    assert reading.ids == ["c/0.png", "m/0", "c/3.png"]
    assert torch.equal(reading.images[0], dataset[0][0])
    assert [(r.row, r.id, r.kind) for r in reading.rejected] == [(4, "c/1.png", "empty"), (2, "m/2", "unreadable")]
    sliced = open_dataset(f"imagefolder:{open_folder}[1:3]", size=(2, 2), channels=1)
    assert [r.id for r in sliced.read_each([0, 1]).rejected] == ["c/1.png"]


def test_a_row_of_hdf5_that_is_out_of_range(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    images = np.random.default_rng(0).random((9, 1, 4, 4), dtype=np.float32)
    images[4, 0, 1, 1] = 1.5
    images[7, 0, 0, 0] = np.nan
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = images
    for options in ({}, {"size": 3, "channels": 3}):
        dataset = open_dataset(f"hdf5:{tmp_path / 'a.h5'}", **options)
        reading = dataset.read_each(range(9))
        assert reading.rows.tolist() == [0, 1, 2, 3, 5, 6, 8]
        assert [(r.row, r.kind) for r in reading.rejected] == [(4, "out of range"), (7, "out of range")]
        assert torch.equal(reading.images, dataset.batch(reading.rows)[0])


# --- digests


def test_digests_follow_the_pixels_alone(open_folder: Path) -> None:
    image = noise(0)
    (open_folder / "c" / "0.bmp").write_bytes(encoded(image, "BMP"))
    (open_folder / "c" / "0.tif").write_bytes(encoded(image, "TIFF"))
    (open_folder / "c" / "0.webp").write_bytes(encoded(image, "WEBP", lossless=True))
    dataset = open_dataset(f"imagefolder:{open_folder}")
    (batch,) = read(dataset, np.arange(len(dataset)), 16, workers=2)
    of = dict(zip(batch.ids, (digest.tobytes() for digest in batch.digests), strict=True))
    assert len(of) == 7
    assert len({of[f"c/0.{suffix}"] for suffix in ("png", "bmp", "tif", "webp")}) == 1
    assert len(set(of.values())) == 4
    stored = ArrayDataset(image[None], [0], name="a", classes=["x"])
    assert pixel_digests(stored.batch([0])[0])[0].tobytes() == of["c/0.png"]


def test_digests_tell_shapes_and_small_differences_apart() -> None:
    zeros = [torch.zeros(1, *shape) for shape in ((1, 4, 6), (1, 6, 4), (3, 4, 2), (3, 2, 4))]
    assert len({pixel_digests(image)[0].tobytes() for image in zeros}) == 4
    images = torch.randint(0, 256, (1, 3, 5, 5), generator=torch.Generator().manual_seed(0)).div(255)
    attacked = images.clone()
    attacked[0, 0, 0, 0] = torch.nextafter(attacked[0, 0, 0, 0], torch.tensor(0.5))
    assert not np.array_equal(pixel_digests(images), pixel_digests(attacked))
    assert np.array_equal(pixel_digests(attacked), pixel_digests(attacked.clone()))
    # Every 8-bit level counts as one, in any memory layout.
    levels = torch.arange(256).float().div(255).view(1, 1, 16, 16)
    twice = levels.repeat(1, 2, 1, 1)[:, 1:]
    assert np.array_equal(pixel_digests(levels), pixel_digests(twice))
    assert pixel_digests(levels)[0].tobytes().hex() == PINNED
    colours = torch.arange(12).float().div(255).view(1, 3, 2, 2)
    by_hand = hashlib.blake2b(b"2 x 2 x 3 8 bits\n" + bytes([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]), digest_size=16)
    assert pixel_digests(colours)[0].tobytes() == by_hand.digest()
    assert pixel_digests(torch.zeros(0, 3, 4, 4)).shape == (0, 16)


# The digest is stored in databases: it must be the same in years to come.
PINNED = "c190873c00b4c86b27848c7c1fa8dd54"


# --- the reader


def test_reader_refuses_wrong_numbers_at_once() -> None:
    dataset = Moody(3, set())
    for options in ({"batch_size": 0}, {"batch_size": 1, "workers": 0}, {"batch_size": 1, "ahead": -1}):
        with pytest.raises(InputError, match="reading needs"):
            read(dataset, np.arange(3), **options)
    with pytest.raises(InputError, match="no image 3"):
        read(dataset, np.array([3]), 1)
    assert list(read(dataset, np.zeros(0, dtype=np.int64), 4)) == []


class Counting(Moody):
    """Counts how many rows have been asked for."""

    asked = 0

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        self.asked += len(rows)
        return super()._read(rows)


def test_reader_reads_no_further_ahead_than_it_is_told_and_stops_with_its_caller() -> None:
    dataset = Counting(1000, set())
    batches = read(dataset, np.arange(1000), 10, workers=2, ahead=2)
    assert dataset.asked == 0
    next(batches)
    assert dataset.asked <= 30
    next(batches)
    assert dataset.asked <= 40
    batches.close()
    before = dataset.asked
    assert before <= 40
    with pytest.raises(StopIteration):
        next(batches)
    assert dataset.asked == before


class Broken(Moody):
    """A source that goes away at a row."""

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        if 50 in rows.tolist():
            raise SourceError("the disk is gone")
        return super()._read(rows)


def test_reader_hands_on_what_came_before_the_source_went() -> None:
    found = []
    with pytest.raises(SourceError, match="disk is gone"):
        found.extend(batch.positions.tolist() for batch in read(Broken(100, set()), np.arange(100), 20, workers=3))
    assert found in ([], [list(range(20)), list(range(20, 40))])


def test_warnings_of_pillow_do_not_stop_a_reading(dirty: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = open_dataset(f"imagefolder:{dirty}", size=SIZE)
        found = {r.id: r.kind for r in reading.read_each(range(len(reading))).rejected}
    assert found["bomb/real.png"] == "too large"
