"""Image folders: one folder a class, images anywhere below it; or images without classes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.derived import Size, check_form
from nndefense.datasets.encoded import EncodedDataset
from nndefense.datasets.ids import PackedIds
from nndefense.datasets.picture_names import SUFFIXES, Unread, is_picture
from nndefense.datasets.remote import open_store
from nndefense.datasets.store import Store
from nndefense.errors import DataError

# Folders with these names are taken for splits if there is nothing else beside them.
_SPLITS = ("train", "val", "valid", "validation", "test")
_SHOWN = 8


class ImageFolderDataset(EncodedDataset):
    """The images below ``root/<class>/`` (or ``root/<split>/<class>/``), decoded when asked for.

    A file is taken for a picture by its suffix, and without one by its first bytes; pictures in formats that are not
    read (HEIC, AVIF, ...) are left out with a warning. Classes and files are in sorted order. Hidden files and folders
    (``.name``) are left out, so is what systems leave behind (``@eaDir``, ``$RECYCLE.BIN``, ``__MACOSX``,
    ``lost+found``, ...), and links to folders that are in the data set anyway or hold it. The id of an image is
    its path relative to ``root``, with forward slashes. Without a split, a folder that holds nothing but folders
    named train, val, valid, validation or test stands for its ``train`` folder.

    Args:
        root: the folder, or its URL (see :mod:`nndefense.datasets.remote`).
        split: the name of a folder in it.
        size: one side, or (height, width), see :func:`nndefense.datasets.load_image`. If left out, all images must
            have the size of the first that can be read.
        channels: 3 (the default) reads every image as RGB, 1 as grey.
        labelled: False takes every image in the folder and below, however it is laid out, and asks for no labels.

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
        labelled: bool = True,
    ) -> None:
        form = check_form(size, channels)
        self._store, self._root = open_store(root)
        if not self._store.is_folder(self._root):
            layout = "that holds one folder of images for each class" if labelled else "of images"
            raise DataError(f"there is no folder {root}: give a folder {layout}")
        if labelled:
            split = split or _default_split(self._store, self._root, str(root))
        if split is not None and not self._store.is_folder(self._store.join(self._root, split)):
            raise DataError(f"{root} has no folder {split}: it holds {_listed(self._store.listing(self._root)[0])}")
        home = self._store.join(self._root, split) if split else self._root
        find = _find_images if labelled else _find_loose_images
        classes, labels, ids, self._sizes = find(self._store, home, f"{split}/" if split else "")
        kind = "imagefolder" if labelled else "images"
        title = name or f"{kind}:{root}" + (f":{split}" if split else "")
        super().__init__(name=title, classes=classes, ids=ids, labels=labels, size=form, channels=channels)

    def path(self, row: int) -> Path:
        """Return the image file of a row; of a remote folder, its path there."""
        return Path(self._root) / self.ids[row]

    def _fetch(self, row: int, item: str) -> tuple[str, bytes]:
        path = self._store.join(self._root, item)
        return self._store.url(path), self._store.image_bytes(path, lambda: self._store.reachable(self._root))

    def _digest(self) -> str:
        """Hash the form, and the path and byte count of every file: reading all the pixels would take hours."""
        digest = self._begun_digest("imagefolder")
        sizes = self._sizes
        if sizes is None:
            paths = (self._store.join(self._root, item) for item in self.ids)
            sizes = np.fromiter(map(self._store.size, paths), dtype=np.int64)
            for row in np.flatnonzero(sizes < 0):
                path = self._store.join(self._root, self.ids[int(row)])
                # A link to nowhere is a bad image, not one that is gone.
                if not self._store.is_link(path):
                    raise DataError(f"cannot find {path} any more: open {self.name} again")
        digest.update(sizes.astype("<i8").tobytes())
        return digest.hexdigest()


# Classes, labels, ids, and the byte counts where the listing tells them.
_Found = tuple[list[str], NDArray[np.int64], PackedIds, "NDArray[np.int64] | None"]


def _find_images(store: Store, home: str, prefix: str) -> _Found:
    classes, files = store.listing(home)
    place = store.url(home)
    if not classes:
        loose = any(file.lower().endswith(SUFFIXES) for file in files)
        state = "has images but no folders" if loose else "has no folders" if files else "is empty"
        remedy = f", or open images:{place}, which asks for no classes" if loose else ""
        raise DataError(
            f"{place} {state}: put the images of each class into a folder with the name of the class{remedy}"
        )
    _check_apart(store, home, classes)
    counts: list[int] = []
    sizes = array("q")
    unread = Unread()

    def inside() -> Iterator[str]:
        for folder in classes:
            before = len(sizes)
            yield from _images_below(store, store.join(home, folder), home, f"{prefix}{folder}/", sizes, unread)
            counts.append(len(sizes) - before)

    ids = PackedIds(inside())
    unread.tell(place)
    if not len(ids):
        raise DataError(f"{place} has no images in its folders: they must end in {', '.join(SUFFIXES)}")
    if 0 in counts:
        empty = [folder for folder, count in zip(classes, counts, strict=True) if count == 0]
        raise DataError(f"{place} has no images of {_listed(empty)}: fill these folders or remove them")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return classes, labels, ids, _known(store, sizes)


def _check_apart(store: Store, home: str, classes: list[str]) -> None:
    """Raise DataError where a class is a link into another class: its pictures would have two labels."""
    owners = {store.true_path(store.join(home, folder)): folder for folder in reversed(classes)}
    for folder in classes:
        path = store.true_path(store.join(home, folder))
        while path and owners.get(path, folder) == folder:
            path = path.rpartition("/")[0]
        if path:
            raise DataError(
                f"the folders {owners[path]} and {folder} of {store.url(home)} have images in common, because one is a "
                "link to the other: remove one"
            )


def _find_loose_images(store: Store, home: str, prefix: str) -> _Found:
    sizes = array("q")
    unread = Unread()
    ids = PackedIds(_images_below(store, home, home, prefix, sizes, unread))
    unread.tell(store.url(home))
    if not len(ids):
        raise DataError(f"{store.url(home)} has no images: they must end in {', '.join(SUFFIXES)}")
    return [], np.full(len(ids), -1, dtype=np.int64), ids, _known(store, sizes)


def _images_below(
    store: Store, folder: str, home: str, prefix: str, sizes: array[int], unread: Unread
) -> Iterator[str]:
    """The images in and below a folder, sorted, each path with ``prefix`` before it.

    Adds their bytes to ``sizes``, and pictures that cannot be read to ``unread``.
    """
    for item, size in sorted(store.below(folder, home)):
        if is_picture(store, store.join(folder, item), unread):
            sizes.append(size)
            yield prefix + item


def _known(store: Store, sizes: array[int]) -> NDArray[np.int64] | None:
    return np.frombuffer(sizes, dtype=np.int64) if store.lists_sizes else None


def split_folders(folders: Sequence[str]) -> Sequence[str]:
    """The folders of a data set, where all of them are splits, else none."""
    return folders if set(folders) <= set(_SPLITS) else ()


def _default_split(store: Store, root: str, written: str) -> str | None:
    folders = split_folders(store.listing(root)[0])
    if not folders:
        return None
    if "train" not in folders:
        raise DataError(f"{written} holds splits, not classes: open imagefolder:{written}:{folders[0]}")
    return "train"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "no folders"
