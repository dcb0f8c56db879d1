"""The data sets of torchvision, by name."""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nndefense.datasets.base import update_with_strings
from nndefense.datasets.derived import Size, check_form
from nndefense.datasets.encoded import PictureDataset
from nndefense.datasets.ids import NumberedIds, RowNumbers
from nndefense.datasets.image_files import FORMATS, check_pixels, convert
from nndefense.datasets.labels import class_number, numbered_classes
from nndefense.datasets.pixels import Pixels
from nndefense.datasets.rejected import BRING, OTHER_SIZE, BadImage, SourceError
from nndefense.errors import DataError
from nndefense.files import open_regular
from nndefense.images import shape_text

# The sets whose items are a picture and the number of its class, by their splits, the first of which is the usual
# one. "" stands for a set without splits.
_NAMES = {
    ("train", "test"): "CIFAR10 CIFAR100 FER2013 FashionMNIST Food101 GTSRB KMNIST MNIST StanfordCars USPS",
    ("",): "Caltech101 Caltech256 EuroSAT SEMEION SUN397",
    ("train", "valid", "test"): "Country211",
    ("train", "val", "test"): "DTD Flowers102 RenderedSST2",
    ("trainval", "train", "val", "test"): "FGVCAircraft",
    ("train", "val"): "ImageNet Imagenette",
    ("trainval", "test"): "OxfordIIITPet",
    ("train-standard", "train-challenge", "val"): "Places365",
    ("train", "test", "unlabeled", "train+unlabeled"): "STL10",
    ("train", "test", "extra"): "SVHN",
}
SETS = dict(sorted((name, splits) for splits, names in _NAMES.items() for name in names.split()))
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
_CLASS_ATTRIBUTES = ("classes", "categories")
_FINGERPRINT_IMAGES = 100


class TorchvisionDataset(PictureDataset):
    """A data set of torchvision, read from where torchvision puts it, or fetched by it.

    Where torchvision lets others open the files, they are read by this project's rules (turned by EXIF, transparent
    parts on white); else the pictures are those that torchvision hands out. Ids are ``<name>:<split>/00000`` and so on.

    Args:
        set_name: a name in :data:`SETS`, e.g. ``CIFAR100``; upper and lower case do not matter.
        root: the folder that torchvision is given.
        split: one of the set's splits; the first one, if left out.
        size: one side, or (height, width); if left out, all images must have the size of the first.
        channels: 3 or 1; if left out, as the first image is.
        download: whether torchvision may fetch the data where they are not there.

    Raises:
        DataError: an unknown name or split, or data that are neither there nor to be had; later, images.
        InputError: ``size`` or ``channels`` is out of range.
    """

    def __init__(
        self,
        set_name: str,
        root: str | Path,
        *,
        split: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
        download: bool = True,
        name: str | None = None,
    ) -> None:
        self._size = check_form(size, channels)
        known = next((known for known in SETS if known.lower() == set_name.lower()), None)
        if known is None:
            raise DataError(f"torchvision's {set_name!r} is not among the sets read here: choose {', '.join(SETS)}")
        splits = SETS[known]
        chosen = splits[0] if split is None else split
        if chosen not in splits:
            choice = " or ".join(splits) if splits != ("",) else "none"
            raise DataError(f"torchvision's {known} has no split {split!r}: choose {choice}")
        self._items = _open(known, Path(root).expanduser(), chosen, download)
        # Not every set can be asked by several threads at once; what is decoded later, can.
        self._lock = threading.Lock()
        labels, classes = _labels(self._items, known)
        title = name or f"torchvision:{known}:{root}" + (f":{chosen}" if chosen else "")
        first = self._picture(0, title)
        if channels is None:
            channels = 1 if first.mode in ("1", "L", "F") or first.mode.startswith("I") else 3
        height, width = self._size or convert(title, first, channels, None).shape[:2]
        super().__init__(
            name=title,
            classes=classes,
            shape=(channels, height, width),
            ids=NumberedIds(f"{known.lower()}{':' if chosen else ''}{chosen}", len(labels)),
            labels=labels,
        )

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _picture(self, row: int, called: str) -> Image.Image:
        try:
            with self._lock:
                picture = self._items[row][0]
        except BadImage:
            raise
        except FileNotFoundError as error:
            raise BadImage(
                f"{called} is missing ({error}): fetch it again", "missing", "there is no such file"
            ) from error
        except MemoryError as error:
            raise SourceError(f"there is not enough memory left to read {called}: use fewer workers") from error
        except Exception as error:
            raise _damaged(f"torchvision cannot read {called}", error) from error
        if not isinstance(picture, Image.Image):
            raise DataError(f"{called} is no picture but a {type(picture).__name__}: open another set")
        return picture

    def _pixels(self, row: int, called: str) -> Pixels:
        try:
            pixels = convert(called, self._picture(row, called), self.shape[0], self._size)
        except BadImage:
            raise
        except Exception as error:
            raise _damaged(f"cannot read the image {called}", error) from error
        if pixels.shape[:2] != self.shape[1:]:
            sizes = f"{shape_text(pixels.shape[:2])}, but the first one is {shape_text(self.shape[1:])}"
            reason = f"it is {sizes}: {BRING}"
            raise BadImage(f"the image {called}: {reason}", OTHER_SIZE, reason)
        return pixels

    def _pixels_of(self, rows: RowNumbers) -> Callable[[int], Pixels]:
        items, numbers = self.ids.take(rows), rows.tolist()
        return lambda place: self._pixels(numbers[place], items[place])

    def _digest(self) -> str:
        """Hash the form, the labels and up to 100 evenly spaced images: all of them could take hours."""
        digest = hashlib.sha256(f"torchvision {type(self._items).__name__} {self.shape} {self._size}\n".encode())
        update_with_strings(digest, self.classes)
        digest.update(self.labels.astype("<i8").tobytes())
        picked = np.unique(np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_IMAGES)).astype(np.int64))
        images = torch.empty((len(picked), *self.shape))
        wrong = self.read_into(picked, images)
        digest.update(images.numpy().astype("<f4").tobytes())
        update_with_strings(digest, (wrong[place].kind for place in sorted(wrong)))
        return digest.hexdigest()


def _damaged(what: str, error: Exception) -> BadImage:
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadImage(f"{what} ({reason}): fetch it again", "damaged", f"it is damaged ({reason})")


def _open(name: str, root: Path, split: str, download: bool) -> Any:
    """Torchvision's own data set; without the network first."""
    try:
        import torchvision
    except ImportError as error:
        raise DataError("torchvision's data sets come with torchvision: pip install torchvision") from error
    kind = getattr(torchvision.datasets, name, None)
    if kind is None:
        raise DataError(f"this version of torchvision has no {name}: install a newer one")
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if split and "split" in known:
        options["split"] = split
    elif split:
        options["train"] = split == "train"
    if "loader" in known or name == "ImageNet":
        options["loader"] = _load
    if "root" in known:
        options["root"] = root
    reason: Exception | None = None
    for further in ({}, {"download": True}) if download and "download" in known else ({},):
        try:
            return kind(**options, **further)
        except (OSError, RuntimeError, ValueError, ImportError) as error:  # noqa: PERF203
            reason = error
    words = textwrap.shorten(str(reason), 160)
    remedy = f"put it there as torchvision's {name} expects it"
    raise DataError(f"torchvision's {name} is not in {root} and could not be had ({words}): {remedy}") from reason


def _load(path: str) -> Image.Image:
    """Open a picture; its pixels are decoded later, outside the lock."""
    with open_regular(path) as file:
        picture = Image.open(io.BytesIO(file.read()), formats=FORMATS)
    check_pixels(path, picture)
    return picture


def _labels(items: Any, name: str) -> tuple[NDArray[np.int64], Sequence[str]]:
    count = len(items)
    if count == 0:
        raise DataError(f"torchvision's {name} is empty: fetch it again")
    found = next((getattr(items, key) for key in _LABEL_ATTRIBUTES if _fits(getattr(items, key, None), count)), None)
    if found is None:
        samples = getattr(items, "_samples", None)
        # Only sets that tell their labels in no other way have all their items read.
        pairs = samples if samples is not None and _fits(samples, count) else (items[row] for row in range(count))
        found = [label for _, label in pairs]
    title = f"torchvision's {name}"
    labels = np.array([-1 if label is None else class_number(float(label), title) for label in found], dtype=np.int64)
    classes = next((list(getattr(items, key)) for key in _CLASS_ATTRIBUTES if getattr(items, key, None)), [])
    names = [" / ".join(item) if isinstance(item, tuple) else str(item) for item in classes]
    if len(set(names)) < len(names) or len(names) <= labels.max():
        names = numbered_classes(labels, title)
    return labels, names


def _fits(values: Any, count: int) -> bool:
    return values is not None and not callable(values) and hasattr(values, "__len__") and len(values) == count
