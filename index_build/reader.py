"""Reader: rows of a data set -> batches in order, with what had to be left out, read ahead by threads.

Threads, not processes: Pillow decodes outside the interpreter lock, and a process would have to hand every image over
(``benchmarks/reading.py`` compares them).
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.datasets import BadImage, ImageDataset, Rejected
from nndefense.datasets.encoded import one_of_many, processors
from nndefense.datasets.pixels import DIGEST_BYTES
from nndefense.errors import InputError

_PIECE = 16
"""Images that a thread reads in one go: few enough that threads end a batch together."""
_PIECE_PIXELS = 1 << 17
"""As many small images as have so many numbers, so that handing them out costs little beside reading them."""


@dataclass(frozen=True)
class ReadBatch:
    """What became of up to ``batch_size`` rows; those of rejected images are missing from all but ``rejected``.

    Attributes:
        positions: int64 n, the row of each image in the data set.
        images: float32 n x C x H x W in [0, 1]; in pinned memory if that was asked for.
        labels: int64 n, class numbers of the data set, -1 where unknown.
        ids: n ids.
        digests: uint8 n x 16, see :func:`~nndefense.datasets.pixel_digests`.
        rejected: the images left out, in order.
    """

    positions: NDArray[np.int64]
    images: Tensor
    labels: Tensor
    ids: list[str]
    digests: NDArray[np.uint8]
    rejected: tuple[Rejected, ...]

    def take(self, kept: Tensor) -> ReadBatch:
        """Those of the images that n truth values say."""
        chosen = kept.numpy()
        ids = [name for name, keep in zip(self.ids, chosen, strict=True) if keep]
        return ReadBatch(
            self.positions[chosen], self.images[kept], self.labels[kept], ids, self.digests[chosen], self.rejected
        )

    def under_noise(self, sigma: float, seed: int, before: int = 0) -> Tensor:
        """The images, changed in place, with Gaussian noise of this standard deviation, clipped to [0, 1].

        The noise of an image is drawn from its position in the source, which follows ``before`` other images, and the
        seed, and depends on nothing else.
        """
        if sigma:
            for position, image in zip((self.positions + before).tolist(), self.images, strict=True):
                digest = hashlib.sha256(f"noise of row {position} under {seed}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                image.add_(torch.randn(image.shape, generator=generator), alpha=sigma).clamp_(0, 1)
        return self.images


def read(
    dataset: ImageDataset,
    positions: NDArray[np.int64],
    batch_size: int,
    *,
    workers: int | None = None,
    ahead: int = 2,
    pin: bool = False,
) -> Iterator[ReadBatch]:
    """Yield the images at ``positions``, in that order, ``batch_size`` positions at a time.

    Memory holds at most ``ahead`` + 1 batches, besides the one that the caller has. What comes out does not depend on
    ``workers`` and ``ahead``. A batch may hold fewer images than positions, even none.

    Args:
        dataset: the images.
        positions: rows of ``dataset``, in any order.
        batch_size: at least 1.
        workers: threads that read and decode; None for one a processor.
        ahead: how many batches are read while the caller works on one.
        pin: give the images in memory from which a GPU copies faster, and while the program goes on.

    Raises:
        InputError: a number is out of range, or a position.
        SourceError: the source cannot be read; no image is rejected for that.
    """
    if batch_size < 1 or (workers is not None and workers < 1) or ahead < 0:
        raise InputError(
            f"reading needs a batch size and workers of at least 1 and batches ahead of at least 0, not {batch_size}, "
            f"{workers} and {ahead}"
        )
    # The checks above must not wait for the first batch, so the loop is a function of its own.
    return _read(dataset, dataset.rows(positions), batch_size, workers or processors(), ahead, pin)


@dataclass
class _Coming:
    """A batch whose pieces are being read into its memory."""

    rows: NDArray[np.int64]
    images: Tensor
    digests: NDArray[np.uint8]
    pieces: list[tuple[int, Future[dict[int, BadImage]]]]


def _read(
    dataset: ImageDataset, rows: NDArray[np.int64], batch_size: int, workers: int, ahead: int, pin: bool
) -> Iterator[ReadBatch]:
    # Small batches of large images are read by several threads too.
    small = _PIECE_PIXELS // max(1, math.prod(dataset.shape))
    size = max(1, small, min(_PIECE, -(-batch_size // workers)))
    waiting: deque[_Coming] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader", initializer=one_of_many)

    def begin(part: NDArray[np.int64]) -> _Coming:
        # Torch keeps pinned blocks for the next batch once one is let go of.
        images = torch.empty((len(part), *dataset.shape), pin_memory=pin)
        digests = np.zeros((len(part), DIGEST_BYTES), dtype=np.uint8)
        pieces = []
        for at in range(0, len(part), size):
            cut = slice(at, at + size)
            pieces.append((at, pool.submit(dataset.read_into, part[cut], images[cut], digests[cut])))
        return _Coming(part, images, digests, pieces)

    try:
        for start in range(0, len(rows), batch_size):
            waiting.append(begin(rows[start : start + batch_size]))
            if len(waiting) > ahead:
                yield _finished(dataset, waiting.popleft())
        while waiting:
            yield _finished(dataset, waiting.popleft())
    finally:
        # Reached at the end, on an error, and when the caller stops in the middle: nothing is left running.
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(dataset: ImageDataset, coming: _Coming) -> ReadBatch:
    wrong = {at + place: error for at, piece in coming.pieces for place, error in piece.result().items()}
    rows, images, digests = coming.rows, coming.images, coming.digests
    rejected = dataset.rejected(rows, wrong)
    if wrong:
        good = np.delete(np.arange(len(rows)), sorted(wrong))
        kept = torch.from_numpy(good)
        rows, digests = rows[good], digests[good]
        packed = torch.empty((len(good), *images.shape[1:]), pin_memory=images.is_pinned())
        images = torch.index_select(images, 0, kept, out=packed)
    return ReadBatch(rows, images, torch.from_numpy(dataset.labels[rows]), dataset.ids.take(rows), digests, rejected)
