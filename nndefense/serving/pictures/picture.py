"""The first picture of an image file, before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from nndefense.serving.pictures.refused import Refused, refused

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
