"""The errors of the project: each says in one sentence what is wrong and what to do about it.

The command line prints the message alone and ends with the class's ``exit_code``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from dataclasses import fields
from typing import Any

# The library, and what it is decorated with.
_INSIDE = ("nndefense", "index_build", "contextlib", "functools", "torch")


class NNDefenseError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class InputError(NNDefenseError, ValueError):
    """An argument or a batch of images that cannot be used as it is."""

    exit_code = 2


class DataError(NNDefenseError):
    """A data set that is missing, empty, corrupt or of the wrong form."""

    exit_code = 3


class ModelError(NNDefenseError):
    """A classifier that cannot be found, read or used."""

    exit_code = 4


class DatabaseError(NNDefenseError):
    """An image database that is missing, incomplete, damaged or made for another classifier."""

    exit_code = 5


def one_line(error: BaseException) -> str:
    """What an error says, on one line and not too long; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn of something at the line of the user's that called the library, however deep inside it this is."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, category, stacklevel=depth)


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raise :class:`InputError` unless the setting called ``name`` has one of the known values."""
    if value not in known:
        raise InputError(f"{name} is {value!r}, but must be one of {', '.join(known)}")


def plain(value: Any) -> Any:
    """A number of NumPy's, or an array or tensor of no axis, as Python's number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def make_plain(record: Any) -> None:
    """Give the numbers among a dataclass's fields as Python's, a frozen one's too: records are written as JSON."""
    for field in fields(record):
        object.__setattr__(record, field.name, plain(getattr(record, field.name)))
