"""Walking through a JPEG file: see :mod:`nndefense.serving.pictures.containers`."""

from __future__ import annotations

import re
import struct

from nndefense.serving.pictures.orientation import orientation
from nndefense.serving.pictures.picture import MAX_STEPS, Picture, damaged
from nndefense.serving.pictures.refused import refused

MAX_SCANS = 64
"""The most scans of one picture; the usual progressive files have 10, and none needs more than a few dozen."""

_JUNK = 2**16
_APP0, _APP1, _APP14, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
_OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xDE}
_ALONE = {0x01, *range(0xD0, 0xD8)}
# A marker inside the compressed data: neither an escaped 255 nor a restart nor filling. No "+" after the first byte:
# that would be quadratic in the length of the filling.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def read_jpeg(data: bytes) -> Picture:
    """Walk through a JPEG file (ITU-T T.81) that begins with its start marker; see
    :func:`~nndefense.serving.pictures.containers.read_container`.

    Segments that make no pixels (EXIF, profiles, thumbnails, comments) are left out, and so is whatever follows the
    end.

    Raises:
        Refused: ``unsupported_image`` for arithmetic, lossless and hierarchical JPEG; ``damaged_image``.
    """
    kept, exif, xmp = [b"\xff\xd8"], b"", b""
    frame, scans, place = b"", 0, 2
    for _ in range(MAX_STEPS):
        match = _MARKER.search(data, place)
        if match is None:
            # The decoder decides whether a file without its end is whole enough.
            if scans:
                kept.append(data[place:])
                break
            raise damaged("it ends early")
        if scans:
            kept.append(data[place : match.start()])
        elif match.start() - place > _JUNK:
            raise damaged("its segments do not follow one another")
        marker, place = match[1][0], match.end()
        if marker == _END:
            kept.append(b"\xff\xd9")
            break
        if marker in _ALONE:
            continue
        if marker == _START:
            raise damaged("it has two beginnings")
        (length,) = struct.unpack_from(">H", data, place)
        segment = data[place : place + length]
        if length < 2 or len(segment) < length:
            raise damaged("it ends early")
        place += length
        if marker in _OTHER_FRAMES:
            kinds = "arithmetic, lossless or hierarchical"
            raise refused("unsupported_image", f"this kind of JPEG ({kinds}) is not read: save it anew")
        if marker in _FRAMES:
            if frame or length < 8:
                raise damaged("it has two headers" if frame else "its header is too short")
            frame = segment
        elif marker == _SCAN:
            scans += 1
            if not frame or scans > MAX_SCANS:
                raise damaged("it has too many scans" if frame else "its header does not come first")
        elif marker == _APP1:
            if segment[2:].startswith(b"Exif\0\0") and len(exif) < _JUNK:
                exif += segment[8:]
            elif segment[2:].startswith(_XMP):
                xmp = segment[2 + len(_XMP) :]
        # What tells the decoder how colours are coded stays, and of the other applications nothing.
        if _APP0 <= marker <= 0xEF or marker == _COMMENT:
            if (marker, segment[2:6]) not in ((_APP0, b"JFIF"), (_APP14, b"Adob")):
                continue
            segment = segment[:16]
            segment = struct.pack(">H", len(segment)) + segment[2:]
        kept.append(bytes((0xFF, marker)) + segment)
    else:
        raise damaged("it has too many parts")
    if not scans:
        raise damaged("it has no pixels")
    height, width = struct.unpack_from(">HH", frame, 3)
    return Picture("JPEG", width, height, b"".join(kept), orientation(exif, xmp), scans)
