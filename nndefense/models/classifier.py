"""The classifier: any net from images to logits, with its normalisation, its fingerprint and its classes' names."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from nndefense.errors import InputError, ModelError, plain, warn
from nndefense.files import MOST_CLASSES, read_whole, text_lines
from nndefense.images import channel_message, shape_text
from nndefense.models.class_names import match_classes
from nndefense.models.state import constants_in, update_with_state
from nndefense.unwrapping import unwrapped

# A sequence of names, or the path of a file that lists them.
Classes = Sequence[str] | str | Path

_NAME_COLUMNS = ("name", "class", "label")
_ID_COLUMNS = ("wnid", "class_id", "id", "synset")


class Classifier(nn.Module):
    """A net that takes images in [0, 1] and returns logits.

    Attributes:
        net: the net itself, without torch.compile or DataParallel; feature layers are named by their path inside it.
        mean, std: buffers 1 x C x 1 x 1; the net sees (image - mean) / std. Zeros and ones by default.
        arch: the name of the architecture.
        classes: the K names of the classes, in the order of the logits.
        class_ids: K ids such as WordNet ids, or None.
        input_shape: channels, height and width of the images that it was made for.
        source: what it was loaded from, or ``""``.
        info: how it was trained, as plain JSON values; empty where unknown.
        fixed_size: whether images must have exactly the height and width of ``input_shape``.

    Raises:
        InputError: fewer than two classes, ids that are not one for each, or a mean or std that cannot be used.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        arch: str,
        input_shape: Sequence[int],
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        source: str = "",
        info: Mapping[str, Any] | None = None,
        fixed_size: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = check_input_shape(input_shape)
        self.classes = tuple(classes)
        self.class_ids = None if class_ids is None else tuple(class_ids)
        if len(self.classes) < 2:
            raise InputError(f"a classifier needs at least 2 classes, not {len(self.classes)}")
        if self.class_ids is not None and len(self.class_ids) != len(self.classes):
            raise InputError(
                f"there are {len(self.classes)} classes but {len(self.class_ids)} class ids: give one each"
            )
        self.net = unwrapped(net)
        self.arch = arch
        self.source = source
        self.info: dict[str, Any] = dict(info or {})
        self.fixed_size = fixed_size
        channels = self.input_shape[0]
        self.register_buffer("mean", _per_channel("mean", mean, 0.0, channels))
        self.register_buffer("std", _per_channel("std", std, 1.0, channels))
        if not bool((self.std > 0).all()):
            raise InputError("std must be above 0 in every channel: give the standard deviation of pixels in [0, 1]")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K for images N x C x H x W in [0, 1].

        Only the shape is checked here, because attacks call this in their inner loop;
        :func:`nndefense.images.check_images` checks the values where a batch enters.

        Raises:
            InputError: the images have another number of dimensions or channels, or, for a net of fixed size, another
                height or width.
        """
        # Under torch.fx the shape is itself a proxy without a value, so there is nothing to compare.
        if not isinstance(images, fx.Proxy):
            self.check_shape(images.shape)
            images = images.to(self.mean.dtype)
        logits: Tensor = self.net(self.normalised(images))
        return logits

    def normalised(self, images: Tensor) -> Tensor:
        """What the net sees of images in [0, 1]: (image - mean) / std."""
        return (images - self.mean) / self.std

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise :class:`InputError` unless the net takes a batch of this shape N x C x H x W."""
        channels, height, width = self.input_shape
        if len(shape) != 4:
            raise InputError(
                f"images have shape {shape_text(shape)}, but the classifier takes batches "
                f"N x {shape_text(self.input_shape)}"
            )
        if shape[1] != channels:
            raise InputError(channel_message(shape[1], channels))
        if self.fixed_size and (shape[2] != height or shape[3] != width):
            raise InputError(
                f"images are {shape[2]} x {shape[3]}, but the classifier {self.arch} takes only {height} x {width}: "
                "resize them"
            )

    @property
    def device(self) -> torch.device:
        """Where it is: the device that its images must be on."""
        return self.mean.device

    @property
    def fingerprint(self) -> str:
        """The sha256, as 64 hexadecimal digits, of architecture, normalisation and every weight.

        Worked out afresh each time, since weights may have changed: milliseconds for small nets, about 0.2 s for 46
        million weights. The same in every process and on every platform and device. Names of classes do not enter;
        nor does a user's own code, beyond the name of the net's class.
        """
        digest = hashlib.sha256(f"nndefense-classifier 1\n{self.arch}\n{type(self.net).__qualname__}\n".encode())
        update_with_state(digest, self.state_dict())
        update_with_state(digest, constants_in(self.net))
        return digest.hexdigest()

    def layers(self) -> tuple[str, ...]:
        """The paths of all modules inside the net, in order of definition: candidates for feature layers."""
        return tuple(name for name, _ in self.net.named_modules() if name)

    def label_map(self, classes: Sequence[str]) -> Tensor:
        """Return an int64 tensor that maps a data set's class numbers to those of this classifier.

        Classes are matched by :func:`~nndefense.models.class_names.match_classes`: by name or class id, and by number
        only where one side has numbers for names. Where another order is as likely, a warning says which was taken.

        Raises:
            ModelError: a class of the data set is none of the classifier's.
        """
        found = match_classes(classes, self.classes, self.class_ids)
        if found.doubt:
            warn(found.doubt)
        if found.missing is None:
            return torch.tensor(found.numbers, dtype=torch.int64)
        name, why = found.missing
        raise ModelError(
            f"the data set's class {name!r} {why} of the classifier's {len(self.classes)} classes "
            f"({self.classes[0]!r} to {self.classes[-1]!r}): use data with the same class names or ids, or give the "
            "classifier's classes when it is loaded"
        )

    def class_number(self, name: str) -> int:
        """The number of a class by its name or id, matched as by :meth:`label_map`, else by its number as text.

        Raises:
            InputError: no class, or several, have the name.
        """
        found = match_classes([name], self.classes, self.class_ids)
        if found.numbers[0] is not None:
            return found.numbers[0]
        if re.fullmatch("[0-9]{1,9}", name) and int(name) < len(self.classes):
            return int(name)
        _, why = found.missing or ("", "is not one")
        close = difflib.get_close_matches(name, self.classes, n=3)
        raise InputError(
            f"{name!r} {why} of the classifier's {len(self.classes)} classes ({self.classes[0]!r} to "
            f"{self.classes[-1]!r}): give a name or a number from 0 to {len(self.classes) - 1}"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the modules."""
        return f"{self.arch}, {shape_text(self.input_shape)}, {len(self.classes)} classes"


def check_input_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``shape`` as (channels, height, width).

    Raises:
        InputError: it is not three numbers of at least 1.
    """
    sides = tuple(plain(side) for side in shape)
    if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise InputError(f"the input shape must be channels, height and width, such as 3, 32, 32, not {sides}")
    return sides[0], sides[1], sides[2]


def _per_channel(name: str, values: Sequence[float] | None, default: float, channels: int) -> Tensor:
    numbers = [default] * channels if values is None else [float(value) for value in values]
    if len(numbers) != channels or not all(math.isfinite(number) for number in numbers):
        raise InputError(f"{name} must be {channels} finite numbers, one a channel, not {numbers}")
    return torch.tensor(numbers, dtype=torch.float32).view(1, channels, 1, 1)


def read_classes(path: str | Path) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Read the names of classes from the file at ``path``, and their ids where it has them.

    A ``.csv`` file has a header with a column ``name`` (or ``class``, ``label``), perhaps ``wnid`` (or ``class_id``,
    ``id``, ``synset``), and perhaps ``index``, the class number from 0. Any other file has one name a line.

    Returns:
        the K names, and K ids or None.

    Raises:
        ModelError: the file is missing or not of that form.
    """
    path = Path(path).expanduser()
    try:
        text = read_whole(path, 16 << 20).decode("utf-8-sig")
    except FileNotFoundError:
        raise ModelError(f"there is no file of classes at {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise ModelError(
            f"the file of classes {path} cannot be read{reason}: it must be a UTF-8 text or CSV file"
        ) from None
    if text.count("\n") > MOST_CLASSES:
        raise ModelError(f"the file of classes {path} has more than the {MOST_CLASSES:,} lines allowed: shorten it")
    if path.suffix.lower() == ".csv":
        return _read_csv(path, text)
    names = tuple(line.strip() for line in text_lines(text))
    while names and not names[-1]:
        names = names[:-1]
    if not names or "" in names:
        raise ModelError(f"the file of classes {path} is empty or has an empty line: write one class name a line")
    return names, None


def _read_csv(path: Path, text: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ModelError(f"the file of classes {path} is no table ({error}): mend it") from None
    columns = {column.strip().lower(): column for column in (rows[0] if rows else {}) if column}
    name = next((columns[column] for column in _NAME_COLUMNS if column in columns), None)
    if name is None:
        raise ModelError(f"the CSV file of classes {path} needs a header with a column 'name' and one row a class")
    if "index" in columns:
        try:
            numbers = [int(row[columns["index"]]) for row in rows]
        except (TypeError, ValueError):
            raise ModelError(f"the column 'index' of {path} must hold class numbers from 0 on") from None
        if sorted(numbers) != list(range(len(rows))):
            raise ModelError(f"the column 'index' of {path} must hold each class number from 0 to {len(rows) - 1} once")
        rows = [row for _, row in sorted(zip(numbers, rows, strict=True), key=lambda pair: pair[0])]
    identity = next((columns[column] for column in _ID_COLUMNS if column in columns), None)
    names = tuple((row[name] or "").strip() for row in rows)
    if "" in names:
        raise ModelError(f"row {names.index('') + 1} of the file of classes {path} has no name: fill it in")
    if identity is None:
        return names, None
    return names, tuple((row[identity] or "").strip() for row in rows)


def given_classes(classes: Classes) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return names, and ids or None, from a sequence of names or from the path of a file."""
    if isinstance(classes, (str, Path)):
        return read_classes(classes)
    return tuple(str(name) for name in classes), None
