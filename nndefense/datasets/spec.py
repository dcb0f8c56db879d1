"""What data sets are called, and :func:`open_dataset`, which opens them by that name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nndefense.datasets import hdf5
from nndefense.datasets.base import ImageDataset
from nndefense.datasets.cifar10 import open_cifar10
from nndefense.datasets.digits import open_digits
from nndefense.datasets.folder import ImageFolderDataset
from nndefense.datasets.idx import open_idx
from nndefense.datasets.transform import Size, check_form, in_form
from nndefense.datasets.webdataset import WebDataset
from nndefense.errors import DataError

KNOWN_SPECS = ("digits", "mnist", "fashion-mnist", "cifar10", "imagefolder:PATH", "hdf5:PATH", "webdataset:PATH")

_NAMED = ("digits", "mnist", "fashion-mnist", "cifar10")
_SPLITS = ("train", "test")
_SLICE = re.compile(r"(?P<body>.*?)(?P<cut>\[[^\[\]]*\])?", re.DOTALL)
_BOUNDS = re.compile(r"\[\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)?\s*)?\]")


def open_dataset(
    spec: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    size: Size | None = None,
    channels: int | None = None,
    download: bool = True,
) -> ImageDataset:
    """Open a data set by its name.

    ``digits``, ``mnist``, ``fashion-mnist`` and ``cifar10`` have the splits ``train`` and ``test``
    (``mnist:test``); without one, the training split is meant. ``imagefolder:PATH`` opens the folder PATH with one
    folder a class, ``imagefolder:PATH:val`` its folder ``val``. ``hdf5:PATH`` opens a file, and
    ``hdf5:PATH:test`` the file ``test.h5`` of the folder PATH. ``webdataset:PATH`` opens a tar shard, the shards of a
    folder, or those of a pattern such as ``pool-{000..099}.tar``; ``webdataset:PATH:test`` the folder ``test`` or the
    shards ``test*.tar`` of the folder PATH. A slice as in Python may follow: ``mnist:train[:55000]``. A path that
    exists as it is written is never taken apart.

    Args:
        spec: the name.
        data_dir: the folder of the data sets; else the environment variable NNDEFENSE_DATA, else ``data``.
        size: one side, or (height, width), that all images are brought to: the centre is cropped to this aspect
            ratio and resized (bilinear, antialiased).
        channels: 1 turns colour to grey (luma), 3 repeats the channel of grey images. Image folders and shards are
            read in colour unless this is 1; other data sets stay as they are stored.
        download: whether MNIST, Fashion-MNIST and CIFAR-10 may be fetched from the network if they are missing.

    Raises:
        DataError: the name is unknown, or the data are missing, damaged or of another form.
        InputError: ``size`` or ``channels`` is out of range.
    """
    form = check_form(size, channels)
    spec = spec.strip()
    folder = Path(data_dir).expanduser() if data_dir is not None else default_data_dir()
    kind, _, rest = spec.partition(":")
    if kind == "webdataset":
        source, split, cut = _locate_shards(rest)
        dataset: ImageDataset = WebDataset(source, split=split, size=form, channels=channels)
    elif kind in ("imagefolder", "hdf5"):
        path, split, cut = _locate(kind, rest)
        if kind == "imagefolder":
            dataset = ImageFolderDataset(path, split=split, size=form, channels=channels)
        else:
            dataset = in_form(_open_hdf5(path, split), form, channels)
    else:
        body, cut = _split_slice(spec)
        name, _, split_text = body.partition(":")
        if name not in _NAMED:
            raise DataError(f"unknown data set {spec!r}: choose {', '.join(KNOWN_SPECS[:-1])} or {KNOWN_SPECS[-1]}")
        dataset = in_form(_open_named(name, split_text or "train", folder, download), form, channels)
    return _sliced(dataset, cut) if cut else dataset


def default_data_dir() -> Path:
    """Return the folder of the data sets: the environment variable NNDEFENSE_DATA, else ``data``."""
    return Path(os.environ.get("NNDEFENSE_DATA") or "data").expanduser()


def _open_named(name: str, split: str, data_dir: Path, download: bool) -> ImageDataset:
    if split not in _SPLITS:
        raise DataError(f"{name} has no split {split!r}: choose {' or '.join(f'{name}:{known}' for known in _SPLITS)}")
    if name == "digits":
        return open_digits(split)
    if name == "cifar10":
        return open_cifar10(split, data_dir, download=download)
    return open_idx(name, split, data_dir, download=download)


def _open_hdf5(path: Path, split: str | None) -> ImageDataset:
    if not path.is_dir():
        if split is not None:
            raise DataError(f"{path} is a file, so it has no split {split!r}: open hdf5:{path}")
        return hdf5.HDF5Dataset(path)
    files = {file.stem: file for suffix in reversed(hdf5.SUFFIXES) for file in sorted(path.glob(f"*{suffix}"))}
    if not files:
        raise DataError(f"the folder {path} has no files *.h5: give the path of an HDF5 file")
    if (split or "train") not in files:
        known = _choices(f"hdf5:{path}:{stem}" for stem in sorted(files))
        raise DataError(f"the folder {path} has no {split or 'train'}.h5: open {known}")
    split = split or "train"
    return hdf5.HDF5Dataset(files[split], name=f"hdf5:{path}:{split}")


def _locate(kind: str, rest: str) -> tuple[Path, str | None, str | None]:
    """Take ``PATH[:SPLIT][SLICE]`` apart: return path, split and slice, the longest path that exists first."""
    if not rest:
        raise DataError(f"give a path after {kind}: for example {kind}:photos:train")
    body, cut = _split_slice(rest)
    readings = [(rest, None), (body, cut)]
    for text, slice_text in readings:
        # os.path.exists, because Path.exists raises on names that no file can have.
        if os.path.exists(os.path.expanduser(text)):
            return Path(text).expanduser(), None, slice_text
    for text, slice_text in readings:
        head, _, split = text.rpartition(":")
        if head and split and os.path.exists(os.path.expanduser(head)):
            return Path(head).expanduser(), split, slice_text
    raise DataError(f"there is nothing at {body}: check the path of {kind}:{rest}")


def _locate_shards(rest: str) -> tuple[str, str | None, str | None]:
    """As :func:`_locate`, for a source that may also be a pattern."""
    body, _ = _split_slice(rest)
    # An ending .tar leaves no doubt; elsewhere brackets and braces could be read in two ways.
    if rest and body.endswith(".tar") and not os.path.exists(os.path.expanduser(rest)):
        return body, None, _split_slice(rest)[1]
    path, split, cut = _locate("webdataset", rest)
    return str(path), split, cut


def _split_slice(text: str) -> tuple[str, str | None]:
    match = _SLICE.fullmatch(text)
    assert match is not None  # the pattern matches any text
    return match["body"], match["cut"]


def _sliced(dataset: ImageDataset, cut: str) -> ImageDataset:
    match = _BOUNDS.fullmatch(cut)
    bounds = [int(part) if part else None for part in match.groups()] if match else [0, 0, 0]
    if bounds[2] == 0:
        raise DataError(f"cannot understand the slice {cut} of {dataset.name}: write it as [start:stop], e.g. [:1000]")
    rows = np.arange(len(dataset), dtype=np.int64)[slice(*bounds)]
    if len(rows) == 0:
        raise DataError(f"the slice {cut} leaves none of the {len(dataset)} images of {dataset.name}: widen it")
    return dataset.subset(rows, name=dataset.name + cut)


def _choices(names: Iterable[str]) -> str:
    shown = list(names)
    return " or ".join(shown[:4]) + (" or another" if len(shown) > 4 else "")
