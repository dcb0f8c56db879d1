"""The neighbours of a training set in a database that may hold it, and the images of the database's rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nndefense.bars import progress_bar
from nndefense.database import ImageDatabase
from nndefense.database.exact_search import ExactSearch
from nndefense.datasets import ImageDataset, concatenate, open_dataset, recorded_specs, specs_at_hand
from nndefense.errors import DataError, InputError
from nndefense.models import Classifier

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]

_BATCH = 256
_HELD_BYTES = 2**30
# An image's distance to itself is 0 but for rounding, which grows with the vectors' length.
_SAME = 1e-3
_PROBES = 16


def row_images(
    classifier: Classifier, database: ImageDatabase, images: ImageDataset | None = None, data_dir: Path | None = None
) -> ImageDataset:
    """The images of a database's rows, in row order; a database stores none itself.

    They are looked up by id, and a few of them are put through the feature net to see that they are the rows' own.

    Args:
        classifier: the one that the database was made with.
        database: whole, not a subset.
        images: a data set that holds every row's id. None: what the manifest names, where that may be opened because
            it stands there (:func:`~nndefense.datasets.specs_at_hand`).
        data_dir: the folder of the data sets.

    Raises:
        DataError: they cannot be opened, an id is missing, or they are other images.
        InputError: a subset of a database.
    """
    if len(database) != database.manifest.rows:
        raise InputError("neighbours are retrieved from a whole database: give it, not a subset of it")
    if images is None:
        data = database.manifest.data
        specs = specs_at_hand(data, database.path)
        if not specs:
            named = " and ".join(recorded_specs(data))
            what = f"names {named} for its images, which only you may have opened" if named else "names no images"
            raise DataError(f"{database.path} {what}: give the data set that it was built from (--images)")
        channels, *size = classifier.input_shape
        form: dict[str, Any] = {"data_dir": data_dir, "size": tuple(size), "channels": channels, "download": False}
        images = concatenate([open_dataset(spec, **form) for spec in specs])
    ids = database.ids(database.row_numbers)
    if len(ids) != len(images) or ids != list(images.ids):
        images = images.subset([images.index_of(item) for item in ids], name=f"{images.name} (rows)")
    probes = np.linspace(0, len(ids) - 1, min(_PROBES, len(ids))).astype(np.int64)
    device = classifier.device
    pictures, _ = images.batch(probes)
    classifier.check_shape(pictures.shape)
    with torch.no_grad():
        found = database.extractor(classifier.eval())(pictures.to(device)).cpu()
    stored = database.features(probes)
    if bool(((found - stored).norm(dim=1) > 0.02 * stored.norm(dim=1) + 1e-4).any()):
        raise DataError(
            f"the images of {images.name} are not those that {database.path} was built from (their features differ): "
            "give the data set that it was built from"
        )
    return images


@torch.no_grad()
def nearest_others(
    classifier: Classifier, database: ImageDatabase, dataset: ImageDataset, k: int, *, progress: bool = False
) -> Tensor:
    """For each image the numbers of its k nearest rows that are not the image itself: N x k, nearest first, int64.

    A row is the image itself if it has its id, or if their features differ by rounding only, as those of a copy under
    another id do.

    Args:
        classifier: the one that the database was made with, on any device.
        database: where neighbours are found.
        dataset: N images of the shape that the classifier takes.
        k: at least 1.
        progress: show a bar.

    Raises:
        InputError: k is below 1, or there are not so many other rows.
    """
    if k < 1 or k > len(database):
        raise InputError(f"k is {k}, but must be from 1 to the database's {len(database):,} rows: lower k")
    extractor = database.extractor(classifier.eval())
    search = _searching(database, classifier.device)
    row_of = {item: row for row, item in enumerate(database.ids(database.row_numbers))}
    itself = np.array([row_of.get(item, -1) for item in dataset.ids], dtype=np.int64)
    found = []
    with progress_bar(total=len(dataset), desc="finding neighbours", unit=" images", shown=progress) as bar:
        for images, _, numbers in dataset.batches(_BATCH):
            vectors = extractor(images.to(classifier.device))
            found.append(_others(vectors, search, len(database), itself[numbers], k))
            bar.update(len(images))
    return torch.cat(found)


def _searching(database: ImageDatabase, device: torch.device) -> Search:
    """The database's search, or an equal one that is faster for as many queries as a training set has.

    In one thread FAISS's exact index takes five times as long as a product of matrices. An index that is not exact is
    asked itself, since predictions will ask it.
    """
    if not database.exact or 4 * len(database) * database.dimension > _HELD_BYTES:
        return database.search
    return ExactSearch(database.features(database.row_numbers).to(device)).search


def _others(vectors: Tensor, search: Search, count: int, itself: np.ndarray, k: int) -> Tensor:
    near = _SAME * vectors.norm(dim=1, keepdim=True).cpu()
    own = torch.from_numpy(itself)[:, None]
    m = min(k + 1, count)
    while True:
        distances, rows = (part.cpu() for part in search(vectors, m))
        other = (rows != own) & (distances > near)
        if bool((other.sum(1) >= k).all()):
            # A stable sort brings the others to the front, in their order.
            order = (~other).to(torch.int8).sort(dim=1, stable=True).indices[:, :k]
            return rows.gather(1, order)
        if m == count:
            raise InputError(
                f"k is {k}, but an image has only {int(other.sum(1).min())} rows beside itself and its copies: lower k"
            )
        m = min(2 * m, count)
