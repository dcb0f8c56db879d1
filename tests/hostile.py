# ruff: noqa: E501 (a case is a line)
"""The catalogue of hostile input: images, bodies, requests and connections, each with the answer that is right for it.

Nothing is stored: every case is made in memory when it is asked for. ``tests/test_decode.py`` gives the images to the
decoder, ``tests/test_serving_hostile.py`` gives everything to a running server.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import hostile_files as make
import numpy as np
from PIL import Image

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Picture:
    """A hostile image file.

    ``twin`` is an honest file that must get the same prediction (by default the picture as data sets load it).
    ``large``: decoding it takes the time and memory that its many pixels need.
    """

    name: str
    build: Callable[[], bytes]
    status: int
    code: str = ""
    media_type: str = "application/octet-stream"
    twin: Callable[[], bytes] | None = None
    large: bool = False

    @property
    def data(self) -> bytes:
        """The file, made once."""
        return _built(self.build)


@dataclass(frozen=True)
class Request:
    """A hostile request that an ordinary HTTP client can send; the status must be one of ``allowed``."""

    name: str
    build: Callable[[], bytes]
    allowed: tuple[int, ...]
    code: str = ""
    content_type: str = "application/json"
    method: str = "POST"
    path: str = "/v1/classify"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        """The body, made once."""
        return _built(self.build)

    @property
    def for_parser(self) -> bool:
        """Whether all that is wrong is in the body and its type."""
        return (self.method, self.path) == ("POST", "/v1/classify") and not self.headers


@functools.cache
def _built(build: Callable[[], bytes]) -> bytes:
    return build()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("evil.sh", "rm -rf /")
    return out.getvalue()


def _xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def _turned() -> bytes:
    return make.plain(np.rot90(make.grey(), -1).copy())


def _palette() -> Image.Image:
    return make.colour().quantize(16)


def _cmyk() -> bytes:
    return make.save(make.colour().convert("CMYK"), "JPEG", quality=95)


def _see_through() -> Image.Image:
    image = make.colour().convert("RGBA")
    image.putalpha(Image.fromarray(make.grey()))
    return image


_SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg"><text>&x;</text></svg>'
_LOL = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><svg><text>&b;</text></svg>'
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file\n%%EOF\n"
_PDF = b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n%%EOF\n"

PICTURES: tuple[Picture, ...] = (
    # honest, but rare: these must be classified, and rightly
    Picture("png plain", make.plain, 200, twin=make.plain),
    Picture("png one bit", lambda: make.save(Image.fromarray(make.grey()).convert("1"), "PNG"), 200),
    Picture("png palette", lambda: make.save(_palette(), "PNG"), 200),
    Picture("png palette and transparency", lambda: make.save(_palette(), "PNG", transparency=bytes(range(16))), 200),
    Picture("png transparent colour", lambda: make.save(make.colour(), "PNG", transparency=(0, 0, 255)), 200),
    Picture("png grey and alpha", lambda: make.save(_see_through().convert("LA"), "PNG"), 200),
    Picture("png alpha", lambda: make.save(_see_through(), "PNG"), 200),
    Picture("png 16 bits", make.png_sixteen, 200, twin=make.plain),
    Picture("png 16 bits of colour and alpha", make.png_sixteen_colours, 200, twin=make.plain),
    Picture("png interlaced", make.png_interlaced, 200, twin=make.plain),
    Picture("png animated", make.apng, 200, twin=make.plain),
    Picture("png turned by exif", lambda: make.save(make.grey(), "PNG", exif=make.exif_of(6)), 200, twin=_turned),
    Picture(
        "png turned by xmp",
        lambda: make.png_with(make.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _xmp(6))),
        200,
        twin=_turned,
    ),
    Picture("jpeg grey", lambda: make.jpeg_with(), 200),
    Picture("jpeg colour", lambda: make.jpeg_with(pixels=make.colour()), 200),
    Picture("jpeg cmyk", _cmyk, 200),
    Picture("jpeg progressive", lambda: make.jpeg_with(pixels=make.colour(), progressive=True), 200),
    Picture("jpeg declared as jpg", lambda: make.jpeg_with(), 200, media_type="image/jpg"),
    Picture("jpeg turned by exif", lambda: make.jpeg_with(exif=make.exif_of(8)), 200),
    Picture("jpeg with another after it", lambda: make.jpeg_with() + make.jpeg_with(pixels=255 - make.grey()), 200, twin=make.jpeg_with),
    Picture("webp lossy", lambda: make.save(make.colour(), "WEBP"), 200),
    Picture("webp lossless", lambda: make.riff((b"VP8L", make.webp_pixels())), 200, twin=make.plain),
    Picture("webp alpha", lambda: make.save(_see_through(), "WEBP"), 200),
    Picture(
        "webp animated",
        lambda: make.save(make.colour(), "WEBP", save_all=True, append_images=[make.colour().rotate(90)]),
        200,
    ),
    Picture("webp turned by exif", lambda: make.save(make.colour(), "WEBP", exif=make.exif_of(5)), 200),
    Picture("gif plain", lambda: make.gif_with(), 200, twin=make.plain),
    Picture("gif transparent", lambda: make.save(_palette(), "GIF", transparency=3), 200),
    Picture("gif of 500 frames", lambda: make.gif_animated(500), 200, twin=make.plain),
    Picture("one pixel", lambda: make.plain(np.full((1, 1), 77, np.uint8)), 200),
    Picture("1 x 10,000", lambda: make.plain(np.zeros((1, 10_000), np.uint8)), 200),
    Picture("24 million pixels", lambda: make.save(np.kron(make.grey(), np.ones((612, 612), np.uint8)), "JPEG"), 200, large=True),
    Picture("10,000 x 1", lambda: make.plain(np.zeros((10_000, 1), np.uint8)), 200),
    # metadata made to hurt, which must not even slow the picture down
    Picture("png text bomb", lambda: make.png_with(make.text_bomb()), 200, twin=make.plain),
    Picture(
        "png 80 text bombs after the pixels",
        lambda: make.png_with(after=[make.text_bomb(size=MEBIBYTE)] * 80),
        200,
        twin=make.plain,
    ),
    Picture("png xmp bomb", lambda: make.png_with(make.text_bomb(b"Raw profile type exif")), 200, twin=make.plain),
    Picture("png exif bomb", lambda: make.png_with(make.chunk(b"eXIf", make.exif_bomb())), 200, twin=make.plain),
    Picture(
        "png profile bomb",
        lambda: make.png_with(make.chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**26)))),
        200,
        twin=make.plain,
    ),
    Picture(
        "png text that overwrites Pillow's own notes",
        lambda: make.png_with(make.chunk(b"tEXt", b"interlace\0x"), make.chunk(b"tEXt", b"transparency\0x")),
        200,
        twin=make.plain,
    ),
    Picture(
        "png with 20,000 empty chunks of pixels",
        lambda: make.png_with(*[make.chunk(b"IDAT", b"")] * 20_000),
        200,
        twin=make.plain,
    ),
    Picture("png with a profile of 4 MiB", lambda: make.png_with(make.chunk(b"iCCP", bytes(2**22))), 200, twin=make.plain),
    Picture("png of 5,000 frames that are not there", lambda: make.png_with(make.chunk(b"acTL", b"\0\0\x13\x88" + bytes(4))), 200, twin=make.plain),
    Picture(
        "jpeg exif bomb", lambda: make.jpeg_with(make.segment(0xE1, b"Exif\0\0" + make.exif_bomb(4000, 15_000))), 200, twin=make.jpeg_with),
    Picture("jpeg exif of 40 segments", lambda: make.jpeg_with(*[make.segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 40), 200, twin=make.jpeg_with),
    Picture("jpeg profile of 100 segments", lambda: make.jpeg_with(*[make.segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000))] * 100), 200, twin=make.jpeg_with),
    Picture("jpeg with 20,000 comments", lambda: make.jpeg_with(*[make.segment(0xFE, b"x" * 100)] * 20_000), 200, twin=make.jpeg_with),
    Picture("jpeg damaged exif", lambda: make.jpeg_with(make.segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")), 200, twin=make.jpeg_with),
    Picture("jpeg with photoshop's blocks", lambda: make.jpeg_with(make.segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\xff\xff\xff\xff" * 999)), 200, twin=make.jpeg_with),
    Picture("gif with 40,000 blocks of comment", lambda: make.gif_with(b"!\xfe" + b"\x02hi" * 40_000 + b"\0"), 200, twin=make.plain),
    Picture("gif with 10,000 comments", lambda: make.gif_with(b"!\xfe\x02hi\0" * 10_000), 200, twin=make.plain),
    # polyglots: the picture counts, the rest is not looked at
    Picture("png and zip", lambda: make.plain() + _zip(), 200, twin=make.plain),
    Picture("png and web page", lambda: make.png_with(make.chunk(b"tEXt", b"x\0<script>alert(1)</script>")), 200, twin=make.plain),
    Picture("jpeg and javascript", lambda: make.jpeg_with(make.segment(0xFE, b"*/=alert(1)/*")), 200, twin=make.jpeg_with),
    Picture("jpeg and php", lambda: make.jpeg_with(make.segment(0xFE, b"<?php system($_GET[0]); ?>")), 200, twin=make.jpeg_with),
    Picture("gif and zip", lambda: make.gif_with() + _zip(), 200, twin=make.plain),
    Picture("webp and pdf", lambda: make.riff((b"VP8L", make.webp_pixels()), (b"EXIF", _PDF)) + _PDF, 200, twin=make.plain),
    # bombs
    Picture("png bomb", lambda: make.png(make.header(50_000, 50_000), make.chunk(b"IDAT", zlib.compress(bytes(10**7)))), 413, "too_many_pixels"),
    Picture("png of 2^31 - 1", lambda: make.png(make.header(2**31 - 1, 2**31 - 1), make.chunk(b"IDAT", b"")), 413, "too_many_pixels"),
    Picture("png 1 x 60,000", lambda: make.plain(np.zeros((60_000, 1), np.uint8)), 413, "too_many_pixels"),
    Picture("png 60,000 x 1", lambda: make.plain(np.zeros((1, 60_000), np.uint8)), 413, "too_many_pixels"),
    Picture("png that unpacks to 64 MiB behind its last row", lambda: make.png(make.header(8, 8), make.chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r.tobytes() for r in make.grey()) + bytes(2**26)))), 200, twin=make.plain),
    Picture("gif bomb", lambda: make.gif_with(screen=(65_535, 65_535)), 413, "too_many_pixels"),
    Picture("gif picture beyond its screen", lambda: make.gif_with().replace(b"\x2c\0\0\0\0\x08\0\x08\0", b"\x2c\xff\xff\xff\xff\x08\0\x08\0"), 413, "too_many_pixels"),
    Picture("webp bomb", make.webp_huge, 413, "too_many_pixels"),
    Picture("webp canvas bomb", lambda: make.riff(make.webp_canvas(2**24, 2**24), (b"VP8L", make.webp_pixels())), 413, "too_many_pixels"),
    Picture("jpeg bomb", lambda: make.jpeg_headed(make.jpeg_frame(0xC0, 65_500, 65_500)), 413, "too_many_pixels"),
    Picture("jpeg of 60 scans of 24 million pixels", lambda: make.jpeg_scans(4_900, 60), 413, "too_many_pixels"),
    Picture("jpeg of 5,000 scans", lambda: make.jpeg_scans(64, 5_000), 422, "damaged_image"),
    Picture("tiff bomb", lambda: make.tiff(100_000, 100_000), 415, "unsupported_image"),
    Picture("file of more bytes than allowed", lambda: make.png_with(make.chunk(b"teSt", bytes(8 * MEBIBYTE))), 413, "image_too_large"),
    # damaged
    Picture("empty", lambda: b"", 422, "empty_image"),
    Picture("one byte", lambda: b"\x89", 415, "unsupported_image"),
    Picture("zeros", lambda: bytes(1000), 415, "unsupported_image"),
    Picture("noise", lambda: random.Random(0).randbytes(10_000), 415, "unsupported_image"),
    Picture("png that is only its name", lambda: b"\x89PNG\r\n\x1a\n", 422, "damaged_image"),
    Picture("jpeg that is only its name", lambda: b"\xff\xd8\xff", 422, "damaged_image"),
    Picture("gif that is only its name", lambda: b"GIF89a", 422, "damaged_image"),
    Picture("webp that is only its name", lambda: b"RIFF\0\0\0\0WEBP", 422, "damaged_image"),
    Picture("png cut in half", lambda: make.plain()[:-30], 422, "damaged_image"),
    Picture("jpeg cut in half", lambda: make.save(np.tile(make.grey(), (20, 20)), "JPEG")[:-2000], 422, "damaged_image"),
    Picture("gif cut in half", lambda: make.gif_with()[:-20], 422, "damaged_image"),
    Picture("webp cut in half", lambda: make.riff((b"VP8L", make.webp_pixels()))[:-20], 422, "damaged_image"),
    Picture("png with noise for pixels", lambda: make.png(make.header(8, 8), make.chunk(b"IDAT", random.Random(0).randbytes(500))), 422, "damaged_image"),
    Picture("png with fewer rows than it says", lambda: make.png(make.header(8, 800), make.chunk(b"IDAT", make.rows(make.grey()))), 200),
    Picture("png with a wrong checksum", lambda: make.plain()[:29] + b"\0\0\0\0" + make.plain()[33:], 422, "damaged_image"),
    Picture("png of no pixels", lambda: make.png(make.header(0, 8), make.chunk(b"IDAT", make.rows(make.grey()))), 422, "damaged_image"),
    Picture("png without a palette", lambda: make.png(make.header(8, 8, kind=3), make.chunk(b"IDAT", make.rows(make.grey()))), 422, "damaged_image"),
    Picture("png of 3 bits", lambda: make.png(make.header(8, 8, depth=3), make.chunk(b"IDAT", make.rows(make.grey()))), 422, "damaged_image"),
    Picture("png with two headers", lambda: make.png_with(make.header(9, 9)), 422, "damaged_image"),
    Picture("png whose header comes late", lambda: make.png(make.chunk(b"tEXt", b"a\0b"), make.header(8, 8)), 422, "damaged_image"),
    Picture("png with a chunk longer than the file", lambda: make.plain()[:33] + b"\xff\xff\xff\xffIDAT", 422, "damaged_image"),
    Picture("png with 60,000 chunks", lambda: make.png_with(*[make.chunk(b"teSt", b"")] * 60_000), 422, "damaged_image"),
    Picture("png with a filter that there is not", lambda: make.png(make.header(8, 8), make.chunk(b"IDAT", zlib.compress((b"\x09" + bytes(8)) * 8))), 422, "damaged_image"),
    Picture("jpeg of no height", lambda: make.jpeg_headed(make.jpeg_frame(0xC0, 8, 0)), 422, "damaged_image"),
    Picture("jpeg of five colours", lambda: make.jpeg_headed(make.jpeg_frame(0xC0, 8, 8, 5)), 422, "damaged_image"),
    Picture("jpeg with two headers", lambda: make.jpeg_headed(make.jpeg_frame() + make.jpeg_frame(0xC0, 9, 9)), 422, "damaged_image"),
    Picture("jpeg without a header", lambda: make.jpeg_headed(b""), 422, "damaged_image"),
    Picture("jpeg of 255s", lambda: b"\xff\xd8" + b"\xff" * MEBIBYTE + b"\0", 422, "damaged_image"),
    Picture("jpeg with 300,000 segments", lambda: make.jpeg_with(b"\xff\xfe\0\2" * 300_000), 422, "damaged_image"),
    Picture("jpeg with a megabyte of junk before its header", lambda: make.jpeg_with(make.segment(0xFE, b"x"), bytes(MEBIBYTE)), 422, "damaged_image"),
    Picture("jpeg lossless", lambda: make.jpeg_headed(make.jpeg_frame(0xC3)), 415, "unsupported_image"),
    Picture("jpeg arithmetic", lambda: make.jpeg_headed(make.jpeg_frame(0xC9)), 415, "unsupported_image"),
    Picture("gif without a picture", lambda: make.gif_with(b";"), 422, "damaged_image"),
    Picture("gif with a part of no known kind", lambda: make.gif_with(b"\x99"), 422, "damaged_image"),
    Picture("gif with 200,000 blocks", lambda: make.gif_with(b"!\xfe" + b"\1x" * 200_000 + b"\0"), 422, "damaged_image"),
    Picture("webp longer than its file", lambda: make.riff((b"VP8L", make.webp_pixels()), size=2**31), 422, "damaged_image"),
    Picture("webp with a chunk longer than the file", lambda: make.riff((b"VP8L", make.webp_pixels()))[:16] + b"\xff\xff\xff\x7f" + make.webp_pixels(), 422, "damaged_image"),
    Picture("webp whose canvas is not its picture's", lambda: make.riff(make.webp_canvas(9, 9), (b"VP8L", make.webp_pixels())), 422, "damaged_image"),
    Picture("webp with a frame and no animation", lambda: make.riff((b"ANMF", bytes(16) + make.webp_pixels())), 422, "damaged_image"),
    # others in disguise
    Picture("png declared as jpeg", make.plain, 415, "type_mismatch", "image/jpeg"),
    Picture("jpeg declared as png", lambda: make.jpeg_with(), 415, "type_mismatch", "image/png"),
    Picture("gif declared as webp", lambda: make.gif_with(), 415, "type_mismatch", "image/webp"),
    Picture("web page declared as png", lambda: b"<html><script>alert(1)</script></html>", 415, "unsupported_image", "image/png"),
    Picture("svg", lambda: _SVG, 415, "unsupported_media_type", "image/svg+xml"),
    Picture("svg declared as png", lambda: _SVG, 415, "unsupported_image", "image/png"),
    Picture("svg of nested entities", lambda: _LOL, 415, "unsupported_image"),
    Picture("pdf declared as jpeg", lambda: _PDF, 415, "unsupported_image", "image/jpeg"),
    Picture("eps declared as png", lambda: _EPS, 415, "unsupported_image", "image/png"),
    Picture("psd", lambda: b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x08\0\0\0\x08\0\x08\0\3" + bytes(100), 415, "unsupported_image"),
    Picture("ico", lambda: make.save(make.grey(), "ICO", sizes=[(8, 8)]), 415, "unsupported_image", "image/png"),
    Picture("bmp", lambda: make.save(make.grey(), "BMP"), 415, "unsupported_image"),
    Picture("tiff", lambda: make.save(make.grey(), "TIFF"), 415, "unsupported_media_type", "image/tiff"),
    Picture("tiff declared as png", lambda: make.save(make.grey(), "TIFF"), 415, "unsupported_image", "image/png"),
    Picture("heic", lambda: make.isobmff(b"heic"), 415, "unsupported_image"),
    Picture("avif", lambda: make.isobmff(b"avif"), 415, "unsupported_image"),
    Picture("ppm", lambda: b"P5 8 8 255\n" + bytes(64), 415, "unsupported_image"),
    Picture("zip", _zip, 415, "unsupported_image"),
    Picture("pickle", lambda: b"cos\nsystem\n(S'true'\ntR.", 415, "unsupported_image"),
    Picture("gzip bomb", lambda: gzip.compress(bytes(2**26)), 415, "unsupported_image"),
    Picture("wave in a riff", lambda: b"RIFF" + struct.pack("<L", 36) + b"WAVEfmt " + bytes(28), 415, "unsupported_image"),
)  # fmt: skip


def _json(**values: object) -> bytes:
    return json.dumps(values).encode()


def _text(data: bytes | None = None) -> str:
    return base64.b64encode(make.plain() if data is None else data).decode()


def _raw(text: str) -> Callable[[], bytes]:
    """A JSON body in which IMAGE stands for a good image."""
    return lambda: text.replace("IMAGE", f'"{_text()}"').encode("utf-8", "surrogatepass")


BOUNDARY = "x-x-x"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def part(content: bytes, disposition: str = 'form-data; name="files"; filename="a.png"', *headers: str) -> bytes:
    """A part of a form."""
    lines = [f"--{BOUNDARY}", f"Content-Disposition: {disposition}", *headers, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    """A form of parts."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def _form(*arguments: str, content: bytes | None = None) -> Callable[[], bytes]:
    return lambda: form(part(make.plain() if content is None else content, *arguments))


def _named(filename: str) -> Callable[[], bytes]:
    return _form(f'form-data; name="files"; filename="{filename}"')


REQUESTS: tuple[Request, ...] = (
    # JSON
    Request("json as it should be", lambda: _json(images=[_text()], top=3), (200,)),
    Request("json NaN", _raw('{"images": [IMAGE], "top": NaN}'), (400,), "malformed_json"),
    Request("json Infinity", _raw('{"images": [IMAGE], "top": -Infinity}'), (400,), "malformed_json"),
    Request("json 1e999", _raw('{"images": [IMAGE], "top": 1e999}'), (422,), "invalid_argument"),
    Request("json number of 60,000 digits", _raw('{"images": [IMAGE], "top": %s}' % ("9" * 60_000)), (400,), "malformed_json"),
    Request("json nested 100,000 deep", lambda: b"[" * 100_000, (400,), "malformed_json"),
    Request("json objects nested 20,000 deep", lambda: b'{"a":' * 20_000 + b"1" + b"}" * 20_000, (400, 413)),
    Request("json nested 10 deep", _raw('{"images": [[[[[[[[[[IMAGE]]]]]]]]]]}'), (400,), "malformed_json"),
    Request("json nested 3 deep", _raw('{"images": [[IMAGE]]}'), (422,), "invalid_argument"),
    Request("json of a million empty lists", lambda: b'{"images":[' + b"[]," * 10**6 + b"[]]}", (400,), "malformed_json"),
    Request("json of a million empty strings", lambda: b'{"images":[' + b'"",' * 10**6 + b'""]}', (413,), "too_many_images"),
    Request("json of a million escapes", lambda: b'{"images":["' + b'\\"' * 10**6 + b'"]}', (400,), "malformed_json"),
    Request("json lists hidden behind an odd row of escapes", lambda: b'{"a":"' + b"\\" * 65 + b'","images":[' + b"[]," * 10**5 + b"[]]}", (400,), "malformed_json"),
    Request("json field twice", _raw('{"images": [IMAGE], "images": []}'), (400,), "malformed_json"),
    Request("json unknown field", _raw('{"images": [IMAGE], "__proto__": {"path": "/etc/passwd"}}'), (422,), "invalid_argument"),
    Request("json path instead of an image", lambda: _json(images=["/etc/passwd"]), (400,), "invalid_base64"),
    Request("json address instead of an image", lambda: _json(images=["http://127.0.0.1:22/"]), (400,), "invalid_base64"),
    Request("json base64 without padding", lambda: _json(images=[_text().rstrip("=") + "A"]), (400, 422)),
    Request("json base64 of the other alphabet", lambda: _json(images=["-_-_" + _text()]), (400,), "invalid_base64"),
    Request("json base64 with line breaks", lambda: _json(images=[_text()[:20] + "\n" + _text()[20:]]), (200,)),
    Request("json base64 of blanks", lambda: _json(images=[" \n" * 10**6]), (422,), "empty_image"),
    Request("json base64 in a million pieces", lambda: _json(images=["A " * 10**6]), (422, 415, 400)),
    Request("json data address", lambda: _json(images=["data:image/png;base64," + _text()]), (200,)),
    Request("json data address of another type", lambda: _json(images=["data:image/jpeg;base64," + _text()]), (415,), "type_mismatch"),
    Request("json data address of text", lambda: _json(images=["data:text/html;base64," + _text()]), (415,), "unsupported_media_type"),
    Request("json data address without base64", lambda: _json(images=["data:image/png," + _text()]), (400,), "invalid_base64"),
    Request("json data address with a long type", lambda: _json(images=["data:" + "a;" * 10**6 + "base64," + _text()]), (400,), "invalid_base64"),
    Request("json base64 of nothing", lambda: _json(images=[""]), (422,), "empty_image"),
    Request("json base64 of a lone surrogate", lambda: b'{"images": ["\\ud800"]}', (400,), "invalid_base64"),
    Request("json image is null", lambda: _json(images=[None]), (422,), "invalid_argument"),
    Request("json image is a list of bytes", lambda: _json(images=[list(make.plain())]), (422,), "invalid_argument"),
    Request("json images is text", lambda: _json(images=_text()), (422,), "invalid_argument"),
    Request("json images is null", lambda: _json(images=None), (422,), "invalid_argument"),
    Request("json images is empty", lambda: _json(images=[]), (400,), "no_image"),
    Request("json 65 images", lambda: _json(images=[_text()] * 65), (413,), "too_many_images"),
    Request("json one bad image of three", lambda: _json(images=[_text(), _text(b"bad"), _text()]), (415,), "unsupported_image"),
    Request("json images of too many pixels together", lambda: _json(images=[_text(make.plain(np.zeros((4000, 4000), np.uint8)))] * 4), (413,), "too_many_pixels"),
    Request("json text", lambda: b'"images"', (422,), "invalid_argument"),
    Request("json null", lambda: b"null", (422,), "invalid_argument"),
    Request("json empty", lambda: b"", (400, 422)),
    Request("json cut", lambda: _json(images=[_text()])[:-2], (400,), "malformed_json"),
    Request("json with a tail", lambda: _json(images=[_text()]) + b"{}", (400,), "malformed_json"),
    Request("json with a byte order mark", lambda: b"\xef\xbb\xbf" + _json(images=[_text()]), (400,), "malformed_json"),
    Request("json in UTF-16", lambda: _json(images=[_text()]).decode().encode("utf-16"), (400,), "malformed_json"),
    Request("json that is no UTF-8", lambda: b'{"images": ["\xff\xfe"]}', (400,), "malformed_json"),
    Request("json with a zero byte", lambda: b'{"images": ["\0"]}', (400,), "malformed_json"),
    Request("json comment", _raw('{"images": [IMAGE] /* */}'), (400,), "malformed_json"),
    Request("json top is 0", lambda: _json(images=[_text()], top=0), (422,), "invalid_argument"),
    Request("json top is negative", lambda: _json(images=[_text()], top=-1), (422,), "invalid_argument"),
    Request("json top is text", lambda: _json(images=[_text()], top="5"), (422,), "invalid_argument"),
    Request("json top is true", lambda: _json(images=[_text()], top=True), (422,), "invalid_argument"),
    Request("json top is a half", lambda: _json(images=[_text()], top=1.5), (422,), "invalid_argument"),
    Request("json top is huge", lambda: _json(images=[_text()], top=10**30), (422,), "invalid_argument"),
    Request("json neighbours without end", lambda: _json(images=[_text()], neighbors=10**9), (422,), "invalid_argument"),
    Request("json more neighbours than there are", lambda: _json(images=[_text()], neighbors=10**6), (200, 422)),
    # forms
    Request("form as it should be", _form(), (200,), content_type=FORM),
    Request("form of 10,000 parts", lambda: form(*[part(b"x")] * 10_000), (413,), "too_many_parts", FORM),
    Request("form of 10,000 fields", lambda: form(*[part(b"5", 'form-data; name="top"')] * 10_000), (400, 413), content_type=FORM),
    Request("form of 70 images", lambda: form(*[part(make.plain())] * 70), (413,), "too_many_images", FORM),
    Request("form without a boundary", _form(), (400,), "malformed_multipart", "multipart/form-data"),
    Request("form with another boundary", _form(), (400,), "malformed_multipart", "multipart/form-data; boundary=other"),
    Request("form with a boundary of 300 letters", _form(), (400,), "malformed_multipart", "multipart/form-data; boundary=" + "x" * 300),
    Request("form with an empty boundary", _form(), (400,), "malformed_multipart", 'multipart/form-data; boundary=""'),
    Request("form that does not end", lambda: part(make.plain()), (400,), "malformed_multipart", FORM),
    Request("form of nothing", lambda: b"", (400,), "malformed_multipart", FORM),
    Request("form of its end", lambda: form(), (400,), content_type=FORM),
    Request("form field without a name", _form("form-data"), (400,), "malformed_multipart", FORM),
    Request("form field of another name", _form('form-data; name="path"', content=b"/etc/passwd"), (422,), "invalid_argument", FORM),
    Request("form field not disposed", _form("attachment; name=files"), (400,), "malformed_multipart", FORM),
    Request("form file name is a path", _named("../../../../etc/passwd"), (200,), content_type=FORM),
    Request("form file name is an absolute path", _named("/etc/passwd"), (200,), content_type=FORM),
    Request("form file name is a path of Windows", _named("C:\\\\Windows\\\\system.ini"), (200,), content_type=FORM),
    Request("form file name has a zero byte", _named("a\0.png"), (400,), "malformed_multipart", FORM),
    Request("form file name is Unicode", _named("猫🐈\u202egnp.exe"), (200,), content_type=FORM),
    Request("form file name is a command", _named("$(reboot).png"), (200,), content_type=FORM),
    Request("form file name of 3,000 letters", _named("a" * 3_000), (200,), content_type=FORM),
    Request("form file name of 30,000 letters", _named("a" * 30_000), (400,), "malformed_multipart", FORM),
    Request("form part with 5,000 headers", _form('form-data; name="files"', *["X: y"] * 5_000), (400,), "malformed_multipart", FORM),
    Request("form part with a line that is no header", _form('form-data; name="files"', "what?"), (400,), "malformed_multipart", FORM),
    Request("form part without headers", lambda: f"--{BOUNDARY}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(), (400,), "malformed_multipart", FORM),
    Request("form part in base64", _form('form-data; name="files"', "Content-Transfer-Encoding: base64"), (400,), "malformed_multipart", FORM),
    Request("form part declared as another type", _form('form-data; name="files"', "Content-Type: image/gif"), (415,), "type_mismatch", FORM),
    Request("form part declared as text", _form('form-data; name="files"', "Content-Type: text/html"), (415,), "unsupported_media_type", FORM),
    Request("form part with an empty file", _form(content=b""), (422,), "empty_image", FORM),
    Request("form top is text", lambda: form(part(make.plain()), part(b"five", 'form-data; name="top"')), (422,), "invalid_argument", FORM),
    Request("form top in other digits", lambda: form(part(make.plain()), part("٣".encode(), 'form-data; name="top"')), (422,), "invalid_argument", FORM),
    Request("form top twice", lambda: form(part(make.plain()), *[part(b"3", 'form-data; name="top"')] * 2), (400,), "malformed_multipart", FORM),
    Request("form top of 100 kB", lambda: form(part(make.plain()), part(b"1" * 100_000, 'form-data; name="top"')), (422,), "invalid_argument", FORM),
    Request("form in a form", _form('form-data; name="files"', f"Content-Type: {FORM}"), (415, 400), content_type=FORM),
    # other bodies
    Request("no content type", make.plain, (415,), "unsupported_media_type", ""),
    Request("text", lambda: b"hello", (415,), "unsupported_media_type", "text/plain"),
    Request("form of a web page", lambda: b"images=x", (415,), "unsupported_media_type", "application/x-www-form-urlencoded"),
    Request("pickle", lambda: b"cos\nsystem\n(S'true'\ntR.", (415,), "unsupported_media_type", "application/x-pickle"),
    Request("content type of 4,000 letters", make.plain, (415,), "unsupported_media_type", "x/" + "y" * 4_000),
    Request("compressed body", lambda: gzip.compress(make.plain()), (200,), content_type="image/png", headers={"Content-Encoding": "gzip"}),
    Request("compressed bomb", lambda: gzip.compress(bytes(2**26)), (413,), "body_too_large", headers={"Content-Encoding": "gzip"}),
    Request("brotli body", make.plain, (415,), content_type="image/png", headers={"Content-Encoding": "br"}),
    Request("17 MiB", lambda: bytes(17 * MEBIBYTE), (413,), "body_too_large", "image/png"),
    Request("query top is text", make.plain, (422,), content_type="image/png", path="/v1/classify?top=five"),
    Request("query top is NaN", make.plain, (422,), content_type="image/png", path="/v1/classify?top=NaN"),
    Request("query top is negative", make.plain, (422,), content_type="image/png", path="/v1/classify?top=-1"),
    Request("query of 10,000 letters", make.plain, (200, 400, 414, 422), content_type="image/png", path="/v1/classify?x=" + "a" * 10_000),
    # methods and paths
    *(Request(f"{method} classify", lambda: b"", (405,), "method_not_allowed", "", method) for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE")),
    Request("a method that there is not", lambda: b"", (400, 405), "", "", "BREW"),
    Request("path out of the pictures", lambda: b"", (404, 400), "", "", "GET", "/v1/neighbors/..%2f..%2f..%2fetc%2fpasswd/image"),
    Request("path out of the pictures, plainly", lambda: b"", (404, 400), "", "", "GET", "/v1/neighbors/../../../etc/passwd"),
    Request("path out of the page", lambda: b"", (404, 400), "", "", "GET", "/page/../../../../etc/passwd"),
    Request("path out of the page, coded twice", lambda: b"", (404, 400), "", "", "GET", "/page/%252e%252e%252f%252e%252e%252fetc%252fpasswd"),
    Request("path with a zero byte", lambda: b"", (404, 400), "", "", "GET", "/v1/neighbors/%00/image"),
    Request("path of bytes that are no text", lambda: b"", (404, 400), "", "", "GET", "/v1/neighbors/%ff%fe/image"),
    Request("neighbour of 5,000 letters", lambda: b"", (404, 414, 422), "", "", "GET", "/v1/neighbors/" + "9" * 5_000 + "/image"),
    Request("neighbour -1", lambda: b"", (404, 422), "", "", "GET", "/v1/neighbors/-1/image"),
    Request("no such path", lambda: b"", (404,), "not_found", "", "GET", "/wp-admin/setup.php"),
    Request("reload from a page of another site", lambda: b"", (401, 403), "", "", "POST", "/v1/admin/reload", {"Origin": "https://evil.example"}),
    Request("another host's name", make.plain, (421,), "wrong_host", "image/png", headers={"Host": "evil.example"}),
    Request("6 kB of cookie", make.plain, (200, 431), "", "image/png", headers={"Cookie": "a" * 6_000}),
)  # fmt: skip


@dataclass(frozen=True)
class Connection:
    """What is sent over a bare connection: bytes, and pauses in seconds; then the answer's status must be allowed.

    0 stands for a connection that is closed without an answer. ``closes``: the client sends no more, and says so.
    ``waits``: the answer comes when the server's patience is over.
    """

    name: str
    build: Callable[[], tuple[bytes | float, ...]]
    allowed: tuple[int, ...]
    closes: bool = False
    waits: bool = False


def image_head() -> bytes:
    """The head of a good request whose body is still to come."""
    return _image()


def _head(*lines: str, method: str = "POST", path: str = "/v1/classify", host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


def _image(*lines: str, length: int | None = None) -> bytes:
    size = len(make.plain()) if length is None else length
    return _head("Content-Type: image/png", f"Content-Length: {size}", *lines)


_CHUNKED = ("Content-Type: image/png", "Transfer-Encoding: chunked")


def _chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


CONNECTIONS: tuple[Connection, ...] = (
    Connection("a request as it should be", lambda: (_image(), make.plain()), (200,)),
    Connection("chunks as they should be", lambda: (_head(*_CHUNKED), _chunks(make.plain()[:9], make.plain()[9:])), (200,)),
    Connection("chunks of one byte", lambda: (_head(*_CHUNKED), _chunks(*[bytes([b]) for b in make.plain()])), (200,)),
    # lengths that lie
    Connection("body shorter than its length, then silence", lambda: (_image(length=10**6), make.plain()), (408,), waits=True),
    Connection("body shorter than its length, then closed", lambda: (_image(length=10**6), make.plain()), (0, 400), closes=True),
    Connection("body longer than its length", lambda: (_image(length=50), make.plain()), (400, 422)),
    Connection("no length at all", lambda: (_head("Content-Type: image/png"), make.plain()), (400, 411)),
    Connection("length of a terabyte", lambda: (_image(length=10**12), make.plain()), (413,)),
    Connection("length of a terabyte, to be continued", lambda: (_image("Expect: 100-continue", length=10**12),), (413,)),
    Connection("length of 5,000 digits", lambda: (_head("Content-Type: image/png", "Content-Length: " + "9" * 5_000), b"x"), (400, 413)),
    Connection("negative length", lambda: (_head("Content-Type: image/png", "Content-Length: -1"), b"x"), (400,)),
    Connection("length that is no number", lambda: (_head("Content-Type: image/png", "Content-Length: 0x10"), b"x" * 16), (400,)),
    Connection("two lengths", lambda: (_head("Content-Length: 1", "Content-Length: 2"), b"xx"), (400,)),
    Connection("a length and chunks", lambda: (_head(*_CHUNKED, "Content-Length: 5"), b"0\r\n\r\n"), (400,)),
    Connection("another coding", lambda: (_head("Transfer-Encoding: gzip, chunked"), b"0\r\n\r\n"), (400, 415, 501)),
    Connection("chunks without a size", lambda: (_head(*_CHUNKED), b"\r\nabc\r\n"), (400,)),
    Connection("chunk of a huge size", lambda: (_head(*_CHUNKED), b"ffffffffffffffffff\r\nabc"), (400, 408, 413), waits=True),
    Connection("chunk with an endless extension", lambda: (_head(*_CHUNKED), b"1;" + b"x" * 10**6), (400, 408, 413, 0), waits=True),
    Connection("chunks of 20 MiB", lambda: (_head(*_CHUNKED), _chunks(*[bytes(MEBIBYTE)] * 20)), (413,)),
    Connection("chunks with 10,000 trailers", lambda: (_head(*_CHUNKED), b"0\r\n" + b"X-Y: z\r\n" * 10_000), (400, 408, 413, 431), waits=True),
    # headers
    Connection("10,000 headers", lambda: (_head(*[f"X-{i}: y" for i in range(10_000)], method="GET", path="/healthz"),), (431, 400)),
    Connection("1,000 short headers", lambda: (_head(*["a: b"] * 1_000, method="GET", path="/healthz"),), (200, 400, 431)),
    Connection("header of a megabyte", lambda: (_head("X-Y: " + "z" * 10**6, method="GET", path="/healthz"),), (431, 400)),
    Connection("path of a megabyte", lambda: (_head(method="GET", path="/" + "a" * 10**6),), (431, 414, 400)),
    Connection("header without a colon", lambda: (_head("what", method="GET", path="/healthz"),), (400,)),
    Connection("header with a zero byte", lambda: (_head("X-Y: a\0b", method="GET", path="/healthz"),), (400,)),
    Connection("header that is folded", lambda: (_head("X-Y: a", " b", method="GET", path="/healthz"),), (200, 400)),
    Connection("header with a bare line break", lambda: (_head("X-Y: a\nX-Api-Key: b", method="GET", path="/healthz"),), (200, 400)),
    Connection("header before a blank", lambda: (_head("Content-Length : 5"), b"12345"), (400,)),
    Connection("headers that are no ASCII", lambda: (_head("X-Y: \xe4\xff", method="GET", path="/healthz"),), (200, 400)),
    Connection("no host", lambda: (b"GET /healthz HTTP/1.1\r\n\r\n",), (400, 421)),
    Connection("two hosts", lambda: (_head("Host: evil.example", method="GET", path="/healthz"),), (200, 400, 421)),
    Connection("web socket", lambda: (_head("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA", method="GET", path="/"),), (200, 400, 404)),
    # not HTTP, or hardly
    Connection("nothing, and closed", lambda: (b"",), (0,), closes=True),
    Connection("nothing, and silence", lambda: (b"",), (0, 408), waits=True),
    Connection("noise", lambda: (random.Random(1).randbytes(5_000),), (400, 408, 431, 0), waits=True),
    Connection("zeros", lambda: (bytes(5_000),), (400, 431, 0)),
    Connection("a megabyte of line breaks", lambda: (b"\r\n" * 500_000,), (400, 431, 408, 0), waits=True),
    Connection("HTTP/0.9", lambda: (b"GET /healthz\r\n",), (400, 0, 408), waits=True),
    Connection("HTTP/1.0", lambda: (b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n",), (200,)),
    Connection("HTTP/2", lambda: (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), (400, 404, 405, 421, 505, 0)),
    Connection("HTTP/9.9", lambda: (b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",), (200, 400, 505)),
    Connection("TLS", lambda: (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500),), (400, 431, 0)),
    Connection("CONNECT", lambda: (b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",), (400, 404, 405, 421)),
    Connection("an address of its own in the request line", lambda: (b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",), (200, 400, 404, 421)),
    Connection("an asterisk", lambda: (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",), (200, 400, 404, 405)),
    Connection("60 requests at once", lambda: (_head(method="GET", path="/healthz") * 60,), (200,)),
    # slow
    Connection("headers that stop", lambda: (_image()[:40],), (408, 0), waits=True),
    Connection("headers a byte at a time", lambda: tuple(x for b in _image() for x in (bytes([b]), 0.1)), (408, 0), waits=True),
    Connection("body that never comes", lambda: (_image(),), (408,), waits=True),
    Connection("body a byte at a time", lambda: (_image(), *(x for b in make.plain()[:15] for x in (bytes([b]), 0.1))), (408,), waits=True),
    Connection("chunk a byte at a time", lambda: (_head(*_CHUNKED), *(x for b in _chunks(make.plain())[:15] for x in (bytes([b]), 0.1))), (408,), waits=True),
    Connection("body in the middle of which the client goes", lambda: (_image(), make.plain()[:20]), (0, 400), closes=True),
)  # fmt: skip
