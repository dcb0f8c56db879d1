"""What of an image file makes its pixels: the file is walked through, checked, and all else is left out.

A decoder that is handed a whole file reads more than the picture: texts, profiles, thumbnails, EXIF directories,
further frames. Each of them is a way to make a small file cost much time or memory. So the containers are walked here,
with a bound on the number of steps, and only the parts of the first picture are put together again for the decoder.
The pixels are the same, which ``tests/test_decode.py`` holds against the loading of data sets.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from nndefense.serving.pictures.limits import refused
from nndefense.serving.pictures.picture import MAX_STEPS, Picture, damaged, orientation

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_XMP_BYTES = 2**18


def read_container(data: bytes) -> Picture:
    """Walk through an image file and return its first picture, not decoded.

    Args:
        data: the file. The first bytes alone decide what format it has.

    Raises:
        Refused: ``empty_image``; ``unsupported_image`` for another format than PNG, JPEG, WebP and GIF, or a rare
            kind of JPEG; ``damaged_image`` for a file that ends early or contradicts its format.
    """
    if not data:
        raise refused("empty_image", "the image file is empty: send one that holds a picture")
    reader = next((read for begins, read in _READERS if begins.match(data)), None)
    if reader is None:
        raise refused("unsupported_image", "this is no PNG, JPEG, WebP or GIF image: save it as one of these")
    try:
        picture = reader(data)
    except (struct.error, IndexError) as error:
        raise damaged("it ends early") from error
    if picture.width < 1 or picture.height < 1:
        raise damaged("it has no pixels")
    return picture


# JPEG: ITU-T T.81

# The most scans of one picture; the usual progressive files have 10, and none needs more than a few dozen.
_MAX_SCANS = 64
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


def _read_jpeg(data: bytes) -> Picture:
    """Segments that make no pixels (EXIF, profiles, comments) are left out, and so is whatever follows the end."""
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
            if not frame or scans > _MAX_SCANS:
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


# PNG: https://www.w3.org/TR/png-3/#5DataRep


def _png_checksum(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L", zlib.crc32(content, zlib.crc32(name)))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG)
    for _ in range(MAX_STEPS):
        length, name = struct.unpack_from(">L4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise damaged("it ends early")
        content = data[place + 8 : end - 4]
        if name in _PNG_KEPT and data[end - 4 : end] != _png_checksum(name, content):
            raise damaged("a checksum in it is wrong")
        yield name, content
        if name == b"IEND":
            return
        place = end
    raise damaged("it has too many parts")


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L4s", len(content), name) + content + _png_checksum(name, content)


def _read_png(data: bytes) -> Picture:
    header, pixels = b"", []
    kept: list[tuple[bytes, bytes]] = []
    exif = legacy = xmp = b""
    finished = False
    for name, content in _png_chunks(data):
        if not header:
            if name != b"IHDR" or len(content) != 13:
                raise damaged("its header is not at the beginning")
            header = content
        elif name == b"IHDR":
            raise damaged("it has two headers")
        elif name == b"IDAT" and not finished:
            pixels.append(content)
            continue
        elif name in (b"PLTE", b"tRNS") and not pixels:
            if any(known == name for known, _ in kept):
                raise damaged("it has two palettes")
            kept.append((name, content))
        elif name == b"eXIf":
            exif = content
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, text = content.partition(b"\0")
            if keyword == b"XML:com.adobe.xmp" and name == b"iTXt":
                xmp = _international_text(text)
            elif keyword == b"Raw profile type exif" and name != b"iTXt":
                legacy = text if name == b"tEXt" else _inflated(text[1:])
        finished = bool(pixels)
    if not pixels:
        raise damaged("it has no pixels")
    width, height = struct.unpack_from(">LL", header)
    parts = [(b"IHDR", header), *kept, (b"IDAT", b"".join(pixels)), (b"IEND", b"")]
    return Picture(
        "PNG",
        width,
        height,
        _PNG + b"".join(_png_chunk(name, content) for name, content in parts),
        orientation(exif or _hexadecimal(legacy), xmp),
    )


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _XMP_BYTES)
    except zlib.error:
        return b""


def _international_text(content: bytes) -> bytes:
    compressed = content[:1] == b"\1"
    text = content[2:].split(b"\0", 2)[-1]
    return _inflated(text) if compressed else text[:_XMP_BYTES]


def _hexadecimal(profile: bytes) -> bytes:
    # The old way of ImageMagick: an empty line, the name, the length, then lines of hexadecimal digits.
    try:
        return bytes.fromhex(b"".join(profile[: 2 * _XMP_BYTES].split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


# GIF: https://www.w3.org/Graphics/GIF/spec-gif89a.txt


def _after_blocks(data: bytes, place: int) -> int:
    """Where the sub-blocks that begin at ``place`` are over."""
    for _ in range(MAX_STEPS):
        size = data[place]
        place += 1 + size
        if not size:
            return place
    raise damaged("it has too many parts")


def _palette(data: bytes, place: int, flags: int) -> bytes:
    return data[place : place + (3 << ((flags & 7) + 1))] if flags & 128 else b""


def _read_gif(data: bytes) -> Picture:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + len(_palette(data, 13, flags))
    screen, control = data[:place], b""
    for _ in range(MAX_STEPS):
        introducer = data[place]
        if introducer == 0x21:
            end = _after_blocks(data, place + 2)
            if data[place + 1] == 0xF9:
                if end - place != 8:
                    raise damaged("its control block has another length than 4")
                control = data[place:end]
            place = end
        elif introducer == 0x2C:
            left, top, across, down, flags = struct.unpack_from("<HHHHB", data, place + 1)
            begin = place + 10 + len(_palette(data, place + 10, flags))
            end = _after_blocks(data, begin + 1)
            if end > len(data) or not (across and down):
                raise damaged("it ends early" if end > len(data) else "it has no pixels")
            # A picture may reach beyond the screen, and Pillow then makes the screen larger.
            return Picture(
                "GIF", max(width, left + across), max(height, top + down), screen + control + data[place:end] + b";", 1
            )
        elif introducer == 0x3B:
            raise damaged("it has no picture")
        else:
            raise damaged("a part of it is of no known kind")
    raise damaged("it has too many parts")


# WebP: RFC 9649


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    for _ in range(MAX_STEPS):
        if place >= len(data):
            return
        name, size = struct.unpack_from("<4sL", data, place)
        end = place + 8 + size
        if end > len(data):
            raise damaged("it ends early")
        yield name, data[place + 8 : end]
        place = end + (size & 1)
    raise damaged("it has too many parts")


def _riff_chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<L", len(content)) + content + b"\0" * (len(content) & 1)


def _lossy_size(content: bytes) -> tuple[int, int]:
    if content[3:6] != b"\x9d\x01\x2a":
        raise damaged("its picture has no header")
    width, height = struct.unpack_from("<HH", content, 6)
    return width & 0x3FFF, height & 0x3FFF


def _lossless_size(content: bytes) -> tuple[int, int]:
    if content[:1] != b"\x2f":
        raise damaged("its picture has no header")
    (bits,) = struct.unpack_from("<L", content, 1)
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _read_webp(data: bytes) -> Picture:
    (size,) = struct.unpack_from("<L", data, 4)
    if 8 + size > len(data):
        raise damaged("it ends early")
    kept: list[tuple[bytes, bytes]] = []
    extended = exif = xmp = b""
    pictures = 0
    for name, content in _riff_chunks(data[12 : 8 + size]):
        if name == b"VP8X" and not kept and not extended:
            extended = content
        elif name in (b"VP8 ", b"VP8L", b"ANMF"):
            pictures += 1
            if pictures == 1:
                kept.append((name, content))
        elif name in (b"ALPH", b"ANIM") and not pictures:
            kept.append((name, content))
        elif name == b"EXIF":
            exif = exif or content
        elif name == b"XMP ":
            xmp = xmp or content
    if not pictures:
        raise damaged("it has no picture")
    name, content = kept[-1]
    if extended:
        # The flags for a profile, EXIF and XMP are taken back, as these are left out.
        (flags,) = struct.unpack_from("<L", extended)
        width, height = (int.from_bytes(extended[i : i + 3], "little") + 1 for i in (4, 7))
        if len(extended) != 10:
            raise damaged("its header has another length than 10")
        kept.insert(0, (b"VP8X", struct.pack("<L", flags & ~0x2C) + extended[4:]))
    elif name == b"ANMF":
        raise damaged("it is animated without saying so")
    else:
        width, height = _lossy_size(content) if name == b"VP8 " else _lossless_size(content)
        kept = [(name, content)]
    body = b"WEBP" + b"".join(_riff_chunk(name, content) for name, content in kept)
    return Picture("WEBP", width, height, b"RIFF" + struct.pack("<L", len(body)) + body, orientation(exif, xmp))


_READERS = (
    (re.compile(_PNG), _read_png),
    (re.compile(rb"\xff\xd8\xff"), _read_jpeg),
    (re.compile(rb"RIFF[\0-\xff]{4}WEBP"), _read_webp),
    (re.compile(rb"GIF8[79]a"), _read_gif),
)
