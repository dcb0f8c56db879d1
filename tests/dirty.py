"""Pictures as collections really have them: every kind of dirt, each with what must become of it."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 20


@dataclass(frozen=True)
class Dirt:
    """A file, and the picture (float64 H x W x 3 in 0..255) or the kind and reason of its rejection.

    ``tolerance`` is in levels of 255, for formats that lose something.
    """

    data: bytes
    picture: np.ndarray | None = None
    kind: str = ""
    reason: str = ""
    tolerance: float = 0.0


def noise(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Random 8-bit colours H x W x 3."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture that JPEG keeps within a few levels."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * across, 255 * down, 128 + 60 * across * down], -1).round().astype(np.uint8)


def encoded(picture: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a picture in one of Pillow's formats."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(
    width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"", end: bool = True
) -> bytes:
    """A PNG written by hand, for what Pillow does not write; ``rows`` begin with a filter byte each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + (chunk(b"IEND", b"") if end else b"")


def _text_bomb() -> bytes:
    text = b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return png_of(2, 2, 8, 0, bytes(6), chunk)


def _deep_colour() -> tuple[bytes, np.ndarray]:
    values = np.random.default_rng(5).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(WIDTH, HEIGHT, 16, 2, rows), (values >> 8).astype(np.float64)


def _turned(orientation: int) -> Dirt:
    """A file whose EXIF says how it must be turned, and the picture as it is seen (EXIF 2.32, tag 0x0112)."""
    seen = noise(orientation)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Dirt(encoded(np.ascontiguousarray(stored), "PNG", exif=exif), seen)


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    return colours * share + 255 * (1 - share)


def catalogue() -> dict[str, Dirt]:
    """Every kind of dirt that lies in the bytes of a file, by the name of the file."""
    clean, other = noise(1), noise(2)
    found = {
        "clean.png": Dirt(encoded(clean, "PNG"), clean),
        "suffix/loud.PNG": Dirt(encoded(other, "PNG"), other),
        "suffix/png-called.jpg": Dirt(encoded(clean, "PNG"), clean),
        "suffix/jpeg-called.tiff": Dirt(encoded(smooth(), "JPEG", quality=100, subsampling=0), smooth(), tolerance=3),
        "empty/zero-bytes.png": Dirt(b"", kind="empty", reason="the file is empty"),
        "other/text.png": Dirt(b"a note, no picture\n", kind="not an image", reason="not a JPEG"),
        "other/page.jpg": Dirt(b"<html>404 Not Found</html>", kind="not an image", reason="not a JPEG"),
        "other/zeros.jpg": Dirt(bytes(5000), kind="not an image", reason="not a JPEG"),
        "other/document.png": Dirt(b"%PDF-1.7\n%%EOF\n", kind="not an image", reason="not a JPEG"),
        "other/postscript.png": Dirt(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", kind="not an image", reason="not a JPEG"
        ),
        "other/icon.png": Dirt(encoded(clean, "ICO"), kind="not an image", reason="not a JPEG"),
    }
    for suffix, kind in {
        "jpg": "JPEG",
        "png": "PNG",
        "webp": "WEBP",
        "gif": "GIF",
        "bmp": "BMP",
        "tif": "TIFF",
    }.items():
        whole = encoded(noise(3, 40, 40), kind)
        found[f"truncated/half.{suffix}"] = Dirt(whole[: len(whole) // 2], kind="damaged", reason="cut short")
    whole = encoded(noise(3, 40, 40), "JPEG", progressive=True)
    found["truncated/progressive.jpg"] = Dirt(whole[: len(whole) // 2], kind="damaged", reason="cut short")
    found["truncated/head-alone.png"] = Dirt(encoded(clean, "PNG")[:20], kind="damaged", reason="cut short")
    # All pixels are there; only the mark of the end is not.
    found["truncated/without-end.png"] = Dirt(encoded(clean, "PNG")[:-12], clean)
    found["truncated/with-more.png"] = Dirt(encoded(clean, "PNG") + b"more", clean)

    inks = np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    printed = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    found["colour/cmyk.tif"] = Dirt(encoded(Image.fromarray(inks, "CMYK"), "TIFF"), printed, tolerance=1)
    even = np.full((HEIGHT, WIDTH, 4), (40, 90, 150, 30), dtype=np.uint8)
    printed = (255.0 - even[..., :3]) * (255.0 - even[..., 3:]) / 255
    found["colour/cmyk.jpg"] = Dirt(encoded(Image.fromarray(even, "CMYK"), "JPEG", quality=95), printed, tolerance=4)

    deep = np.random.default_rng(6).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    scaled = np.repeat(deep[..., None] / 257.0, 3, axis=2)
    found["deep/grey16.png"] = Dirt(encoded(Image.fromarray(deep), "PNG"), scaled, tolerance=1e-4)
    found["deep/grey16.tif"] = Dirt(encoded(Image.fromarray(deep), "TIFF"), scaled, tolerance=1e-4)
    data, high = _deep_colour()
    found["deep/colour16.png"] = Dirt(data, high)
    grey = (clean[..., 0] > 127).astype(np.uint8) * 255
    found["deep/one-bit.png"] = Dirt(
        encoded(Image.fromarray(grey).convert("1", dither=Image.Dither.NONE), "PNG"), np.repeat(grey[..., None], 3, 2)
    )
    ratio = np.full((HEIGHT, WIDTH), 3.5, np.float32)
    found["deep/heat.tif"] = Dirt(
        encoded(Image.fromarray(ratio), "TIFF"),
        kind="out of range",
        reason="grey values outside the range of a picture",
    )

    alpha = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    alpha[0] = 0
    see_through = Image.fromarray(np.dstack([clean, alpha]), "RGBA")
    found["alpha/colour.png"] = Dirt(encoded(see_through, "PNG"), _on_white(clean, alpha), tolerance=1)
    veiled = Image.merge("LA", [Image.fromarray(clean[..., 0]), Image.fromarray(alpha)])
    found["alpha/grey.png"] = Dirt(
        encoded(veiled, "PNG"), _on_white(np.repeat(clean[..., :1], 3, 2), alpha), tolerance=1
    )
    few = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 4, "P")
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9]], np.uint8)
    few.putpalette(colours.tobytes())
    shown = colours[np.asarray(few)].astype(np.float64)
    found["alpha/palette-opaque.png"] = Dirt(encoded(few, "PNG"), shown)
    clear = shown.copy()
    clear[np.asarray(few) == 2] = 255
    found["alpha/palette.png"] = Dirt(encoded(few, "PNG", transparency=2), clear)
    found["alpha/palette.gif"] = Dirt(encoded(few, "GIF", transparency=2), clear)

    frames = [Image.fromarray(noise(seed)) for seed in (10, 11, 12)]
    moving: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    found["moving/pages.tif"] = Dirt(encoded(frames[0], "TIFF", **moving), noise(10))
    found["moving/animated.png"] = Dirt(encoded(frames[0], "PNG", **moving), noise(10))
    found["moving/animated.webp"] = Dirt(encoded(frames[0], "WEBP", lossless=True, **moving), noise(10))
    second = few.point(lambda level: 3 - level)
    found["moving/animated.gif"] = Dirt(encoded(few, "GIF", save_all=True, append_images=[second]), shown)

    found |= {f"turned/exif-{number}.png": _turned(number) for number in range(1, 9)}
    found["turned/exif-nonsense.jpg"] = Dirt(
        encoded(smooth(), "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0nonsense"), smooth(), tolerance=3
    )

    # 900 million pixels that are not there, 100 million that are (in 12 kB), and a comment of 80 MiB in as little.
    found["bomb/claimed.png"] = Dirt(
        png_of(30000, 30000, 8, 2, bytes(100)), kind="too large", reason="far more pixels than the 89,478,485 allowed"
    )
    found["bomb/real.png"] = Dirt(
        png_of(10000, 10000, 1, 0, bytes(10000 * 1251)), kind="too large", reason="10000 x 10000 pixels, more than the"
    )
    found["bomb/comment.png"] = Dirt(_text_bomb(), kind="damaged", reason="Decompressed data too large")
    return found
