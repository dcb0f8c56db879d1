"""What data sets are called, and :func:`open_dataset`, which opens them by that name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nndefense.datasets import arrays
from nndefense.datasets.base import ImageDataset
from nndefense.datasets.derived import Sides, Size, check_form, in_form
from nndefense.datasets.folder import ImageFolderDataset, split_folders
from nndefense.datasets.hub import HubDataset
from nndefense.datasets.listing import FileListDataset
from nndefense.datasets.parquet import ParquetDataset
from nndefense.datasets.remote import has_suffix, open_store
from nndefense.datasets.small_sets import open_cifar10, open_digits, open_idx
from nndefense.datasets.store import is_url
from nndefense.datasets.torchvision_set import SETS, TorchvisionDataset
from nndefense.datasets.webdataset import WebDataset
from nndefense.errors import DataError

NAMED = ("digits", "mnist", "fashion-mnist", "cifar10")
"""Sets that are known by name alone."""
_PATH_KINDS = ("imagefolder", "images", "files", "hdf5", "webdataset", "parquet")
_PATHS = tuple(f"{kind}:{'LIST' if kind == 'files' else 'PATH'}" for kind in _PATH_KINDS)
#: The forms of a data set's name, as help and errors list them.
KNOWN_SPECS = (*NAMED, *_PATHS, "torchvision:NAME:PATH", "hf:NAME")

_SPLITS = ("train", "test")
VALIDATION = ("val", "valid", "validation")
MEASURED = ("test", *VALIDATION)
"""The splits that a measurement takes, the first before the others."""
# How the files of a kind end where a pattern may stand for several.
_SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}
_SLICE = re.compile(r"(?P<body>.*?)(?P<cut>\[[^\[\]]*\])?", re.DOTALL)
_SPLIT_OF_URL = re.compile(r"(?P<head>.*[^:]):(?P<split>[^:/\[\]{}*]+)", re.DOTALL)
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
    (``mnist:test``); without one, the training split is meant (:func:`measured_spec` is for those who measure). The
    others are:

    * ``imagefolder:PATH``: the folder PATH with one folder a class, ``imagefolder:PATH:val`` its folder ``val``;
    * ``images:PATH``: every image in the folder PATH and below, without labels;
    * ``files:LIST``: the images that a list names, see :class:`~nndefense.datasets.FileListDataset`;
    * ``hdf5:PATH``: a file; ``hdf5:PATH:test`` the file ``test.h5`` of the folder PATH;
    * ``webdataset:PATH``: a tar shard, the shards of a folder, or those of a pattern such as ``pool-{000..099}.tar``;
      ``webdataset:PATH:test`` the folder ``test`` or the shards ``test*.tar`` of the folder PATH;
    * ``parquet:PATH``: the same with Parquet files, see :class:`~nndefense.datasets.ParquetDataset`;
    * ``torchvision:NAME:PATH:test``: a split of torchvision's data set NAME, whose files are in the folder PATH or are
      fetched there; without PATH, ``data_dir``;
    * ``hf:NAME:test``: a split of a data set of Hugging Face's hub, or of a folder that its library wrote, see
      :class:`~nndefense.datasets.HubDataset`; ``hf:NAME:CONFIG:test`` where it has several subsets.

    A PATH may be a URL that fsspec reads, such as ``s3://bucket/photos`` or ``zip://photos::/data/photos.zip``. A slice
    as in Python may follow: ``mnist:train[:55000]``. A path that exists as it is written is never taken apart.

    Args:
        spec: the name.
        data_dir: the folder of the data sets; else the environment variable NNDEFENSE_DATA, else ``data``.
        size: one side, or (height, width), that all images are brought to: the centre is cropped to this aspect
            ratio and resized (bilinear, antialiased).
        channels: 1 turns colour to grey (luma), 3 repeats the channel of grey images. Files of pictures are read in
            colour unless this is 1; other data sets stay as they are stored.
        download: whether MNIST, Fashion-MNIST, CIFAR-10, torchvision's sets and the hub's may be fetched, if they are
            missing.

    Raises:
        DataError: the name is unknown, or the data are missing, damaged or of another form.
        InputError: ``size`` or ``channels`` is out of range.
    """
    form = check_form(size, channels)
    spec = spec.strip()
    folder = Path(data_dir).expanduser() if data_dir is not None else default_data_dir()
    kind, _, rest = spec.partition(":")
    dataset: ImageDataset
    if kind == "torchvision":
        dataset, cut = _open_torchvision(rest, folder, form, channels, download)
    elif kind == "hf":
        dataset, cut = _open_hub(rest, form, channels, download)
    elif kind in _PATH_KINDS:
        path, split, cut = locate(kind, rest, _SUFFIXES.get(kind))
        dataset = _open_path(kind, path, split, form, channels)
    else:
        body, cut = split_slice(spec)
        name, _, split_text = body.partition(":")
        if name not in NAMED:
            raise DataError(f"unknown data set {spec!r}: choose {', '.join(KNOWN_SPECS[:-1])} or {KNOWN_SPECS[-1]}")
        dataset = in_form(_open_named(name, split_text or "train", folder, download), form, channels)
    return _sliced(dataset, cut) if cut else dataset


def measured_spec(spec: str, *, data_dir: str | os.PathLike[str] | None = None, among: Sequence[str] = MEASURED) -> str:
    """What a measurement opens: the data set with its test split, else its validation split, where none is named.

    Args:
        spec: as for :func:`open_dataset`, which takes the training split where none is named.
        data_dir: as for :func:`open_dataset`.
        among: the splits that may be taken, the first before the others.

    Returns:
        The spec with a split; as it is where it names one, or where the data set has none.

    Raises:
        DataError: it has splits, but none of these; or there is nothing at its path.
    """
    base, split, cut, splits = splits_of(spec, data_dir=data_dir)
    if split is not None or not splits:
        return spec
    chosen = next((name for name in among if name in splits), None)
    if chosen is None:
        raise DataError(
            f"{spec} has no split {' or '.join(among[:2])} to take here, but {', '.join(splits)}: name the one that is "
            f"meant, such as {base}:{splits[-1]}{cut}"
        )
    return f"{base}:{chosen}{cut}"


def splits_of(
    spec: str, *, data_dir: str | os.PathLike[str] | None = None
) -> tuple[str, str | None, str, Sequence[str]]:
    """Take a spec apart: the data set, the split and the slice that are named, and the splits that there are.

    Raises:
        DataError: there is nothing at its path.
    """
    kind, _, rest = spec.strip().partition(":")
    if kind == "torchvision":
        name, place, split, cut = _torchvision_parts(rest)
        root = place or os.fspath(data_dir if data_dir is not None else default_data_dir())
        return f"{kind}:{name}:{root}", split, cut or "", [known for known in _torchvision_splits(name) if known]
    if kind == "hf":
        name, config, split, cut = _hub_parts(rest)
        # Which there are is asked for when it is opened.
        splits = () if os.path.exists(os.path.join(name, "state.json")) else _SPLITS
        return ":".join(filter(None, (kind, name, config))), split, cut or "", splits
    if kind in _PATH_KINDS:
        path, split, cut = locate(kind, rest, _SUFFIXES.get(kind))
        return f"{kind}:{path}", split, cut or "", _splits_at(kind, path)
    body, cut = split_slice(spec.strip())
    name, _, text = body.partition(":")
    return name, text or None, cut or "", _SPLITS if name in NAMED else ()


def _splits_at(kind: str, path: str) -> Sequence[str]:
    """The splits of a data set of files; none where it is one file, a pattern, or not laid out by splits."""
    suffixes = arrays.SUFFIXES if kind == "hdf5" else (_SUFFIXES[kind],) if kind in _SUFFIXES else ()
    if kind == "files" or has_suffix(path, suffixes):
        return ()
    store, folder = open_store(path)
    if not store.is_folder(folder):
        return ()
    folders, files = store.listing(folder)
    if kind in ("imagefolder", "images"):
        # Classes are asked for, so a split without any (test images without labels) is none.
        labelled = kind == "imagefolder"
        return [name for name in split_folders(folders) if not labelled or store.listing(store.join(folder, name))[0]]
    names = [name for name in files if has_suffix(name, suffixes)]
    if kind == "hdf5":
        return sorted({name.rpartition(".")[0] for name in names})
    begun = {re.match("[a-z]*", name)[0] for name in names}  # type: ignore[index]
    return [name for name in ("train", *MEASURED) if name in folders or name in begun]


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


def _open_path(kind: str, path: str, split: str | None, size: Sides | None, channels: int | None) -> ImageDataset:
    if kind in ("webdataset", "parquet"):
        opened = WebDataset if kind == "webdataset" else ParquetDataset
        return opened(path, split=split, size=size, channels=channels)
    if kind == "hdf5":
        return in_form(_open_hdf5(path, split), size, channels)
    if kind == "files":
        if split is not None:
            raise DataError(f"{path} is a list, so it has no split {split!r}: open files:{path}")
        return FileListDataset(path, size=size, channels=channels)
    return ImageFolderDataset(path, split=split, size=size, channels=channels, labelled=kind == "imagefolder")


def _open_torchvision(
    rest: str, data_dir: Path, size: Sides | None, channels: int | None, download: bool
) -> tuple[ImageDataset, str | None]:
    name, place, split, cut = _torchvision_parts(rest)
    root = Path(place).expanduser() if place else data_dir
    dataset = TorchvisionDataset(name, root, split=split, size=size, channels=channels, download=download)
    return dataset, cut


def _torchvision_parts(rest: str) -> tuple[str, str, str | None, str | None]:
    """Name, folder, split and slice of one of torchvision's sets."""
    name, _, place = rest.partition(":")
    cut = None
    if not os.path.exists(os.path.expanduser(place)):
        name, cut = split_slice(name) if not place else (name, None)
        place, cut = split_slice(place) if place else (place, cut)
    head, _, tail = place.rpartition(":")
    if tail and tail in _torchvision_splits(name) and not os.path.exists(os.path.expanduser(place)):
        return name, head, tail, cut
    return name, place, None, cut


def _torchvision_splits(name: str) -> Sequence[str]:
    return next((splits for known, splits in SETS.items() if known.lower() == name.lower()), ())


def _open_hub(rest: str, size: Sides | None, channels: int | None, download: bool) -> tuple[ImageDataset, str | None]:
    name, config, split, cut = _hub_parts(rest)
    return HubDataset(name, config=config, split=split, size=size, channels=channels, download=download), cut


def _hub_parts(rest: str) -> tuple[str, str | None, str | None, str | None]:
    """Name or folder, subset, split and slice of a data set of the hub."""
    body, cut = split_slice(rest)
    place = os.path.expanduser(body)
    if os.path.exists(place):
        return place, None, None, cut
    head, _, tail = place.rpartition(":")
    if head and os.path.exists(head):
        return head, None, tail, cut
    name, *further = body.split(":")
    if not name or not all(further) or len(further) > 2:
        raise DataError(f"hf:{rest} is no data set of the hub: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return name, further[0] if len(further) == 2 else None, further[-1] if further else None, cut


def _open_hdf5(path: str, split: str | None) -> ImageDataset:
    if has_suffix(path, arrays.SUFFIXES) if is_url(path) else not os.path.isdir(path):
        if split is not None:
            raise DataError(f"{path} is a file, so it has no split {split!r}: open hdf5:{path}")
        return arrays.HDF5Dataset(path)
    store, folder = open_store(path)
    names = [name for name in store.listing(folder)[1] if has_suffix(name, arrays.SUFFIXES)]
    # Where there are both, the shorter suffix goes before the longer.
    files = {name.rpartition(".")[0]: name for name in sorted(names, key=len, reverse=True)}
    if not files:
        raise DataError(f"the folder {path} has no files *.h5: give the path of an HDF5 file")
    split = split or "train"
    if split not in files:
        known = " or ".join(f"hdf5:{path}:{stem}" for stem in sorted(files)[:4]) + (
            " or another" if len(files) > 4 else ""
        )
        raise DataError(f"the folder {path} has no {split}.h5: open {known}")
    return arrays.HDF5Dataset(f"{path.rstrip('/')}/{files[split]}", name=f"hdf5:{path}:{split}")


def _sliced(dataset: ImageDataset, cut: str) -> ImageDataset:
    match = _BOUNDS.fullmatch(cut)
    bounds = [int(part) if part else None for part in match.groups()] if match else [0, 0, 0]
    if bounds[2] == 0:
        raise DataError(f"cannot understand the slice {cut} of {dataset.name}: write it as [start:stop], e.g. [:1000]")
    rows = np.arange(len(dataset), dtype=np.int64)[slice(*bounds)]
    if len(rows) == 0:
        raise DataError(f"the slice {cut} leaves none of the {len(dataset)} images of {dataset.name}: widen it")
    return dataset.subset(rows, name=dataset.name + cut)


def split_slice(text: str) -> tuple[str, str | None]:
    """Cut a slice in brackets from the end of a text."""
    match = _SLICE.fullmatch(text)
    assert match is not None  # the pattern matches any text
    return match["body"], match["cut"]


def locate(kind: str, rest: str, suffix: str | None) -> tuple[str, str | None, str | None]:
    """Return path (or URL, or pattern), split and slice; of a path, the longest reading that exists.

    A URL is taken apart by its letters alone, because asking a server costs time: a bracket at its end is a slice, and
    what stands after its last colon is a split, unless it could be a port.

    Args:
        kind: what the spec begins with, for messages.
        rest: the spec after it.
        suffix: how a file ends, where several can be given as a pattern; None where patterns mean nothing.

    Raises:
        DataError: there is nothing at any of the readings.
    """
    if not rest:
        raise DataError(f"give a path after {kind}: for example {kind}:photos:train")
    body, cut = split_slice(rest)
    if is_url(rest):
        match = _SPLIT_OF_URL.fullmatch(body)
        if match is None or (match["split"].isdigit() and "/" not in match["head"].rpartition("://")[2]):
            return body, None, cut
        return match["head"], match["split"], cut
    # An ending such as .tar leaves no doubt; elsewhere brackets and braces could be read in two ways.
    if suffix and has_suffix(body, (suffix,)) and not os.path.exists(os.path.expanduser(rest)):
        return os.path.expanduser(body), None, cut
    readings = [(rest, None), (body, cut)]
    for text, slice_text in readings:
        # os.path.exists, because Path.exists raises on names that no file can have.
        if os.path.exists(os.path.expanduser(text)):
            return _tidy(text), None, slice_text
    for text, slice_text in readings:
        head, _, split = text.rpartition(":")
        if head and split and os.path.exists(os.path.expanduser(head)):
            return _tidy(head), split, slice_text
    raise DataError(f"there is nothing at {body}: check the path of {kind}:{rest}")


def _tidy(path: str) -> str:
    """As ``str(Path(path).expanduser())``: without ``./`` and double slashes."""
    return os.fspath(os.path.normpath(os.path.expanduser(path))) if ".." not in path else os.path.expanduser(path)
