"""Data sets: what is read equals what was stored, every damage is named, and splits and slices are exact."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from nndefense import datasets
from nndefense.datasets import (
    ArrayDataset,
    HDF5Dataset,
    ImageDataset,
    ImageFolderDataset,
    TransformedDataset,
    concatenate,
    holdout,
    image_channels,
    load_image,
    open_dataset,
    write_hdf5,
)
from nndefense.datasets import arrays as hdf5_module
from nndefense.datasets.encoded import decoder_threads
from nndefense.errors import DataError, InputError
from nndefense.images import check_images


def small(count: int = 12, classes: int = 3, *, name: str = "small", seed: int = 0) -> ArrayDataset:
    """An in-memory colour set with known pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    return ArrayDataset(pixels, np.arange(count) % classes, name=name, classes=[f"c{i}" for i in range(classes)])


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def picture(path: Path, size: tuple[int, int] = (6, 5), value: int = 0, mode: str = "RGB", **save: object) -> Path:
    """Write an image file of one shade; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value, value)).save(path, **save)
    return path


def write_idx(path: Path, array: np.ndarray, *, packed: bool = False) -> bytes:
    """Write an idx file of bytes, and return what was written before packing."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if packed else data)
    return data


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A data folder with ten tiny MNIST test images."""
    rng = np.random.default_rng(1)
    write_idx(tmp_path / "mnist/t10k-images-idx3-ubyte", rng.integers(0, 256, (10, 28, 28)))
    write_idx(tmp_path / "mnist/t10k-labels-idx1-ubyte.gz", np.arange(10), packed=True)
    return tmp_path


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Two classes with three and two images, one of them in a deeper folder."""
    root = tmp_path / "photos"
    for index, place in enumerate(["cat/b.png", "cat/deep/a.PNG", "cat/a.bmp", "dog/x.webp", "dog/y.tiff"]):
        save = {"lossless": True} if place.endswith("webp") else {}
        picture(root / place, value=10 * index, **save)
    return root


@pytest.fixture
def h5_file(tmp_path: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 4, 5, 3), dtype=np.uint8)
    path = tmp_path / "set" / "train.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["images"] = pixels
        file["labels"] = (np.arange(40) % 4).astype(np.uint8)
        file.attrs["classes"] = ["a", "b", "c", "d"]
    return path, pixels


# --- the base class ---------------------------------------------------------------------------------------------


def test_batch_item_and_batches_agree() -> None:
    dataset = small()
    stored = torch.from_numpy(np.asarray(dataset._images)).permute(0, 3, 1, 2).float() / 255
    images, labels = dataset.batch([5, 0, -1, 5])
    assert torch.equal(images, stored[[5, 0, 11, 5]])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 0, 2, 2]
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    item, label = dataset[-1]
    assert torch.equal(item, stored[11])
    assert label == 2
    assert type(label) is int
    pieces = list(dataset.batches(5))
    assert [len(rows) for _, _, rows in pieces] == [5, 5, 2]
    assert np.array_equal(np.concatenate([rows for *_, rows in pieces]), np.arange(12))
    assert torch.equal(torch.cat([piece for piece, *_ in pieces]), stored)
    assert len(list(dataset)) == 12  # a plain loop ends
    check_images(images, channels=3)


def test_batches_hand_out_their_own_memory() -> None:
    dataset = ArrayDataset(np.full((2, 1, 3, 3), 0.5, np.float32), [0, 0], name="floats", classes=["a"])
    dataset.batch([0, 1])[0].fill_(1)
    dataset[0][0].fill_(1)
    assert dataset.batch([0])[0].eq(0.5).all()


@pytest.mark.parametrize("indices", [[12], [-13], [0.5], [[0, 1]], np.zeros(11, bool)])
def test_wrong_indices(indices: object) -> None:
    with pytest.raises(InputError, match="small"):
        small().batch(indices)  # type: ignore[arg-type]


def test_masks_empty_and_tensor_indices() -> None:
    dataset = small()
    mask = np.zeros(12, bool)
    mask[[3, 7]] = True
    assert dataset.subset(mask).ids == ["small/00003", "small/00007"]
    assert dataset.batch([])[0].shape == (0, 3, 4, 5)
    assert torch.equal(dataset.batch(torch.tensor([3]))[0], dataset.batch([3])[0])
    with pytest.raises(IndexError):
        dataset[12]
    with pytest.raises(InputError, match="batch size"):
        dataset.batches(0)


def test_array_errors() -> None:
    with pytest.raises(DataError, match="int64"):
        ArrayDataset(np.zeros((2, 4, 4, 3), np.int64), [0, 0], name="bad", classes=["a"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 x 3 x 4 x 4"):
        ArrayDataset(np.zeros((2, 3, 4, 4), np.uint8), [0, 0], name="bad", classes=["a"])
    with pytest.raises(DataError, match="labels from 0 to 1"):
        ArrayDataset(np.zeros((2, 4, 4, 3), np.uint8), [0, 1], name="bad", classes=["a"])
    with pytest.raises(DataError, match="labels of shape"):
        ArrayDataset(np.zeros((2, 4, 4, 3), np.uint8), [0], name="bad", classes=["a"])
    with pytest.raises(DataError, match="NaN"):
        ArrayDataset(np.full((2, 3, 4, 4), np.nan, np.float32), [0, 0], name="bad", classes=["a"])


def test_index_of_and_ids() -> None:
    dataset = small()
    part = dataset.subset([9, 4, 4])
    assert dataset.index_of("small/00004") == 4
    assert part.index_of("small/00004") == 1
    assert part.ids[-1] == "small/00004"
    assert part.ids[0:2] == ["small/00009", "small/00004"]
    assert part.ids != ["small/00009"]
    assert part.ids == tuple(part.ids)
    with pytest.raises(IndexError):
        part.ids[3]
    with pytest.raises(DataError, match="no image with id 'small/00005'"):
        part.index_of("small/00005")


def test_subset_of_subset_is_one_subset() -> None:
    dataset = small()
    twice = dataset.subset([8, 6, 4, 2]).subset([3, 1])
    once = dataset.subset([2, 6])
    assert twice.ids == once.ids == ["small/00002", "small/00006"]
    assert twice.fingerprint == once.fingerprint != dataset.fingerprint
    assert dataset.subset([6, 2]).fingerprint != once.fingerprint
    assert torch.equal(twice.batch([0, 1])[0], dataset.batch([2, 6])[0])
    assert dataset.subset(range(12)) is dataset


def test_fingerprint_follows_content() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
    labels, classes = np.arange(12) % 3, ["c0", "c1", "c2"]
    dataset = ArrayDataset(pixels, labels, name="same content, another name", classes=classes)
    assert dataset.fingerprint == small().fingerprint
    assert len(dataset.fingerprint) == 64
    assert int(dataset.fingerprint, 16) >= 0
    changed = pixels.copy()
    changed[7, 1, 1, 1] ^= 1
    others = [
        ArrayDataset(changed, labels, name="n", classes=classes),
        ArrayDataset(pixels, np.roll(labels, 1), name="n", classes=classes),
        ArrayDataset(pixels, labels, name="n", classes=["c0", "c1", "other"]),
        ArrayDataset(pixels.reshape(12, 5, 4, 3), labels, name="n", classes=classes),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_concatenate_joins_classes_by_name() -> None:
    first = small(4, 2, name="one")
    second = ArrayDataset(
        np.zeros((3, 4, 5, 3), np.uint8), [0, 1, -1], name="two", classes=["c1", "new"], ids=["x", "y", "z"]
    )
    both = concatenate([first, second])
    assert both.classes == ("c0", "c1", "new")
    assert both.labels.tolist() == [0, 1, 0, 1, 1, 2, -1]
    assert both.ids == [*first.ids, "x", "y", "z"]
    assert both.name == "one + two"
    images, labels = both.batch([6, 0, 4, 1])
    assert torch.equal(images[[1, 3]], first.batch([0, 1])[0])
    assert images[[0, 2]].eq(0).all()
    assert labels.tolist() == [-1, 0, 1, 1]
    assert both.subset([5, 1]).ids == ["y", "one/00001"]
    assert both.fingerprint != concatenate([second, first]).fingerprint
    assert concatenate([first]) is first
    with pytest.raises(InputError, match="at least one"):
        concatenate([])
    grey = ArrayDataset(np.zeros((1, 4, 5, 1), np.uint8), [0], name="grey", classes=["c0"])
    with pytest.raises(DataError, match="grey has images 1 x 4 x 5, but one 3 x 4 x 5"):
        concatenate([first, grey])


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(-1, 4), min_size=2, max_size=80), data=st.data(), seed=st.integers(-(2**70), 2**70))
def test_holdout_is_a_stratified_partition(labels: list[int], data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, len(labels) - 1))
    pixels = np.zeros((len(labels), 1, 1, 1), np.uint8)
    dataset = ArrayDataset(pixels, labels, name="any", classes=list("abcde"))
    rest, held = holdout(dataset, n, seed)
    assert len(held) == n
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(held) > 0).all()
    for label in set(labels):
        share = n * labels.count(label) / len(labels)
        assert abs(np.count_nonzero(dataset.labels[held] == label) - share) < 1
    assert np.array_equal(holdout(dataset, n, seed)[1], held)


def test_holdout_seed_and_bounds() -> None:
    dataset = small(300)
    seeds = [holdout(dataset, 60, seed)[1] for seed in range(20)]
    assert len({rows.tobytes() for rows in seeds}) == 20
    # Every row has the same chance: over 200 seeds each is held out 40 times on average (standard deviation 5.7).
    held = np.bincount(np.concatenate([holdout(dataset, 60, seed)[1] for seed in range(200)]), minlength=300)
    assert held.min() > 10
    assert held.max() < 75
    for n in (0, -1, 300, 301):
        with pytest.raises(InputError, match=f"cannot hold out {n} of the 300"):
            holdout(dataset, n, 0)


def test_holdout_is_pinned() -> None:
    """The same rows in every version of the libraries; a change here changes everyone's splits."""
    rest, held = holdout(small(20), 5, seed=3)
    assert held.tolist() == [9, 10, 15, 17, 19]
    assert rest.dtype == held.dtype == np.int64


@settings(max_examples=30, deadline=None)
@given(start=st.none() | st.integers(-40, 40), stop=st.none() | st.integers(-40, 40), step=st.sampled_from(["", 1, 3]))
def test_slices_are_those_of_python(start: int | None, stop: int | None, step: int | str) -> None:
    cut = f"[{'' if start is None else start}:{'' if stop is None else stop}{f':{step}' if step else ''}]"
    wanted = list(range(1297))[start : stop : step or None]
    if not wanted:
        with pytest.raises(DataError, match="leaves none"):
            open_dataset(f"digits{cut}")
        return
    dataset = open_dataset(f"digits:train{cut}")
    whole = open_dataset("digits")
    assert len(dataset) == len(wanted)
    assert dataset.ids == whole.subset(wanted).ids
    assert dataset.name in (f"digits:train{cut}", "digits:train")


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "emnist", "minst:test", "digit", "/some/folder", "mnist test", "[:3]"])
def test_unknown_names_list_the_known(spec: str) -> None:
    with pytest.raises(DataError, match="unknown data set") as error:
        open_dataset(spec, download=False)
    text = one_line(error)
    assert all(known in text for known in datasets.KNOWN_SPECS)


@pytest.mark.parametrize("spec", ["digits:val", "mnist:all", "fashion-mnist:x", "cifar10:val[:3]"])
def test_unknown_splits_list_the_known(spec: str, tmp_path: Path) -> None:
    name = spec.split(":")[0]
    with pytest.raises(DataError, match=f"choose {name}:train or {name}:test"):
        open_dataset(spec, data_dir=tmp_path, download=False)


@pytest.mark.parametrize("spec", ["digits[5]", "digits[]", "digits[::0]", "digits[a:b]", "digits:test[1:2:3:4]"])
def test_malformed_slices(spec: str) -> None:
    with pytest.raises(DataError, match="cannot understand the slice"):
        open_dataset(spec)


@pytest.mark.parametrize("spec", ["imagefolder", "imagefolder:", "hdf5", "hdf5:"])
def test_path_left_out(spec: str) -> None:
    with pytest.raises(DataError, match="give a path after"):
        open_dataset(spec)


@pytest.mark.parametrize("keywords", [{"size": 0}, {"size": (4, -1)}, {"size": (1, 2, 3)}, {"channels": 2}])
def test_wrong_size_or_channels(keywords: dict[str, object]) -> None:
    with pytest.raises(InputError):
        open_dataset("digits", **keywords)  # type: ignore[arg-type]


def test_data_dir_comes_from_the_environment(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNDEFENSE_DATA", str(idx_folder))
    assert len(open_dataset("mnist:test", download=False)) == 10
    monkeypatch.delenv("NNDEFENSE_DATA")
    monkeypatch.chdir(idx_folder.parent)
    assert datasets.default_data_dir() == Path("data")
    with pytest.raises(DataError, match="mnist"):
        open_dataset("mnist:test", download=False)


def test_heavy_libraries_are_not_imported() -> None:
    script = (
        "import sys, nndefense.datasets; print([m for m in ('sklearn', 'h5py', 'torchvision') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- digits -----------------------------------------------------------------------------------------------------


def test_digits_hold_what_scikit_learn_has() -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    train, test = open_dataset("digits"), open_dataset("digits:test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.name == "digits:train"
    assert train.shape == (1, 8, 8)
    assert train.classes == tuple("0123456789")
    assert not set(train.ids) & set(test.ids)
    for dataset in (train, test):
        images, labels = dataset.batch(range(len(dataset)))
        check_images(images, channels=1)
        rows = [int(item.removeprefix("digits/")) for item in dataset.ids]
        assert np.array_equal(images[:, 0].numpy() * 16, original.images[rows])
        assert np.array_equal(labels.numpy(), original.target[rows])
    share = np.bincount(test.labels) / np.bincount(original.target)
    assert np.abs(share - 500 / 1797).max() < 0.006


def test_digits_split_is_pinned() -> None:
    """Results on the digits can be compared only while their split stays as it is."""
    text = json.dumps(list(open_dataset("digits:test").ids))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "15876fdcfaea594f28f3441500a78be5a3edffa5e7f824c6b766fc0d973770d5"
    )


# --- MNIST and Fashion-MNIST ------------------------------------------------------------------------------------


def test_mnist_is_the_original(data_root: Path) -> None:
    train = open_dataset("mnist:train", data_dir=data_root, download=False)
    test = open_dataset("mnist:test", data_dir=data_root, download=False)
    assert (len(train), len(test), train.shape) == (60000, 10000, (1, 28, 28))
    # The class counts that the data's description gives.
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    images, _ = train.batch(range(0, 60000, 7))
    # The mean and deviation that every MNIST recipe normalises with.
    assert images.mean().item() == pytest.approx(0.1307, abs=1e-3)
    assert images.std().item() == pytest.approx(0.3081, abs=1e-3)
    tail = open_dataset("mnist:train[55000:]", data_dir=data_root, download=False)
    assert tail.ids[0] == "mnist:train/55000"
    assert len(tail) == 5000
    assert torch.equal(tail[3][0], train[55003][0])
    assert open_dataset("mnist", data_dir=data_root, download=False).name == "mnist:train"


def test_fashion_mnist_agrees_with_torchvision(data_root: Path, tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (data_root / "fashion-mnist").glob("t10k*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    for kind, side in (("images-idx3", 28), ("labels-idx1", 0)):
        write_idx(raw / f"train-{kind}-ubyte", np.zeros((1, side, side) if side else (1,)))
    theirs = FashionMNIST(tmp_path, train=False, download=False)
    dataset = open_dataset("fashion-mnist:test", data_dir=tmp_path, download=False)
    assert torch.equal(dataset.batch(range(10000))[0][:, 0] * 255, theirs.data.float())
    assert np.array_equal(dataset.labels, theirs.targets.numpy())
    assert dataset.classes == tuple(theirs.classes)
    packed = open_dataset("fashion-mnist:test", data_dir=data_root, download=False)
    assert packed.fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:10], "no idx file"),
        (lambda data: b"", "no idx file"),
        (lambda data: data + b"\0", "longer than its header says"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "no idx file"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "its header says"),
        (lambda data: gzip.compress(data), "no idx file"),
    ],
)
def test_damaged_idx(damage: object, message: str, idx_folder: Path) -> None:
    file = idx_folder / "mnist/t10k-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as error:
        open_dataset("mnist:test", data_dir=idx_folder, download=False)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("damage", ["truncate", "flip", "checksum"])
def test_damaged_gzip(damage: str, idx_folder: Path) -> None:
    file = idx_folder / "mnist/t10k-labels-idx1-ubyte.gz"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        data = data[:-9]
    elif damage == "flip":
        data[2] ^= 255
    else:
        data[-6] ^= 255
    file.write_bytes(data)
    with pytest.raises(DataError, match="fetch it again") as error:
        open_dataset("mnist:test", data_dir=idx_folder, download=False)
    assert str(file) in one_line(error)


def test_idx_files_that_do_not_fit(idx_folder: Path) -> None:
    labels = idx_folder / "mnist/t10k-labels-idx1-ubyte"
    write_idx(labels, np.arange(9))  # the unpacked file is preferred to the packed one
    with pytest.raises(DataError, match=r"10 images, but .* 9 labels"):
        open_dataset("mnist:test", data_dir=idx_folder, download=False)
    write_idx(labels, np.arange(1, 11))
    with pytest.raises(DataError, match="has label 10"):
        open_dataset("mnist:test", data_dir=idx_folder, download=False)


def test_missing_files_say_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz and t10k-labels") as error:
        open_dataset("mnist:test", data_dir=tmp_path, download=False)
    assert str(tmp_path / "mnist") in one_line(error)

    def offline(**_: object) -> None:
        raise RuntimeError("Error downloading:\nno route to host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    with pytest.raises(DataError, match=r"could not be downloaded \(Error downloading: no route to host\)") as error:
        open_dataset("fashion-mnist", data_dir=tmp_path)
    assert str(tmp_path / "fashion-mnist") in one_line(error)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(DataError, match="no route to host") as error:
        open_dataset("cifar10:test", data_dir=tmp_path)
    assert str(tmp_path / "cifar10") in one_line(error)
    assert "test.h5" in str(error.value)


def test_download_is_used_where_files_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def download(*, root: Path, train: bool, download: bool) -> None:
        assert download
        assert train
        write_idx(root / "MNIST/raw/train-images-idx3-ubyte", np.full((3, 28, 28), 51))
        write_idx(root / "MNIST/raw/train-labels-idx1-ubyte", np.array([7, 8, 9]))

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    dataset = open_dataset("mnist", data_dir=tmp_path)
    assert dataset.labels.tolist() == [7, 8, 9]
    assert dataset[2][0].eq(0.2).all()


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------


def test_cifar10(unpacked: Path) -> None:
    train = open_dataset("cifar10", data_dir=unpacked, download=False)
    test = open_dataset("cifar10:test[1000:2000]", data_dir=unpacked, download=False)
    assert train.name == "cifar10:train"
    assert len(train) == 50000
    assert train.shape == (3, 32, 32)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert test.ids[0] == "cifar10:test/01000"
    assert len(test) == 1000
    images, _ = train.batch(range(0, 50000, 10))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)
    with h5py.File(unpacked / "cifar10/test.h5") as file:
        assert np.array_equal(test.batch([5])[0][0].permute(1, 2, 0).numpy() * 255, file["images"][1005])
        assert test.labels[5] == file["labels"][1005]


def test_cifar10_from_torchvision_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickled form is read only where the md5 of each file is the expected one."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    content = {
        "test_batch": {"data": np.arange(2 * 3072).reshape(2, 3072) % 256, "labels": [3, 9]},
        "batches.meta": {"label_names": ["a"]},
    }
    sums = {}
    for name, value in content.items():
        (base / name).write_bytes(pickle.dumps(value))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    dataset = open_dataset("cifar10:test", data_dir=tmp_path, download=False)
    assert dataset.labels.tolist() == [3, 9]
    assert dataset.classes[9] == "truck"
    wanted = content["test_batch"]["data"].reshape(2, 3, 32, 32)  # type: ignore[attr-defined]
    assert np.array_equal((dataset.batch([0, 1])[0] * 255).round().numpy(), wanted)
    with (base / "test_batch").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="not found or corrupted"):
        open_dataset("cifar10:test", data_dir=tmp_path, download=False)


def test_cifar10_file_that_holds_something_else(h5_file: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    shutil.copytree(h5_file[0].parent, tmp_path / "cifar10")
    with pytest.raises(DataError, match="does not hold CIFAR-10"):
        open_dataset("cifar10", data_dir=tmp_path, download=False)


# --- HDF5 -------------------------------------------------------------------------------------------------------


def test_hdf5_reads_rows_in_any_order(h5_file: tuple[Path, np.ndarray]) -> None:
    path, pixels = h5_file
    dataset = open_dataset(f"hdf5:{path}")
    assert (len(dataset), dataset.shape, dataset.classes) == (40, (3, 4, 5), ("a", "b", "c", "d"))
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for rows in ([3, 4, 5], [39, 0, 17, 17, 2], [7], list(range(40)), list(range(39, -1, -1)), [0, 30]):
        images, labels = dataset.batch(rows)
        assert torch.equal(images, wanted[rows])
        assert labels.tolist() == [row % 4 for row in rows]
    assert dataset.ids[7] == "train/00007"
    assert open_dataset(f"hdf5:{path.parent}:train[10:12]").ids == ["train/00010", "train/00011"]
    assert open_dataset(f"hdf5:{path.parent}").name == f"hdf5:{path.parent}:train"


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 99), min_size=1, max_size=50), packed=st.sampled_from([None, "gzip", "lzf"]))
def test_hdf5_rows_property(rows: list[int], packed: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"property-{packed}.h5"
    pixels = (np.arange(100)[:, None, None, None] + np.zeros((1, 2, 2, 1))).astype(np.uint8)
    if not path.exists():
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=pixels, chunks=(7, 2, 2, 1), compression=packed)
    images, labels = HDF5Dataset(path).batch(rows)
    assert (images[:, 0, 1, 1] * 255).round().tolist() == rows
    assert labels.eq(-1).all()


def test_hdf5_reads_hardly_more_than_is_asked_for() -> None:
    """Scattered rows of a huge file must not pull in all that lies between them."""

    def spans(rows: list[int], chunk: int | None) -> list[tuple[int, int]]:
        array = np.array(rows)
        return [(rows[run.start], rows[run.stop - 1]) for run in hdf5_module._runs(array, chunk)]

    assert spans([0, 2, 3, 900, 901, 5000], None) == [(0, 3), (900, 901), (5000, 5000)]
    assert spans([0, 2, 90, 110, 199, 200], 100) == [(0, 90), (110, 199), (200, 200)]


def test_write_hdf5_keeps_attacked_images_exactly(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "new folder" / "attacked.h5"
    ids = ["cifar10:test/00001", "photos/ünï.png", "c", "d", "e", "bad-\udcff-bytes"]
    write_hdf5(path, images, torch.tensor([1, 0, 1, -1, 0, 2]), ids, ["x", "y", "ž"])
    assert [file.name for file in path.parent.iterdir()] == ["attacked.h5"]
    dataset = open_dataset(f"hdf5:{path}")
    assert torch.equal(dataset.batch(range(6))[0], images)
    assert dataset.ids == ids
    assert dataset.index_of("d") == 3
    assert dataset.classes == ("x", "y", "ž")
    assert dataset.labels.tolist() == [1, 0, 1, -1, 0, 2]
    assert dataset.subset([5, 1]).ids == [ids[5], ids[1]]
    write_hdf5(path, images[:2].numpy())  # replaces the file; nothing but images
    again = open_dataset(f"hdf5:{path}")
    assert again.classes == ()
    assert again.labels.tolist() == [-1, -1]
    assert again.ids[1] == "attacked/00001"


def test_write_hdf5_holds_many_class_names(tmp_path: Path) -> None:
    names = [f"class {number} with a long enough name to pass 64 KiB" for number in range(6000)]
    write_hdf5(tmp_path / "many.h5", torch.zeros(1, 1, 2, 2), [5999], ["a"], names)
    assert open_dataset(f"hdf5:{tmp_path / 'many.h5'}").classes == tuple(names)


def test_write_hdf5_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = torch.zeros(2, 3, 4, 4)
    path = tmp_path / "out.h5"
    for arguments in [(good + 2,), (good[0],), (good, [0]), (good, [0.5, 1.0]), (good, None, ["a"])]:
        with pytest.raises(InputError):
            write_hdf5(path, *arguments)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_hdf5(tmp_path / "file" / "out.h5", good)
    write_hdf5(path, good)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_hdf5(path, good + 1)
    assert path.read_bytes() == before  # the old file stays, and no part of the new one
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "out.h5"]


@pytest.mark.parametrize("kind", ["vlen", "fixed"])
def test_hdf5_ids_in_both_forms(kind: str, tmp_path: Path) -> None:
    ids = ["one", "zwölf", "three"]
    with h5py.File(tmp_path / "ids.h5", "w") as file:
        file["images"] = np.zeros((3, 2, 2, 1), np.uint8)
        dtype = h5py.string_dtype() if kind == "vlen" else h5py.string_dtype(length=8)
        file.create_dataset("ids", data=[item.encode() for item in ids], dtype=dtype)
    assert open_dataset(f"hdf5:{tmp_path / 'ids.h5'}").ids == ids


def h5_with(path: Path, classes: object = None, **content: object) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            file[key] = value
        if classes is not None:
            file.attrs["classes"] = classes
    return path


IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no data set 'images'"),
        ({"images": IMAGES.astype(np.float64)}, "type float64"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "shape 3 x 3 x 4 x 4"),
        ({"images": IMAGES.astype(np.float32)}, "store them as N x C x H x W"),
        ({"images": IMAGES[0]}, "shape 4 x 4 x 3"),
        ({"images": h5py.Empty("uint8")}, "no array in 'images'"),
        ({"images/inner": IMAGES}, "no array in 'images'"),
        ({"images": IMAGES, "labels": [0, 1]}, "labels of shape 2"),
        ({"images": IMAGES, "labels": [0.0, 1.5, 2.0]}, "label 1.5"),
        ({"images": IMAGES, "labels": [b"0", b"1", b"2"]}, "labels of type object"),
        ({"images": IMAGES, "labels": [0, -2, 1]}, "label -2"),
        ({"images": IMAGES, "labels": [0, 1, 2], "classes": ["a", "b"]}, "label 2, but names only 2"),
        ({"images": IMAGES, "labels": [0, 1, 2], "classes": 3}, "classes attribute"),
        ({"images": IMAGES, "ids": [1, 2, 3]}, "ids of type int64"),
        ({"images": IMAGES, "ids": [b"a"]}, "ids of shape 1"),
    ],
)
def test_hdf5_of_another_form(content: dict[str, object], message: str, tmp_path: Path) -> None:
    path = h5_with(tmp_path / "bad.h5", **content)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(f"hdf5:{path}")
    assert str(path) in one_line(error)


def test_hdf5_damaged_or_missing(h5_file: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = h5_file
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[:-500])
    text = tmp_path / "text.h5"
    text.write_text("this is not HDF5")
    empty = tmp_path / "empty.h5"
    empty.touch()
    for file in (cut, text, empty):
        with pytest.raises(DataError, match=r"cannot read .* as an HDF5 file") as error:
            open_dataset(f"hdf5:{file}")
        assert str(file) in one_line(error)
    for missing in (tmp_path / "none.h5", tmp_path / "none"):
        with pytest.raises(DataError, match="there is nothing at"):
            open_dataset(f"hdf5:{missing}")
    with pytest.raises(DataError, match=r"no test\.h5: open hdf5:.*:train"):
        open_dataset(f"hdf5:{path.parent}:test")
    with pytest.raises(DataError, match="is a file, so it has no split"):
        open_dataset(f"hdf5:{path}:test")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=r"no files \*\.h5"):
        open_dataset(f"hdf5:{tmp_path / 'hollow'}")


def test_hdf5_damaged_chunk_is_found_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "chunk.h5"
    with h5py.File(path, "w") as file:
        pixels = np.random.default_rng(0).integers(0, 9, (20, 8, 8, 3), dtype=np.uint8)
        images = file.create_dataset("images", data=pixels, chunks=(5, 8, 8, 3), compression="gzip")
        offset = images.id.get_chunk_info(2).byte_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 20] = bytes(20)
    path.write_bytes(data)
    dataset = open_dataset(f"hdf5:{path}")
    assert dataset.batch(range(10))[0].shape == (10, 3, 8, 8)
    with pytest.raises(DataError, match="cannot read") as error:
        dataset.batch(range(8, 12))
    assert str(path) in one_line(error)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (1.5, "range from"), (-0.1, "range from")])
def test_hdf5_floats_are_checked_on_reading(value: float, message: str, tmp_path: Path) -> None:
    images = np.zeros((4, 3, 4, 4), np.float32)
    images[2, 1, 1, 1] = value
    path = h5_with(tmp_path / "floats.h5", images=images)
    dataset = open_dataset(f"hdf5:{path}")
    dataset.batch([0, 1, 3])
    with pytest.raises(DataError, match=message) as error:
        dataset.batch([2])
    assert str(path) in one_line(error)


def test_hdf5_of_the_other_byte_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32)
    swapped = open_dataset(f"hdf5:{h5_with(tmp_path / 'big.h5', images=images.astype('>f4'))}")
    native = open_dataset(f"hdf5:{h5_with(tmp_path / 'little.h5', images=images)}")
    assert np.array_equal(swapped.batch([0, 1, 2])[0].numpy(), images)
    assert swapped.fingerprint == native.fingerprint


def test_hdf5_fingerprint(h5_file: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = h5_file
    dataset = open_dataset(f"hdf5:{path}")
    copy = shutil.copy(path, tmp_path / "copy.h5")
    assert open_dataset(f"hdf5:{copy}").fingerprint == dataset.fingerprint
    with h5py.File(copy, "r+") as file:
        file["images"][39, 0, 0, 0] ^= 1
    assert open_dataset(f"hdf5:{copy}").fingerprint != dataset.fingerprint


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers(h5_file: tuple[Path, np.ndarray], context: str) -> None:
    path, _ = h5_file
    dataset = open_dataset(f"hdf5:{path}")
    wanted, labels = dataset.batch(range(40))  # the file is open before the workers start
    loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([images for images, _ in batches]), wanted)
    assert torch.equal(torch.cat([numbers for _, numbers in batches]), labels)


def test_pickling(h5_file: tuple[Path, np.ndarray], class_folder: Path) -> None:
    for dataset in (
        open_dataset(f"hdf5:{h5_file[0]}"),
        open_dataset(f"imagefolder:{class_folder}", size=4),
        open_dataset("digits[:20]", channels=3),
        concatenate([small(), small(seed=1)]),
    ):
        expected = dataset.batch([2, 0])[0]
        twin: ImageDataset = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(twin.batch([2, 0])[0], expected)
        assert twin.ids == dataset.ids
        assert twin.fingerprint == dataset.fingerprint


# --- size and channels of sets that come as arrays --------------------------------------------------------------


def test_channels_of_array_sets(h5_file: tuple[Path, np.ndarray]) -> None:
    grey = open_dataset("digits[:5]")
    colour = open_dataset("digits[:5]", channels=3)
    assert colour.shape == (3, 8, 8)
    assert colour.ids == grey.ids
    assert torch.equal(colour.batch(range(5))[0], grey.batch(range(5))[0].expand(-1, 3, -1, -1))
    assert colour.fingerprint != grey.fingerprint
    path, pixels = h5_file
    luma = open_dataset(f"hdf5:{path}", channels=1).batch([0, 1])[0]
    wanted = (pixels[:2] / 255 @ np.array([0.299, 0.587, 0.114]))[:, None]
    assert luma.shape == (2, 1, 4, 5)
    assert np.allclose(luma.numpy(), wanted, atol=1e-6)
    # A form that the set already has changes nothing, so nothing that was built for it becomes unusable.
    assert open_dataset("digits", channels=1, size=8).fingerprint == open_dataset("digits").fingerprint


def test_size_of_array_sets(h5_file: tuple[Path, np.ndarray]) -> None:
    big = open_dataset("digits:test", size=16)
    assert big.shape == (1, 16, 16)
    check_images(big.batch(range(500))[0], channels=1)
    # Antialiased: every one of the 64 pixels must leave a trace in the small image, not just a few of them.
    points = (np.eye(64).reshape(64, 8, 8, 1) * 255).astype(np.uint8)
    dots = ArrayDataset(points, np.zeros(64), name="dots", classes=["dot"])
    shrunk = TransformedDataset(dots, size=(2, 2), channels=1).batch(range(64))[0]
    assert shrunk.sum((1, 2, 3)).min() > 0.005
    assert shrunk.sum((1, 2, 3)).max() < 0.2
    # Rounding may lift white above 1, which an attack or a check would stumble over.
    white = ArrayDataset(np.full((1, 8, 8, 1), 255, np.uint8), [0], name="white", classes=["white"])
    check_images(TransformedDataset(white, size=(2, 2), channels=1).batch([0])[0])
    path, pixels = h5_file
    cropped = open_dataset(f"hdf5:{path}", size=(4, 3)).batch([0])[0]
    assert np.array_equal((cropped[0] * 255).round().numpy(), pixels[0, :, 1:4].transpose(2, 0, 1))


# --- image folders ----------------------------------------------------------------------------------------------


def test_imagefolder(class_folder: Path) -> None:
    dataset = open_dataset(f"imagefolder:{class_folder}")
    assert dataset.classes == ("cat", "dog")
    assert dataset.shape == (3, 5, 6)
    assert dataset.ids == ["cat/a.bmp", "cat/b.png", "cat/deep/a.PNG", "dog/x.webp", "dog/y.tiff"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]
    images, labels = dataset.batch([4, 0, 1, 2, 3])
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [40, 20, 0, 10, 30]
    assert labels.tolist() == [1, 0, 0, 0, 1]
    assert torch.equal(dataset[4][0], images[0])
    assert isinstance(dataset, ImageFolderDataset)
    assert dataset.path(3) == class_folder / "dog/x.webp"
    assert open_dataset(f"imagefolder:{class_folder}", channels=1).shape == (1, 5, 6)
    loader = DataLoader(dataset, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), dataset.batch(range(5))[0])


def test_imagefolder_leaves_other_files_out(class_folder: Path) -> None:
    (class_folder / "cat/notes.txt").write_text("no image")
    (class_folder / "cat/._b.png").write_bytes(b"junk")
    (class_folder / ".git").mkdir()
    (class_folder / "cat/looks.png").mkdir()
    (class_folder / "cat/loop").symlink_to(class_folder / "cat")
    picture(class_folder / "cat/looks.png/inner.png")
    ids = list(open_dataset(f"imagefolder:{class_folder}").ids)
    assert ids == ["cat/a.bmp", "cat/b.png", "cat/deep/a.PNG", "cat/looks.png/inner.png", "dog/x.webp", "dog/y.tiff"]


def test_imagefolder_splits(class_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    shutil.copytree(class_folder, root / "train")
    shutil.copytree(class_folder, root / "val")
    val = open_dataset(f"imagefolder:{root}:val[1:3]")
    assert val.name == f"imagefolder:{root}:val[1:3]"
    assert val.ids == ["val/cat/b.png", "val/cat/deep/a.PNG"]
    bare = open_dataset(f"imagefolder:{root}")
    assert bare.name == f"imagefolder:{root}:train"
    assert bare.classes == ("cat", "dog")
    with pytest.raises(DataError, match="has no folder test: it holds train, val"):
        open_dataset(f"imagefolder:{root}:test")
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match=f"open imagefolder:{root}:val"):
        open_dataset(f"imagefolder:{root}")


@pytest.mark.parametrize("odd", ["a:b", "a[1:2]", "C:\\photos", "a:train", "tail[:3]", "sp ace"])
def test_odd_paths_open_as_they_are(odd: str, class_folder: Path, tmp_path: Path, h5_file: tuple[Path, object]) -> None:
    root = tmp_path / "odd" / odd
    shutil.copytree(class_folder, root)
    shutil.copytree(class_folder, root.parent / f"{odd}-set" / "val")
    assert len(open_dataset(f"imagefolder:{root}")) == 5
    assert len(open_dataset(f"imagefolder:{root}[:2]")) == 2
    assert open_dataset(f"imagefolder:{root}-set:val[4:]").ids == ["val/dog/y.tiff"]
    file = shutil.copy(h5_file[0], root.parent / f"{odd}.h5:x")
    assert len(open_dataset(f"hdf5:{file}")) == 40


def test_imagefolder_fingerprint(class_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(f"imagefolder:{class_folder}")
    moved = shutil.copytree(class_folder, tmp_path / "elsewhere")
    assert open_dataset(f"imagefolder:{moved}").fingerprint == dataset.fingerprint
    assert open_dataset(f"imagefolder:{class_folder}", size=4).fingerprint != dataset.fingerprint
    with (moved / "cat/a.bmp").open("ab") as file:
        file.write(b"x")
    assert open_dataset(f"imagefolder:{moved}").fingerprint != dataset.fingerprint
    late = open_dataset(f"imagefolder:{moved}")
    (moved / "cat/a.bmp").unlink()
    with pytest.raises(DataError, match="any more"):
        _ = late.fingerprint
    with pytest.raises(DataError, match=r"no image file .*a\.bmp"):
        late.batch([0, 1])


def test_imagefolder_of_another_form(tmp_path: Path) -> None:
    root = tmp_path / "root"
    spec = f"imagefolder:{root}"
    with pytest.raises(DataError, match="there is nothing at"):
        open_dataset(spec)
    with pytest.raises(DataError, match="there is no folder"):
        ImageFolderDataset(root)
    root.mkdir()
    with pytest.raises(DataError, match="is empty: put the images of each class into a folder"):
        open_dataset(spec)
    (root / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match="has no folders"):
        open_dataset(spec)
    picture(root / "loose.jpg")
    with pytest.raises(DataError, match="has images but no folders"):
        open_dataset(spec)
    (root / "cat").mkdir()
    with pytest.raises(DataError, match="no images in its folders"):
        open_dataset(spec)
    picture(root / "dog/a.png")
    with pytest.raises(DataError, match="no images of cat: fill these folders or remove them"):
        open_dataset(spec)
    file = picture(tmp_path / "file.png")
    with pytest.raises(DataError, match="there is no folder"):
        open_dataset(f"imagefolder:{file}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_images_are_named(suffix: str, damage: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"c/{name}.{suffix}")
    file = tmp_path / f"c/b.{suffix}"
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    dataset = open_dataset(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match="repair, replace or remove it") as error:
        dataset.batch([0, 1])
    text = one_line(error)
    assert str(file) in text
    assert {"truncated": "", "empty": "(empty)", "text": "not a JPEG"}[damage] in text
    if damage != "truncated":
        with pytest.raises(DataError, match="repair, replace or remove it"):
            image_channels(file)


def test_images_of_several_sizes_need_a_size(class_folder: Path) -> None:
    odd = picture(class_folder / "dog/z.png", size=(9, 7), value=200)
    dataset = open_dataset(f"imagefolder:{class_folder}")
    with pytest.raises(DataError, match=r"is 7 x 9, but the first one .* 5 x 6: give a size") as error:
        dataset.batch(range(6))
    assert str(odd) in one_line(error)
    sized = open_dataset(f"imagefolder:{class_folder}", size=(4, 8))
    assert sized.shape == (3, 4, 8)
    assert sized.batch(range(6))[0][-1].mul(255).round().eq(200).all()


def test_imagenette(unpacked: Path) -> None:
    train = open_dataset(f"imagefolder:{unpacked / 'imagenette'}")
    val = open_dataset(f"imagefolder:{unpacked / 'imagenette'}:val", size=64)
    assert (len(train), len(val)) == (1500, 500)
    assert train.shape == (3, 224, 224)
    assert val.shape == (3, 64, 64)
    assert np.bincount(val.labels).tolist() == [50] * 10
    assert train.classes == val.classes
    assert all(name.startswith("n0") for name in train.classes)
    assert val.ids[0].startswith(f"val/{val.classes[0]}/")
    assert val.ids[0].endswith(".JPEG")
    images, _ = val.batch(range(0, 500, 25))
    check_images(images, channels=3)
    with Image.open(unpacked / "imagenette" / val.ids[25]) as file:
        wanted = np.asarray(file.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal((images[1] * 255).round().byte().permute(1, 2, 0).numpy(), wanted)
    sample = open_dataset(f"imagefolder:{unpacked / 'imagenet_sample'}[::100]")
    assert len(sample.classes) == 1000
    assert sample.labels.tolist() == list(range(0, 1000, 100))
    assert sample.batch(range(10))[0].shape == (10, 3, 224, 224)


def test_threads_decode_in_a_forked_process(class_folder: Path) -> None:
    """A pool's threads do not survive a fork; a batch in the child must not wait for them for ever."""
    dataset = open_dataset(f"imagefolder:{class_folder}")
    dataset.batch(range(5))
    assert decoder_threads.cache_info().currsize == 1
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        os._exit(0 if dataset.batch(range(5))[0].shape == (5, 3, 5, 6) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- single image files -----------------------------------------------------------------------------------------


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    for suffix in ("png", "tiff"):
        file = tmp_path / f"deep.{suffix}"
        Image.fromarray(values).save(file)
        assert np.allclose(load_image(file, channels=1)[0].numpy(), values / 65535, atol=1e-7)
        assert torch.equal(load_image(file), load_image(file, channels=1).expand(3, -1, -1))
        assert load_image(file, size=2).shape == (3, 2, 2)
        assert image_channels(file) == 1


def test_grey_values_without_a_known_range(tmp_path: Path) -> None:
    good = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
    Image.fromarray(good).save(tmp_path / "good.tiff")
    assert np.array_equal(load_image(tmp_path / "good.tiff", channels=1)[0].numpy(), good)
    for name, values in {"f": good * 300, "nan": good * np.nan, "i": np.array([[0, 70000]], np.int32)}.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        with pytest.raises(DataError, match="outside the range of a picture"):
            load_image(tmp_path / f"{name}.tiff")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (3, 2), (255, 0, 0, 128))
    half.putpixel((0, 0), (0, 0, 0, 0))
    half.save(tmp_path / "alpha.png")
    image = load_image(tmp_path / "alpha.png")
    assert image[:, 0, 0].tolist() == [1, 1, 1]
    assert torch.allclose(image[:, 1, 2], torch.tensor([1, 127 / 255, 127 / 255]), atol=0.005)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert load_image(tmp_path / "palette.png")[:, 0].T.tolist() == [[1, 0, 0], [1, 1, 1]]
    palette.save(tmp_path / "opaque.gif")
    assert load_image(tmp_path / "opaque.gif")[:, 0].T.tolist() == [[1, 0, 0], [0, 0, 1]]
    Image.new("LA", (2, 1), (0, 0)).save(tmp_path / "la.png")
    assert load_image(tmp_path / "la.png", channels=1).tolist() == [[[1, 1]]]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png", channels=1)
    assert turned.shape == (1, 4, 2)
    assert turned[0].nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [("1", "png", 1), ("L", "jpg", 1), ("LA", "png", 1), ("RGB", "png", 3), ("RGBA", "png", 3), ("CMYK", "jpg", 3)],
)
def test_every_mode_gives_both_forms(mode: str, suffix: str, channels: int, tmp_path: Path) -> None:
    file = tmp_path / f"image.{suffix}"
    Image.new(mode, (3, 2)).save(file)
    assert image_channels(file) == channels
    for wanted in (1, 3):
        image = load_image(file, channels=wanted)
        assert image.shape == (wanted, 2, 3)
        assert image.dtype == torch.float32
        check_images(image[None])


def test_size_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png", size=10).eq(1).all()
    # The outer pixels take in a little of what lies beyond the crop, as if the whole image had been resized.
    halved = load_image(tmp_path / "wide.png", size=4)
    assert halved[:, :, 1:3].eq(1).all()
    assert halved.min() > 0.8
    assert load_image(tmp_path / "wide.png", size=(5, 15)).mean().item() == pytest.approx(1 / 3, abs=0.02)
    # Antialiased: fine stripes become even grey instead of a moire of black and white.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert load_image(tmp_path / "stripes.png", size=8).sub(0.5).abs().max() < 0.06


def test_oversized_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = picture(tmp_path / "c" / "bomb.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow itself would only warn below 4,000
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match="50 x 50 pixels") as error:
        load_image(file)
    assert str(file) in one_line(error)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="cannot read") as error:
        load_image(file)
    assert str(file) in one_line(error)
    monkeypatch.undo()
    # A thread of pixels must not be blown up to 224 rows on its way to a small square.
    thin = picture(tmp_path / "thin.png", size=(60000, 1), value=77)
    assert load_image(thin, size=224).mul(255).round().eq(77).all()


def test_load_image_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no image file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="there is no image file"):
        image_channels(tmp_path / "none.png")
    with pytest.raises(DataError, match="Is a directory"):
        load_image(tmp_path)
    file = picture(tmp_path / "a.png")
    for keywords in ({"channels": 4}, {"size": 0}):
        with pytest.raises(InputError):
            load_image(file, **keywords)
    (tmp_path / "fake.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    with pytest.raises(DataError, match="not a JPEG"):
        load_image(tmp_path / "fake.png")
