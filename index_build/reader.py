"""Reader: a data set -> batches of images with their ids and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nndefense.datasets import ImageDataset


@dataclass(frozen=True)
class Batch:
    """N images N x C x H x W in [0, 1], their labels N as classes of the data set, and their ids."""

    images: Tensor
    labels: Tensor
    ids: Sequence[str]


def read(dataset: ImageDataset, batch_size: int, indices: np.ndarray | None = None) -> Iterator[Batch]:
    """Yield the items at ``indices`` (default: all) in order; the next batch is read while one is being used."""
    wanted = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    pieces = [wanted[first : first + batch_size] for first in range(0, len(wanted), batch_size)]

    def load(piece: np.ndarray) -> Batch:
        images, labels = dataset.batch(piece)
        return Batch(images, labels, [dataset.ids[int(i)] for i in piece])

    with ThreadPoolExecutor(max_workers=1) as ahead:
        coming = ahead.submit(load, pieces[0]) if pieces else None
        for following in [*pieces[1:], None]:
            if coming is None:
                return
            batch = coming.result()
            coming = ahead.submit(load, following) if following is not None else None
            yield batch
