"""Sources of images: every kind gives the same rows for the same pictures; wrong ones say what to do."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dirty import encoded, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from index_build.reader import read
from nndefense.datasets import FileListDataset, ImageFolderDataset, ParquetDataset, open_dataset, write_hdf5
from nndefense.datasets import cells as cells_module
from nndefense.datasets.spec import locate
from nndefense.errors import DataError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 14
CLASSES = ("cat", "dog")
NAMES = [f"{CLASSES[number * 2 // COUNT]}/{number:02d}.png" for number in range(COUNT)]
LABELS = [number * 2 // COUNT for number in range(COUNT)]
PICTURES = [noise(number, 6, 7) for number in range(COUNT)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two classes, some images deeper than others."""
    root = tmp_path_factory.mktemp("photos")
    for name, picture in zip(NAMES, PICTURES, strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(picture, "PNG"))
    return root


def as_folder(photos: Path, out: Path) -> str:
    return f"imagefolder:{photos}"


def as_images(photos: Path, out: Path) -> str:
    return f"images:{photos}"


def as_text(photos: Path, out: Path) -> str:
    (out / "list.txt").write_text("".join(f"{photos / name}\n\n" for name in NAMES))
    return f"files:{out / 'list.txt'}"


def as_table(photos: Path, out: Path) -> str:
    lines = [f"{CLASSES[label]}\t{photos / name}" for name, label in zip(NAMES, LABELS, strict=True)]
    (out / "list.tsv").write_text("\n".join(["class\tfile", *lines]))
    return f"files:{out / 'list.tsv'}"


def as_hdf5(photos: Path, out: Path) -> str:
    images = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2) / 255
    write_hdf5(out / "a.h5", images, LABELS, NAMES, CLASSES)
    return f"hdf5:{out / 'a.h5'}"


def as_shards(photos: Path, out: Path) -> str:
    for shard, rows in enumerate((range(5), range(5, COUNT))):
        with tarfile.open(out / f"p-{shard:03d}.tar", "w") as tar:
            for row in rows:
                for suffix, data in (("png", encoded(PICTURES[row], "PNG")), ("cls", b"%d" % LABELS[row])):
                    info = tarfile.TarInfo(f"{NAMES[row].removesuffix('.png')}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (out / "classes.txt").write_text("\n".join(CLASSES))
    return f"webdataset:{out}/p-{{000..001}}.tar"


def as_parquet(photos: Path, out: Path) -> str:
    for file, rows in enumerate((range(6), range(6, COUNT))):
        table(out / f"train-{file}.parquet", rows, row_group_size=3)
    return f"parquet:{out}:train"


def as_binary_parquet(photos: Path, out: Path) -> str:
    cells = [encoded(picture, "PNG") for picture in PICTURES]
    words = [CLASSES[label] for label in LABELS]
    parquet.write_table(arrow.table({"n": range(COUNT), "photo_bytes": cells, "label": words}), out / "all.parquet")
    return f"parquet:{out / 'all.parquet'}"


def table(path: Path, rows: range, **options: object) -> Path:
    """A file as the library ``datasets`` writes it: a struct, and the names of the classes in the schema."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    content = arrow.table(
        {
            "image": [{"bytes": encoded(PICTURES[row], "PNG"), "path": NAMES[row]} for row in rows],
            "label": arrow.array([LABELS[row] for row in rows], arrow.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(content, path, **options)
    return path


FORMS = [as_folder, as_images, as_text, as_table, as_hdf5, as_shards, as_parquet, as_binary_parquet]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_kind_gives_the_same_rows(form: Callable[[Path, Path], str], photos: Path, tmp_path: Path) -> None:
    spec = form(photos, tmp_path)
    dataset = open_dataset(spec)
    assert dataset.name == spec
    assert len(dataset) == COUNT
    assert dataset.shape == (3, 6, 7)
    unlabelled = form in (as_images, as_text)
    assert dataset.classes == (() if unlabelled else CLASSES)
    assert dataset.labels.tolist() == ([-1] * COUNT if unlabelled else LABELS)
    batches = list(read(dataset, np.arange(COUNT), 5, workers=2))
    expected = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2) / 255
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    reference = list(read(open_dataset(f"imagefolder:{photos}"), np.arange(COUNT), COUNT))
    assert np.array_equal(np.concatenate([batch.digests for batch in batches]), reference[0].digests)
    # Ids are unique, and stay with their images in any order and in every process.
    assert len(set(dataset.ids)) == COUNT
    order = [9, 0, 13, 9, 5]
    images, labels = dataset.batch(order)
    assert torch.equal(images, expected[order])
    assert labels.tolist() == dataset.labels[order].tolist()
    again = pickle.loads(pickle.dumps(dataset))
    assert again.fingerprint == dataset.fingerprint == open_dataset(spec).fingerprint
    assert torch.equal(again.batch(order)[0], images)
    assert open_dataset(f"{spec}[3:5]").ids == dataset.ids[3:5]
    sized = open_dataset(spec, size=(4, 5), channels=1)
    assert sized.shape == (1, 4, 5)
    assert sized.fingerprint != dataset.fingerprint


@pytest.mark.parametrize("form", [as_parquet, as_shards, as_table], ids=lambda form: form.__name__)
def test_sources_in_loader_processes(form: Callable[[Path, Path], str], photos: Path, tmp_path: Path) -> None:
    dataset = open_dataset(form(photos, tmp_path))
    before = dataset.batch(range(COUNT))[0]
    found = torch.cat([images for images, _ in DataLoader(dataset, batch_size=4, num_workers=2)])
    assert torch.equal(found, before)


def test_images_at_any_depth_without_classes(tmp_path: Path) -> None:
    for name in ("b.png", "a/x.JPG", "a/deep/er/y.png", "z/1.png", ".hidden/h.png", "a/.h.png", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(noise(0), "PNG"))
    dataset = open_dataset(f"images:{tmp_path}", size=4)
    assert dataset.ids == ["a/deep/er/y.png", "a/x.JPG", "b.png", "z/1.png"]
    assert dataset.labels.tolist() == [-1] * 4
    assert open_dataset(f"images:{tmp_path}:a", size=4).ids == ["a/deep/er/y.png", "a/x.JPG"]
    assert isinstance(dataset, ImageFolderDataset)
    assert dataset.path(2) == tmp_path / "b.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no images: they must end in \.jpg"):
        open_dataset(f"images:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match="has no folder nothing: it holds a, empty, z"):
        open_dataset(f"images:{tmp_path}:nothing")
    for name in ("b.png",):
        (tmp_path / "flat").mkdir()
        (tmp_path / "flat" / name).write_bytes(encoded(noise(0), "PNG"))
    with pytest.raises(DataError, match=f"or open images:{re.escape(str(tmp_path / 'flat'))}, which asks for no"):
        open_dataset(f"imagefolder:{tmp_path / 'flat'}")


# --- lists


def test_lists_are_relative_and_their_mistakes_have_lines(photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text('path,label,id\n"cat/00.png",1,a\ncat/01.png,,b\ndog/13.png,0,c\n')
    dataset = open_dataset(f"files:{photos / 'list.csv'}")
    assert dataset.ids == ["a", "b", "c"]
    assert dataset.labels.tolist() == [1, -1, 0]
    assert dataset.classes == ("0", "1")
    (photos / "list.csv").unlink()

    def refused(message: str, text: str, name: str = "l.csv") -> None:
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message) as error:
            FileListDataset(tmp_path / name, size=4)
        assert "\n" not in str(error.value)

    refused("names no images", "", "l.txt")
    refused("names no images", "path\n")
    refused("has no column path: begin it with", "name,label\na.png,0\n")
    refused("line 3 of .* has 1 cells or no path", "path,label\na.png,0\nb.png\n")
    refused("line 2 of .* has 2 cells or no path", "path,label\n,0\n")
    refused("line 3 of .* repeats line 2", "path\na.png\na.png\n")
    refused("line 4 of .* repeats line 1", "a.png\nb.png\n\na.png\n", "l.txt")
    refused("line 3 of .* has no id", "path,id\na.png,x\nb.png,\n")
    refused("is no line of a table", 'path\n"a".png\n')
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="save it as UTF-8"):
        FileListDataset(tmp_path / "l.txt")
    with pytest.raises(DataError, match="there is no list"):
        FileListDataset(tmp_path)
    with pytest.raises(DataError, match="is a list, so it has no split"):
        open_dataset(f"files:{tmp_path / 'l.txt'}:train")


def test_a_list_whose_files_are_all_gone_is_a_lost_source(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("\n".join(f"{photos}/nowhere/{number}.png" for number in range(30)))
    with pytest.raises(DataError, match="the whole source is out of reach"):
        open_dataset(f"files:{tmp_path / 'l.txt'}", size=4).read_each(range(3))
    (tmp_path / "l.txt").write_text(f"{photos}/nowhere.png\n{photos}/cat/00.png\n")
    reading = open_dataset(f"files:{tmp_path / 'l.txt'}", size=4).read_each(range(2))
    assert [(r.row, r.kind) for r in reading.rejected] == [(0, "missing")]


# --- Parquet


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, COUNT - 1), max_size=30), group=st.integers(1, 9), whole=st.booleans())
def test_parquet_rows_property(
    rows: list[int], group: int, whole: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("parquet")
    table(root / "a.parquet", range(5), row_group_size=group)
    table(root / "b.parquet", range(5, COUNT), row_group_size=group)
    # A tiny bound makes every row group a large one, which is read piece by piece.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells_module, "WHOLE_GROUP", 1 << 30 if whole else 0)
        patch.setattr(cells_module, "KEPT_BYTES", 4000)
        patch.setattr(cells_module, "_PIECE", 2)
        dataset = ParquetDataset(root)
        found = dataset.batch(rows)[0]
        expected = [torch.from_numpy(PICTURES[row]).permute(2, 0, 1) / 255 for row in rows]
        assert torch.equal(found, torch.stack(expected) if rows else torch.zeros(0, 3, 6, 7))
        batches = read(dataset, np.array(rows, dtype=np.int64), 4, workers=3)
        assert [row for batch in batches for row in batch.positions.tolist()] == rows


def test_a_large_row_group_is_read_once_and_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [np.random.default_rng(row).bytes(20_000) for row in range(1000)]
    content = arrow.table({"image": arrow.array(cells, arrow.binary()), "id": [f"r{row}" for row in range(1000)]})
    parquet.write_table(content, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=16)
    monkeypatch.setattr(cells_module, "WHOLE_GROUP", 1 << 20)
    monkeypatch.setattr(cells_module, "KEPT_BYTES", 4 << 20)
    dataset = ParquetDataset(tmp_path / "a.parquet", size=4)
    opened = []
    pieces = dataset._cells._pieces
    monkeypatch.setattr(dataset._cells, "_pieces", lambda key: opened.append(key) or pieces(key))
    before = arrow.total_allocated_bytes()
    most = 0
    for batch in read(dataset, np.arange(1000), 50, workers=3):
        assert len(batch.rejected) == 50
        most = max(most, arrow.total_allocated_bytes() - before)
    assert len(opened) == 1
    assert most < 10 << 20


def test_parquet_labels_and_ids(tmp_path: Path) -> None:
    picture = encoded(PICTURES[0], "PNG")

    def write(**columns: object) -> ParquetDataset:
        parquet.write_table(arrow.table({"image": [picture] * 3, **columns}), tmp_path / "a.parquet")
        return ParquetDataset(tmp_path / "a.parquet")

    assert write().ids == ["a/00000", "a/00001", "a/00002"]
    assert write(id=["x", "y", "z"]).ids == ["x", "y", "z"]
    assert write(id=[1, 2, 3]).ids[0] == "a/00000"
    assert write(label=[0, None, 2]).labels.tolist() == [0, -1, 2]
    named = write(label=arrow.array(["b", None, "a"]).dictionary_encode())
    assert named.labels.tolist() == [1, -1, 0]
    assert named.classes == ("a", "b")
    for columns, message in (
        ({"label": [0.5, 1, 2]}, "has label 0.5"),
        ({"label": [b"0", b"1", b"2"]}, "labels of type binary"),
        ({"label": [0, -2, 1]}, "has label -2"),
        ({"id": ["x", "x", "y"]}, "has an id twice"),
        ({"id": ["x", None, "y"]}, "rows without an id"),
    ):
        with pytest.raises(DataError, match=message):
            write(**columns)


def test_parquet_cells_that_hold_no_image(tmp_path: Path) -> None:
    good = encoded(PICTURES[0], "PNG")
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    cells = [
        {"bytes": good, "path": None},
        None,
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": b"", "path": "x.png"},
    ]
    parquet.write_table(arrow.table({"image": arrow.array(cells, kind)}), tmp_path / "a.parquet")
    reading = ParquetDataset(tmp_path / "a.parquet").read_each(range(4))
    assert reading.rows.tolist() == [0]
    assert [(r.kind, r.reason) for r in reading.rejected] == [
        ("missing", "its row holds no image: its cell is empty"),
        ("missing", "its row holds only the path of a file, not its bytes: embed the images"),
        ("empty", "the file is empty"),
    ]


def test_parquet_files_of_another_form(tmp_path: Path) -> None:
    def refused(message: str, **columns: object) -> None:
        parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message) as error:
            ParquetDataset(tmp_path / "a.parquet")
        assert "\n" not in str(error.value)

    refused("none among text, label: name it image", text=["a"], label=[0])
    refused("several: left, right", left=[b"a"], right=[b"b"])
    refused("has no rows", image=arrow.array([], arrow.binary()))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=r"cannot read .* as a Parquet file"):
        ParquetDataset(tmp_path / "a.parquet")
    table(tmp_path / "a.parquet", range(3))
    parquet.write_table(arrow.table({"image": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has other columns than .*a\.parquet"):
        ParquetDataset(tmp_path)
    dataset = ParquetDataset(tmp_path / "a.parquet", size=4)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match="cannot read row group 0 of"):
        dataset.read_each([0])


# --- torchvision


def idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_torchvision_sets(photos: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for kind in ("MNIST", "KMNIST"):
        for stem in ("train", "t10k"):
            idx(tmp_path / kind / "raw" / f"{stem}-images-idx3-ubyte", images if stem == "train" else images[:2])
            labels = np.array([1, 0, 2, 9, 9])[: 5 if stem == "train" else 2]
            idx(tmp_path / kind / "raw" / f"{stem}-labels-idx1-ubyte", labels)
    for spec, count in (("MNIST", 5), ("KMNIST", 5), ("mnist:test", 2), ("MNIST:train[1:3]", 2)):
        name, _, rest = spec.partition(":")
        dataset = open_dataset(f"torchvision:{name}:{tmp_path}{':' if rest else ''}{rest}", download=False)
        assert len(dataset) == count
        assert dataset.shape == (1, 28, 28)
    dataset = open_dataset(f"torchvision:MNIST:{tmp_path}", download=False)
    assert torch.equal(dataset.batch(range(5))[0], torch.from_numpy(images)[:, None] / 255)
    assert dataset.labels.tolist() == [1, 0, 2, 9, 9]
    assert dataset.ids[:2] == ["mnist:train/00000", "mnist:train/00001"]
    assert dataset.classes[1] == "1 - one"
    again = pickle.loads(pickle.dumps(dataset))
    assert again.fingerprint == dataset.fingerprint
    assert torch.equal(again.batch([3])[0], dataset.batch([3])[0])
    # Without a folder, the one of all data sets.
    assert len(open_dataset("torchvision:MNIST", data_dir=tmp_path, download=False)) == 5
    assert len(open_dataset("torchvision:MNIST:test[:1]", data_dir=tmp_path, download=False)) == 1


def test_torchvision_files_are_read_by_our_rules(tmp_path: Path) -> None:
    from PIL import Image

    home = tmp_path / "eurosat" / "2750"
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, name in enumerate(("Forest/a.png", "Forest/b.png", "River/c.png", "River/d.png")):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(encoded(np.rot90(noise(number, 8, 8)).copy(), "PNG", exif=exif))
    (home / "Forest" / "b.png").write_bytes(b"nothing")
    dataset = open_dataset(f"torchvision:EuroSAT:{tmp_path}", download=False)
    assert dataset.classes == ("Forest", "River")
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    reading = dataset.read_each(range(4))
    assert reading.rows.tolist() == [0, 2, 3]
    expected = [torch.from_numpy(noise(n, 8, 8)).permute(2, 0, 1) / 255 for n in (0, 2, 3)]
    assert torch.equal(reading.images, torch.stack(expected))
    assert [(r.row, r.kind) for r in reading.rejected] == [(1, "damaged")]
    with pytest.raises(DataError, match="torchvision cannot read"):
        dataset.batch(range(4))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision", "torchvision's '' is not among the sets read here: choose CIFAR10, "),
        ("torchvision:Kinetics:.", "'Kinetics' is not among the sets"),
        ("torchvision:CIFAR100:{}", r"torchvision's CIFAR100 is not in .* and could not be had .*put it there"),
        ("torchvision:SVHN:{}:extra[:3]", "torchvision's SVHN is not in"),
        ("torchvision:ImageNet:{}:val", "torchvision's ImageNet is not in"),
    ],
)
def test_torchvision_sets_that_are_not_there(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_dataset(spec.format(tmp_path), download=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_every_torchvision_set_of_the_list_is_opened_with_arguments_it_takes(tmp_path: Path) -> None:
    """Not one ends in a TypeError: each says that its files are not there."""
    from nndefense.datasets.torchvision_set import SETS

    for name, splits in SETS.items():
        for split in splits:
            with pytest.raises(DataError, match="could not be had"):
                open_dataset(f"torchvision:{name}:{tmp_path / name}{':' if split else ''}{split}", download=False)


def test_the_real_mnist_by_torchvision(data_root: Path, tmp_path: Path) -> None:
    for file in (data_root / "mnist").glob("t10k*"):
        target = tmp_path / "MNIST" / "raw" / file.name.removesuffix(".gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
    for stem in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / "MNIST" / "raw" / stem).touch()
    theirs = open_dataset(f"torchvision:MNIST:{tmp_path}:test", download=False)
    ours = open_dataset("mnist:test", data_dir=data_root, download=False)
    rows = np.arange(0, 10_000, 97)
    assert np.array_equal(theirs.labels, ours.labels)
    assert torch.equal(theirs.batch(rows)[0], ours.batch(rows)[0])


# --- specs


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("s3://bucket/photos", ("s3://bucket/photos", None, None)),
        ("s3://bucket/photos:val", ("s3://bucket/photos", "val", None)),
        ("s3://bucket/photos:val[:10]", ("s3://bucket/photos", "val", "[:10]")),
        ("s3://bucket/photos[5:]", ("s3://bucket/photos", None, "[5:]")),
        ("http://host:8080", ("http://host:8080", None, None)),
        ("http://host:8080/photos", ("http://host:8080/photos", None, None)),
        ("http://host:8080/photos:2017", ("http://host:8080/photos", "2017", None)),
        ("zip://::/data/photos.zip", ("zip://::/data/photos.zip", None, None)),
        ("zip://a/b::/data/photos.zip:train", ("zip://a/b::/data/photos.zip", "train", None)),
        ("simplecache::s3://b/p-{000..009}.tar[::2]", ("simplecache::s3://b/p-{000..009}.tar", None, "[::2]")),
        ("memory://photos:val", ("memory://photos", "val", None)),
    ],
)
def test_urls_are_taken_apart_by_their_letters(rest: str, expected: tuple[str, str | None, str | None]) -> None:
    assert locate("imagefolder", rest, None) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *((f"{kind}:", "give a path after") for kind in ("images", "files", "parquet", "webdataset")),
        *((f"{kind}:nowhere", "there is nothing at nowhere") for kind in ("images", "files", "parquet")),
        ("parquet:nowhere.parquet", "there is no file nowhere.parquet"),
        ("parquet:no-{0..3}.parquet", "there is no file no-0.parquet"),
        ("files:list.csv[1:2", "there is nothing at"),
        ("picture:x", "unknown data set .*images:PATH, files:LIST"),
    ],
)
def test_bad_specs(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(spec)
    assert "\n" not in str(error.value)


def test_optional_libraries_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "a.parquet", range(3))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install pyarrow"):
        open_dataset(f"parquet:{tmp_path / 'a.parquet'}")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"pip install 'fsspec\[http\]'"):
        open_dataset("imagefolder:s3://bucket/photos")
    # What needs neither goes on without.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(encoded(noise(0), "PNG"))
    assert len(open_dataset(f"imagefolder:{tmp_path}").read_each([0]).images) == 1
