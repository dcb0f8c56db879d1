"""Files from strangers: each hostile one gives one clear line, within limits of memory and time, and acts on nothing.

Every case is opened in a process of its own, forked off one that has imported the library, so that a crash, a hang or
too much memory is one case's failure. A listener on this machine must hear nothing, and no marker may appear.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from served import serving

REPOSITORY = Path(__file__).resolve().parent.parent
MEBIBYTE = 1 << 20
IMAGES = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
# Where the listener is, in the process that opens the files.
URL = f"http://127.0.0.1:{os.environ.get('LISTENER', '9')}/x"
SECRET = bytes(range(64, 64 + 192)) * 4


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Attributes:
        name: what is hostile.
        make: writes it (and what it leads to) into an empty folder.
        use: what a user does with it, given the folder.
        says: a pattern of what the error says; empty where the file opens and does no harm.
        memory: MiB that the opening may take.
        slow: whether it takes seconds.
    """

    name: str
    make: Callable[[Path], object]
    use: Callable[[Path], object]
    says: str
    memory: int = 400
    slow: bool = False


def read_all(spec: str, folder: Path, **options: Any) -> None:
    """Open a data set and read of it what a job reads."""
    from nndefense.datasets import open_dataset

    dataset = open_dataset(spec.replace("@", str(folder)), download=False, **options)
    dataset.read_each(range(min(len(dataset), 8)))
    list(dataset.ids[:8])
    assert len(dataset.fingerprint) == 64


def opening(spec: str, **options: Any) -> Callable[[Path], object]:
    """Opens a data set whose files are in the folder, ``@``."""
    return functools.partial(read_all, spec, **options)


# HDF5


def hdf5(fill: Callable[[h5py.File], object]) -> Callable[[Path], object]:
    """Writes ``a.h5``, beside which there are a file that is nobody's business and a pipe that nobody writes."""

    def make(folder: Path) -> None:
        (folder / "secret").write_bytes(SECRET)
        os.mkfifo(folder / "pipe")
        with h5py.File(folder / "other.h5", "w") as other:
            other["images"] = IMAGES
        place = os.getcwd()
        os.chdir(folder)
        try:
            with h5py.File("a.h5", "w", libver=("v110", "v110")) as file:
                fill(file)
        finally:
            os.chdir(place)

    return make


def virtual(source: str, name: str = "images") -> Callable[[h5py.File], None]:
    """Images that are those of another file, or of this one."""

    def fill(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(shape=IMAGES.shape, dtype="u1")
        layout[:] = h5py.VirtualSource(source, name, shape=IMAGES.shape)
        file.create_virtual_dataset("images", layout)

    return fill


def growing(file: h5py.File) -> None:
    """A virtual data set whose very shape depends on another file: a pipe."""
    space = h5py.h5s.create_simple((0, 8, 8, 3), (h5py.h5s.UNLIMITED, 8, 8, 3))
    for one in (space, source := space.copy()):
        one.select_hyperslab((0,) * 4, (1,) * 4, (1,) * 4, (h5py.h5s.UNLIMITED, 8, 8, 3))
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_virtual(space, b"pipe", b"images", source)
    h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, space, layout)


def with_images(**further: Any) -> Callable[[h5py.File], None]:
    """Good images, and something else."""

    def fill(file: h5py.File) -> None:
        file["images"] = IMAGES
        for name, value in further.items():
            if name == "classes":
                file.attrs[name] = value
            else:
                file[name] = value

    return fill


def declared(shape: tuple[int, ...], name: str = "images", **options: Any) -> Callable[[h5py.File], None]:
    """An array of which not a byte is written."""

    def fill(file: h5py.File) -> None:
        if name != "images":
            file["images"] = IMAGES
        file.create_dataset(name, shape=shape, dtype="u1", **options)

    return fill


def many_labels(file: h5py.File) -> None:
    """Two hundred million images of one pixel that are not written, and as many labels of a single byte."""
    file.create_dataset("images", shape=(200 << 20, 1, 1, 1), dtype="u1", chunks=(1 << 20, 1, 1, 1))
    file.create_dataset("labels", shape=(200 << 20,), dtype="u1", chunks=(1 << 20,), compression="gzip")


def deep_block(file: h5py.File) -> None:
    """A single image in a compressed block that unpacks to a gigabyte."""
    shape = (1, 512, 1024, 3)
    found = file.create_dataset(
        "images", shape=shape, maxshape=(None, *shape[1:]), chunks=(700, *shape[1:]), dtype="u1", compression="gzip"
    )
    found.id.write_direct_chunk((0, 0, 0, 0), b"\x78\x9c" + bytes(100))


ELSEWHERE = r"which may lead out of the file and is not read: write the values into the file itself$"
BEYOND = r"declares [\d,]+ bytes, far more than the file holds"
HDF5 = "hdf5:@/a.h5"

CASES = [
    Case(
        "hdf5: external storage",
        hdf5(lambda f: f.create_dataset("images", IMAGES.shape, "u1", external=[("secret", 0, 768)])),
        opening(HDF5),
        f"external storage, {ELSEWHERE}",
    ),
    Case(
        "hdf5: external storage of labels",
        hdf5(lambda f: (with_images()(f), f.create_dataset("labels", (4,), "u1", external=[("secret", 0, 4)]))),
        opening(HDF5),
        f"labels .* external storage, {ELSEWHERE}",
    ),
    Case(
        "hdf5: an external link",
        hdf5(lambda f: f.__setitem__("images", h5py.ExternalLink("other.h5", "images"))),
        opening(HDF5),
        f"images .* a link, {ELSEWHERE}",
    ),
    Case(
        "hdf5: an external link to a pipe",
        hdf5(lambda f: f.__setitem__("images", h5py.ExternalLink("pipe", "images"))),
        opening(HDF5),
        f"a link, {ELSEWHERE}",
    ),
    Case(
        "hdf5: an external link of ids",
        hdf5(with_images(ids=h5py.ExternalLink("pipe", "ids"))),
        opening(HDF5),
        f"ids .* a link, {ELSEWHERE}",
    ),
    Case(
        "hdf5: a soft link",
        hdf5(with_images(labels=h5py.SoftLink("/images"))),
        opening(HDF5),
        f"labels .* a link, {ELSEWHERE}",
    ),
    Case(
        "hdf5: a soft link to itself",
        hdf5(with_images(labels=h5py.SoftLink("/labels"))),
        opening(HDF5),
        f"labels .* a link, {ELSEWHERE}",
    ),
    Case(
        "hdf5: a virtual set of another folder",
        hdf5(virtual("/etc/../tmp/other.h5")),
        opening(HDF5),
        f"a virtual data set, {ELSEWHERE}",
    ),
    Case(
        "hdf5: a virtual set of the same folder",
        hdf5(virtual("other.h5")),
        opening(HDF5),
        f"a virtual data set, {ELSEWHERE}",
    ),
    Case("hdf5: a virtual set of itself", hdf5(virtual(".")), opening(HDF5), f"a virtual data set, {ELSEWHERE}"),
    Case(
        "hdf5: a virtual set of itself by name",
        hdf5(virtual("a.h5")),
        opening(HDF5),
        f"a virtual data set, {ELSEWHERE}",
    ),
    Case(
        "hdf5: a virtual set that grows with a pipe", hdf5(growing), opening(HDF5), f"a virtual data set, {ELSEWHERE}"
    ),
    Case("hdf5: huge shape", hdf5(declared((10**12, 8, 8, 3))), opening(HDF5), BEYOND),
    Case("hdf5: huge shape in chunks", hdf5(declared((10**12, 8, 8, 3), chunks=(1, 8, 8, 3))), opening(HDF5), BEYOND),
    Case("hdf5: one huge image", hdf5(declared((1, 10**5, 10**5, 3), chunks=(1, 8, 8, 3))), opening(HDF5), BEYOND),
    Case("hdf5: more images than bytes", hdf5(many_labels), opening(HDF5), f"declares 209,715,200 images|{BEYOND}"),
    Case("hdf5: one huge block", hdf5(deep_block), opening(HDF5), r"compressed in blocks of [\d,]+ bytes, more than"),
    Case(
        "hdf5: a group in the place of images",
        hdf5(lambda f: f.create_group("images")),
        opening(HDF5),
        "no array in 'images'",
    ),
    Case(
        "hdf5: a committed type in the place of labels",
        hdf5(with_images(labels=np.dtype("u1"))),
        opening(HDF5),
        "no array in 'labels'",
    ),
    Case(
        "hdf5: references in the place of labels",
        hdf5(
            lambda f: (with_images()(f), f.create_dataset("labels", data=[f["images"].ref] * 4, dtype=h5py.ref_dtype))
        ),
        opening(HDF5),
        "labels of type object",
    ),
    Case("hdf5: classes that are numbers", hdf5(with_images(classes=np.arange(3))), opening(HDF5), "no list of names"),
    Case("hdf5: a pipe", lambda folder: os.mkfifo(folder / "a.h5"), opening(HDF5), "there is no file"),
    Case("hdf5: a device", lambda folder: (folder / "a.h5").symlink_to("/dev/zero"), opening(HDF5), "there is no file"),
]


def both(*makes: Callable[[Path], object]) -> Callable[[Path], object]:
    """One after the other."""

    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


# texts


def text(name: str, content: bytes | str) -> Callable[[Path], object]:
    """Writes a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def hollow(name: str, size: int) -> Callable[[Path], object]:
    """A file of so many bytes that takes none on the disk."""
    return lambda folder: os.truncate(os.open(folder / name, os.O_CREAT | os.O_WRONLY), size)


def call(function: str) -> Callable[[Path], object]:
    """Calls a function, named ``module:name``, with the path of ``a`` in the folder."""

    def use(folder: Path) -> object:
        module, _, name = function.partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(folder / "a")

    return use


_READERS = {
    "recipe": (call("nndefense.recipes:read_toml"), "give a TOML file"),
    "json": (call("nndefense.files:read_json"), "cannot be read as JSON"),
    "classes": (call("nndefense.models.classifier:read_classes"), "the file of classes .* cannot be read"),
    "palette": (call("nndefense.pipeline.sticker_files:read_palette"), "cannot be read as text"),
    "keys": (call("nndefense.serving.http.security:Keys.read"), "keys in .* cannot be read"),
    "picture": (call("nndefense.datasets:load_image"), "cannot read the image .* (not a regular file)?"),
}
for kind, (use, says) in _READERS.items():
    CASES += [
        Case(f"{kind}: a device", lambda folder: (folder / "a").symlink_to("/dev/zero"), use, says),
        Case(f"{kind}: a pipe", lambda folder: os.mkfifo(folder / "a"), use, says),
        Case(f"{kind}: a terabyte", hollow("a", 1 << 40), use, f"{says}|{kind} .* bytes"),
        Case(f"{kind}: bytes of no kind", text("a", bytes(range(256))), use, "."),
    ]
CASES += [
    Case("json: deep", text("a", "[" * 10**6), *_READERS["json"]),
    Case("json: a number of a million digits", text("a", "1" * 10**6), *_READERS["json"]),
    Case("recipe: deep", text("a", "a=" + "[" * 10**5), _READERS["recipe"][0], "TOML"),
    Case(
        "recipe: long dotted names",
        text("a", ".".join("a" * 60_000) + "=1\n" + ".".join("a" * 60_000) + ".b=1"),
        _READERS["recipe"][0],
        "has a line with more than 1,000 points",
    ),
    Case(
        "list: a device",
        lambda folder: (folder / "a.csv").symlink_to("/dev/zero"),
        opening("files:@/a.csv"),
        "there is no list",
    ),
    Case(
        "list: a terabyte",
        hollow("a.csv", 1 << 40),
        opening("files:@/a.csv"),
        "bytes, more than the .* that are read of a text",
    ),
    Case(
        "list: one endless cell",
        text("a.csv", "path,label\n" + "x" * 10**6),
        opening("files:@/a.csv"),
        "field larger than field limit",
    ),
]


# tar, and labels


def bomb_of_torchvision(folder: Path) -> None:
    """The labels of a set of torchvision's that was made up."""
    from nndefense.datasets.torchvision_set import _labels

    _labels(type("Made", (), {"targets": [0, 2**31 - 1], "__len__": lambda self: 2})(), "MNIST")


def many_names(folder: Path) -> None:
    """As many names as are allowed, none of which is a classifier's."""
    from nndefense.models.class_names import match_classes

    assert match_classes([f"a {n}" for n in range(10**5)], [f"b {n}" for n in range(1000)], None).missing


def picture(size: int = 8) -> bytes:
    """A good PNG."""
    data = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A tar header, whose size may be a lie and below nothing."""
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # In base 256 where it does not fit.
    data[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (size % (1 << 96) | 1 << 95).to_bytes(12, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def block(data: bytes) -> bytes:
    """Filled up to whole blocks."""
    return data + bytes(-len(data) % 512)


def tar(*members: tuple[str, bytes], ahead: bytes = b"", end: bytes = bytes(1024)) -> Callable[[Path], object]:
    """Writes ``a.tar``: what comes ahead, members with honest headers, and the end."""
    body = b"".join(header(name, len(data)) + block(data) for name, data in members)
    return lambda folder: (folder / "a.tar").write_bytes(ahead + body + end)


def labelled(label: str, suffix: str = "cls") -> Callable[[Path], object]:
    """A shard of a picture with a label."""
    return tar(("0.png", picture()), (f"0.{suffix}", label.encode()))


TAR = "webdataset:@/a.tar"
NUMBER = "is no label: write a whole number from 0"
PAX = b"21 path=../../marker\n"
CASES += [
    Case("tar: addresses", labelled(json.dumps({"label": 0, "url": URL, "path": URL}), "json"), opening(TAR), ""),
    Case(
        "hdf5: an external link to an address",
        hdf5(lambda f: f.__setitem__("images", h5py.ExternalLink(URL, "images"))),
        opening(HDF5),
        ELSEWHERE,
    ),
    Case("hdf5: a virtual set of an address", hdf5(virtual(URL)), opening(HDF5), ELSEWHERE),
    Case("tar: a label bomb", labelled("2147483647"), opening(TAR), NUMBER),
    Case("tar: a label of a million", labelled("1e6"), opening(TAR), NUMBER),
    Case("tar: the highest label", labelled("99999"), opening(TAR), ""),
    Case("tar: a label bomb in JSON", labelled('{"label": 2147483647}', "json"), opening(TAR), NUMBER),
    Case("tar: an endless label", labelled('{"label": 1e400}', "json"), opening(TAR), NUMBER),
    Case("tar: deep JSON", labelled("[" * 10**5, "json"), opening(TAR), NUMBER),
    Case(
        "tar: too many classes",
        both(labelled("0"), text("classes.txt", "\n".join(map(str, range(10**5 + 1))))),
        opening(TAR),
        "100,001 classes, more than the 100,000 allowed",
    ),
    Case(
        "tar: a size below nothing",
        tar(("0.png", picture()), ahead=header("x.bin", -1024)),
        opening(TAR),
        "damaged|tar file",
    ),
    Case(
        "tar: a name of a terabyte",
        tar(ahead=header("x", 1 << 40, b"L"), end=b""),
        opening(TAR),
        "a header of 1,099,511,627,776 bytes",
    ),
    Case(
        "tar: a name of a size below nothing",
        tar(ahead=header("x", -512, b"L")),
        opening(TAR),
        "header of -|damaged|tar file",
    ),
    Case(
        "tar: further headers of a terabyte",
        both(tar(ahead=header("x", 1 << 40, b"x")), hollow("a.tar", 1 << 41)),
        opening(TAR),
        "a header of 1,099,511,627,776 bytes",
    ),
    Case(
        "tar: a picture of a terabyte",
        both(tar(ahead=header("0.png", 1 << 40)), hollow("a.tar", (1 << 40) + 2048)),
        opening(TAR),
        "bytes, more than the 1,073,741,824 allowed for one picture",
    ),
    Case(
        "tar: names that lead out",
        tar(
            ("../../marker.png", picture()),
            ("/etc/marker.png", picture()),
            ahead=header("x", len(PAX), b"x") + block(PAX),
        ),
        opening(TAR),
        "",
    ),
    Case(
        "tar: links",
        tar(("0.png", picture()), ahead=header("1.png", 0, b"2") + header("2.png", 0, b"1")),
        opening(TAR),
        "",
    ),
    Case(
        "tar: a pipe in the folder",
        lambda folder: os.mkfifo(folder / "a.tar"),
        opening("webdataset:@"),
        "not a regular file",
    ),
    Case(
        "hdf5: a label bomb",
        hdf5(with_images(labels=np.array([0, 1, 2, 2**31 - 1]))),
        opening(HDF5),
        "has label 2147483647: store whole numbers from 0 to 99,999",
    ),
    Case(
        "hdf5: a label of ten to the 300",
        hdf5(with_images(labels=np.array([0, 1, 2, 1e300]))),
        opening(HDF5),
        "has label 1e.300",
    ),
    Case(
        "hdf5: too many classes",
        hdf5(with_images(classes=np.zeros(10**5 + 1, "S1"))),
        opening(HDF5),
        "100,001 classes, more than the 100,000 allowed",
    ),
    Case(
        "list: a label bomb",
        text("a.csv", "path,label\na.png,2147483647\n"),
        opening("files:@/a.csv", size=8),
        "has label 2147483647",
    ),
    Case(
        "list: a label of many digits",
        text("a.csv", f"path,label\na.png,{'9' * 5000}\n"),
        opening("files:@/a.csv", size=8),
        "has label inf",
    ),
    Case(
        "classes: too many",
        text("a", "\n".join(map(str, range(10**6)))),
        _READERS["classes"][0],
        "has more than the 100,000 lines allowed",
    ),
    Case("classes: as many as are allowed", lambda folder: None, many_names, ""),
    Case("torchvision: a label bomb", lambda folder: None, bomb_of_torchvision, "has label 2147483647"),
]


# pictures


def png(width: int, height: int, bits: int, colour: int, kept: int | None = None) -> Callable[[Path], object]:
    """Writes ``a``: a black PNG of few bytes, of which the first ``kept`` rows are there."""
    bytes_of = {0: 1, 2: 3, 4: 2, 6: 4}[colour] * bits // 8

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))

    def make(folder: Path) -> None:
        packer, row = zlib.compressobj(1), bytes(1 + width * bytes_of)
        data = b"".join(packer.compress(row) for _ in range(height if kept is None else kept)) + packer.flush()
        head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0))
        (folder / "a").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b""))

    return make


def shown(folder: Path) -> None:
    """Reads the picture in a small size."""
    from nndefense.datasets import load_image

    load_image(folder / "a", size=8)


CASES += [
    Case("picture: 9 million pixels of 16 bits", png(3000, 3000, 16, 0), shown, "", memory=80),
    Case("picture: 9 million transparent pixels", png(3000, 3000, 8, 6), shown, "", memory=110),
    Case("picture: 88 million pixels of 16 bits", png(9400, 9400, 16, 0), shown, "", memory=700, slow=True),
    Case("picture: 88 million transparent pixels", png(9400, 9400, 8, 6), shown, "", memory=900, slow=True),
    Case("picture: 100 million pixels", png(10**4, 10**4, 8, 0, kept=1), shown, "more than the [0-9,]+ allowed"),
    Case("picture: four billion pixels", png(1 << 16, 1 << 16, 8, 0, kept=1), shown, "image .* pixels"),
]


# Parquet


def parquet(rows: int, groups: int = 1, **columns: Any) -> Callable[[Path], object]:
    """Writes ``a.parquet``: each column is one value, as often as there are rows."""

    def make(folder: Path) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as pq

        # As they are stored, where they can be made so; the schema says that they are plain.
        places = arrow.array(np.zeros(rows, np.int32))
        table = arrow.table(
            {
                name: arrow.array([value] * rows)
                if isinstance(value, dict)
                else arrow.DictionaryArray.from_arrays(places, arrow.array([value]))
                for name, value in columns.items()
            }
        )
        with pq.ParquetWriter(folder / "a.parquet", table.schema, compression="zstd", store_schema=False) as writer:
            for _ in range(groups):
                writer.write_table(table, row_group_size=rows)
        assert not any(map(arrow.types.is_dictionary, pq.read_schema(folder / "a.parquet").types))

    return make


def zeros(count: int) -> Callable[[Path], object]:
    """Writes ``a.parquet``: pictures that are a MiB of zeros each, but no two alike."""

    def make(folder: Path) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as pq

        cells = arrow.array([number.to_bytes(8, "big") + bytes(MEBIBYTE) for number in range(count)])
        table = arrow.table({"image": cells})
        pq.write_table(table, folder / "a.parquet", compression="zstd", use_dictionary=False)

    return make


PARQUET = "parquet:@/a.parquet"
CASES += [
    Case(
        "parquet: many rows in few bytes",
        parquet(10**6, 30, image=b"x", label=0),
        opening(PARQUET, size=8),
        "declares 30,000,000 rows in [0-9,]+ bytes",
    ),
    Case(
        "parquet: a million rows of few bytes",
        parquet(10**6, image=b"x", label=0),
        opening(PARQUET, size=8),
        "",
        memory=500,
        slow=True,
    ),
    Case(
        "parquet: a large picture again and again",
        parquet(500, image=bytes(8 * MEBIBYTE)),
        opening(PARQUET, size=8),
        "pictures have more than",
    ),
    Case(
        "parquet: a large picture in a struct again and again",
        parquet(80, image={"bytes": bytes(5 * MEBIBYTE), "path": "a"}),
        opening(PARQUET, size=8),
        "pictures have more than",
        memory=800,
        slow=True,
    ),
    Case(
        "parquet: a large id again and again",
        parquet(5000, image=b"x", id="x" * MEBIBYTE),
        opening(PARQUET, size=8),
        "labels or ids of more than",
    ),
    Case(
        "parquet: a large label again and again",
        parquet(5000, image=b"x", label="x" * MEBIBYTE),
        opening(PARQUET, size=8),
        "labels or ids of more than",
        slow=True,
    ),
    Case(
        "parquet: packed zeros",
        zeros(70),
        opening(PARQUET, size=8),
        "unpacks to [0-9,]+ bytes, far more than the file holds",
    ),
    Case(
        "parquet: a label bomb",
        parquet(3, image=b"x", label=2**31 - 1),
        opening(PARQUET, size=8),
        "has label 2147483647",
    ),
    Case(
        "parquet: a path that leads out",
        parquet(3, image={"bytes": b"", "path": URL}),
        opening(PARQUET, size=8),
        "",
    ),
    Case(
        "parquet: no table",
        text("a.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"),
        opening(PARQUET, size=8),
        "cannot read .* as a Parquet file",
    ),
    Case(
        "parquet: a pipe in the folder",
        lambda folder: os.mkfifo(folder / "a.parquet"),
        opening("parquet:@", size=8),
        "not a regular file",
    ),
]


# indexes of FAISS


def index(factory: str, change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    """Writes ``a``: an index of 300 rows of 8 numbers, and what becomes of its bytes."""

    def make(folder: Path) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        rows = np.random.default_rng(0).random((300, 8), dtype=np.float32)
        made = faiss.index_factory(8, factory)
        made.train(rows)
        made.add(rows)
        data = bytearray(faiss.serialize_index(made).tobytes())
        change(data)
        (folder / "a").write_bytes(data)

    return make


def instead(old: bytes, new: bytes) -> Callable[[bytearray], object]:
    """Puts bytes in the place of others."""

    def change(data: bytearray) -> None:
        place = data.index(old)
        data[place : place + len(new)] = new

    return change


def lists_elsewhere(folder: Path) -> None:
    """Writes ``a``: an index whose lists are said to be in another file."""
    import faiss

    index("IVF4,Flat", lambda data: None)(folder)
    made = faiss.read_index(str(folder / "a"))
    lists = faiss.OnDiskInvertedLists(4, made.code_size, str(folder / "marked"))
    lists.merge_from(made.invlists, 0)
    made.replace_invlists(lists, True)
    lists.this.disown()
    faiss.write_index(made, str(folder / "a"))


NO_INDEX = "is not an index that this FAISS can read"
READ_INDEX = call("nndefense.database.index:FaissIndex.read")
COUNT = struct.pack("<Q", 300 * 8)
CASES += [
    Case("faiss: a good index", index("IVF4,Flat", lambda data: None), READ_INDEX, ""),
    Case("faiss: a terabyte", index("Flat", instead(COUNT, struct.pack("<Q", 1 << 38))), READ_INDEX, NO_INDEX),
    Case("faiss: eight gigabytes", index("Flat", instead(COUNT, struct.pack("<Q", 1 << 31))), READ_INDEX, NO_INDEX),
    Case("faiss: cut short", index("HNSW8", lambda data: data.__delitem__(slice(-100, None))), READ_INDEX, NO_INDEX),
    Case("faiss: of no kind", text("a", b"IxXX" + bytes(100)), READ_INDEX, NO_INDEX),
    Case("faiss: a pipe", lambda folder: os.mkfifo(folder / "a"), READ_INDEX, NO_INDEX),
    Case("faiss: lists in another file", lists_elsewhere, READ_INDEX, "has its lists in another file"),
]


# classifiers


def classifier(weights: Callable[[bytes], bytes] | None = None, **changes: Any) -> Callable[[Path], object]:
    """Writes a small classifier, and changes entries of its description and what its file of weights holds."""

    def make(folder: Path) -> None:
        from nndefense.files import sealed
        from nndefense.models import build_classifier, save_classifier

        made = build_classifier("madry-mnist", input_shape=(1, 8, 8), classes=["a", "b"], seed=0)
        save_classifier(made, folder / "a")
        described, stored = folder / "a" / "classifier.json", folder / "a" / "model.safetensors"
        told = json.loads(described.read_text())
        if weights is not None:
            stored.write_bytes(weights(stored.read_bytes()))
            told["weights"]["sha256"] = hashlib.sha256(stored.read_bytes()).hexdigest()
        described.write_text(json.dumps(sealed({**told, **changes})))
        (folder / "marker.py").write_text(f"open({str(folder / 'marker')!r}, 'w')")

    return make


def headed(header: bytes, length: int | None = None) -> Callable[[bytes], bytes]:
    """Another header for a file of safetensors, which may lie about its own length."""

    def change(data: bytes) -> bytes:
        (before,) = struct.unpack_from("<Q", data)
        return struct.pack("<Q", len(header) if length is None else length) + header + data[8 + before :]

    return change


LOAD = call("nndefense.models:load_classifier")
NO_WEIGHTS = "is not a safetensors file"
NO_NET = "does not describe a classifier"
CASES += [
    Case("classifier: good", classifier(), LOAD, ""),
    Case("classifier: a net of terabytes", classifier(input_shape=[1, 40_000, 40_000]), LOAD, "bytes of weights, but"),
    Case("classifier: a net beyond all numbers", classifier(input_shape=[1, 1 << 62, 1 << 62]), LOAD, NO_NET),
    Case("classifier: a net of no size", classifier(input_shape=[1, -8, 8]), LOAD, NO_NET),
    Case(
        "classifier: too many classes", classifier(classes=[str(n) for n in range(10**5 + 1)]), LOAD, "100,001 classes"
    ),
    Case(
        "classifier: weights of a terabyte",
        both(classifier(), lambda folder: os.truncate(folder / "a" / "model.safetensors", 1 << 40)),
        LOAD,
        "bytes of weights, but",
    ),
    Case("classifier: options of no kind", classifier(architecture="torchvision:resnet18", options=[1]), LOAD, NO_NET),
    Case(
        "classifier: code", classifier(architecture="python:marker.py:make", source=URL), LOAD, "names the architecture"
    ),
    Case("safetensors: a header of exabytes", classifier(headed(b"{}", 1 << 60)), LOAD, NO_WEIGHTS),
    Case("safetensors: a deep header", classifier(headed(b'{"a":' + b"[" * 10**5)), LOAD, NO_WEIGHTS),
    Case(
        "safetensors: a tensor beyond the file",
        classifier(headed(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}')),
        LOAD,
        NO_WEIGHTS,
    ),
    Case("safetensors: a pickle", classifier(lambda data: b"\x80\x04cos\nsystem\n" + data), LOAD, NO_WEIGHTS),
]


# damaged headers


def two_forms(folder: Path) -> None:
    """Writes images as this library does, and as h5py does by itself, compressed and with texts of any length."""
    from nndefense.datasets import write_hdf5

    floats = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    write_hdf5(folder / "0.h5", floats, [0, 1, 2, 0, 1, -1], [f"a{n}" for n in range(6)], ["x", "y", "z"])
    with h5py.File(folder / "1.h5", "w") as file:
        file.create_dataset("images", data=IMAGES, chunks=(2, 8, 8, 3), compression="gzip", shuffle=True)
        file["labels"] = np.arange(4)
        file.create_dataset("ids", data=[f"id{n}" for n in range(4)], dtype=h5py.string_dtype())


def flipping(count: int) -> Callable[[Path], None]:
    """Opens so many copies of these files with some bytes changed, most of them in headers."""

    def use(folder: Path) -> None:
        from nndefense.errors import NNDefenseError

        draw = random.Random(count)
        said = []
        for number in range(count):
            data = bytearray((folder / f"{number % 2}.h5").read_bytes())
            for _ in range(draw.choice([1, 2, 4, 16])):
                place = draw.randrange(min(len(data), draw.choice([2048, 1 << 20])))
                data[place] = draw.choice([0, 1, 255, data[place] ^ (1 << draw.randrange(8))])
            (folder / "a.h5").write_bytes(data)
            try:
                read_all(HDF5, folder)
            except NNDefenseError as error:
                said.append(str(error))
        # Most bytes of a header can be anything.
        assert len(said) > count // 5, len(said)
        assert not any("\n" in one for one in said)

    return use


CASES += [
    Case("hdf5: forty damaged headers", two_forms, flipping(40), ""),
    Case("hdf5: four hundred damaged headers", two_forms, flipping(400), "", slow=True),
]


# the process that opens them


def attempt(case: Case, step: Callable[[Path], object], folder: Path, memory: int, seconds: int) -> dict[str, str]:
    """What one step of a case comes to, in a child with limits."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        os.dup2(2, 1)
        status = Path("/proc/self/status").read_text()
        used = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_DATA, (used + memory * MEBIBYTE,) * 2)
        from nndefense.errors import NNDefenseError

        try:
            step(folder)
            found = {"end": "opened", "text": ""}
        except NNDefenseError as error:
            found = {"end": "refused", "text": str(error)}
        except BaseException:
            found = {"end": "traceback", "text": traceback.format_exc()[-2000:]}
        os.write(writable, json.dumps(found).encode())
        os._exit(0)
    os.close(writable)
    with open(readable, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"end": signal.Signals(os.WTERMSIG(status)).name, "text": ""}
    return dict(json.loads(answer)) if answer else {"end": f"exit {os.WEXITSTATUS(status)}", "text": ""}


def main(root: str, names: Sequence[str]) -> None:
    """Make and open the cases of these names, and print what they come to, a line each."""
    import faiss  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import nndefense.database
    import nndefense.datasets
    import nndefense.models
    import nndefense.pipeline.sticker_files
    import nndefense.recipes
    import nndefense.serving.http.security  # noqa: F401

    for number, case in enumerate(CASES):
        if case.name in names:
            folder = Path(root) / str(number)
            folder.mkdir()
            found = attempt(case, case.make, folder, 4096, 60)
            if found["end"] == "opened":
                found = attempt(case, case.use, folder, case.memory, 60 if case.slow else 20)
            print(json.dumps({"name": case.name, **found}), flush=True)


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


Ends = Callable[[Case], dict[str, str]]
# Every fifth of those that take no seconds runs in the fast suite, all of them in the slow one.
SOON = {case.name for case in [case for case in CASES if not case.slow][::5]}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory, listener: socket.socket) -> Ends:
    """What cases come to: all of the fast suite, or all others, at the first that is asked for."""
    found: dict[str, dict[str, str]] = {}
    port = str(listener.getsockname()[1])

    def of(case: Case) -> dict[str, str]:
        if case.name not in found:
            root = tmp_path_factory.mktemp("strangers")
            names = [one.name for one in CASES if (one.name in SOON) == (case.name in SOON)]
            done = subprocess.run(
                [sys.executable, __file__, str(root), *names],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "LISTENER": port},
            )
            assert done.returncode == 0, done.stderr[-3000:]
            found.update((one["name"], one) for one in map(json.loads, done.stdout.splitlines()))
            assert not list(root.glob("**/marker"))
        return found[case.name]

    return of


PARAMETERS = [pytest.param(case, marks=[] if case.name in SOON else [pytest.mark.slow], id=case.name) for case in CASES]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_hostile_file_gives_one_clear_line_and_acts_on_nothing(
    case: Case, ends: Ends, listener: socket.socket
) -> None:
    end = ends(case)
    assert end["end"] == ("refused" if case.says else "opened"), end
    assert re.search(case.says, end["text"]), end["text"]
    assert "\n" not in end["text"]
    assert len(end["text"]) < 600
    with pytest.raises(BlockingIOError):
        listener.accept()


# pictures that are decoded in a process of their own


@pytest.fixture
def apart() -> Iterator[Any]:
    """The module, and after the test no process of this thread's."""
    if sys.platform != "linux":
        pytest.skip("limits of memory are Linux's")
    from nndefense.serving.pictures import apart

    yield apart
    apart._here.__dict__.clear()


@pytest.mark.slow
def test_a_process_of_its_own_decodes_the_same_and_ends_for_its_own_picture_alone(apart: Any, tmp_path: Path) -> None:
    from nndefense.serving.pictures import Limits, Refused, decode_all

    limits, shape, good = Limits(decoder_mib=64), (3, 16, 16), picture(40)
    here = decode_all([(good, "image/png"), (good, None)], Limits(), shape)
    first = apart.decode_images([(good, "image/png"), (good, None)], limits, shape)
    assert all(torch.equal(one, other) for one, other in zip(here, first, strict=True))
    process = apart._here.child._process
    held = Path(f"/proc/{process.pid}/limits").read_text()
    assert re.search(r"Max open files +0 ", held)
    assert re.search(r"Max file size +0 ", held)
    png(4900, 4900, 8, 6)(tmp_path)
    for data, code, says in (
        ((tmp_path / "a").read_bytes(), "too_many_pixels", "take more than 64 MiB to be decoded"),
        (b"no picture", "unsupported_image", "no PNG"),
        (good[:-20], "damaged_image", "cannot be read"),
    ):
        with pytest.raises(Refused, match=says) as error:
            apart.decode_images([(data, None)], limits, shape)
        assert error.value.code == code
    # None of them ended it; what does is told, and the next picture finds another one.
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(Refused, match="ends the decoder"):
        apart.decode_images([(good, None)], limits, shape)
    assert torch.equal(apart.decode_images([(good, None)], limits, shape)[0], here[0])
    assert apart._here.child._process.pid != process.pid


@pytest.mark.slow
def test_a_service_whose_pictures_are_decoded_apart_answers_the_same(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("limits of memory are Linux's")
    from nndefense.serving.pictures import Limits

    png(3000, 3000, 8, 6)(tmp_path)
    good, large = picture(), (tmp_path / "a").read_bytes()
    with serving() as here, here.client() as client:
        expected = client.post("/v1/classify", content=good, headers={"content-type": "image/png"}).content
    with serving(limits=Limits(decoder_mib=40)) as there, there.client() as client:
        for data, status in ((good, 200), (large, 413), (good, 200)):
            answer = client.post("/v1/classify", content=data, headers={"content-type": "image/png"})
            assert answer.status_code == status, answer.text
        assert answer.content == expected


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_ended(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nndefense.serving.pictures import Limits, Refused

    monkeypatch.setattr(apart, "_GRACE", 0.2)
    limits = Limits(decoder_mib=64, decode_seconds=0.3)
    child = apart._here.child = apart._Child(limits)
    child._process.send_signal(signal.SIGSTOP)
    with pytest.raises(Refused, match="take too long") as error:
        apart.decode_images([(picture(), None)], limits, (3, 8, 8))
    assert error.value.code == "decode_timeout"
    assert child.ended


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
