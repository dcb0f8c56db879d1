"""The first picture of an image file before it is decoded, and how it is to be turned.

The orientation is read out of EXIF or XMP with bounded work: Pillow reads every tag of an EXIF block, and copies what
each points to, and 65,535 tags that all point to the same megabyte make 64 GB of it. Here only the one tag is looked
for, in the first directory, and nothing is copied.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from nndefense.serving.pictures.limits import Refused, refused

MAX_STEPS = 50_000
"""The most chunks, segments or blocks of one file that are walked through; a GIF has one for every 255 bytes."""


@dataclass(frozen=True)
class Picture:
    """What a decoder is given."""

    format: str
    """PNG, JPEG, WEBP or GIF: the first bytes decided."""
    width: int
    """As the header says, before it is turned."""
    height: int
    data: bytes
    """A file of the same format that holds the first picture and nothing besides."""
    orientation: int
    """As in EXIF, 1 to 8; 1 for upright."""
    passes: int = 1
    """How often the decoder goes over the picture."""


def damaged(reason: str) -> Refused:
    """The error for a file that contradicts its own format, for a reason that follows "because"."""
    return refused("damaged_image", f"the image file cannot be read, because {reason}: repair or replace it")


_ORIENTATION = 0x0112
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l"}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP_SEARCHED = 2**20


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation, 1 to 8, that the metadata of an image asks for; 1 where they say nothing that is valid.

    Args:
        exif: the EXIF block, with or without its ``Exif`` prefix, as large as it may be; it may be empty or damaged.
        xmp: the XMP packet, which counts only where EXIF does not speak of it (as in Pillow); its first MiB is read.
    """
    found = _from_exif(re.sub(rb"\A(?:Exif\0\0){1,2}", b"", exif))
    if found is None and (match := _XMP.search(xmp[:_XMP_SEARCHED])):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _from_exif(block: bytes) -> int | None:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 8:
        return None
    (start,) = struct.unpack_from(order + "L", block, 4)
    if start + 2 > len(block):
        return None
    (count,) = struct.unpack_from(order + "H", block, start)
    found = None
    for place in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHL", block, place)
        if tag == _ORIENTATION and kind in _INTEGERS and values == 1:
            (found,) = struct.unpack_from(order + _INTEGERS[kind], block, place + 8)
    return found
