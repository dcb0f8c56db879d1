"""Which files are pictures: by how their names end, and where that says nothing, by how they begin."""

from __future__ import annotations

import re

from nndefense.datasets.store import Store
from nndefense.errors import DataError, warn

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".apng", ".dib"),
)
UNREAD = (
    *(".heic", ".heif", ".hif", ".heics", ".avif", ".avifs", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".svg"),
    *(".psd", ".xcf", ".ico", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".eps", ".cr2", ".cr3", ".nef"),
    *(".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"),
)
"""How pictures end that no decoder of the library's reads: whoever opens a data set is told of them."""

# "photo", "photo.2", "photo.jpg_large": an ending that is none of a kind of file.
_ENDING = re.compile(r".+\.[A-Za-z][A-Za-z0-9]{0,7}")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_UNREAD_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_SHOWN = 3


class Unread:
    """Pictures that are left out because no decoder reads them: how many, and the first names."""

    def __init__(self) -> None:
        self.count, self._first = 0, list[str]()

    def add(self, path: str) -> None:
        """Count one."""
        self.count += 1
        if len(self._first) < _SHOWN:
            self._first.append(path.rpartition("/")[2])

    def tell(self, place: str) -> None:
        """Warn of them; say nothing where there are none."""
        if self.count:
            more = f" and {self.count - _SHOWN:,} more" if self.count > _SHOWN else ""
            count = f"{self.count:,} pictures" if self.count > 1 else "a picture"
            warn(
                f"{place}: left out {count} of a format that is not read ({', '.join(self._first)}{more}): convert to "
                "JPEG or PNG"
            )


def is_picture(store: Store, path: str, unread: Unread) -> bool:
    """Whether a file is a picture of a kind that is read; where it is one of another kind, add it to ``unread``."""
    name = path.rpartition("/")[2]
    lower = name.lower()
    if lower.endswith(SUFFIXES):
        return True
    head = b"" if _ENDING.fullmatch(name) else _head(store, path)
    if lower.endswith(UNREAD) or (head[4:8] == b"ftyp" and head[8:12] in _UNREAD_BRANDS):
        unread.add(path)
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return head.startswith(_BEGINNINGS) or webp or (head[:2] == b"BM" and head[6:10] == bytes(4))


def _head(store: Store, path: str) -> bytes:
    try:
        return store.read(path, 0, 16)
    except (OSError, DataError):
        return b""
