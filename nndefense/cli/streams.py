"""What is printed: in the encoding of whoever reads it, and with nothing in names that a terminal would obey."""

from __future__ import annotations

import io
import re
import sys
import warnings
from json import dumps
from typing import Any

from nndefense.files import escaped_json

# Controls (ESC begins what a terminal obeys), marks that turn the direction of a line, and halves of characters.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LAYOUT = re.compile("[^\n\t]")


def prepare() -> None:
    """Let standard output and standard error take every text: what their encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Neither the file nor the line of the library that warns says anything to whoever runs a command.
    warnings.formatwarning = lambda message, *about, **more: f"nndefense: warning: {one_line(message)}\n"


def visible(text: object) -> str:
    """A text of several lines in which names may stand: what a terminal would obey is written as an escape.

    A byte of a file name that is no UTF-8 is shown as such, ``\\xe9``.
    """
    return _OBEYED.sub(lambda found: _escape(found[0]) if _LAYOUT.match(found[0]) else found[0], str(text))


def one_line(text: object) -> str:
    """A name, or another text that must stay on its line: as :func:`visible`, and line breaks are escaped, too."""
    return _OBEYED.sub(lambda found: _escape(found[0]), str(text))


def json_of(value: Any) -> str:
    """JSON for standard output, whose bytes are UTF-8 (RFC 8259, section 8.1) whatever its encoding is."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")
    return escaped_json(dumps(value, indent=2, ensure_ascii=not utf8))


def _escape(character: str) -> str:
    # Python holds the byte 0xNN of a file name that is no UTF-8 as U+DCNN (PEP 383).
    number = ord(character)
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character) or (
        f"\\x{number & 0xFF:02x}" if number < 0x100 or 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"
    )
