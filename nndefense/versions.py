"""The versions of the libraries that numbers and files depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata

_PACKAGES = ("nndefense", "torch", "torchvision", "numpy", "scipy", "h5py", "faiss-gpu", "faiss-cpu", "safetensors")


def library_versions() -> dict[str, str]:
    """The version of Python and of each library that is installed, for a manifest or a results file."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
