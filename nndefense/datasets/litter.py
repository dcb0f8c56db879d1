"""What systems leave among people's pictures, and links that lead to where one is already: nobody means either."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Synology, QNAP, Windows, macOS, file systems, Python; compared without case.
_LITTER = re.compile(
    r"@eadir|@tmp|#recycle|#snapshot|@recycle|@recently-snapshot|@__thumb|\$recycle\.bin|recycler|found\.\d{3}|"
    r"system volume information|__macosx|network trash folder|temporary items|thevolumesettingsfolder|lost\+found|"
    r"__pycache__",
    re.IGNORECASE,
)

Place = tuple[int, int]
"""Device and number of a folder, the same by whatever name it is reached."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is a system's own: thumbnails, bins, found fragments."""
    return _LITTER.fullmatch(name) is not None


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: hidden (``.name``), or :func:`is_litter`."""
    return name.startswith(".") or is_litter(name)


def passes_through(path: str) -> bool:
    """Whether a path with forward slashes has a part that :func:`is_passed_over`."""
    return any(is_passed_over(part) for part in path.split("/") if part not in (".", ".."))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself or to where nobody may look is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def place_of(folder: str) -> Place:
    """Which folder it is.

    Raises:
        OSError: it is gone.
    """
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def holders(real: str) -> frozenset[Place]:
    """The folders that a folder lies in, up to the root; ``real`` is its path without links.

    Raises:
        OSError: one of them is gone or cannot be looked at.
    """
    return frozenset(place_of(str(parent)) for parent in Path(real).parents)


def leads_up(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link to the folder that it stands in, or to one above.

    Raises:
        OSError: the folders above cannot be looked at.
    """
    if not entry.is_symlink():
        return False
    folder = os.path.realpath(os.path.dirname(entry.path))
    return place_of(entry.path) in holders(folder) | {place_of(folder)}


def stands_in(real: str, root: str) -> bool:
    """Whether what lies at ``real`` is found by walking ``root``, without this link; both are paths without links."""
    inner = os.path.relpath(real, root)
    return not inner.startswith("..") and not passes_through(inner.replace(os.sep, "/"))
