"""Tar shards: the pixels, keys and labels that were stored, at random and as the streaming library reads them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from nndefense.datasets import ImageFolderDataset, WebDataset, open_dataset
from nndefense.datasets.remote import expand_braces, find_files
from nndefense.errors import DataError

Sample = tuple[str, Mapping[str, bytes]]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def pixels(seed: int, height: int = 5, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed: int, height: int = 5, width: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, samples: Sequence[Sample], mode: str = "w") -> Path:
    """Write samples (key, {suffix: bytes}) as one tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for key, files in samples:
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def labelled(first: int, last: int, prefix: str = "") -> list[Sample]:
    return [(f"{prefix}{n:04d}", {"png": png(n), "cls": str(n % 3).encode()}) for n in range(first, last)]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Ten labelled images in three shards."""
    for number, (first, last) in enumerate([(0, 4), (4, 7), (7, 10)]):
        shard(tmp_path / f"pool-{number:03d}.tar", labelled(first, last))
    return tmp_path


def test_images_keys_and_labels(pool: Path) -> None:
    dataset = open_dataset(f"webdataset:{pool}")
    assert dataset.shape == (3, 5, 6)
    assert dataset.ids == [f"{n:04d}" for n in range(10)]
    assert dataset.labels.tolist() == [n % 3 for n in range(10)]
    assert dataset.classes == ("0", "1", "2")
    # In any order, across shards, and twice.
    images, labels = dataset.batch([9, 0, 5, 5])
    for image, n in zip(images, (9, 0, 5, 5), strict=True):
        assert torch.equal(image, torch.from_numpy(pixels(n)).permute(2, 0, 1) / 255)
    assert labels.tolist() == [0, 0, 2, 2]
    assert torch.equal(dataset[3][0], dataset.batch([3])[0][0])


@pytest.mark.parametrize(
    ("source", "first", "count"),
    [
        ("", 0, 10),
        ("/pool-001.tar", 4, 3),
        ("/pool-{000..001}.tar", 0, 7),
        ("/pool-{002,000}.tar", 7, 7),
        ("/pool-*.tar", 0, 10),
        ("/pool-00[12].tar", 4, 6),
        ("/pool-00[12].tar[1:3]", 5, 2),
        ("/pool-{000..002}.tar[::3]", 0, 4),
        ("[2:5]", 2, 3),
        (":pool-002", 7, 3),
        (":pool-002[1:]", 8, 2),
    ],
)
def test_specs(pool: Path, source: str, first: int, count: int) -> None:
    dataset = open_dataset(f"webdataset:{pool}{source}")
    assert dataset.ids[0] == f"{first:04d}"
    assert len(dataset) == count


def test_a_split_may_be_a_folder(pool: Path) -> None:
    shard(pool / "val" / "a.tar", labelled(20, 22))
    assert open_dataset(f"webdataset:{pool}:val").ids == ["0020", "0021"]
    assert len(open_dataset(f"webdataset:{pool}")) == 10


def test_size_and_channels_as_for_folders_of_the_same_files(pool: Path, tmp_path: Path) -> None:
    for n in range(10):
        file = tmp_path / "folder" / "class" / f"{n:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(n))
    for options in ({}, {"size": (4, 3)}, {"channels": 1}, {"size": 8, "channels": 1}):
        ours = WebDataset(pool, **options)
        theirs = ImageFolderDataset(tmp_path / "folder", **options)
        assert ours.shape == theirs.shape
        assert torch.equal(ours.batch(range(10))[0], theirs.batch(range(10))[0])


def test_the_same_samples_as_the_library(pool: Path) -> None:
    library = pytest.importorskip("webdataset")
    with library.ShardWriter(str(pool / "lib-%03d.tar"), maxcount=3, verbose=0) as writer:
        for n in range(8):
            writer.write({"__key__": f"s{n}", "png": pixels(n), "cls": n % 2, "json": {"note": "none"}})
    ours = open_dataset(f"webdataset:{pool}/lib-{{000..002}}.tar")
    stream = library.WebDataset(str(pool / "lib-{000..002}.tar"), shardshuffle=False).decode("rgb8")
    theirs = list(stream.to_tuple("__key__", "png", "cls"))
    assert len(ours) == len(theirs) == 8
    images, labels = ours.batch(range(8))
    for row, (key, image, label) in enumerate(theirs):
        assert ours.ids[row] == key
        assert labels[row] == label
        assert torch.equal((images[row] * 255).round().byte(), torch.from_numpy(image.copy()).permute(2, 0, 1))


def test_loader_processes(pool: Path) -> None:
    dataset = open_dataset(f"webdataset:{pool}")
    found = torch.cat([images for images, _ in DataLoader(dataset, batch_size=4, num_workers=2)])
    assert torch.equal(found, dataset.batch(range(10))[0])
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.batch([4])[0], dataset.batch([4])[0])


# --- labels and ids


def test_labels_are_optional(tmp_path: Path) -> None:
    dataset = WebDataset(shard(tmp_path / "a.tar", [("x", {"png": png(0)}), ("y", {"png": png(1), "cls": b"-1"})]))
    assert dataset.labels.tolist() == [-1, -1]
    assert dataset.classes == ()


def test_labels_in_json(tmp_path: Path) -> None:
    def write(*values: object) -> WebDataset:
        samples = [(f"k{n}", {"json": json.dumps(v).encode(), "png": png(n)}) for n, v in enumerate(values)]
        return WebDataset(shard(tmp_path / "a.tar", samples))

    named = write({"label": "dog"}, {"class": "cat"}, {"other": 1}, [3])
    assert named.classes == ("cat", "dog")
    assert named.labels.tolist() == [1, 0, -1, -1]
    assert write({"label": 1}, {"cls": 0}).labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("bird\ndog\ncat\n")
    assert write({"label": "dog"}, {"class": "cat"}).labels.tolist() == [1, 2]
    assert write({"label": 2}, {"label": 0}).classes == ("bird", "dog", "cat")
    with pytest.raises(DataError, match=r"label 3, but .*classes.txt names 3 classes"):
        write({"label": 3})
    with pytest.raises(DataError, match=r"class 'fox', which .* does not list"):
        write({"label": "fox"})
    with pytest.raises(DataError, match="numbers and labels that are names"):
        write({"label": "dog"}, {"label": 0})


def test_cls_goes_before_json_in_either_order(tmp_path: Path) -> None:
    files = {"png": png(0), "cls": b" 1\n", "json": b'{"label": 0}'}
    backwards = dict(reversed(files.items()))
    dataset = WebDataset(shard(tmp_path / "a.tar", [("x", files), ("y", backwards)]))
    assert dataset.labels.tolist() == [1, 1]


def test_keys_that_shards_share_get_the_name_of_the_shard(pool: Path) -> None:
    shard(pool / "pool-003.tar", labelled(0, 2))
    dataset = open_dataset(f"webdataset:{pool}")
    assert dataset.ids[0] == "pool-000/0000"
    assert dataset.ids[11] == "pool-003/0001"
    assert len(set(dataset.ids)) == 12


def test_keys_with_folders_and_other_files(tmp_path: Path) -> None:
    samples: list[Sample] = [
        ("dog/a.b/7", {"JPG": png(1), "txt": b"a dog", "mask.png": png(9)}),
        (".hidden", {"png": png(2)}),
        ("x", {"pkl": b"\x80\x04N."}),
        ("y" * 180, {"png": png(3), "webp": png(4)}),
    ]
    dataset = WebDataset(shard(tmp_path / "a.tar", samples))
    assert dataset.ids == ["dog/a.b/7", "y" * 180]
    assert torch.equal(dataset[1][0], torch.from_numpy(pixels(3)).permute(2, 0, 1) / 255)


def test_suffixes_of_two_parts(tmp_path: Path) -> None:
    def write(*samples: dict[str, bytes]) -> WebDataset:
        return WebDataset(shard(tmp_path / "a.tar", [(f"k{n}", files) for n, files in enumerate(samples)]))

    found = write(
        {"image.png": png(0), "label.cls": b"1"},
        {"mask.png": png(9), "IMAGE.png": png(1), "label.json": b'{"target": 2}'},
        {"rgb.png": png(2), "cls": b"0", "label.cls": b"5"},
        {"mask.png": png(9), "png": png(3), "json": b'{"label": 6}', "target.cls": b"3", "other.cls": b"7"},
    )
    order = [found.ids.index(f"k{n}") for n in range(4)]
    assert found.labels[order].tolist() == [1, 2, 0, 3]
    for n, row in enumerate(order):
        assert torch.equal(found[row][0], torch.from_numpy(pixels(n)).permute(2, 0, 1) / 255)
    with pytest.raises(DataError, match=r"k0.left.png and k0.right.png for one key"):
        write({"left.png": png(0), "right.png": png(1)})
    twice = [("a", {"image.png": png(0)}), ("a", {"image.png": png(1)})]
    with pytest.raises(DataError, match=r"a.image.png twice"):
        WebDataset(shard(tmp_path / "b.tar", twice))


def test_fingerprint(pool: Path, tmp_path: Path) -> None:
    first = WebDataset(pool).fingerprint
    assert first == WebDataset(f"{pool}/pool-*.tar").fingerprint
    assert first != WebDataset(pool, size=4).fingerprint
    shard(pool / "pool-002.tar", [*labelled(7, 9), ("0009", {"png": png(99), "cls": b"0"})])
    assert first != WebDataset(pool).fingerprint


# --- mistakes and damage


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nothing.tar", "there is no shard"),
        ("/pool-{000..005}.tar", "there is no shard .*pool-003.tar"),
        ("/other-*.tar", "no shard fits"),
        (":other", "neither a folder other nor shards"),
        ("/nowhere", "there is nothing at"),
        ("/empty", r"has no shards \*.tar"),
        ("[5:5]", "leaves none"),
    ],
)
def test_sources_that_are_not_there(pool: Path, source: str, message: str) -> None:
    (pool / "empty").mkdir()
    with pytest.raises(DataError, match=message) as error:
        open_dataset(f"webdataset:{pool}{source}")
    one_line(error)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"compressed .gzip.*unpack it"):
        WebDataset(shard(tmp_path / "a.tar", labelled(0, 3), "w:gz"))


def test_every_cut_of_a_shard_is_seen(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", labelled(0, 3)).read_bytes()
    content = len(whole.rstrip(b"\0"))
    # Also between two files, where nothing but the end is missing.
    for length in [*range(0, content, 97), *range(0, content, 512)]:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.tar (is cut short|is no tar file or is cut short)"):
            WebDataset(tmp_path / "a.tar")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", labelled(0, 3))
    data = bytearray(path.read_bytes())
    place = data.index(b"0001.png")
    data[place + 150] ^= 0xFF  # within the checksum field
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"damaged at byte {place:,}"):
        WebDataset(path)


def test_other_mistakes(tmp_path: Path) -> None:
    def refused(message: str, *samples: Sample) -> None:
        with pytest.raises(DataError, match=message) as error:
            WebDataset(shard(tmp_path / "a.tar", samples)).batch([0, 1])
        one_line(error)

    good: Sample = ("good", {"png": png(0)})
    refused("holds no images, but cls, txt", ("x", {"txt": b"x", "cls": b"1"}))
    refused(r"x.cls in .* is no label", good, ("x", {"png": png(1), "cls": b"dog"}))
    refused("is no label", good, ("x", {"png": png(1), "json": b"{"}))
    refused("is no label", good, ("x", {"png": png(1), "json": b'{"label": 1.5}'}))
    refused("is no label", good, ("x", {"png": png(1), "cls": b"-7"}))
    refused("too many for a label", good, ("x", {"png": png(1), "json": b" " * (2 << 20)}))
    refused("holds good.png twice", good, good)
    refused("is empty", good, ("x", {"png": b""}))
    refused("cannot read the image x.png in", good, ("x", {"png": b"no picture"}))
    refused("is 9 x 6, but the first one", good, ("x", {"png": png(1, 9)}))
    (tmp_path / "b.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match="is no tar file"):
        WebDataset(tmp_path / "b.tar")
    for names in ("", "a\n\nb", "a\na"):
        (tmp_path / "classes.txt").write_text(names)
        with pytest.raises(DataError, match=r"classes.txt is empty, or"):
            WebDataset(shard(tmp_path / "a.tar", [good]))


def test_a_shard_that_was_cut_after_it_was_opened(pool: Path) -> None:
    dataset = open_dataset(f"webdataset:{pool}")
    path = pool / "pool-002.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"0009.png in .*pool-002.tar is cut short"):
        dataset.batch([9])
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*pool-002.tar"):
        dataset.batch([9])


def test_braces() -> None:
    assert list(expand_braces("a-{08..11}{x,y}.tar"))[:3] == ["a-08x.tar", "a-08y.tar", "a-09x.tar"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]
    with pytest.raises(DataError, match="no shard fits"):
        find_files("a-{3..1}.tar", None, (".tar",), "shard")
