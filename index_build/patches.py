"""Job: a data set -> a patch database for image quilting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index_build.extract import bar
from index_build.reader import read
from nndefense.datasets import ImageDataset
from nndefense.datasets.base import shuffle_keys
from nndefense.defenses.quilting import PatchDatabase, check_patch_folder, write_patches
from nndefense.errors import DataError, InputError, check_choice
from nndefense.images import check_images
from nndefense.locks import writes

PATCHES, SIDE = 1_000_000, 5
STORAGES = ("auto", "uint8", "float32")
# How far from a level of 1/255 a pixel may lie, in levels, to be taken for one of 8 bits: more than float32 rounds.
_LEVEL = 1e-3


@writes("out", lend=True)
def build_patches(
    dataset: ImageDataset,
    out: str | Path,
    *,
    patches: int = PATCHES,
    side: int = SIDE,
    storage: str = "auto",
    index: str = "auto",
    probes: int | None = None,
    specs: Sequence[str] = (),
    batch_size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> PatchDatabase:
    """Cut patches at random from a data set's images and write them as a patch database.

    All places of all images are equally likely, and none is drawn twice. The code of Guo et al. draws 1,000,000 patches
    of 5 x 5 pixels from 20,000 training images; that many and that size are the defaults. The same data set and seed
    give the same patches everywhere. Memory holds all patches, 75 MB for a million of 5 x 5 in colour as ``uint8``, and
    the index while it is built, four times as much.

    Args:
        dataset: the images; their labels are not looked at.
        out: folder for the database.
        patches: how many, at least 1; all places there are, if these are fewer.
        side: of a patch in pixels.
        storage: ``uint8``, ``float32``, or ``auto``: uint8 where it loses nothing, as with images of 8 bits.
        index: FAISS's factory string, or ``auto``: exact up to 32,768 patches, inverted lists for more.
        probes: how many inverted lists a search looks into; by default 16.
        specs: the data set specs that open the images again.
        batch_size: images read at a time.
        seed: of the places.
        overwrite: replace a finished patch database in that folder.
        progress: show a bar.

    Returns:
        The database, opened.

    Raises:
        DataError: an empty data set or an image that cannot be read.
        InputError: numbers that do not fit the images, an unknown storage, or an index that FAISS cannot build.
        DatabaseError: a folder that already holds a database or cannot be written.
    """
    if len(dataset) == 0:
        raise DataError(f"the data set {dataset.name} is empty: there is nothing to cut patches from")
    check_choice("storage", storage, STORAGES)
    if patches < 1 or batch_size < 1:
        raise InputError("a build needs at least 1 patch and a batch size of at least 1")
    _, height, width = dataset.shape
    if not 1 <= side <= min(height, width):
        raise InputError(
            f"patches of {side} x {side} pixels cannot be cut from the images of {dataset.name}, which are "
            f"{height} x {width}: choose a side from 1 to {min(height, width)}"
        )
    # A folder that cannot be used is told before the work, not after it.
    check_patch_folder(Path(out).expanduser(), overwrite=overwrite)
    origins = draw_places(len(dataset), height - side + 1, width - side + 1, patches, seed)
    pixels = _cut_all(dataset, origins, side, storage, batch_size, progress)
    data = {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset), "specs": list(specs)}
    write_patches(out, pixels, origins, data=data, seed=seed, index=index, probes=probes, overwrite=overwrite)
    return PatchDatabase.open(out)


def draw_places(images: int, rows: int, columns: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw different places, all equally likely: count x 3 (image, row, column), in that order.

    Where there are no more places than ``count``, all are taken. The draw uses integer arithmetic alone, and so is the
    same on every machine and with every version of the libraries.
    """
    total = images * rows * columns
    if count >= total:
        chosen = np.arange(total, dtype=np.int64)
    elif count > total // 2:
        chosen = np.argsort(shuffle_keys(total, seed), kind="stable")[:count]
    else:
        drawn = count + count // 2 + 64
        while True:
            # The remainder favours low places by less than 1 in 2^64 / total.
            keys = (shuffle_keys(drawn, seed) % np.array([total], dtype=np.uint64)).astype(np.int64)
            _, first = np.unique(keys, return_index=True)
            if len(first) >= count:
                break
            drawn *= 2
        chosen = keys[np.sort(first)[:count]]
    return np.stack(np.unravel_index(np.sort(chosen), (images, rows, columns)), axis=1).astype(np.int64)


def _cut_all(
    dataset: ImageDataset, origins: NDArray[np.int64], side: int, storage: str, batch_size: int, progress: bool
) -> Tensor:
    """The patches at these places, which are sorted: n x C x side x side, uint8 or float32."""
    numbers, begins = np.unique(origins[:, 0], return_index=True)
    ends = np.append(begins[1:], len(origins))
    parts: list[Tensor] = []
    with bar(len(numbers), "cutting patches", progress) as shown:
        done = 0
        for batch in read(dataset, numbers, batch_size):
            for image in batch.rejected:
                raise DataError(f"{image.id} of {dataset.name} cannot be used: {image.reason}")
            check_images(batch.images, channels=dataset.shape[0])
            here = slice(begins[done], ends[done + len(batch.ids) - 1])
            places = torch.from_numpy(origins[here])
            within = torch.from_numpy(np.searchsorted(numbers, origins[here, 0]) - done)
            found = cut_at(batch.images, within, places, side)
            levels = (found * 255).round_()
            whole = storage == "uint8" or (storage == "auto" and bool(((found * 255 - levels).abs_() <= _LEVEL).all()))
            if not whole and storage == "auto":
                # One image of more than 8 bits, and all are kept as floats.
                storage = "float32"
                parts = [part.float() / 255 for part in parts]
            parts.append(levels.to(torch.uint8) if whole else found)
            done += len(batch.ids)
            if shown is not None:
                shown.update(len(batch.ids))
    return torch.cat(parts)


def cut_at(images: Tensor, numbers: Tensor, places: Tensor, side: int) -> Tensor:
    """Cut from image ``numbers[i]`` the patch whose first row and column are ``places[i, 1:]``: n x C x side x side."""
    inside = torch.arange(side)
    rows = places[:, 1, None, None] + inside[:, None]
    columns = places[:, 2, None, None] + inside
    # Indices on both sides of the channels put these last.
    return images[numbers[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()
