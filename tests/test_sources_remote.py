"""Sources behind URLs: in memory, in archives, and on a web server of the test's own on loopback."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from dirty import encoded, noise

from index_build.reader import read
from nndefense.datasets import ImageDataset, SourceError, open_dataset, write_hdf5
from nndefense.datasets import remote as remote_module
from nndefense.errors import DataError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

COUNT = 8
NAMES = [f"{'cat' if n < 4 else 'dog'}/{n}.png" for n in range(COUNT)]
PICTURES = [noise(n, 5, 6) for n in range(COUNT)]
EXPECTED = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2) / 255


def lay_out(root: Path) -> None:
    """The same eight pictures in every form below one folder."""
    for name, picture in zip(NAMES, PICTURES, strict=True):
        for home in ("photos", "splits/val"):
            (root / home / name).parent.mkdir(parents=True, exist_ok=True)
            (root / home / name).write_bytes(encoded(picture, "PNG"))
    (root / "list.csv").write_text("\n".join(["path,label", *(f"photos/{n},{n[:3]}" for n in NAMES)]))
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"train-{shard:02d}.tar", "w") as tar:
            for row in range(shard * 4, shard * 4 + 4):
                for suffix, data in (("png", encoded(PICTURES[row], "PNG")), ("cls", b"%d" % (row // 4))):
                    info = tarfile.TarInfo(f"{row}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (root / "shards" / "classes.txt").write_text("cat\ndog\n")
    write_hdf5(root / "h5" / "train.h5", EXPECTED, [n // 4 for n in range(COUNT)], NAMES, ("cat", "dog"))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": encoded(picture, "PNG")} for picture in PICTURES]
    labels = ["cat" if n < 4 else "dog" for n in range(COUNT)]
    (root / "tables").mkdir()
    parquet.write_table(arrow.table({"image": cells, "label": labels}), root / "tables" / "a.parquet", row_group_size=3)
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        for name, picture in zip(NAMES, PICTURES, strict=True):
            archive.writestr(f"inside/{name}", encoded(picture, "PNG"))


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    lay_out(root)
    return root


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, parts of files too, and fails as often as it is told."""

    failures = 0
    ranges = True
    asked: list[str] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append(self.path)
        if kind.failures and self.path.endswith(".png"):
            kind.failures -= 1
            self.send_error(503)
            return
        if self.path.endswith("forbidden.png"):
            self.send_error(403)
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if part is None or not kind.ranges or not os.path.isfile(path):
            super().do_GET()
            return
        first, last = int(part[1]), int(part[2])
        data = Path(path).read_bytes()
        body = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        if type(self).ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


@pytest.fixture
def server(laid: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler], ThreadingHTTPServer]]:
    """A web server of the laid-out folder: its address, its handler, itself."""
    monkeypatch.setattr(remote_module, "_PAUSE", 0.01)
    fsspec.filesystem("http").clear_instance_cache()
    kind = type("OwnHandler", (Handler,), {"asked": []})
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(laid)))
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}", kind, serving
    serving.shutdown()
    serving.server_close()
    thread.join(10)


@pytest.fixture
def memory(laid: Path) -> Iterator[str]:
    """The laid-out folder in fsspec's memory."""
    store = fsspec.filesystem("memory")
    store.put(str(laid), "/pool", recursive=True)
    yield "memory://pool"
    store.rm("/pool", recursive=True)


def check(dataset: ImageDataset) -> None:
    assert len(dataset) == COUNT
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4
    assert dataset.classes == ("cat", "dog")
    batches = list(read(dataset, np.arange(COUNT), 3, workers=2))
    assert torch.equal(torch.cat([batch.images for batch in batches]), EXPECTED)
    assert torch.equal(dataset.batch([6, 0])[0], EXPECTED[[6, 0]])
    again = pickle.loads(pickle.dumps(dataset))
    assert again.fingerprint == dataset.fingerprint
    assert torch.equal(again.batch([5])[0], EXPECTED[[5]])


SPECS = [
    "imagefolder:{}/photos",
    "imagefolder:{}/splits:val",
    "files:{}/list.csv",
    "webdataset:{}/shards/train-{{00..01}}.tar",
    "webdataset:{}/shards/train-*.tar",
    "webdataset:{}/shards:train",
    "webdataset:{}/shards",
    "hdf5:{}/h5/train.h5",
    "hdf5:{}/h5",
    "parquet:{}/tables/a.parquet",
    "parquet:{}/tables",
]


@pytest.mark.parametrize("spec", SPECS)
def test_in_memory(spec: str, memory: str) -> None:
    check(open_dataset(spec.format(memory)))
    assert len(open_dataset(f"{spec.format(memory)}[2:4]")) == 2


@pytest.mark.parametrize("spec", SPECS)
def test_over_http(spec: str, server: tuple[str, type[Handler], ThreadingHTTPServer]) -> None:
    check(open_dataset(spec.format(server[0])))


def test_in_a_zip(laid: Path, server: tuple[str, type[Handler], ThreadingHTTPServer]) -> None:
    check(open_dataset(f"imagefolder:zip://inside::{laid / 'photos.zip'}"))
    check(open_dataset(f"imagefolder:zip://inside::{server[0]}/photos.zip"))
    assert len(open_dataset(f"images:zip://::{laid / 'photos.zip'}")) == COUNT


def test_ids_are_those_of_the_same_folder_here(laid: Path, memory: str) -> None:
    here = open_dataset(f"imagefolder:{laid / 'photos'}")
    assert open_dataset(f"imagefolder:{memory}/photos").ids == here.ids == NAMES
    assert open_dataset(f"images:{memory}/photos").ids == NAMES
    # Byte counts come with the listing, so that even the fingerprints are equal.
    assert open_dataset(f"imagefolder:{memory}/photos").fingerprint == here.fingerprint


def test_a_listed_image_that_is_gone_and_a_store_that_is_gone(memory: str) -> None:
    dataset = open_dataset(f"imagefolder:{memory}/photos", size=4)
    store = fsspec.filesystem("memory")
    store.rm("/pool/photos/cat/1.png")
    reading = dataset.read_each(range(COUNT))
    assert [(r.id, r.kind, r.reason) for r in reading.rejected] == [("cat/1.png", "missing", "there is no such file")]
    for name in NAMES:
        if name != "cat/1.png":
            store.rm(f"/pool/photos/{name}")
    store.rm("/pool/photos", recursive=True)
    with pytest.raises(SourceError, match="the whole source is out of reach"):
        dataset.read_each(range(COUNT))


def test_a_server_that_stumbles_is_asked_again(server: tuple[str, type[Handler], ThreadingHTTPServer]) -> None:
    address, handler, _ = server
    dataset = open_dataset(f"imagefolder:{address}/photos", size=4)
    handler.failures = 2
    assert len(dataset.read_each([0]).ids) == 1
    assert handler.asked.count("/photos/cat/0.png") == 3
    handler.failures = 1000
    with pytest.raises(SourceError, match=r"cannot read .*photos/cat/0\.png .*503") as error:
        dataset.read_each([0])
    assert "\n" not in str(error.value)


def test_a_server_that_goes_away_rejects_nothing(server: tuple[str, type[Handler], ThreadingHTTPServer]) -> None:
    address, _, serving = server
    dataset = open_dataset(f"imagefolder:{address}/photos", size=4)
    shards = open_dataset(f"webdataset:{address}/shards", size=4)
    serving.shutdown()
    serving.server_close()
    for source in (dataset, shards):
        with pytest.raises(SourceError, match="cannot read"):
            source.read_each([7])
        with pytest.raises(SourceError):
            list(read(source, np.arange(COUNT), 2))


def test_refused_and_missing_files_of_a_server_are_bad_images(
    server: tuple[str, type[Handler], ThreadingHTTPServer], laid: Path
) -> None:
    address = server[0]
    (laid / "some.txt").write_text("photos/cat/0.png\nphotos/forbidden.png\nphotos/nowhere.png\n")
    reading = open_dataset(f"files:{address}/some.txt", size=4).read_each(range(3))
    assert reading.ids == ["photos/cat/0.png"]
    assert [(r.kind, r.reason) for r in reading.rejected] == [
        ("unreadable", "there is no permission to read it"),
        ("missing", "there is no such file"),
    ]
    # The same from a list here that names URLs.
    (laid / "urls.txt").write_text(f"{address}/photos/dog/5.png\n{address}/nowhere.png\n{laid}/photos/cat/0.png\n")
    reading = open_dataset(f"files:{laid / 'urls.txt'}").read_each(range(3))
    assert torch.equal(reading.images, EXPECTED[[5, 0]])
    assert [r.kind for r in reading.rejected] == ["missing"]
    for line in ("/etc/passwd", "file:///etc/passwd"):
        (laid / "bad.txt").write_text(f"photos/cat/0.png\n{line}\n")
        with pytest.raises(DataError, match=r"line 2 of .* names a file of this machine"):
            open_dataset(f"files:{address}/bad.txt")


def test_a_server_without_parts_of_files(server: tuple[str, type[Handler], ThreadingHTTPServer]) -> None:
    address, handler, _ = server
    handler.ranges = False
    check(open_dataset(f"imagefolder:{address}/photos"))
    with pytest.raises(DataError, match="cannot read") as error:
        open_dataset(f"webdataset:{address}/shards").batch(range(COUNT))
    assert "\n" not in str(error.value)


def test_a_damaged_member_of_an_archive_is_a_bad_image(laid: Path, tmp_path: Path) -> None:
    data = bytearray((laid / "photos.zip").read_bytes())
    place = data.index(encoded(PICTURES[2], "PNG"))
    data[place + 60] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(bytes(data))
    reading = open_dataset(f"imagefolder:zip://inside::{tmp_path / 'a.zip'}", size=4).read_each(range(COUNT))
    assert [(r.row, r.kind) for r in reading.rejected] == [(2, "damaged")]
    assert "CRC" in reading.rejected[0].reason


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagefolder:nonsense://x/y", "cannot be opened .*nonsense.*: check the URL"),
        ("imagefolder:memory://nowhere", "there is no folder"),
        ("webdataset:memory://nowhere/a.tar", "there is no shard"),
        ("webdataset:memory://nowhere/a-{0..2}.tar", "there is no shard memory://.*a-0.tar"),
        ("webdataset:memory://nowhere/*.tar", "no shard fits"),
        ("parquet:memory://nowhere/a.parquet", "there is no file"),
        ("hdf5:memory://nowhere/a.h5", "there is no file"),
        ("hdf5:memory://nowhere", "there is no folder"),
        ("files:memory://nowhere/list.txt", "there is no list"),
        ("imagefolder:zip://x::/nowhere.zip", "cannot be opened"),
    ],
)
def test_bad_urls(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_PAUSE", 0.01)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(spec)
    assert "\n" not in str(error.value)


def test_a_url_that_needs_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match="needs another package: Install s3fs"):
        open_dataset("imagefolder:s3://bucket/photos")


def test_a_folder_here_that_looks_like_a_url(laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zip::x").symlink_to(laid / "photos")
    check(open_dataset("imagefolder:zip::x"))


def test_a_forked_process_makes_its_own_connections(server: tuple[str, type[Handler], ThreadingHTTPServer]) -> None:
    dataset = open_dataset(f"imagefolder:{server[0]}/photos")
    assert torch.equal(dataset.batch([0])[0], EXPECTED[[0]])
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        os._exit(0 if torch.equal(dataset.batch([3])[0], EXPECTED[[3]]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
