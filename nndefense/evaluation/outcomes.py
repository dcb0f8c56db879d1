"""Per-image outcomes in a results file: one bit an image, as hexadecimal digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nndefense.errors import InputError

Bits = NDArray[np.bool_]


def to_hex(right: ArrayLike) -> str:
    """Pack N booleans, first image first, into ``ceil(N / 8)`` bytes as hexadecimal digits; spare bits are 0."""
    return np.packbits(np.asarray(right, dtype=np.bool_)).tobytes().hex()


def from_hex(text: str, n: int) -> Bits:
    """The N booleans of :func:`to_hex`.

    Raises:
        InputError: the text does not hold N bits.
    """
    try:
        packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    except ValueError:
        raise InputError("outcomes must be hexadecimal digits: evaluate again") from None
    if len(packed) != -(-n // 8):
        raise InputError(f"outcomes of {n} images need {-(-n // 8)} bytes, but there are {len(packed)}: evaluate again")
    found: Bits = np.unpackbits(packed, count=n).astype(np.bool_)
    return found
