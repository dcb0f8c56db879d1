"""The pictures behind the rows of a database, and some images to try, where they can be opened again."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset, open_recorded, recorded_specs, specs_at_hand
from nndefense.errors import DataError, InputError, NNDefenseError
from nndefense.guard.percentile import Percentile

_log = logging.getLogger(__name__)
# Rows of which the samples are taken, about.
_LOOKED_AT = 1 << 13


@dataclass(frozen=True)
class Sample:
    """An image to try.

    Attributes:
        id: its id in its data set.
        image: uint8 H x W x C, C 1 or 3, of the classifier's size.
        class_name: its own class, or None where that is unknown.
        held_out: whether it is one of the calibration images; otherwise it stands in the database.
    """

    id: str
    image: NDArray[np.uint8]
    class_name: str | None
    held_out: bool


class Pictures:
    """Opens the data sets of a database and of its calibration when the first picture is asked for.

    A data set is used only where its fingerprint is the recorded one: a picture is never that of another image.
    """

    def __init__(
        self,
        database: ImageDatabase,
        calibration: Percentile | None,
        shape: tuple[int, int, int],
        data_dir: Path | None = None,
        images: Sequence[str] = (),
    ) -> None:
        """``shape`` is C, H, W of the pictures; ``data_dir`` is where data sets are looked for, and ``images`` are the
        specs that the user names for them, in the place of the recorded ones.
        """
        self.database, self.calibration, self.shape, self.data_dir = database, calibration, shape, data_dir
        self.images = tuple(images)
        self._lock = threading.Lock()
        self._opened: dict[str, ImageDataset | None] = {}

    @property
    def at_hand(self) -> bool:
        """Whether the pictures of the rows can be shown."""
        return self._rows() is not None

    def of(self, row: int | str) -> NDArray[np.uint8] | None:
        """As :meth:`nndefense.guard.Guard.neighbor_image` says, which asks here."""
        if isinstance(row, (int, np.integer)):
            if not 0 <= row < self.database.manifest.rows:
                raise InputError(f"there is no row {row}: the database has rows 0 to {self.database.manifest.rows - 1}")
            row = self.database.ids(np.array([row]))[0]
        dataset = self._rows()
        if dataset is None:
            return None
        try:
            return _picture(dataset, dataset.index_of(row))
        except DataError:
            raise InputError("the database has no row of that id: give the id of a neighbour") from None

    def samples(self, count: int) -> list[Sample]:
        """At most ``count`` images: calibration images, or rows of the database where those are not at hand."""
        dataset, known = self._held_out(), () if self.calibration is None else self.calibration.samples
        held_out = dataset is not None and len(known) > 0
        if not held_out:
            dataset = self._rows()
        if dataset is None:
            return []
        # Of a database of millions some thousands are enough to have one of each class.
        step = max(len(dataset) // _LOOKED_AT, 1)
        places = np.array([dataset.index_of(item) for item in known]) if held_out else np.arange(0, len(dataset), step)
        chosen = places[varied(np.asarray(dataset.labels)[places], count)]
        return [_sample(dataset, int(place), held_out=held_out) for place in chosen]

    def _rows(self) -> ImageDataset | None:
        return self._open("rows", self.database.manifest.data, lambda: self.database.ids(self.database.row_numbers))

    def _held_out(self) -> ImageDataset | None:
        data = {} if self.calibration is None else self.calibration.dataset
        return self._open("held out", data, lambda: data.get("ids", ()))

    def _open(self, key: str, data: Mapping[str, Any], ids: Callable[[], Sequence[str]]) -> ImageDataset | None:
        with self._lock:
            if key not in self._opened:
                folder = self.database.path
                named = recorded_specs(data)
                if named and not self.images and not specs_at_hand(data, folder):
                    _log.warning(
                        "%s names %r for pictures, which is not opened unless --images names it", folder, named
                    )
                try:
                    self._opened[key] = open_recorded(
                        data, ids, self.shape, self.data_dir, folder=folder, images=self.images
                    )
                except NNDefenseError:
                    # Pictures illustrate; nothing that is answered depends on them.
                    self._opened[key] = None
            return self._opened[key]


def _picture(dataset: ImageDataset, place: int) -> NDArray[np.uint8]:
    images, _ = dataset.batch([place])
    pixels: NDArray[np.uint8] = (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return pixels


def _sample(dataset: ImageDataset, place: int, *, held_out: bool) -> Sample:
    label = int(dataset.labels[place])
    name = dataset.classes[label] if label >= 0 else None
    return Sample(dataset.ids[place], _picture(dataset, place), name, held_out)


def varied(labels: Sequence[int] | NDArray[Any], count: int) -> list[int]:
    """At most ``count`` places of ``labels``, one of each class before a second of any, evenly from first to last."""
    labels = np.asarray(labels)
    groups = _spread([np.flatnonzero(labels == one) for one in np.unique(labels)], count)
    each = [_spread(group, -(-count // len(groups))) for group in groups]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*each))
    return [int(place) for place in turns if place is not None][:count]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
