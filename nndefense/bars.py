"""How far a long job is: a bar on a terminal, and without one a line a minute, on standard error."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

#: Between two lines in a log, in seconds.
MINUTE = 60.0


class _Lines:
    """Standard error for a bar without a terminal: each state is a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _MinuteBar(tqdm):  # type: ignore[misc]
    """Its own clock says when it is shown: a new figure is no reason for a line."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)


def progress_bar(*given: Any, shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm's, with its arguments: by default from the first second on, and as lines where no terminal is.

    Args:
        shown: whether anything is shown.
    """
    if not shown:
        return tqdm(*given, **options | {"disable": True})
    if sys.stderr.isatty():
        return tqdm(*given, **{"delay": 1, "file": sys.stderr} | options)
    # The first line after a minute, too, so that a short job prints none.
    return _MinuteBar(
        *given, **options | {"delay": MINUTE, "mininterval": MINUTE, "maxinterval": MINUTE, "file": _Lines()}
    )
