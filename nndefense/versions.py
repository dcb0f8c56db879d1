"""The versions of the libraries, and of the project's own code, that numbers and files depend on."""

from __future__ import annotations

import functools
import hashlib
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

_PACKAGES = ("nndefense", "torch", "torchvision", "numpy", "scipy", "h5py", "faiss-gpu", "faiss-cpu", "safetensors")


def library_versions() -> dict[str, str]:
    """The version of Python and of each library that is installed, for a manifest or a results file."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def code_version(*rooms: str) -> str:
    """The sha256 of the library's code in some rooms: what it made is made again once it has changed.

    Args:
        rooms: modules and packages of ``nndefense``, such as ``attacks``.
    """
    home, digest = Path(__file__).parent, hashlib.sha256()
    for room in sorted(rooms):
        for path in (home / f"{room}.py", *sorted((home / room).rglob("*.py"))):
            if path.is_file():
                digest.update(f"{path.relative_to(home).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
