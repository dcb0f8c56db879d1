"""Image folders: one folder a class, images anywhere below it."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.ids import PackedIds
from nndefense.datasets.image_files import SUFFIXES, decode, to_tensor
from nndefense.datasets.transform import Size, check_form
from nndefense.errors import DataError
from nndefense.images import shape_text

# Folders with these names are taken for splits if there is nothing else beside them.
_SPLITS = ("train", "val", "valid", "validation", "test")
_SHOWN = 8


class ImageFolderDataset(ImageDataset):
    """The images below ``root/<class>/`` (or ``root/<split>/<class>/``), decoded when asked for.

    Classes and files are in sorted order; hidden files and folders (``.name``) are left out. The id of an image is
    its path relative to ``root``, with forward slashes. Without a split, a folder that holds nothing but folders
    named train, val, valid, validation or test stands for its ``train`` folder.

    Args:
        root: the folder.
        split: the name of a folder in it.
        size: one side, or (height, width), see :func:`nndefense.datasets.load_image`. If left out, all images must
            have the size of the first.
        channels: 3 (the default) reads every image as RGB, 1 as grey.

    Raises:
        DataError: the folder is missing, empty, or not laid out by class; later, an image cannot be read.
        InputError: ``size`` or ``channels`` is out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
        name: str | None = None,
    ) -> None:
        self._size = check_form(size, channels)
        self._root = Path(root)
        if not self._root.is_dir():
            raise DataError(f"there is no folder {root}: give a folder that holds one folder of images for each class")
        split = split or _default_split(self._root)
        if split is not None and not (self._root / split).is_dir():
            raise DataError(f"{root} has no folder {split}: it holds {_listed(_list(self._root)[0])}")
        classes, labels, ids = _find_images(self._root, split)
        first = decode(self._root / ids[0], channels or 3, self._size)
        super().__init__(
            name=name or f"imagefolder:{root}" + (f":{split}" if split else ""),
            classes=classes,
            shape=(channels or 3, first.shape[0], first.shape[1]),
            ids=ids,
            labels=labels,
        )

    def path(self, row: int) -> Path:
        """Return the image file of a row."""
        return self._root / self.ids[row]

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        images = torch.empty((len(rows), *self.shape))

        def read(place: int, relative: str) -> None:
            path = self._root / relative
            image = to_tensor(decode(path, self.shape[0], self._size))
            if image.shape[1:] != self.shape[1:]:
                raise DataError(
                    f"the image {path} is {shape_text(image.shape[1:])}, but the first one of {self.name} is "
                    f"{shape_text(self.shape[1:])}: give a size that all images are brought to"
                )
            images[place] = image

        names = self.ids.take(rows)
        if len(names) == 1 or get_worker_info() is not None:
            # A loader process is one of many already; threads in each would only compete.
            for place, relative in enumerate(names):
                read(place, relative)
        else:
            # Pillow lets go of the interpreter lock while it decodes, so threads do run side by side.
            list(decoder_threads(os.getpid()).map(read, range(len(names)), names))
        return images

    def _digest(self) -> str:
        """Hash the form, and the path and byte count of every file: reading all the pixels would take hours."""
        digest = hashlib.sha256(f"imagefolder {self.shape} {self._size}\n".encode())
        update_with_strings(digest, self.classes)
        update_with_strings(digest, self.ids)
        try:
            sizes = np.fromiter(((self._root / item).stat().st_size for item in self.ids), dtype="<i8")
        except OSError as error:
            raise DataError(f"cannot find {error.filename} any more: open {self.name} again") from error
        digest.update(sizes.tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def decoder_threads(process: int) -> ThreadPoolExecutor:
    """Return the process's decoding threads. They do not survive a fork, hence one pool for each process id."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="decode")


def _find_images(root: Path, split: str | None) -> tuple[list[str], NDArray[np.int64], PackedIds]:
    """Return the classes, and the label and relative path of each image."""
    home = root / split if split else root
    classes, files = _list(home)
    if not classes:
        loose = any(file.lower().endswith(SUFFIXES) for file in files)
        state = "has images but no folders" if loose else "has no folders" if files else "is empty"
        raise DataError(f"{home} {state}: put the images of each class into a folder with the name of the class")
    counts, ids = [], []
    for folder in classes:
        prefix = f"{split}/{folder}" if split else folder
        found = sorted(_walk(home / folder, prefix, frozenset()))
        counts.append(len(found))
        ids.extend(found)
    if not ids:
        raise DataError(f"{home} has no images in its folders: they must end in {', '.join(SUFFIXES)}")
    if 0 in counts:
        empty = [folder for folder, count in zip(classes, counts, strict=True) if count == 0]
        raise DataError(f"{home} has no images of {_listed(empty)}: fill these folders or remove them")
    return classes, np.repeat(np.arange(len(classes), dtype=np.int64), counts), PackedIds(ids)


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the images in and below ``folder``, each path with ``prefix`` in place of ``folder``."""
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a folder that we are in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # The suffix is looked at first: then no file but only folders may cost a system call.
                if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                    yield f"{prefix}/{entry.name}"
                elif entry.is_dir():
                    yield from _walk(Path(entry.path), f"{prefix}/{entry.name}", above | {here})
    except OSError as error:
        raise DataError(f"cannot list the folder {folder} ({error.strerror}): check its permissions") from error


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files in ``folder``, without hidden ones."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(f"cannot list the folder {folder} ({error.strerror}): check its permissions") from error
    return sorted(folders), sorted(files)


def _default_split(root: Path) -> str | None:
    folders, _ = _list(root)
    if not folders or not set(folders) <= set(_SPLITS):
        return None
    if "train" not in folders:
        raise DataError(f"{root} holds splits, not classes: open imagefolder:{root}:{folders[0]}")
    return "train"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "no folders"
