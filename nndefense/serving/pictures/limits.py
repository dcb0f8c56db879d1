"""How much one request may ask of the server, and the error of one that is refused.

Such an error has an HTTP status, a word that programs can test, and a sentence for people.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

from nndefense.errors import InputError

#: The media types that are taken -> Pillow's name of the format.
MEDIA_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
"""What is decoded, by content type; :mod:`nndefense.serving.pictures.decode` says why nothing else."""


@dataclass(frozen=True)
class Limits:
    """The limits on a request; all but ``decoder_mib`` are positive, and sizes are in bytes.

    Raises:
        InputError: a limit is not a positive finite number, or one image may be larger than a whole body.
    """

    max_body_bytes: int = 16 * 2**20
    """A body, however it is sent; counted as it arrives, whatever the content length claims."""
    max_image_bytes: int = 8 * 2**20
    """One image file (after base64)."""
    max_images: int = 64
    """The images of one request."""
    max_pixels: int = 25_000_000
    """Width times height of one image, as its header says: checked before any pixel is decoded."""
    max_request_pixels: int = 50_000_000
    """The pixels of all images of one request together."""
    max_side: int = 12_000
    """Width or height of one image."""
    decode_seconds: float = 5.0
    """The time for decoding all images of one request."""
    max_decoders: int = 2
    """How many images are decoded at the same time: this many times the memory of one large image."""
    decoder_mib: int = 0
    """MiB that decoding a request's images may take in a process of its own (on Linux); 0: they are decoded here."""
    max_parts: int = 80
    """The parts of a multipart body, fields and files together."""
    max_part_header_bytes: int = 4096
    """The headers of one part."""
    max_json_depth: int = 4
    """How deep arrays and objects may stand inside one another in a JSON body; a correct one needs 2."""
    max_header_bytes: int = 16 * 2**10
    """The request line and all headers together."""
    body_seconds: float = 20.0
    """The time in which the whole body must have arrived, counted from the end of the headers."""
    header_seconds: float = 10.0
    """The time in which a new connection must have sent its headers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and (value > 0 or (field.name == "decoder_mib" and value == 0))):
                raise InputError(f"the limit {field.name} is {value}: it must be a positive number")
        if self.decoder_mib and sys.platform != "linux":
            raise InputError("decoder_mib limits a process's memory, which this system does not: leave it out")
        if self.max_image_bytes > self.max_body_bytes:
            raise InputError(
                f"one image may have {self.max_image_bytes} bytes but a whole body only {self.max_body_bytes}: "
                "lower max_image_bytes or raise max_body_bytes"
            )


STATUS = {
    # what is wrong with the request
    "malformed_request": 400,
    "malformed_json": 400,
    "malformed_multipart": 400,
    "invalid_base64": 400,
    "no_image": 400,
    "invalid_argument": 422,
    "slow_body": 408,
    # how much of it there is
    "body_too_large": 413,
    "too_many_parts": 413,
    "too_many_images": 413,
    "image_too_large": 413,
    "too_many_pixels": 413,
    # what is wrong with an image
    "unsupported_media_type": 415,
    "unsupported_image": 415,
    "type_mismatch": 415,
    "empty_image": 422,
    "damaged_image": 422,
    "decode_timeout": 422,
}
"""The status that goes with each code."""


class Refused(InputError):
    """A request that is refused, through no fault of the server.

    Args:
        status: the HTTP status, 400 to 499.
        code: what is wrong, as one of the words in ``STATUS``.
        detail: what is wrong and what to do, in a sentence that tells nothing of the server's files or memory.

    Raises:
        ValueError: the status is no client error.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        if not 400 <= status <= 499:
            raise ValueError(f"{status} is not the status of a refused request")
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.headers: dict[str, str] = {}


def refused(code: str, detail: str) -> Refused:
    """Return the error of a code with the status that goes with it; ``code`` must stand in ``STATUS``."""
    return Refused(STATUS[code], code, detail)
