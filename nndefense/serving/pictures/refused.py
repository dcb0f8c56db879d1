"""The error for a request that is refused: an HTTP status, a word that programs can test, a sentence for people."""

from __future__ import annotations

from nndefense.errors import InputError

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
