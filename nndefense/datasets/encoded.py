"""What data sets of encoded pictures have in common, whether these are files, parts of archives or cells of a table.

Images are decoded by threads: Pillow lets go of the interpreter lock meanwhile, so they do run side by side.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import get_worker_info

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.ids import RowNumbers
from nndefense.datasets.image_files import decode, fill
from nndefense.datasets.pixels import Digests, Pixels, pixel_digest
from nndefense.datasets.rejected import BRING, OTHER_SIZE, BadImage
from nndefense.errors import DataError
from nndefense.images import shape_text

_PROBED = 1000
_here = threading.local()


class PictureDataset(ImageDataset):
    """Pictures that are read one by one, in many threads. A subclass implements :meth:`_pixels_of`.

    ``_size`` is the height and width that the centre of each image is brought to, or None: all are as the first one.
    """

    _size: tuple[int, int] | None

    def _begun_digest(self, kind: str) -> hashlib._Hash:
        """A hash of the form, the classes and the ids, to which a subclass adds what defines its images."""
        digest = hashlib.sha256(f"{kind} {self.shape} {self._size}\n".encode())
        update_with_strings(digest, self.classes)
        update_with_strings(digest, self.ids)
        return digest

    @abstractmethod
    def _pixels_of(self, rows: RowNumbers) -> Callable[[int], Pixels]:
        """Return a function that gives the pixels of the place in ``rows`` or raises :class:`BadImage`."""

    def _read(self, rows: RowNumbers) -> Tensor:
        images = torch.empty((len(rows), *self.shape))
        wrong = self.read_into(rows, images)
        if wrong:
            raise wrong[min(wrong)]
        return images

    def read_into(self, rows: RowNumbers, images: Tensor, digests: Digests | None = None) -> dict[int, BadImage]:
        """As for every data set: see :meth:`ImageDataset.read_into`."""
        wrong: dict[int, BadImage] = {}
        pixels_of = self._pixels_of(rows)

        def read(place: int) -> None:
            try:
                pixels = pixels_of(place)
            except BadImage as error:
                wrong[place] = error
                images[place] = 0
                return
            fill(images[place], pixels)
            if digests is not None:
                digests[place] = pixel_digest(pixels)

        each(read, len(rows))
        return wrong


class EncodedDataset(PictureDataset):
    """Pictures in the formats of files, decoded when asked for.

    A subclass implements :meth:`_fetch` or :meth:`_fetcher`, and what they need must be there before this constructor
    runs. With a size no image is read; without one, the first image that can be read tells the size of all.

    Args:
        size: height and width that the centre of each image is brought to, or None.
        channels: 3 (the default) reads every image as RGB, 1 as grey.

    Raises:
        DataError: without a size, when none of the first thousand images can be read: the error of the first.
    """

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str],
        ids: Sequence[str],
        labels: ArrayLike,
        size: tuple[int, int] | None,
        channels: int | None,
    ) -> None:
        self._size = size
        height, width = size or (0, 0)
        super().__init__(name=name, classes=classes, shape=(channels or 3, height, width), ids=ids, labels=labels)
        if size is None:
            self.shape = (self.shape[0], *self._first_size())

    def _fetch(self, row: int, item: str) -> tuple[str, bytes]:
        """Return what messages call the image of a row, whose id is ``item``, and its bytes; called by many threads.

        Raises:
            BadImage: the image is missing, empty or cannot be read.
            SourceError: the source is out of reach.
        """
        raise NotImplementedError

    def _fetcher(self, rows: RowNumbers) -> Callable[[int], tuple[str, bytes]]:
        """Return a function that gives :meth:`_fetch` of the place in ``rows``; a source may read them ahead here."""
        items = self.ids.take(rows)
        numbers = rows.tolist()
        return lambda place: self._fetch(numbers[place], items[place])

    def _first_size(self) -> tuple[int, int]:
        first: BadImage | None = None
        for row in range(min(len(self), _PROBED)):
            try:
                called, data = self._fetcher(np.array([row], dtype=np.int64))(0)
                height, width, _ = decode(called, self.shape[0], None, data).shape
                return height, width
            except BadImage as error:  # noqa: PERF203
                first = first or error
        raise first or DataError(f"{self.name} has no images: check its place")

    def _pixels_of(self, rows: RowNumbers) -> Callable[[int], Pixels]:
        fetch = self._fetcher(rows)

        def read(place: int) -> Pixels:
            called, data = fetch(place)
            pixels = decode(called, self.shape[0], self._size, data)
            self._check_size(called, pixels.shape)
            return pixels

        return read

    def _check_size(self, called: str, shape: tuple[int, ...]) -> None:
        if shape[:2] != self.shape[1:]:
            own, others = shape_text(shape[:2]), shape_text(self.shape[1:])
            raise BadImage(
                f"the image {called} is {own}, but the first one of {self.name} is {others}: {BRING}",
                OTHER_SIZE,
                f"it is {own} pixels, but the first image is {others}: {BRING}",
            )


def each(function: Callable[[int], None], count: int) -> None:
    """Call ``function`` with 0 to ``count`` - 1, side by side unless this thread or process is one of many already.

    The first call in that order that raises an error has its error raised here.
    """
    if count < 2 or get_worker_info() is not None or getattr(_here, "one_of_many", False):
        for number in range(count):
            function(number)
    else:
        for _ in decoder_threads(os.getpid()).map(function, range(count)):
            pass


def one_of_many() -> None:
    """Say that the calling thread is one of several that read at the same time: threads in each would only compete."""
    _here.one_of_many = True


@functools.lru_cache(maxsize=1)
def decoder_threads(process: int) -> ThreadPoolExecutor:
    """Return the process's decoding threads. They do not survive a fork, hence one pool for each process id."""
    return ThreadPoolExecutor(max_workers=processors(), thread_name_prefix="decode", initializer=one_of_many)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
