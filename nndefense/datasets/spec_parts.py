"""Taking a spec's ``PATH[:SPLIT][SLICE]`` apart."""

from __future__ import annotations

import os
import re

from nndefense.datasets.remote import has_suffix
from nndefense.datasets.store import is_url
from nndefense.errors import DataError

_SLICE = re.compile(r"(?P<body>.*?)(?P<cut>\[[^\[\]]*\])?", re.DOTALL)
_SPLIT_OF_URL = re.compile(r"(?P<head>.*[^:]):(?P<split>[^:/\[\]{}*]+)", re.DOTALL)


def split_slice(text: str) -> tuple[str, str | None]:
    """Cut a slice in brackets from the end of a text."""
    match = _SLICE.fullmatch(text)
    assert match is not None  # the pattern matches any text
    return match["body"], match["cut"]


def locate(kind: str, rest: str, suffix: str | None) -> tuple[str, str | None, str | None]:
    """Return path (or URL, or pattern), split and slice; of a path, the longest reading that exists.

    A URL is taken apart by its letters alone, because asking a server costs time: a bracket at its end is a slice, and
    what stands after its last colon is a split, unless it could be a port.

    Args:
        kind: what the spec begins with, for messages.
        rest: the spec after it.
        suffix: how a file ends, where several can be given as a pattern; None where patterns mean nothing.

    Raises:
        DataError: there is nothing at any of the readings.
    """
    if not rest:
        raise DataError(f"give a path after {kind}: for example {kind}:photos:train")
    body, cut = split_slice(rest)
    if is_url(rest):
        match = _SPLIT_OF_URL.fullmatch(body)
        if match is None or (match["split"].isdigit() and "/" not in match["head"].rpartition("://")[2]):
            return body, None, cut
        return match["head"], match["split"], cut
    # An ending such as .tar leaves no doubt; elsewhere brackets and braces could be read in two ways.
    if suffix and has_suffix(body, (suffix,)) and not os.path.exists(os.path.expanduser(rest)):
        return os.path.expanduser(body), None, cut
    readings = [(rest, None), (body, cut)]
    for text, slice_text in readings:
        # os.path.exists, because Path.exists raises on names that no file can have.
        if os.path.exists(os.path.expanduser(text)):
            return _tidy(text), None, slice_text
    for text, slice_text in readings:
        head, _, split = text.rpartition(":")
        if head and split and os.path.exists(os.path.expanduser(head)):
            return _tidy(head), split, slice_text
    raise DataError(f"there is nothing at {body}: check the path of {kind}:{rest}")


def _tidy(path: str) -> str:
    """As ``str(Path(path).expanduser())``: without ``./`` and double slashes."""
    return os.fspath(os.path.normpath(os.path.expanduser(path))) if ".." not in path else os.path.expanduser(path)
