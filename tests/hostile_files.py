"""Image files that no honest program writes, made byte by byte, and honest ones to hold them against."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

SIDE = 8


def grey() -> np.ndarray:
    """An 8 x 8 grey picture that looks different from every side: uint8."""
    picture = np.zeros((SIDE, SIDE), np.uint8)
    picture[1:7, 2] = 255
    picture[1, 2:6] = 170
    picture[4, 2:5] = 119
    picture[6, 6] = 85
    return picture


def save(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """The picture as a file of a kind."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(pixels: np.ndarray | None = None) -> bytes:
    """An honest PNG."""
    return save(grey() if pixels is None else pixels, "PNG")


def colour() -> Image.Image:
    """The picture in colours, RGB."""
    return Image.fromarray(np.stack([grey(), grey().T, 255 - grey()], axis=2))


# PNG


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


def header(width: int, height: int, depth: int = 8, kind: int = 0, interlace: int = 0) -> bytes:
    """A PNG's header chunk."""
    return chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, depth, kind, 0, 0, interlace))


def png(*chunks: bytes) -> bytes:
    """A PNG of chunks, its end added."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def rows(pixels: np.ndarray) -> bytes:
    """Compressed rows without a filter."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


def png_with(*extra: bytes, after: Iterable[bytes] = ()) -> bytes:
    """The grey picture with further chunks before and after its pixels."""
    return png(header(SIDE, SIDE), *extra, chunk(b"IDAT", rows(grey())), *after)


def png_interlaced() -> bytes:
    """The grey picture in the seven passes of Adam7."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b"".join(
        b"\0" + row.tobytes() for x, y, across, down in passes for row in grey()[y::down, x::across] if row.size
    )
    return png(header(SIDE, SIDE, interlace=1), chunk(b"IDAT", zlib.compress(data)))


def png_sixteen() -> bytes:
    """The grey picture with 16 bits: every value times 257, which is the same shade."""
    pixels = (grey().astype(np.uint16) * 257).astype(">u2")
    return png(header(SIDE, SIDE, depth=16), chunk(b"IDAT", rows(pixels)))


def png_sixteen_colours() -> bytes:
    """The grey picture as RGBA of 16 bits."""
    pixels = np.repeat((grey().astype(np.uint16) * 257)[..., None], 4, axis=2)
    pixels[..., 3] = 65535
    return png(header(SIDE, SIDE, depth=16, kind=6), chunk(b"IDAT", rows(pixels.astype(">u2"))))


def text_bomb(keyword: bytes = b"Comment", size: int = 2**26) -> bytes:
    """A compressed text of 64 MiB in 64 KiB."""
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(bytes(size), 9))


def exif_bomb(tags: int = 65_535, size: int = 2**20) -> bytes:
    """An EXIF block whose every tag points to the same megabyte: 64 GiB for a reader that copies."""
    directory = b"".join(struct.pack("<HHLL", tag, 7, size, 8) for tag in range(tags))
    return b"II*\0" + struct.pack("<L", 8) + struct.pack("<H", tags) + directory + bytes(size)


def exif_of(orientation: int) -> Image.Exif:
    """An honest EXIF block that says how to turn the picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def apng() -> bytes:
    """An animation of two frames; the first is the grey picture."""
    return save(grey(), "PNG", save_all=True, append_images=[Image.fromarray(255 - grey())], duration=100)


# JPEG


def segment(marker: int, content: bytes) -> bytes:
    """A JPEG segment."""
    return bytes((255, marker)) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(*segments: bytes, pixels: Image.Image | np.ndarray | None = None, **options: Any) -> bytes:
    """A JPEG with further segments after its start."""
    data = save(grey() if pixels is None else pixels, "JPEG", quality=95, **options)
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_frame(marker: int = 0xC0, width: int = SIDE, height: int = SIDE, components: int = 1) -> bytes:
    """The segment that says how large a JPEG is."""
    parts = b"".join(bytes((i + 1, 0x11, 0)) for i in range(components))
    return segment(marker, struct.pack(">BHHB", 8, height, width, components) + parts)


def jpeg_headed(frame: bytes) -> bytes:
    """A JPEG whose header is replaced."""
    data = save(grey(), "JPEG")
    place = data.index(b"\xff\xc0")
    (length,) = struct.unpack_from(">H", data, place + 2)
    return data[:place] + frame + data[place + 2 + length :]


def jpeg_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG with many scans, each a handful of bytes that skip all blocks: seconds of work in 90 kB."""
    tables = segment(0xDB, b"\0" + b"\1" * 64)
    one_code = bytes([1] + [0] * 15)
    tables += segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    blocks = ((side + 7) // 8) ** 2
    data = segment(0xDA, bytes((1, 1, 0, 0, 0, 0))) + bytes((blocks + 7) // 8)
    # Each code is the longest run of empty blocks: 2^14 and 14 bits more.
    bits = ("0" + "1" * 13 + "0") * (blocks // (2**15 - 2) + 1)
    bits += "1" * (-len(bits) % 8)
    run = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    for number in range(scans):
        data += segment(0xDA, bytes((1, 1, 0, 1, 63, 0x10 if number else 1))) + run
    return b"\xff\xd8" + tables + jpeg_frame(0xC2, side, side) + data + b"\xff\xd9"


# GIF


def gif_with(extensions: bytes = b"", screen: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """The grey picture as a GIF with extensions before it, on a screen of any size."""
    data = save(grey(), "GIF")
    place = 13 + (3 << (data[10] & 7) + 1)  # behind the palette
    return data[:6] + struct.pack("<HH", *screen) + data[10:place] + extensions + data[place:]


def gif_animated(frames: int) -> bytes:
    """The grey picture and further frames."""
    rest = [Image.fromarray(np.roll(grey(), i, axis=1)) for i in range(1, frames)]
    return save(grey(), "GIF", save_all=True, append_images=rest)


# WebP


def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    """A WebP file of chunks; its size may be a lie."""
    body = b"WEBP" + b"".join(
        name + struct.pack("<L", len(content)) + content + bytes(len(content) & 1) for name, content in chunks
    )
    return b"RIFF" + struct.pack("<L", len(body) if size is None else size) + body


def webp_pixels() -> bytes:
    """The lossless pixels of the grey picture: the content of a VP8L chunk."""
    data = save(Image.fromarray(grey()).convert("RGB"), "WEBP", lossless=True)
    (size,) = struct.unpack_from("<L", data, 16)
    return data[20 : 20 + size]


def webp_canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    """The chunk that says how large the canvas is."""
    return b"VP8X", struct.pack("<L", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def webp_huge() -> bytes:
    """16,383 x 16,383 pixels of one colour in a few bytes, honestly written (a gigabyte when decoded)."""
    small = webp_pixels()
    size = 16_382 | 16_382 << 14
    (bits,) = struct.unpack_from("<L", small, 1)
    return riff((b"VP8L", small[:1] + struct.pack("<L", (bits & 0xF0000000) | size) + small[5:]))


# others


def tiff(width: int, height: int) -> bytes:
    """A TIFF that says it is large and has next to nothing in it."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (278, 4, height)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", t, k, 1, v) for t, k, v in tags)
    return b"II*\0" + struct.pack("<L", 8) + directory + struct.pack("<L", 0)


def isobmff(brand: bytes) -> bytes:
    """The beginning of a HEIC or AVIF file."""
    box = b"ftyp" + brand + bytes(4) + b"mif1" + brand
    return struct.pack(">L", len(box) + 4) + box + struct.pack(">L", 8) + b"mdat"
