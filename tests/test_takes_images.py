"""docs/does-it-take-my-images.md: every row of its tables is a case here, laid out as people have it, and tried.

``python tests/test_takes_images.py`` writes the tables into the page again.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tables
from command import nndefense
from dirty import HEIGHT, WIDTH, Dirt, catalogue, encoded, noise
from test_dirty import check as check_pixels
from test_dirty import nobody

from nndefense.database import Manifest
from nndefense.datasets import ImageDataset, open_dataset, write_hdf5
from nndefense.errors import DataError
from nndefense.models import Classifier, build_classifier, load_classifier, save_classifier
from nndefense.reporting import Table

PAGE = "does-it-take-my-images.md"
SIZE = (HEIGHT, WIDTH)
DIRT = catalogue()
Lay = Mapping[str, bytes] | Callable[[], object]


def png(number: int = 0) -> bytes:
    return encoded(noise(number), "PNG")


def photos(*names: str) -> dict[str, bytes]:
    """A picture of its own at each name."""
    return {name: png(number) for number, name in enumerate(names)}


def lay(files: Lay) -> None:
    """Put files into the working folder."""
    if not isinstance(files, Mapping):
        files()
        return
    for name, data in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


THREE = photos("photos/cat/1.png", "photos/cat/2.png", "photos/dog/3.png")


@dataclass(frozen=True)
class Case:
    """A data set, and a row of the page.

    Attributes:
        what: it is.
        spec: how it is opened.
        becomes: what :func:`outcome` finds.
        files: what there is.
        claim: more than :func:`outcome` tells; ``holds`` asserts it.
        names: the files whose fate the row tells; all have the same. Without any, that of all images is told.
        given: in the last column, instead of the spec.
        opened_by: who opens it.
        needs: a package without which it cannot be tried.
    """

    what: str
    spec: str
    becomes: str
    files: Lay
    claim: str = ""
    holds: Callable[[ImageDataset], object] | None = None
    names: tuple[str, ...] = ()
    given: str = ""
    opened_by: Callable[[], AbstractContextManager[object]] = nullcontext
    needs: str = "torch"

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        return self.what, "; ".join(filter(None, (self.becomes, self.claim))), f"`{self.given or self.spec}`"


def outcome(case: Case) -> tuple[str, ImageDataset | None]:
    """What becomes of a data set in the working folder, in the words of the page; and the data set, if it opens."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            dataset = open_dataset(case.spec, size=SIZE, download=False)
            reading = dataset.read_each(range(len(dataset)))
        except DataError as error:
            return f"refused: `{error}`", None
    warned = "".join(f"; it warns: `{warning.message}`" for warning in said if warning.category is UserWarning)
    wrong = {found.id: found for found in reading.rejected}

    def fate(name: str) -> str:
        item = next((item for item in dataset.ids if name in (item, item.removeprefix("cat/"))), "")
        if item not in wrong:
            return "read" if item else "not looked at"
        # Why a file is damaged is told in the decoder's words.
        reason = "" if wrong[item].kind == "damaged" else f": {wrong[item].reason}"
        return f"left out: `{wrong[item].kind}{reason}`"

    if case.names:
        (found,) = set(map(fate, case.names))
        return found + warned, dataset
    assert not wrong
    counts = {name: int((dataset.labels == number).sum()) for number, name in enumerate(dataset.classes)}
    found = [f"{name} ({count})" for name, count in counts.items() if count]
    unknown = int((dataset.labels == -1).sum())
    return f"read: {', '.join(found + [f'without label ({unknown})'] * (unknown > 0))}{warned}", dataset


# -- files ----------------------------------------------------------------------------------------------------------


def files_of(what: str, files: Mapping[str, Dirt | bytes], becomes: str = "read", claim: str = "") -> Case:
    """Files of one kind among good ones; those that have a picture must show it."""

    def shown(dataset: ImageDataset) -> None:
        for name, file in files.items():
            if isinstance(file, Dirt):
                check_pixels(file, dataset.batch([dataset.index_of(f"cat/{name}")])[0][0])

    there = {f"photos/cat/{name}": file.data if isinstance(file, Dirt) else file for name, file in files.items()}
    pictures = becomes == "read" and any(isinstance(file, Dirt) for file in files.values())
    return Case(what, "imagefolder:photos", becomes, THREE | there, claim, shown if pictures else None, tuple(files))


def catalogued(what: str, *keys: str, becomes: str = "read", claim: str = "") -> Case:
    """Files of the catalogue of dirt."""
    return files_of(what, {key.partition("/")[2]: DIRT[key] for key in keys}, becomes, claim)


def beginning(data: bytes, *names: str) -> dict[str, bytes]:
    return {name: data + bytes(20) for name in names}


def grey(number: int) -> Dirt:
    level = noise(number)[..., 0]
    return Dirt(encoded(level, "PNG"), np.repeat(level[..., None], 3, axis=2))


HEIC, AVIF = bytes(4) + b"ftypheic", bytes(4) + b"ftypavif"
NO_IMAGE = "left out: `not an image: not a JPEG, PNG, WebP, BMP, GIF or TIFF file`"
FILES = [
    files_of(
        "PNG, JPEG, GIF, BMP, TIFF, WebP",
        {f"a.{kind.lower()}": Dirt(encoded(noise(6), kind), noise(6)) for kind in ("PNG", "BMP", "TIFF")}
        | {f"a.{kind.lower()}": encoded(noise(6), kind) for kind in ("JPEG", "GIF", "WEBP")},
    ),
    files_of("`.JPG`, `.jpe`, `.jfif`", dict.fromkeys(("A.JPG", "b.jpe", "c.jfif"), DIRT["suffix/jpeg-called.tiff"])),
    files_of(
        "a name without suffix",
        {"IMG_0001": Dirt(png(7), noise(7)), "2024.05.01": Dirt(png(8), noise(8))},
        claim="its first bytes tell what it is",
    ),
    catalogued("a suffix that is wrong", "suffix/png-called.jpg", "suffix/jpeg-called.tiff"),
    files_of(
        "HEIC, AVIF, JPEG XL, SVG, raw photos",
        beginning(HEIC, "a.heic", "IMG_2") | beginning(AVIF, "b.avif") | beginning(b"", "c.jxl", "d.svg", "e.dng"),
        "not looked at; it warns: `photos: left out 6 pictures of a format that is not read (IMG_2, a.heic, b.avif and "
        "3 more): convert to JPEG or PNG`",
    ),
    files_of("HEIC called `.jpg`", beginning(HEIC, "a.jpg"), NO_IMAGE),
    files_of("grey, for a net of 3 channels", {"a.png": grey(3)}, claim="three equal channels"),
    catalogued("16-bit grey", "deep/grey16.png", "deep/grey16.tif", claim="all levels are kept"),
    catalogued("16-bit colour", "deep/colour16.png", claim="8 bits of each channel"),
    catalogued("black and white (1 bit)", "deep/one-bit.png"),
    catalogued("palette", "alpha/palette-opaque.png"),
    catalogued("CMYK", "colour/cmyk.tif", "colour/cmyk.jpg", claim="as RGB, without a colour profile"),
    catalogued("transparent", "alpha/colour.png", "alpha/grey.png", "alpha/palette.png", claim="laid on white"),
    catalogued("turned by EXIF", *(f"turned/exif-{n}.png" for n in range(1, 9)), claim="turned as viewers show it"),
    catalogued(
        "animated, or of several pages", "moving/animated.gif", "moving/animated.png", "moving/animated.webp",
        "moving/pages.tif", claim="the first frame or page",
    ),
    catalogued("cut short, damaged", "truncated/half.jpg", "truncated/half.png", becomes="left out: `damaged`"),
    catalogued("empty", "empty/zero-bytes.png", becomes="left out: `empty: the file is empty`"),
    catalogued("text, a web page, PDF", "other/text.png", "other/page.jpg", "other/document.png", becomes=NO_IMAGE),
    catalogued(
        "too many pixels", "bomb/real.png",
        becomes="left out: `too large: it has 10000 x 10000 pixels, more than the 89,478,485 allowed: scale it down`",
    ),
]  # fmt: skip


# -- folders --------------------------------------------------------------------------------------------------------


def linked(*links: tuple[str, str], beside: Mapping[str, bytes] = THREE) -> Callable[[], None]:
    """Files and links: where each is, and where it leads."""

    def make() -> None:
        lay(beside)
        for place, target in links:
            Path(place).symlink_to(target)

    return make


def zipped() -> None:
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for name, data in THREE.items():
            archive.writestr(name, data)


def forbidden() -> None:
    lay(THREE)
    os.chmod("photos/dog", 0)


def classes(*names: str, ids: list[str] | None = None) -> Classifier:
    net = build_classifier("small-cnn", input_shape=(3, *SIZE), classes=list(names), seed=0)
    net.class_ids = None if ids is None else tuple(ids)
    return net


def by_number(dataset: ImageDataset) -> None:
    with pytest.warns(UserWarning, match="taken for the places of the classifier's outputs"):
        found = classes(*map(str, range(11))).label_map(dataset.classes)
    assert [int(name) for name in dataset.classes] == found.tolist()


def by_id(dataset: ImageDataset) -> None:
    for ids in (None, ["n01443537", "n01440764"]):
        assert classes("goldfish", "tench", ids=ids).label_map(dataset.classes).tolist() == [1, 0]


CLASSES = "cat (2), dog (1)"
SPLITS = photos("photos/train/cat/1.png", "photos/train/dog/2.png", "photos/val/cat/3.png", "photos/val/dog/4.png")
LITTER = {f"photos/{name}": png(3) for name in ("__MACOSX/cat/._1.png", "@eaDir/1.png", "$RECYCLE.BIN/x/1.png")}
LITTER |= {f"photos/cat/{name}": b"x" for name in (".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir/1.png/thumb.png")}
FOLDERS = [
    Case("a folder for each class", "imagefolder:photos", f"read: {CLASSES}", THREE),
    Case(
        "pictures deeper below", "imagefolder:photos", f"read: {CLASSES}",
        photos("photos/cat/1.png", "photos/cat/2024/may/2.png", "photos/dog/x/3.png"),
    ),
    Case(
        "`train`, `val` (or `valid`, `test`) with the classes in them", "imagefolder:photos", "read: cat (1), dog (1)",
        SPLITS, "those of `train`", lambda found: same(found.ids, "train/cat/1.png", "train/dog/2.png"),
    ),
    Case(
        "", "imagefolder:photos:val", "read: cat (1), dog (1)", SPLITS,
        "those of `val`", lambda found: same(found.ids, "val/cat/3.png", "val/dog/4.png"),
    ),
    Case(
        "`val` and `test` alone", "imagefolder:photos",
        "refused: `photos holds splits, not classes: open imagefolder:photos:test`",
        photos("photos/val/cat/1.png", "photos/test/cat/2.png"),
    ),
    Case(
        "pictures without folders", "imagefolder:photos",
        "refused: `photos has images but no folders: put the images of each class into a folder with the name of the "
        "class, or open images:photos, which asks for no classes`",
        photos("photos/1.png", "photos/2.png"),
    ),
    Case("", "images:photos", "read: without label (2)", photos("photos/1.png", "photos/deep/2.png")),
    Case(
        "folders `0`, `1`, ... `10`", "imagefolder:photos", "read: 0 (1), 1 (1), 10 (1), 2 (1)",
        photos("photos/0/1.png", "photos/1/2.png", "photos/2/3.png", "photos/10/4.png"),
        "with a net whose outputs are numbers, `10` is output 10, and a warning says so", by_number,
    ),
    Case(
        "folders `n01440764`, ... (ImageNet)", "imagefolder:photos", "read: n01440764 (1), n01443537 (1)",
        photos("photos/n01440764/1.png", "photos/n01443537/2.png"),
        "found in a net with ImageNet's names or ids", by_id,
    ),
    Case(
        "an empty folder among them", "imagefolder:photos",
        "refused: `photos has no images of fox: fill these folders or remove them`",
        THREE | {"photos/fox/.DS_Store": b"x"},
    ),
    Case(
        "what systems leave: `__MACOSX`, `@eaDir`, `$RECYCLE.BIN`, `.DS_Store`, `Thumbs.db`, ...", "imagefolder:photos",
        f"read: {CLASSES}", THREE | LITTER, "the rest is not looked at", lambda found: same(found.ids, *ids_of(THREE)),
    ),
    Case(
        "links to folders elsewhere", "imagefolder:photos", f"read: {CLASSES}",
        linked(("photos/cat", "../store"), beside=photos("store/1.png", "store/2.png", "photos/dog/3.png")),
    ),
    Case(
        "links back up", "imagefolder:photos", f"read: {CLASSES}", linked(("photos/cat/up", ".."), ("photos/all", ".")),
        "the links are not followed", lambda found: same(found.ids, *ids_of(THREE)),
    ),
    Case(
        "a class that is a link to another", "imagefolder:photos",
        "refused: `the folders cat and kitten of photos have images in common, because one is a link to the other: "
        "remove one`",
        linked(("photos/kitten", "cat")),
    ),
    Case(
        "a link to nowhere", "imagefolder:photos", "left out: `missing: there is no such file`",
        linked(("photos/cat/4.png", "gone.png")), names=("4.png",),
    ),
    Case(
        "a folder that may not be looked at", "imagefolder:photos",
        "refused: `cannot list the folder photos/dog (Permission denied): check its permissions`", forbidden,
        opened_by=nobody,
    ),
    Case("a zip of the folder", "imagefolder:zip://photos::photos.zip", f"read: {CLASSES}", zipped, needs="fsspec"),
]  # fmt: skip


def same(found: object, *names: str) -> None:
    assert list(found) == list(names)  # type: ignore[call-overload]


def ids_of(files: Mapping[str, bytes]) -> list[str]:
    return [name.removeprefix("photos/") for name in files]


# -- names ----------------------------------------------------------------------------------------------------------

# How Python holds names that are no UTF-8 (PEP 383).
ODD = {
    "spaces, quotes, brackets": ("my photo (1).png", 'it\'s "one".png', "a[1].png"),
    "accents, Chinese, emoji": ("été.png", "照片.png", "😀.png"),
    "a line break, a tab, U+2028": ("two\nlines.png", "a\tb.png", "a\u2028b.png"),
    "bytes that are no UTF-8": ("caf\udce9.png",),
    "a leading dash or `~`": ("-rf.png", "~.png"),
}
NAMES = [
    Case(what, "imagefolder:photos", "read", THREE | {f"photos/cat/{name}": png() for name in names}, names=names)
    for what, names in ODD.items()
]


# -- lists, archives, arrays ----------------------------------------------------------------------------------------


def listed(text: str, name: str = "list.csv") -> dict[str, bytes]:
    return THREE | {name: text.encode()}


def shard(**files: bytes) -> Callable[[], None]:
    """A tar whose members are called as the keywords, ``_`` for the dots."""

    def make() -> None:
        with tarfile.open("pool.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name.replace("_", "."))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return make


def hdf5(images: np.ndarray, **columns: object) -> Callable[[], None]:
    def make() -> None:
        import h5py

        with h5py.File("photos.h5", "w") as file:
            for name, values in {"images": images, **columns}.items():
                file[name] = values

    return make


def parquet(**columns: list[object]) -> Callable[[], None]:
    def make() -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), "photos.parquet")

    return make


def idx(path: str, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    lay({path: header + values.astype(np.uint8).tobytes()})


def mnist() -> None:
    for stem in ("train", "t10k"):
        idx(f"data/MNIST/raw/{stem}-images-idx3-ubyte", np.zeros((3, 28, 28)))
        idx(f"data/MNIST/raw/{stem}-labels-idx1-ubyte", np.array([0, 0, 1]))


def arrays() -> None:
    write_hdf5("photos.h5", np.zeros((3, 3, *SIZE), np.float32), [0, 0, 1], classes=["cat", "dog"])


CSV = "path,label\nphotos/cat/1.png,{}\nphotos/cat/2.png,{}\nphotos/dog/3.png,{}\n"
PATHS = "photos/cat/1.png\nphotos/cat/2.png\nphotos/dog/3.png\n"
BYTES = np.zeros((3, *SIZE, 3), np.uint8)
OTHERS = [
    Case("a CSV of paths and names", "files:list.csv", f"read: {CLASSES}", listed(CSV.format("cat", "cat", "dog"))),
    Case(
        "a CSV of paths and numbers (`0`, `1.0`)", "files:list.csv", "read: 0 (2), 1 (1)",
        listed(CSV.format("0", "0.0", "1.0")),
    ),
    Case(
        "labels that are empty, NaN or -1", "files:list.csv", "read: 0 (1), without label (2)",
        listed(CSV.format("0", "", "nan")),
    ),
    Case(
        "names and numbers mixed", "files:list.csv",
        "refused: `files:list.csv has labels that are numbers and labels that are names ('cat' beside '0'): use one "
        "kind`",
        listed(CSV.format("0", "0", "cat")),
    ),
    Case(
        "a CSV without a line of names", "files:list.csv",
        "refused: `list.csv has no column path: begin it with the line path,label`", listed("photos/cat/1.png,cat\n"),
    ),
    Case("a path a line", "files:list.txt", "read: without label (3)", listed(PATHS, "list.txt")),
    Case(
        "`path label` a line", "files:list.txt",
        "refused: `line 1 of list.txt is a path and '0': a list with labels is a .csv file whose first line is "
        "path,label`",
        listed(PATHS.replace("\n", " 0\n"), "list.txt"),
    ),
    Case(
        "paths of Windows", "files:list.txt",
        "refused: `line 1 of list.txt has backslashes (photos\\cat\\1.png), which divide paths on Windows alone: write "
        "photos/cat/1.png`",
        listed(PATHS.replace("/", "\\"), "list.txt"),
    ),
    Case(
        "a path that is not there", "files:list.txt", "left out: `missing: there is no such file`",
        listed(PATHS + "gone.png\n", "list.txt"), names=("gone.png",),
    ),
    Case(
        "a path twice", "files:list.txt",
        "refused: `line 4 of list.txt repeats line 1 (photos/cat/1.png): name every image once`",
        listed(PATHS + PATHS, "list.txt"),
    ),
    Case(
        "HDF5, uint8 N x H x W x C", "hdf5:photos.h5", "read: 0 (2), 1 (1)", hdf5(BYTES, labels=np.array([0, 0, 1])),
        needs="h5py",
    ),
    Case("HDF5, float32 N x C x H x W in [0, 1]", "hdf5:photos.h5", "read: cat (2), dog (1)", arrays),
    Case(
        "HDF5, uint8 N x C x H x W", "hdf5:photos.h5",
        "refused: `photos.h5 has uint8 images of shape 3 x 3 x 12 x 20: store them as N x H x W x C with C = 1 or 3`",
        hdf5(BYTES.transpose(0, 3, 1, 2)),
    ),
    Case(
        "HDF5, float64", "hdf5:photos.h5",
        "refused: `photos.h5 has images of type float64: store them as uint8 N x H x W x C, or as float32 "
        "N x C x H x W in [0, 1]`",
        hdf5(BYTES / 255.0),
    ),
    Case(
        "arrays (`.npy`, `.npz`, tensors)", "hdf5:photos.h5", "read: cat (2), dog (1)", arrays,
        given='nndefense.datasets.write_hdf5("photos.h5", images, labels, classes=...)',
    ),
    Case(
        "tar shards (WebDataset)", "webdataset:pool.tar", "read: 0 (1), 1 (1)",
        shard(a_png=png(0), a_cls=b"0", b_image_png=png(1), b_json=b'{"label": 1}'),
    ),
    Case("Parquet, as the hubs hand it out", "parquet:photos.parquet", "read: 0 (2), 1 (1)",
         parquet(image=[{"bytes": png(n), "path": None} for n in range(3)], label=[0, 0, 1]), needs="pyarrow"),
    Case(
        "torchvision's own sets, where it puts them", "torchvision:MNIST:data", "read: 0 - zero (2), 1 - one (1)", mnist
    ),
    Case(
        "a folder that is not there", "imagefolder:photos",
        "refused: `there is nothing at photos: check the path of imagefolder:photos`", {},
    ),
]  # fmt: skip


# -- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A command, and a row of the page: what stands between backticks in ``becomes`` is printed.

    ``more`` are options that only make it short, or say where the result goes.
    """

    what: str
    command: str
    becomes: str
    files: Lay
    more: str = ""
    holds: Callable[[], object] | None = None

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        return self.what, self.becomes, f"`{self.command}`"


def sized(*sizes: tuple[int, int]) -> dict[str, bytes]:
    """Photos of these sizes (height, width) in turn."""
    names = [f"photos/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    return {name: encoded(noise(n, *sizes[n % len(sizes)]), "PNG") for n, name in enumerate(names)}


MIXED = sized((12, 20), (30, 11), (25, 25))
BROKEN = THREE | {"photos/cat/4.jpg": DIRT["truncated/half.jpg"].data}
GREY = THREE | {"grey.png": grey(0).data}
TRAIN = "--epochs 1 --out out"
BUILD = "--layer block1 --pca 0 --out out"


def trained_at(*size: int) -> Callable[[], None]:
    def holds() -> None:
        assert load_classifier("out").input_shape == (3, *size)

    return holds


def built(rows: int, rejected: Mapping[str, int]) -> Callable[[], None]:
    def holds() -> None:
        manifest = Manifest.read(Path("out"))
        assert (manifest.rows, manifest.rejected) == (rows, rejected)

    return holds


RUNS = [
    Run(
        "photos of different sizes", "nndefense train --dataset imagefolder:photos",
        "trained at one size: `images of different sizes are brought to 32 x 32, which small-cnn was made for; --size "
        "says otherwise`",
        MIXED, TRAIN, trained_at(32, 32),
    ),
    Run(
        "", "nndefense train --dataset imagefolder:photos --size 12,20",
        "of each, the largest part around the middle that has this shape, scaled", MIXED, TRAIN, trained_at(12, 20),
    ),
    Run(
        "", "nndefense index build --dataset imagefolder:photos --classifier net",
        "the same, at the size that the classifier takes", MIXED, BUILD, built(6, {}),
    ),
    Run(
        "a broken file among good ones", "nndefense index build --dataset imagefolder:photos --classifier net",
        "built without it: `left out   1 damaged`; `rejected.jsonl` names it", BROKEN, BUILD, built(3, {"damaged": 1}),
    ),
    Run(
        "", "nndefense index build --dataset imagefolder:photos --classifier net --max-rejected 0",
        "refused: `1 of the 4 images of imagefolder:photos cannot be used, more than the 0 that --max-rejected allows; "
        "the first is cat/4.jpg`",
        BROKEN, BUILD,
    ),
    Run(
        "a class that the net does not know", "nndefense index build --dataset imagefolder:photos --classifier net",
        "built, without that label: `1 of the 3 classes of imagefolder:photos (such as 'durian') cannot be placed "
        "among the classifier's: images stored without a label, which a search never uses: 1`",
        THREE | photos("photos/durian/1.png"), BUILD, built(4, {}),
    ),
    Run(
        "", "nndefense attack --dataset imagefolder:photos --classifier net",
        "refused: `the data set's class 'durian' is not one of the classifier's 2 classes ('cat' to 'dog'): use data "
        "with the same class names or ids, or give the classifier's classes when it is loaded`",
        THREE | photos("photos/durian/1.png"), "--out attacked.h5",
    ),
    Run(
        "pictures without labels", "nndefense train --dataset images:photos",
        "refused: `images:photos has no labels: give labelled images, such as a folder for each class "
        "(imagefolder:PATH) or a .csv list with a column label (files:LIST)`",
        THREE, TRAIN,
    ),
    Run(
        "a grey picture for a net of 3 channels", "nndefense classify grey.png --database db",
        "refused: `grey.png is grey, but the classifier takes colour images: give --convert`", GREY,
    ),
    Run("", "nndefense classify grey.png --database db --convert", "classified, with three equal channels", GREY),
]  # fmt: skip


SECTIONS = {
    "Files": FILES,
    "Folders": FOLDERS,
    "Names of files": NAMES,
    "Lists, archives, arrays": OTHERS,
    "Sizes, channels, broken files": RUNS,
}
CASES = [case for cases in SECTIONS.values() for case in cases if isinstance(case, Case)]


def page() -> dict[str, Table]:
    """The tables under their headings; where all is given alike, the last column is left out."""
    found = {}
    for heading, cases in SECTIONS.items():
        rows = [case.row() for case in cases]
        width = 3 if len({row[2] for row in rows}) > 1 else 2
        columns = ("What you have", "What happens", "How it is given")[:width]
        found[heading] = Table(columns, tuple(row[:width] for row in rows), left=width)
    return found


def name_of(case: Case | Run) -> str:
    return f"{case.what}, {case.spec if isinstance(case, Case) else case.command}"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that everyone may enter; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.chdir(name)
        yield Path(name)
        monkeypatch.undo()


def lay_or_skip(case: Case) -> None:
    pytest.importorskip(case.needs)
    if case.opened_by is nobody and not hasattr(os, "geteuid"):
        pytest.skip("permissions of POSIX")
    try:
        lay(case.files)
    except (OSError, UnicodeError) as error:
        pytest.skip(f"not on this file system: {error}")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_happens(case: Case, here: Path) -> None:
    lay_or_skip(case)
    with case.opened_by():
        found, dataset = outcome(case)
    assert found == case.becomes
    assert case.holds or not case.claim, "nothing asserts the claim"
    if case.holds:
        assert dataset is not None
        case.holds(dataset)


@pytest.fixture(scope="module")
def net_and_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of cats and dogs, and a database."""
    folder = tmp_path_factory.mktemp("made")
    save_classifier(classes("cat", "dog"), folder / "net")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lay(THREE)
        done = nndefense(
            "index", "build", "--dataset", "imagefolder:photos", "--classifier", "net", "--quiet", *BUILD.split()
        )
    assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_what_a_command_does(run: Run, net_and_database: Path, here: Path) -> None:
    lay(run.files)
    Path("net").symlink_to(net_and_database / "net")
    Path("db").symlink_to(net_and_database / "out")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        done = nndefense(*shlex.split(run.command)[1:], *run.more.split())
    said = "\n".join([done.out, done.err, *(str(warning.message) for warning in warned)])
    assert (done.code != 0) == run.becomes.startswith("refused"), done.err
    for words in re.findall("`([^`]+)`", run.becomes):
        assert words in said or Path("out", words).is_file(), words
    if run.holds:
        run.holds()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_build_does_the_same(case: Case, here: Path) -> None:
    """By the command: the same rows, the same images left out, the same line."""
    lay_or_skip(case)
    found, dataset = outcome(case)
    known = dataset.classes if dataset else ()
    save_classifier(classes(*known, *("other", "more")[len(known) :]), "net")
    done = nndefense("index", "build", "--dataset", case.spec, "--classifier", "net", "--quiet", *BUILD.split())
    if dataset is None:
        assert done.code == 3
        assert found.removeprefix("refused: ").strip("`") in done.err
        return
    assert done.code == 0, done.err
    rejected = dataset.read_each(range(len(dataset))).rejected
    assert Manifest.read(Path("out")).rows == len(dataset) - len(rejected)
    told = Path("out/rejected.jsonl")
    lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()] if told.exists() else []
    assert [(line["id"], line["kind"], line["reason"]) for line in lines] == [
        (r.id, r.kind, r.reason) for r in rejected
    ]


def test_the_page_shows_these_rows() -> None:
    tables.check(PAGE, page())


if __name__ == "__main__":
    tables.write(PAGE, page())
