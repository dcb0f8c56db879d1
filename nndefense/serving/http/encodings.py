"""Bodies compressed on their way (RFC 9110, section 8.4): gzip is unpacked within limits, others refused."""

from __future__ import annotations

import zlib

from nndefense.serving.pictures.limits import Limits, Refused, refused

_GZIP = ("gzip", "x-gzip")
_MEMBERS = 64
"""The gzip files that may stand one after the other in a body; a sender that flushes makes one."""


def is_packed(encodings: str) -> bool:
    """Whether a body is compressed, by the header ``Content-Encoding``, empty where it is not there.

    Raises:
        Refused: ``unsupported_media_type`` for anything but gzip, once.
    """
    names = [name for name in map(str.strip, encodings.lower().split(",")) if name not in ("", "identity")]
    if len(names) > 1 or (names and names[0] not in _GZIP):
        error = refused(
            "unsupported_media_type", "of content encodings only gzip is read here, and once: send the body without any"
        )
        # RFC 7694, section 3.
        error.headers["accept-encoding"] = "gzip, identity"
        raise error
    return bool(names)


def unpacked(body: bytes, limits: Limits) -> bytes:
    """A gzip body as it was before; never more than ``limits.max_body_bytes`` of it is made.

    Raises:
        Refused: ``body_too_large``; ``malformed_request`` for what is no gzip, or not all of it.
    """
    found: list[bytes] = []
    left = limits.max_body_bytes
    for _ in range(_MEMBERS):
        # With gzip's header and checksum.
        member = zlib.decompressobj(wbits=31)
        try:
            # One byte more than allowed tells what is too long from what just fits.
            found.append(member.decompress(body, left + 1))
        except zlib.error:
            raise _malformed() from None
        left -= len(found[-1])
        if left < 0:
            raise refused(
                "body_too_large",
                f"unpacked, the body has more than the {limits.max_body_bytes:,} bytes allowed: send fewer images",
            )
        if not member.eof:
            raise _malformed()
        body = member.unused_data
        if not body.strip(b"\0"):
            return b"".join(found)
    raise _malformed()


def _malformed() -> Refused:
    return refused(
        "malformed_request", "the body is declared as gzip but is not, or not all of it: send the whole file"
    )
