"""The body of a request, taken apart: one image as it is, a form (multipart), or JSON with base64.

Everything is done on the bytes of a whole body (whose length is limited while it arrives), with a bound on the number
of steps: what is not like a correct request is refused before anything large is made of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from nndefense.serving.http.schema import MOST, NUMBERS, ClassifyJson, whole_number
from nndefense.serving.pictures.decode import from_base64, invalid_base64
from nndefense.serving.pictures.limits import MEDIA_TYPES, Limits, Refused, refused

FIELD = "files"
"""The name of the fields of a form that hold images."""

# RFC 2046, section 5.1.1.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_PARAMETER = re.compile(r';\s*([!#$%&*+.^_`|~0-9A-Za-z-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')
# What stands outside the strings of a JSON body: 64 KiB are plenty for commas and indentation.
_SKELETON_BYTES = 2**16


class Part(NamedTuple):
    """An image of a request: its bytes, and the content type that the client declared for it, if any."""

    data: bytes
    media_type: str | None


@dataclass(frozen=True)
class Upload:
    """What a request asks for."""

    images: tuple[Part, ...]
    """At least one."""
    top: int | None
    """How many classes; None where the body does not say."""
    neighbors: int | None
    """How many neighbours; None where the body does not say."""


def parse(body: bytes, content_type: str | None, limits: Limits) -> Upload:
    """Take the body of a request apart.

    Args:
        body: all of it.
        content_type: the header's value: ``multipart/form-data`` with fields ``files`` (and ``top``, ``neighbors``);
            ``application/json`` with ``{"images": [base64, ...], "top": 5, "neighbors": 10}``; or the type of the image
            that the body is (``application/octet-stream`` where it is not known).
        limits: how much may be in it.

    Raises:
        Refused: the body is of another type, malformed, without an image, or with too much in it.
    """
    if len(body) > limits.max_body_bytes:
        raise refused(
            "body_too_large", f"the body has more than the {limits.max_body_bytes:,} bytes allowed: send fewer images"
        )
    kind = (content_type or "").split(";")[0].strip().lower()
    if kind == "application/json":
        return _parse_json(body, limits)
    if kind == "multipart/form-data":
        return _parse_form(body, content_type or "", limits)
    if kind.startswith("image/") or kind == "application/octet-stream":
        if not body:
            raise refused("no_image", "the body is empty: send an image")
        return Upload((Part(body, content_type),), None, None)
    raise refused(
        "unsupported_media_type",
        "the content type must be multipart/form-data, application/json or that of an image: "
        + ", ".join([*MEDIA_TYPES, "application/octet-stream"]),
    )


def _no_image() -> Refused:
    return refused("no_image", "the request has no image: send at least one")


def _too_many(limits: Limits) -> Refused:
    return refused("too_many_images", f"send at most {limits.max_images} images in one request")


def _no_number(name: str) -> Refused:
    return refused("invalid_argument", f"{name} must be a whole number, from {NUMBERS[name][0]} to {MOST:,}")


# JSON


def _bad_json(why: str) -> Refused:
    return refused("malformed_json", f"the body is no JSON as it is expected, {why}")


def read_json(body: bytes, limits: Limits) -> Any:
    """The value of a JSON body, whose fields are those of an image or few more.

    Raises:
        Refused: it is no JSON, or there is more or deeper nesting outside its strings than such a body has.
    """
    _check_skeleton(body, limits)
    try:
        return json.loads(body.decode(), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _bad_json("because its syntax is wrong") from None


def _parse_json(body: bytes, limits: Limits) -> Upload:
    value = read_json(body, limits)
    try:
        wanted = ClassifyJson.model_validate(value)
    except ValidationError as error:
        raise _invalid_json(error) from None
    if len(wanted.images) > limits.max_images:
        raise _too_many(limits)
    images = tuple(Part(*from_base64(image, limits)) for image in wanted.images)
    return Upload(images, wanted.top, wanted.neighbors)


def _invalid_json(error: ValidationError) -> Refused:
    """What the schema says of a body, in our words; of several faults the one that hides the others comes first."""
    faults = {fault["type"]: fault["loc"] for fault in error.errors(include_url=False, include_input=False)}
    if any(len(place) < 2 and place[:1] in ((), ("images",)) for kind, place in faults.items() if kind != "too_short"):
        return refused("invalid_argument", 'the JSON body must be an object with a list "images" of base64 strings')
    if "extra_forbidden" in faults:
        return refused("invalid_argument", 'the JSON body has fields besides "images", "top" and "neighbors"')
    names = [str(place[0]) for place in faults.values()]
    if "too_short" in faults:
        return _no_image()
    if "string_unicode" in faults:
        return invalid_base64()
    if "images" in names:
        return refused("invalid_argument", "every image must be a string of base64")
    return _no_number(names[0])


def _check_skeleton(body: bytes, limits: Limits) -> None:
    """Refuse a body with more outside its strings, or deeper, than a correct one has, before it becomes objects.

    Sixteen megabytes of ``[],[],[]`` would become half a gigabyte of lists.
    """
    outside, place = [], 0
    for _ in range(limits.max_images + 64):
        begin = body.find(b'"', place)
        if begin < 0:
            outside.append(body[place:])
            break
        outside.append(body[place:begin])
        end = _end_of_string(body, begin + 1)
        place = end + 1
    else:
        raise _too_many(limits)
    if sum(map(len, outside)) > _SKELETON_BYTES:
        raise _bad_json("because there is too much in it besides the images")
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", b"".join(outside)):
        depth += 1 if bracket in b"[{" else -1
        if depth > limits.max_json_depth:
            raise _bad_json(f"because it is nested deeper than {limits.max_json_depth}")


def _end_of_string(body: bytes, place: int) -> int:
    for _ in range(64):
        end = body.find(b'"', place)
        if end < 0:
            raise _bad_json("because a string does not end")
        # Before ``place`` stands a quotation mark, so the run of escapes before this one lies in between.
        text = body[place:end]
        if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:
            return end
        place = end + 1
    raise _bad_json("because a string has too many quotation marks in it")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _bad_json("because a field stands in it twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _bad_json("because NaN and Infinity are no JSON")


# multipart/form-data: RFC 7578


def _bad_form(why: str) -> Refused:
    return refused("malformed_multipart", f"the form is malformed: {why}")


def _parse_form(body: bytes, content_type: str, limits: Limits) -> Upload:
    boundary = _parameters(content_type).get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise _bad_form("the content type must name its boundary, of 1 to 70 characters")
    images: list[Part] = []
    numbers: dict[str, int] = {}
    for part in _parts(body, boundary.encode("ascii"), limits):
        head, gap, content = part.partition(b"\r\n\r\n")
        if len(head) > limits.max_part_header_bytes:
            raise _bad_form(f"the headers of a part have more than {limits.max_part_header_bytes:,} bytes")
        if not gap:
            raise _bad_form("a part has no end of its headers")
        name, media_type = _headers(head)
        if name == FIELD:
            images.append(Part(content, media_type))
            if len(images) > limits.max_images:
                raise _too_many(limits)
        elif name in NUMBERS:
            if name in numbers:
                raise _bad_form(f"the field {name} stands in it twice")
            number = whole_number(name, content.decode("latin-1"))
            if number is None:
                raise _no_number(name)
            numbers[name] = number
        else:
            raise refused("invalid_argument", f"the form has fields besides {FIELD}, top and neighbors")
    if not images:
        raise _no_image()
    return Upload(tuple(images), numbers.get("top"), numbers.get("neighbors"))


def _parts(body: bytes, boundary: bytes, limits: Limits) -> list[bytes]:
    """The content of the parts, headers included, without the line that begins each."""
    delimiter = b"\r\n--" + boundary
    if body.startswith(delimiter[2:]):
        place = len(delimiter) - 2
    elif body.startswith(delimiter):
        place = len(delimiter)
    else:
        raise _bad_form("it does not begin with its boundary")
    parts: list[bytes] = []
    while not body.startswith(b"--", place):
        if len(parts) >= limits.max_parts:
            raise refused("too_many_parts", f"the form has more than the {limits.max_parts} parts allowed")
        if not body.startswith(b"\r\n", place):
            raise _bad_form("a line that begins with the boundary goes on after it")
        # A part without headers begins with an empty line, which the next search must not miss.
        end = body.find(delimiter, place)
        if end < 0:
            raise _bad_form("its last boundary is missing")
        parts.append(body[place + 2 : end])
        place = end + len(delimiter)
    return parts


def _headers(head: bytes) -> tuple[str, str | None]:
    """The field's name and the declared content type, if any."""
    name: str | None = None
    media_type: str | None = None
    for line in head.split(b"\r\n"):
        header, colon, value = line.decode("latin-1").partition(":")
        header = header.strip().lower()
        if not colon or "\0" in line.decode("latin-1"):
            raise _bad_form("a part has a line that is no header")
        if header == "content-disposition":
            if name is not None or not value.strip().lower().startswith("form-data"):
                raise _bad_form("a part is not disposed as form-data, once")
            name = _parameters(value).get("name")
            if name is None:
                raise _bad_form("a part has no name")
        elif header == "content-type":
            if media_type is not None:
                raise _bad_form("a part has two content types")
            media_type = value.strip()
        elif header == "content-transfer-encoding" and value.strip().lower() not in ("binary", "8bit", "7bit"):
            raise _bad_form("the content of a part must be sent as it is, without another encoding")
    if name is None:
        raise _bad_form("a part has no name")
    return name, media_type


def _parameters(value: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, quoted, plain in _PARAMETER.findall(value):
        # The first one counts, as a filter in front of the server might see it.
        found.setdefault(key.lower(), re.sub(r"\\(.)", r"\1", quoted) if quoted else plain)
    return found
