"""What stickers are read from and written to: photos, masks, corner points, palettes, stickers, pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nndefense.attacks.rp2 import Mode, Sticker, check_mask, check_palette, frame, homography
from nndefense.datasets.image_files import FORMATS
from nndefense.datasets.litter import is_passed_over
from nndefense.datasets.picture_names import Unread, is_picture
from nndefense.datasets.store import LocalStore
from nndefense.errors import DataError, InputError, warn
from nndefense.files import open_regular, read_json, read_whole, write_atomically

_CM_PER_INCH = 2.54


@dataclass(frozen=True)
class Photos:
    """The photos of a folder, by name.

    Attributes:
        names: of the files, in natural order (2 before 10).
        images: N x C x H x W in [0, 1], in the classifier's size.
        matrices: N x 3 x 3 homographies from the canonical frame to each photo's.
    """

    names: list[str]
    images: Tensor
    matrices: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def at(self, rows: Sequence[int]) -> Photos:
        """Some of the photos."""
        return Photos([self.names[i] for i in rows], self.images[list(rows)], self.matrices[list(rows)])


def read_photos(folder: Path, shape: tuple[int, int, int], corners: Path | None) -> Photos:
    """Read every picture of a folder in a classifier's size.

    Args:
        folder: its pictures, taken as a data set takes them.
        shape: C, H, W of the classifier.
        corners: JSON with four points for every file name: where the canonical frame's corners are in that photo, in
            its own pixels from its top left corner, clockwise from the frame's top left; null for an aligned photo.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name the folder that holds the photos")
    seen, unread, store = (file for file in folder.iterdir() if not is_passed_over(file.name)), Unread(), LocalStore()
    files = sorted((file for file in seen if file.is_file() and is_picture(store, str(file), unread)), key=_natural)
    unread.tell(str(folder))
    if not files:
        raise DataError(f"{folder} holds no photos: put JPEG or PNG files into it")
    given = None if corners is None else read_json(corners)
    if given is not None and not isinstance(given, dict):
        raise DataError(f"{corners} must hold an object with four points for each photo's file name")
    names, images, points = [], [], []
    for file in files:
        try:
            picture = _open(file)
        except DataError as error:
            warn(f"{error}: it is left out")
            continue
        names.append(file.name)
        points.append(frame()[0] if given is None else _points(given, file.name, picture.size, corners))
        images.append(_tensor(picture, shape))
    if not images:
        raise DataError(f"none of the {len(files)} photos of {folder} can be read: save them anew as PNG or JPEG")
    try:
        matrices = homography(frame(len(points)), torch.stack(points))
    except InputError as error:
        raise DataError(f"{corners}: {error}") from None
    return Photos(names, torch.stack(images), matrices)


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """Read a mask, white where the sticker may be, as 1 x h x w of 0 and 1 in the given size."""
    picture = _open(path).convert("L").resize((size[1], size[0]), Image.Resampling.BOX)
    try:
        return check_mask(torch.from_numpy((np.asarray(picture) > 127).astype(np.float32))[None])
    except InputError:
        raise DataError(f"{path} is black in the classifier's size: mark the sticker's place in white") from None


def read_palette(path: Path) -> Tensor:
    """Read printable colours, one a line: ``#rrggbb`` or three numbers from 0 to 255; P x 3 in [0, 1]."""
    try:
        lines = read_whole(path, 1 << 20).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path} cannot be read as text: give one colour a line") from None
    colours = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
            colours.append([int(text[i : i + 2], 16) for i in (1, 3, 5)])
            continue
        values = re.split(r"[,\s]+", text)
        if len(values) != 3 or not all(re.fullmatch(r"\d{1,3}", v) and int(v) <= 255 for v in values):
            raise DataError(f"{path}, line {number}: {text[:40]!r} is no colour: write #rrggbb or three numbers to 255")
        colours.append([int(v) for v in values])
    return check_palette(torch.tensor(colours, dtype=torch.float64).reshape(-1, 3) / 255)


def write_sticker(path: Path, sticker: Sticker) -> None:
    """Keep a sticker exactly, as NumPy arrays: delta C x h x w, mask 1 x h x w, mode."""

    def write(part: Path) -> None:
        delta, mask = sticker.delta.cpu().numpy(), sticker.mask.cpu().numpy()
        with part.open("wb") as file:
            np.savez(file, delta=delta, mask=mask, mode=np.array(sticker.mode))

    write_atomically(path, write)


def read_sticker(text: str, mask: Path | None, mode: Mode) -> Sticker:
    """Read ``sticker.npz``, or ``FILE.npz:NAME``: an array h x w x C, with a mask and a mode from elsewhere."""
    path, _, name = text.rpartition(":") if re.search(r"\.npz:\w+$", text) else (text, "", "")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not name:
                delta, own = torch.from_numpy(arrays["delta"]), torch.from_numpy(arrays["mask"])
                return Sticker(delta, check_mask(own), str(arrays["mode"]))  # type: ignore[arg-type]
            delta = torch.from_numpy(arrays[name].astype(np.float32)).permute(2, 0, 1).contiguous()
    except InputError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError):
        raise DataError(f"{text} is no sticker: give a sticker.npz, or FILE.npz:NAME of an array h x w x C") from None
    if mask is None:
        raise InputError(f"{text} is an array alone: give its mask too, with --mask")
    bounds = (0.0, 1.0) if mode == "replace" else (-1.0, 1.0)
    inside = read_mask(mask, (delta.shape[1], delta.shape[2]))
    return Sticker(delta.clamp(*bounds) * inside, inside, mode)


def write_print(path: Path, colours: Tensor, mask: Tensor, *, width_cm: float, dpi: int) -> tuple[int, int]:
    """Write the sticker for the printer: the canonical frame at its real size, transparent beside the mask.

    Pixels of the canonical frame become squares, as they were optimised, without smoothing.

    Returns:
        Width and height in pixels.
    """
    height, width = mask.shape[1:]
    across = max(width, round(width_cm / _CM_PER_INCH * dpi))
    size = (across, max(1, round(across * height / width)))
    if across > 20_000:
        raise InputError(f"{width_cm:g} cm at {dpi} dpi are {across} pixels: lower --dpi")
    values = _bytes(colours)
    alpha = (mask[0].cpu().numpy() * 255).astype(np.uint8)
    picture = Image.fromarray(np.dstack([values, alpha])).resize(size, Image.Resampling.NEAREST)
    write_atomically(path, lambda part: picture.save(part, format="PNG", dpi=(dpi, dpi), optimize=True))
    return size


def write_grey(path: Path, values: Tensor) -> None:
    """Write h x w values from 0 to 1 as a grey PNG."""
    picture = Image.fromarray(np.rint(values.cpu().clamp(0, 1).numpy() * 255).astype(np.uint8))
    write_atomically(path, lambda part: picture.save(part, format="PNG"))


def _bytes(colours: Tensor) -> NDArray[np.uint8]:
    pixels = colours.detach().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    values: NDArray[np.uint8] = np.rint(pixels * 255).astype(np.uint8)
    return values


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _open(path: Path) -> Image.Image:
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as picture:
            # As a viewer shows it, since that is where corner points are read off.
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        # Pillow raises a SyntaxError for a broken PNG.
        raise DataError(f"{path} cannot be read as a picture") from None


def _tensor(picture: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    if channels not in (1, 3):
        raise InputError(f"photos have 1 or 3 channels, but the classifier takes {channels}")
    drawn = picture.convert("L" if channels == 1 else "RGB")
    if drawn.size != (width, height):
        drawn = drawn.resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(drawn, dtype=np.float32).reshape(height, width, channels) / 255
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def _points(given: dict[str, Any], name: str, size: tuple[int, int], corners: Path | None) -> Tensor:
    """One photo's corners in frame coordinates, 4 x 2."""
    if name not in given:
        raise DataError(f"{corners} has no corners for {name}: add four points, or null for an aligned photo")
    if given[name] is None:
        return frame()[0]
    try:
        points = torch.tensor(given[name], dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        points = torch.empty(0)
    if points.shape != (4, 2):
        raise DataError(f"{corners}: {name} needs four points [x, y], clockwise from the top left")
    return points / torch.tensor(size, dtype=torch.float64) * 2 - 1
