"""Decoding what strangers send: the right pixels or the right refusal, in bounded time and memory."""

from __future__ import annotations

import base64
import io
import itertools
import re
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hostile
import hostile_files as make
import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nndefense.datasets import load_image
from nndefense.errors import InputError
from nndefense.serving.http.bodies import Part, parse
from nndefense.serving.pictures.containers import read_container
from nndefense.serving.pictures.decode import decode, decode_all, from_base64, inspect
from nndefense.serving.pictures.limits import STATUS, Limits, Refused, refused
from nndefense.serving.pictures.picture import orientation

LIMITS = Limits()
SHAPE = (1, 8, 8)
_STATUS_FILE = Path("/proc/self/status")


@contextmanager
def bounded(*, seconds: float, mebibytes: int) -> Iterator[None]:
    """What stands inside takes so much processor time and memory at most (memory: where the system tells)."""
    measured = _STATUS_FILE.exists()
    if measured:
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
    begun = time.thread_time()
    yield
    assert time.thread_time() - begun < seconds
    if measured:
        assert _peak() - before < mebibytes


def _peak() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS_FILE.read_text())
    assert match
    return int(match[1]) / 1024


def loaded(folder: Path, data: bytes, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """The file as data sets load it."""
    path = folder / "image"
    path.write_bytes(data)
    with warnings.catch_warnings():
        # Pillow tells what it thinks of damaged metadata.
        warnings.simplefilter("ignore", UserWarning)
        return load_image(path, channels=shape[0], size=shape[1:])


# the catalogue


def test_the_catalogue_has_every_case_once() -> None:
    for cases in (hostile.PICTURES, hostile.REQUESTS, hostile.CONNECTIONS):
        assert len({case.name for case in cases}) == len(cases) >= 40
    assert all(case.code in STATUS for case in hostile.PICTURES if case.status != 200)


@pytest.mark.parametrize("case", hostile.PICTURES, ids=lambda case: case.name)
def test_hostile_pictures(case: hostile.Picture, tmp_path: Path) -> None:
    data = case.data
    with bounded(seconds=3, mebibytes=800) if case.large else bounded(seconds=1, mebibytes=40):
        try:
            image = decode(data, LIMITS, SHAPE, media_type=case.media_type)
            found = (200, "")
        except Refused as error:
            found = (error.status, error.code)
    assert found == (case.status, case.code)
    if case.status == 200:
        twin = case.twin() if case.twin is not None else data
        assert torch.equal(image, loaded(tmp_path, twin))


@pytest.mark.parametrize("case", [case for case in hostile.REQUESTS if case.for_parser], ids=lambda case: case.name)
def test_hostile_bodies(case: hostile.Request) -> None:
    body = case.data
    with bounded(seconds=1, mebibytes=40):
        try:
            upload = parse(body, case.content_type or None, LIMITS)
            assert decode_all(upload.images, LIMITS, SHAPE)
            found = (200, "")
        except Refused as error:
            found = (error.status, error.code)
    assert found[0] in case.allowed
    assert not case.code or found[1] == case.code


# the same pixels as data sets have

KINDS = {
    "PNG": (("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), ({}, {"optimize": True}, {"dpi": (72, 72)})),
    "JPEG": (
        ("L", "RGB", "CMYK"),
        ({}, {"progressive": True}, {"subsampling": 2, "quality": 30}, {"comment": b"hello"}, {"dpi": (72, 72)}),
    ),
    "WEBP": (("RGB", "RGBA"), ({}, {"lossless": True}, {"quality": 10})),
    "GIF": (("1", "L", "LA", "P", "RGB", "RGBA"), ({}, {"interlace": 0}, {"comment": "hello"})),
}


def picture_of(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise of a mode."""
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65_536, (height, width), dtype=np.uint16))
    noise = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "CMYK":
        return Image.fromarray(noise, "CMYK")
    if mode == "P":
        return Image.fromarray(noise[..., :3].copy()).quantize(16)
    return Image.fromarray(noise, "RGBA").convert(mode)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pixels_are_those_of_the_data_sets(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    modes, variants = KINDS[kind]
    mode, options = data.draw(st.sampled_from(modes)), dict(data.draw(st.sampled_from(variants)))
    width, height = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    if kind != "GIF" and (turn := data.draw(st.integers(0, 9))):
        options["exif"] = make.exif_of(turn)
    if mode == "P":
        options["transparency"] = data.draw(st.integers(0, 3))
    if data.draw(st.booleans()) and kind in ("PNG", "GIF", "WEBP") and mode in ("L", "RGB", "RGBA"):
        options.update(save_all=True, append_images=[picture_of(mode, width, height, 1)])
    file = make.save(picture_of(mode, width, height, 0), kind, **options)
    shape = (data.draw(st.sampled_from((1, 3))), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    image = decode(file, LIMITS, shape)
    assert image.shape == shape
    assert image.dtype == torch.float32
    assert torch.equal(image, loaded(tmp_path, file, shape))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_shows_the_same_picture(turn: int) -> None:
    """A picture that is stored turned, and says so, is decoded as the upright one."""
    upright = make.grey()
    stored = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[turn]
    expected = decode(make.plain(), LIMITS, SHAPE)
    assert torch.equal(decode(make.save(stored.copy(), "PNG", exif=make.exif_of(turn)), LIMITS, SHAPE), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["H", "L", "h", "l"])
def test_orientation_in_every_integer(order: str, kind: str) -> None:
    number = {"H": 3, "L": 4, "h": 8, "l": 9}[kind]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, 1)
    entry = struct.pack(order + "HHL" + kind, 0x0112, number, 1, 7).ljust(12, b"\0")
    assert orientation(head + entry) == orientation(b"Exif\0\0" + head + entry) == 7
    file = make.png_with(make.chunk(b"eXIf", head + entry + bytes(4)))
    with Image.open(io.BytesIO(file)) as image:
        assert image.getexif()[0x0112] == 7


@given(st.binary(max_size=300), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]))
def test_orientation_of_noise(noise: bytes, head: bytes) -> None:
    assert 1 <= orientation(head + noise, noise) <= 8


# damage

SEEDS = {
    "png": make.plain(),
    "interlaced": make.png_interlaced(),
    "palette": make.save(make.colour().quantize(16), "PNG", transparency=bytes(range(16))),
    "jpeg": make.jpeg_with(exif=make.exif_of(6)),
    "progressive": make.jpeg_with(pixels=make.colour(), progressive=True),
    "gif": make.gif_animated(3),
    "webp": make.save(make.colour(), "WEBP", exif=make.exif_of(6)),
    "lossless": make.riff(make.webp_canvas(8, 8), (b"VP8L", make.webp_pixels())),
}


@pytest.mark.parametrize("name", SEEDS)
@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damage_is_refused_or_makes_a_picture(name: str, data: st.DataObject) -> None:
    """Bytes changed, cut out, put in: never another error, and never a picture that is none."""
    file = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file)))
        change = data.draw(st.sampled_from(("set", "cut", "put", "swap")))
        if change == "set" and place < len(file):
            file[place] = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFE, 0xFF)) | st.integers(0, 255))
        elif change == "cut":
            del file[place : place + data.draw(st.integers(1, 20))]
        elif change == "put":
            file[place:place] = data.draw(st.binary(max_size=20))
        else:
            file[place : place + 4] = file[place : place + 4][::-1]
    limits = Limits(max_pixels=10_000, max_request_pixels=10_000)
    try:
        image = decode(bytes(file), limits, SHAPE)
    except Refused:
        pass
    else:
        assert image.shape == SHAPE
        assert image.min() >= 0
        assert image.max() <= 1


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\x80\0\0\0WEBP"]),
)
@settings(deadline=None)
def test_noise_is_refused(noise: bytes, head: bytes) -> None:
    with pytest.raises(Refused):
        decode(head + noise, LIMITS, SHAPE)


@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "webp", "lossless"])
def test_a_file_cut_anywhere_is_refused(name: str) -> None:
    whole = SEEDS[name] if name != "gif" else make.gif_with()
    # The last two bytes of a JPEG and the last one of a GIF only say that it is over.
    for length in range(len(whole) - {"jpeg": 2, "gif": 1}.get(name, 0)):
        with pytest.raises(Refused):
            decode(whole[:length], LIMITS, SHAPE)


# limits


def blank(width: int, height: int, kind: str = "PNG") -> bytes:
    """An honest picture of one shade."""
    return make.save(Image.new("L", (width, height), 9), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pixels_and_sides_up_to_the_limit(kind: str) -> None:
    limits = Limits(max_pixels=600, max_side=60, max_request_pixels=10_000)
    for width, height in ((30, 20), (60, 10), (10, 60)):
        assert decode(blank(width, height, kind), limits, SHAPE).shape == SHAPE
    for width, height in ((601, 1), (31, 20), (61, 9), (9, 61)):
        with pytest.raises(Refused, match="pixels") as error:
            decode(blank(width, height, kind), limits, SHAPE)
        assert (error.value.status, error.value.code) == (413, "too_many_pixels")


def test_bytes_images_and_pixels_of_a_request() -> None:
    file = blank(10, 10)
    limits = Limits(max_image_bytes=len(file), max_images=3, max_request_pixels=250)
    assert len(decode_all([(file, None)] * 2, limits, SHAPE)) == 2
    for images, code in (
        ([(file + b"x", None)], "image_too_large"),
        ([(file, None)] * 3, "too_many_pixels"),
        ([(file, None)] * 4, "too_many_images"),
    ):
        with pytest.raises(Refused) as error:
            decode_all(images, limits, SHAPE)
        assert error.value.code == code


def test_an_image_at_fault_is_named_by_its_number() -> None:
    with pytest.raises(Refused, match="image 2 of the request") as error:
        decode_all([(make.plain(), None), (b"", None)], LIMITS, SHAPE)
    assert error.value.code == "empty_image"


def test_no_pixel_is_decoded_before_all_headers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.open", lambda *a, **k: pytest.fail("a decoder was called"))
    with pytest.raises(Refused):
        decode_all([(make.plain(), None), (make.plain()[:-5], None)], LIMITS, SHAPE)
    with pytest.raises(Refused):
        decode(make.webp_huge(), LIMITS, SHAPE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_the_clock_ends_a_decoder_half_way(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)
    file = make.save(noise, kind)
    calls = itertools.count()
    assert decode_all([(file, None)], LIMITS, SHAPE, clock=lambda: float(next(calls)) / 1e6)
    looks = next(calls)
    # Some looks are at the header; then there is one for every 4096 bytes.
    assert looks > len(file) / 4096
    late = itertools.count()
    with pytest.raises(Refused) as error:
        decode_all([(file, None)], LIMITS, SHAPE, clock=lambda: 10.0 * (next(late) >= looks - 3))
    assert (error.value.status, error.value.code) == (422, "decode_timeout")


def test_webp_is_not_begun_when_the_time_is_over() -> None:
    late = itertools.count()
    with pytest.raises(Refused) as error:
        decode_all([(blank(9, 9, "WEBP"), None)], LIMITS, SHAPE, clock=lambda: 10.0 * (next(late) > 1))
    assert error.value.code == "decode_timeout"


def test_scans_of_a_jpeg_are_counted() -> None:
    assert inspect(make.jpeg_scans(64, 10), LIMITS).passes == 11
    assert read_container(make.jpeg_scans(64, 63)).passes == 64
    with pytest.raises(Refused, match="scans"):
        read_container(make.jpeg_scans(64, 64))


def png_sixteen_interlaced(side: int) -> bytes:
    """RGBA of 16 bits in seven passes, with the filter that costs most."""
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    packer = zlib.compressobj(1)
    pieces = []
    for x, y, across, down in steps:
        row = b"\4" + b"\1" * (8 * len(range(x, side, across)))
        pieces += [packer.compress(row) for _ in range(y, side, down)]
    return make.png(make.header(side, side, 16, 6, 1), make.chunk(b"IDAT", b"".join(pieces) + packer.flush()))


LARGEST = {
    "png": png_sixteen_interlaced,
    "jpeg": lambda side: make.jpeg_scans(side, 15),
    "webp": lambda side: make.save(Image.new("RGBA", (side, side), (1, 2, 3, 4)), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", ["jpeg", *(pytest.param(n, marks=pytest.mark.slow) for n in ("png", "webp"))])
def test_time_and_memory_at_the_limits(name: str) -> None:
    """The costliest files known to us that the limits let through."""
    side = int(LIMITS.max_pixels**0.5)
    file = LARGEST[name](side)
    assert len(file) <= LIMITS.max_image_bytes
    with bounded(seconds=LIMITS.decode_seconds, mebibytes=800):
        assert decode(file, LIMITS, (3, 224, 224)).shape == (3, 224, 224)


@pytest.mark.parametrize(
    "media_type", [None, "", "image/png", "IMAGE/PNG", "image/png; charset=binary", "application/octet-stream"]
)
def test_a_declared_type_that_fits(media_type: str | None) -> None:
    assert decode(make.plain(), LIMITS, SHAPE, media_type=media_type).shape == SHAPE


@pytest.mark.parametrize("name", ["max_pixels", "decode_seconds", "max_images", "max_body_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_an_image_may_not_be_larger_than_a_body() -> None:
    with pytest.raises(InputError, match="max_image_bytes"):
        Limits(max_body_bytes=100, max_image_bytes=101)


def test_a_rejection_is_never_the_servers_fault() -> None:
    assert all(400 <= status < 500 for status in STATUS.values())
    assert refused("no_image", "send one").status == 400
    with pytest.raises(ValueError, match="503"):
        Refused(503, "busy", "later")


# bodies


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=5), st.integers(1, 100) | st.none())
def test_forms_as_an_ordinary_client_writes_them(contents: list[bytes], top: int | None) -> None:
    request = httpx.Request(
        "POST",
        "http://localhost/",
        files=[("files", (f'bild-ü"{i}.png', content, "image/png")) for i, content in enumerate(contents)],
        data={} if top is None else {"top": str(top)},
    )
    upload = parse(request.read(), request.headers["content-type"], LIMITS)
    assert upload.images == tuple(Part(content, "image/png") for content in contents)
    assert (upload.top, upload.neighbors) == (top, None)


@given(
    st.binary(max_size=300) | st.text(alphabet='{}[]",:\\0 \r\n-xnul', max_size=100).map(str.encode),
    st.sampled_from(["application/json", hostile.FORM, "multipart/form-data; boundary=-", "image/png", "text/x", ""]),
    st.sampled_from([b"", b"--x-x-x\r\n", b'{"images":["']),
)
def test_bodies_of_noise(noise: bytes, content_type: str, head: bytes) -> None:
    try:
        upload = parse(head + noise, content_type, LIMITS)
    except Refused:
        pass
    else:
        assert upload.images


def test_numbers_in_bodies() -> None:
    def json_with(numbers: str) -> tuple[int | None, int | None]:
        upload = parse(b'{"images": ["AAAA"]%s}' % numbers.encode(), "application/json", LIMITS)
        return upload.top, upload.neighbors

    assert json_with("") == (None, None)
    assert json_with(', "top": 3, "neighbors": 0') == (3, 0)
    assert json_with(', "top": 3.0, "neighbors": null') == (3, None)


@given(st.binary(max_size=50))
def test_base64_there_and_back(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    assert from_base64(plain, LIMITS) == (data, None)
    # In lines of 76 or with CRLF, and as a data URL, as browsers and mail write it.
    for lines in (base64.encodebytes(data).decode(), "\r\n ".join([plain[:7], plain[7:], ""])):
        assert from_base64(lines, LIMITS) == (data, None)
        assert from_base64("data:;base64," + lines, LIMITS) == (data, None)
        assert from_base64("DATA:image/png;charset=x;BASE64," + lines, LIMITS) == (data, "image/png;charset=x")


def test_base64_is_measured_before_it_is_decoded() -> None:
    limits = Limits(max_image_bytes=6)
    assert from_base64("AAAAAAAA", limits) == (bytes(6), None)
    assert from_base64("data:image/png;base64,\nAAAA\n  \n  \nAAAA\n", limits)[0] == bytes(6)
    with pytest.raises(Refused) as error:
        from_base64("AAAA" * 3, limits)
    assert error.value.code == "image_too_large"
